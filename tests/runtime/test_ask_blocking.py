# SPDX-License-Identifier: Apache-2.0
"""What a client outside of an actor uses: a request, its reply, and what may come instead."""

from __future__ import annotations

import errno
import os
import socket
import threading
from collections.abc import Callable, Iterator

import pytest

from pvbus.actors.runtime import wire
from pvbus.actors.runtime.asking import ask_blocking
from pvbus.actors.runtime.inbox import PeerGone
from pvbus.actors.runtime.wire import Done, Failure, Message, WireError


class BlockingCall(Message, frozen=True, kw_only=True):
    data: bytes = b""


Server = Callable[[Callable[[socket.socket, wire.Frame], None]], socket.socket]


@pytest.fixture
def server() -> Iterator[Server]:
    sockets: list[socket.socket] = []
    threads: list[threading.Thread] = []

    def start(answer: Callable[[socket.socket, wire.Frame], None]) -> socket.socket:
        ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)

        def serve() -> None:
            with theirs:
                data, fds = wire.recv_frame(theirs)
                wire.close_fds(fds)
                if data:
                    answer(theirs, wire.decode(data))

        threads.append(threading.Thread(target=serve))
        threads[-1].start()
        sockets.append(ours)
        return ours

    yield start
    for sock in sockets:
        sock.close()
    for thread in threads:
        thread.join(5)


def test_the_reply_and_its_descriptors_come_back(server: Server) -> None:
    def answer(sock: socket.socket, frame: wire.Frame) -> None:
        wire.send_frame(
            sock, wire.encode(Done(value=1), frame.request - 1, reply=True)
        )  # one that came too late
        wire.send_frame(sock, wire.encode(BlockingCall()))  # a tell nobody asked for
        wire.send_frame(sock, wire.encode(BlockingCall(data=b"x"), frame.request, reply=True), [0])

    reply, fds = ask_blocking(server(answer), BlockingCall(), fds=[1])
    assert reply == BlockingCall(data=b"x")
    assert len(fds) == 1
    os.close(fds[0])


def test_a_failure_is_an_oserror_of_its_errno(server: Server) -> None:
    def answer(sock: socket.socket, frame: wire.Frame) -> None:
        failure = Failure(errno=errno.ENOENT, text="no such port")
        wire.send_frame(sock, wire.encode(failure, frame.request, reply=True))

    with pytest.raises(FileNotFoundError, match="no such port"):
        ask_blocking(server(answer), BlockingCall())


def test_an_epipe_that_the_peer_reports_is_not_its_end(server: Server) -> None:
    def answer(sock: socket.socket, frame: wire.Frame) -> None:
        wire.send_frame(sock, wire.encode(Failure(errno=errno.EPIPE), frame.request, reply=True))

    with pytest.raises(BrokenPipeError) as caught:
        ask_blocking(server(answer), BlockingCall())
    assert not isinstance(caught.value, PeerGone)


def test_a_peer_that_ends_with_the_call_unanswered_is_gone(server: Server) -> None:
    def answer(sock: socket.socket, frame: wire.Frame) -> None:
        wire.send_frame(sock, wire.encode(Failure(errno=errno.ESHUTDOWN), frame.request, reply=True))

    with pytest.raises(PeerGone):
        ask_blocking(server(answer), BlockingCall())


def test_a_complaint_about_the_frame_is_raised_too(server: Server) -> None:
    def answer(sock: socket.socket, _frame: wire.Frame) -> None:
        wire.send_frame(sock, wire.encode(Failure(errno=errno.EBADMSG)))

    with pytest.raises(OSError) as caught:
        ask_blocking(server(answer), BlockingCall())
    assert caught.value.errno == errno.EBADMSG


def test_a_peer_that_dies_in_mid_call_is_peer_gone(server: Server) -> None:
    sock = server(lambda _sock, _frame: None)
    with pytest.raises(PeerGone):
        ask_blocking(sock, BlockingCall())
    with pytest.raises(PeerGone):
        ask_blocking(sock, BlockingCall())


def test_no_reply_is_a_time_out() -> None:
    ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    with pytest.raises(TimeoutError, match="no answer to BlockingCall"):
        ask_blocking(ours, BlockingCall(), timeout_s=0.0)
    for sock in (ours, theirs):
        sock.close()


def test_a_peer_that_never_reads_is_a_time_out() -> None:
    ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    with pytest.raises(TimeoutError):
        for _ in range(100):
            ask_blocking(ours, BlockingCall(data=bytes(60_000)), timeout_s=0.0)
    for sock in (ours, theirs):
        sock.close()


def test_a_foreign_reply_is_a_wire_error(server: Server) -> None:
    with pytest.raises(WireError):
        ask_blocking(server(lambda sock, _frame: sock.sendall(b"\xc1")), BlockingCall())
