# SPDX-License-Identifier: Apache-2.0
"""Ask and wait: for processes that have no inbox (users, tools, tests). One socket, one question at a time."""

from __future__ import annotations

import errno
import itertools
import select
import socket
import time
from typing import TYPE_CHECKING

from pvbus.actors.runtime import wire
from pvbus.actors.runtime.peer import PeerGone
from pvbus.actors.runtime.wire import DescriptorsLostError, Failure, Message, WireError

if TYPE_CHECKING:
    from collections.abc import Sequence

ATTACH_REQUEST = 1
"""The request number of the first Attach on a file's connection: the supervisor has sent it for who opens."""
_requests = itertools.count(ATTACH_REQUEST + 1)


def ask_blocking(
    sock: socket.socket, message: Message, fds: Sequence[int] = (), timeout_s: float = 5.0
) -> tuple[Message, list[int]]:
    """Send a request on a SEQPACKET socket and wait for its reply: for clients, which have no loop.

    One caller at a time a socket. TimeoutError; PeerGone; a Failure is raised as OSError(errno, text), EMFILE
    if this process has no descriptor left for those of the reply.
    Replies to earlier calls that timed out are dropped.
    """
    request = next(_requests)
    wire.check_fds(message, len(fds))
    data = wire.encode(message, request)
    deadline_s = time.monotonic() + timeout_s
    try:
        try:
            while not _try_send(sock, data, fds):
                _wait(sock, select.POLLOUT, deadline_s, message)
        except BrokenPipeError:
            why = _try_receive(sock, request)  # why it has hung up, if it said so
            if why is None:
                raise
            answer = why
        else:
            answer = _await(sock, request, deadline_s, message)
    except (BrokenPipeError, ConnectionResetError):
        raise PeerGone(type(message).__name__) from None
    return _not_failed(answer)


def await_blocking(sock: socket.socket, message: Message, request: int, timeout_s: float) -> tuple[Message, list[int]]:
    """Wait for the reply to a request that somebody else has sent on this socket; like `ask_blocking` otherwise."""
    try:
        answer = _await(sock, request, time.monotonic() + timeout_s, message)
    except (BrokenPipeError, ConnectionResetError):
        raise PeerGone(type(message).__name__) from None
    return _not_failed(answer)


def _not_failed(answer: tuple[Message, list[int]]) -> tuple[Message, list[int]]:
    """Raise a Failure; where nothing else is caught: an EPIPE that the other side reports is not the other side's end.

    ESHUTDOWN is: what every actor says that ends with calls unanswered.
    """
    if not isinstance(answer[0], Failure):
        return answer
    if answer[0].errno == errno.ESHUTDOWN:
        raise PeerGone(answer[0].text) from None
    raise answer[0].as_oserror()


def _await(sock: socket.socket, request: int, deadline_s: float, message: Message) -> tuple[Message, list[int]]:
    while True:
        _wait(sock, select.POLLIN, deadline_s, message)
        answer = _try_receive(sock, request)
        if answer is not None:
            return answer


def _wait(sock: socket.socket, events: int, deadline_s: float, message: Message) -> None:
    poller = select.poll()
    poller.register(sock, events)
    left_ms = max(0.0, deadline_s - time.monotonic()) * 1000
    if not poller.poll(left_ms):
        raise TimeoutError(errno.ETIMEDOUT, f"no answer to {type(message).__name__}")


def _try_send(sock: socket.socket, data: bytes, fds: Sequence[int]) -> bool:
    try:
        wire.send_frame(sock, data, fds, socket.MSG_DONTWAIT)
    except BlockingIOError:
        return False
    return True


def _try_receive(sock: socket.socket, request: int) -> tuple[Message, list[int]] | None:
    try:
        data, fds = wire.recv_frame(sock, socket.MSG_DONTWAIT)
    except BlockingIOError:
        return None
    except DescriptorsLostError as error:
        if not error.reply or error.request != request:
            return None
        raise OSError(error.number, str(error)) from None
    if not data:
        raise BrokenPipeError
    try:
        frame = wire.decode(data)
    except WireError:
        wire.close_fds(fds)
        raise
    ours = frame.reply and frame.request == request
    complaint = not frame.reply and frame.request == 0 and isinstance(frame.message, Failure)
    if not ours and not complaint:
        wire.close_fds(fds)
        return None
    return frame.message, fds
