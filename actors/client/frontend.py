# SPDX-License-Identifier: Apache-2.0
"""An open event-channel file for a program that holds many and must never wait: a front end with an inbox.

`open_file` opens one on behalf of another process; `FrontendFile` is it. What shared memory answers is answered at once, by the
same native calls as the client's own file (evtchn.py); ioctls and the close are messages with a continuation. Nothing blocks but
a push into a submission ring that is full. One thread, no forks: who forks makes its files afterwards.
"""

from __future__ import annotations

import errno
import os
import select
import socket
import sys
from typing import TYPE_CHECKING

from pvbus.actors.client.evtchn import CALL_TIMEOUT_S, IOCTL_RESET
from pvbus.actors.runtime import messages as m
from pvbus.actors.runtime.asking import ATTACH_REQUEST
from pvbus.actors.runtime.wire import Done, Failure, Message, close_fds
from pvbus.shm.layout import MAGIC_FILE, MAGIC_PUBLIC, MAGIC_SUBMISSION, FilePage, PublicPage, SubmissionRing
from pvbus.shm.memory import Context, Memory, UserFile
from pvbus.shm.segment import check

if TYPE_CHECKING:
    from collections.abc import Callable

    from pvbus.actors.runtime.inbox import Inbox
    from pvbus.actors.runtime.peer import Peer

READABLE = select.POLLIN | select.POLLRDNORM
MASK_ALL = READABLE | select.POLLOUT | select.POLLWRNORM


def open_file(
    inbox: Inbox,
    machine: Peer,
    message: m.OpenEvtchn,
    then: Callable[[FrontendFile], None],
    failed: Callable[[int], None],
) -> None:
    """Ask the machine, a connection to its supervisor, for an open file; call `then` with it, or `failed` with an errno."""

    def opened(reply: Message, fds: list[int]) -> None:
        if not isinstance(reply, m.Opened) or len(fds) != 4:
            close_fds(fds)
            failed(_number_of(reply, machine))
            return
        page, public, connection, door = fds
        peer = inbox.add_peer(socket.socket(fileno=connection), f"file {reply.slot}")

        def attached(answer: Message, ring_fds: list[int]) -> None:
            number = errno.EPROTO
            if isinstance(answer, m.Attached) and len(ring_fds) == 2:
                try:
                    file = FrontendFile(inbox, peer, reply, (page, public, door, *ring_fds))
                except OSError as error:
                    number = error.errno or errno.EIO
                else:
                    then(file)
                    return
            elif isinstance(answer, Failure):
                number = _number_of(answer, peer)
            close_fds([page, public, door, *ring_fds])
            peer.close()
            failed(number)

        peer.expect(ATTACH_REQUEST, attached, CALL_TIMEOUT_S)

    machine.ask(message, opened, CALL_TIMEOUT_S)


def _nothing() -> None:
    """Do nothing."""


def _number_of(reply: Message, peer: Peer) -> int:
    """Give the errno of an answer that is none; EIO for a process that has died."""
    if not isinstance(reply, Failure):
        return errno.EPROTO
    gone = peer.closed or peer.hung_up or reply.errno == errno.ESHUTDOWN
    return errno.EIO if gone and reply.errno in (errno.EPIPE, errno.ESHUTDOWN) else reply.errno


class FrontendFile:
    """One open file. `read`, `write` and `notify` are the native calls; they never wait, whatever the descriptor's mode was."""

    def __init__(self, inbox: Inbox, peer: Peer, opened: m.Opened, fds: tuple[int, ...]) -> None:
        page, public, self.door, ring, self.kick = fds
        self._inbox = inbox
        self._peer = peer
        self.slot = opened.slot
        self.dead = False
        self.closed = False
        self.on_ready: Callable[[], None] = _nothing
        """Called whenever entries may have come, and when the file has died: it may be a false alarm."""
        pages = Memory(page, FilePage.BYTES), Memory(ring, SubmissionRing.BYTES), Memory(public, PublicPage.BYTES, False)
        check(pages[0], MAGIC_FILE, "the file's page")
        check(pages[1], MAGIC_SUBMISSION, "the submission ring")
        check(pages[2], MAGIC_PUBLIC, "the public page")
        self._page = pages[0]
        os.set_blocking(self.door, False)
        self._context = Context(*pages, self.door, self.kick, 0, opened.ports_max)
        native = UserFile(self._context, True, True)  # the access mode is looked at by who holds the descriptor
        self.read, self.write, self.notify, self._poll = native.read, native.write, native.notify, native.poll
        # Edges: a byte lies in the door for as long as there are entries, and the loop has nothing to do with it meanwhile.
        inbox.add_fd(self.door, select.EPOLLIN | select.EPOLLRDHUP | select.EPOLLET, self._door)
        close_fds([page, public, ring])

    def mask(self) -> int:
        """Give what poll shows; the door is down after an empty answer, so that `on_ready` is called for what comes."""
        if self.dead:
            return select.POLLERR | select.POLLHUP
        mask = self._poll(MASK_ALL)
        if mask & (READABLE | select.POLLERR):
            return mask
        self._context.drain_door()
        return self._poll(MASK_ALL)

    def ready(self) -> bool:
        """Whether a read would give something, an error included."""
        return bool(self.mask() & (READABLE | select.POLLERR))

    def pending(self) -> int:
        """Give how many entries a read would find."""
        return (self._page.load32(FilePage.PROD) - self._page.load32(FilePage.CONS)) & 0xFFFFFFFF

    def peek(self, entries: int) -> bytes:
        """Give the first entries as a read would, and take none."""
        first, size = self._page.load32(FilePage.CONS), self._page.load32(FilePage.SIZE)
        ports = [self._page.load32(FilePage.RING + 4 * ((first + at) & (size - 1))) for at in range(entries)]
        return b"".join(port.to_bytes(4, sys.byteorder) for port in ports)

    def _door(self, events: int) -> None:
        if events & (select.EPOLLHUP | select.EPOLLERR):
            self.dead = True
            self._inbox.remove_fd(self.door)
        self.on_ready()
        if not self.dead and not self.closed:
            self.mask()

    def ioctl(self, request: int, argument: bytes | None, then: Callable[[int, int], None]) -> None:
        """Make an ioctl; `then(errno, value)`, errno 0 for success. None is the bad pointer."""

        def answered(reply: Message, fds: list[int]) -> None:
            close_fds(fds)
            if not isinstance(reply, Done):
                then(_number_of(reply, self._peer), 0)
                return
            if request == IOCTL_RESET and not self.closed:
                self._context.drain_door()
            then(0, reply.value)

        self._peer.ask(m.Ioctl(request=request, argument=argument), answered, CALL_TIMEOUT_S)

    def close(self, then: Callable[[], None]) -> None:
        """Release the file; `then` once its ports are free, or its process is gone."""

        def detached(_reply: Message, fds: list[int]) -> None:
            close_fds(fds)
            self._peer.close()
            then()

        self.closed = True
        self.on_ready = _nothing  # the mappings go with the last reference to this
        self._inbox.remove_fd(self.door)
        os.close(self.door)
        self._peer.ask(m.Detach(), detached, CALL_TIMEOUT_S)
        os.close(self.kick)
