# SPDX-License-Identifier: Apache-2.0
"""/dev/xen/evtchn as a FUSE file: what unmodified programs open, read, write, poll and ask.

`Device` is the node, `OpenFile` one open of it; each speaks for its own file of the machine (actors/client/frontend.py) and none
waits for another. Events, write-backs and notifies are answered from shared memory at once; a read that would block, an open and
the other ioctls are answered when their time has come. Where this differs from the driver: docs/divergences.md.
"""

from __future__ import annotations

import errno
import os
import select
import struct
from collections import deque
from hmac import compare_digest
from pathlib import Path
from typing import TYPE_CHECKING

from pvbus.actors.client import evtchn, frontend
from pvbus.actors.runtime import messages as m
from pvbus.view.fuse.abi import FOPEN_DIRECT_IO, FOPEN_NONSEEKABLE, FOPEN_STREAM
from pvbus.view.fuse.caller import CALLERS_MAX, READ, WRITE, Callers
from pvbus.view.fuse.mount import read_memory, write_memory
from pvbus.view.fuse.node import DeviceNode, Handle, error

if TYPE_CHECKING:
    from collections.abc import Callable

    from pvbus.actors.runtime.clock import Timer
    from pvbus.actors.runtime.inbox import Inbox
    from pvbus.actors.runtime.peer import Peer
    from pvbus.view.fuse.request import Request

ARGUMENT_BYTES = {
    evtchn.IOCTL_BIND_VIRQ: 4, evtchn.IOCTL_BIND_INTERDOMAIN: 8, evtchn.IOCTL_BIND_UNBOUND_PORT: 4, evtchn.IOCTL_UNBIND: 4,
    evtchn.IOCTL_NOTIFY: 4, evtchn.IOCTL_RESET: 0, evtchn.IOCTL_RESTRICT_DOMID: 2, evtchn.IOCTL_BIND_STATIC: 4,
}  # fmt: skip
BYTES_A_CALL = 4096  # the driver reads and writes at most a page at once
RELEASE_NS_MAX = 1_000_000_000  # a close that takes longer holds up no open and no bind any more
DEVICE_INODE = 0x70766275
"""What stat shows of the device, whichever run's: a number that is no session's own."""
IOCTL_DOOR, DOOR = 0x5056, struct.Struct("=II")
"""Not the driver's: who knows the secret is told the server's process and, of this open file, the doorbell's descriptor there."""
_PORT = struct.Struct("=I")
_APPEND = os.O_APPEND
_BY_CALLS = select.POLLERR | select.POLLHUP  # in the events of whoever polls; an io_uring that only looks does not ask for them


class Device(DeviceNode):
    """The node. `machine` is a connection to the machine's supervisor in `inbox`, whose loop also serves the session."""

    inode = DEVICE_INODE

    def __init__(self, inbox: Inbox, machine: Peer, domain: int = 0, secret: bytes = b"") -> None:
        self.inbox = inbox
        self.secret = secret
        self.machine = machine
        self.domain = domain
        self.callers = Callers()
        self._releasing: dict[OpenFile, Timer] = {}
        self._behind: deque[Callable[[], None]] = deque()

    def open(self, request: Request, flags: int) -> Handle | None:
        """Open a file of the machine for the calling process. EINVAL for O_DIRECT, which the driver has not."""
        if flags & os.O_DIRECT:
            raise error(errno.EINVAL)
        try:
            comm = Path(f"/proc/{request.pid}/comm").read_text(encoding="utf-8", errors="replace").rstrip("\n")
        except OSError:  # of another pid namespace, or killed meanwhile
            comm = "?"
        message = m.OpenEvtchn(domain=self.domain, comm=comm, mode=flags & os.O_ACCMODE, pid=request.pid)

        def ask() -> None:
            frontend.open_file(
                self.inbox, self.machine, message, lambda file: request.opened(OpenFile(self, file)), request.fail
            )

        self.after_releases(ask)
        return None

    # ---- a close is done when close(2) has returned: what looks at ports waits for those before it

    def after_releases(self, action: Callable[[], None]) -> None:
        """Act once every file is released whose close came before; at once, if none is under way."""
        if self._releasing:
            self._behind.append(action)
        else:
            action()

    def releasing(self, file: OpenFile) -> None:
        """A close has begun."""
        due_ns = self.inbox.clock.now_ns() + RELEASE_NS_MAX
        self._releasing[file] = self.inbox.call_at(due_ns, lambda: self.released(file))

    def released(self, file: OpenFile) -> None:
        """A close is done, or has taken too long."""
        timer = self._releasing.pop(file, None)
        if timer is not None:
            timer.cancel()
        while self._behind and not self._releasing:
            self._behind.popleft()()


class OpenFile(Handle):
    """One open: the readers that wait for it, and whom to wake."""

    open_flags = FOPEN_DIRECT_IO | FOPEN_NONSEEKABLE | FOPEN_STREAM

    def __init__(self, device: Device, file: frontend.FrontendFile) -> None:
        self.device = device
        self.file = file
        self.readers: deque[_Reader] = deque()
        self.rests: dict[int, bytes] = {}
        """What has been taken for a thread's read and lies in the buffer's next pages, which the kernel comes for at once."""
        self.appends: dict[int, tuple[int, int]] = {}
        """Where a thread's write begins that is not at its end yet, and where its next page will be: O_APPEND."""
        self.short = 0, 0
        """Which thread's io_uring has read last, and how much less than it had room for."""
        self.looked = 0
        """Which thread's io_uring has looked whether a read would wait: its next one is the ring's,"""
        self.of_ring = 0
        """and then it is this one's, with all its pages."""
        self.poller: Callable[[], None] | None = None
        file.on_ready = self._on_ready

    def read(self, request: Request, offset: int, size: int, flags: int) -> bytes | int | None:
        """Mirror evtchn_read (A4), once for each segment; the kernel asks for a page of it at a time."""
        if not offset:
            self.of_ring, self.looked = self.looked, 0
            if self.rests:
                self.rests.pop(request.pid, None)  # of a read that was killed
        if not offset and size >= _PORT.size and flags & os.O_NONBLOCK and not self.file.ready():
            return errno.EAGAIN
        if self.short == (request.pid, size) and self._is_ring_unsated(request):
            self.short = 0, 0
            return b""
        reader = _Reader(request, offset, size, nonblock=bool(flags & os.O_NONBLOCK), of_ring=self.of_ring == request.pid)
        data = self._advance(reader)
        if data is None:
            self.readers.append(reader)
        elif data or offset:
            self._gave(reader, data)
        return data

    def _is_ring_unsated(self, request: Request) -> bool:
        """Whether the kernel is after the rest of a short read: of a regular file an io_uring reads all that it asks for.

        It waits in poll for that, and then reads. No driver's read is like that: there is no more, and it is done. It gets as far
        as to us where what was written has made the file longer.
        """
        return self.short[1] > 0 and self.device.callers.is_in_ring(request.pid)

    def _gave(self, reader: _Reader, data: bytes) -> None:
        """Remember a short answer to a ring."""
        self.short = reader.request.pid, reader.room - len(data) if reader.of_ring and not reader.nonblock else 0

    def _advance(self, reader: _Reader) -> bytes | None:
        """Give what there is for a read, or None: it waits."""
        file, room = self.file, reader.room
        if reader.length < 0:
            if not reader.offset and room >= _PORT.size:  # the beginning of a segment of at least one port
                if not file.ready():
                    return None
                if file.pending() * _PORT.size <= room:  # and all that there is fits into this page of it
                    return self._take(room)
            reader.address, reader.length, reader.inner = self.device.callers.segment(
                reader.request.pid, READ, reader.offset, room
            )
        want = min(reader.length & ~3, BYTES_A_CALL)
        if reader.inner:
            return self._take_more(reader, want)
        if not want:
            return b""
        if not file.ready():
            if reader.nonblock:
                raise error(errno.EAGAIN)
            return None
        there = min(want, _PORT.size * file.pending())
        if there <= room or file.dead or file.mask() & select.POLLERR:
            return self._take(want)
        entries = file.peek(there // _PORT.size)
        # What fits is copied all the same; and where it cannot be copied, nothing is taken.
        if write_memory(reader.request.pid, reader.address, entries) != there:
            raise error(errno.EFAULT)
        data = self._take(there)
        self.rests[reader.request.pid] = data[room:]
        return data[:room]

    def _take_more(self, reader: _Reader, want: int) -> bytes:
        """Give a further page of a segment, which waits for nothing: what its first page has left, or what has come since."""
        rest = self.rests.pop(reader.request.pid, b"")
        if rest:
            if len(rest) > reader.room:
                self.rests[reader.request.pid] = rest[reader.room :]
            return rest[: reader.room]
        more = min(want - reader.inner, reader.room) & ~3
        if more <= 0 or reader.inner & 3 or self.file.dead or not self.file.pending() or self.file.mask() & select.POLLERR:
            return b""
        return self._take(more)

    def _must_live(self) -> None:
        if self.file.dead:
            raise error(errno.EIO)

    def _take(self, want: int) -> bytes:
        self._must_live()
        return self.file.read(want & ~3)

    def write(self, request: Request, offset: int, data: bytes, flags: int) -> int:
        """Mirror evtchn_write (A5), once for each segment: at its first page for all of it."""
        size = len(data)
        if flags & _APPEND:
            offset = self._offset_of(request.pid, offset, size)
        address, length, inner = self.device.callers.segment(request.pid, WRITE, offset, size)
        if length == size >= _PORT.size:
            self._must_live()
            return self.file.write(data)
        count = min(length & ~3, BYTES_A_CALL)
        if not address:  # nothing is known but these bytes
            count = 0 if offset & 3 else max(count - offset, 0)
            if count:
                self._must_live()
                self.file.write(data[:count])
            return count
        if count and not inner:
            self._must_live()
            if count > size:
                data += read_memory(request.pid, address + size, count - size)
            self.file.write(data[:count])
        return max(min(count - inner, size), 0)

    def _offset_of(self, thread: int, position: int, size: int) -> int:
        """Give where in its call a page of a write lies that the kernel puts behind all that was ever written."""
        begin, following = self.appends.pop(thread, (position, position))
        if following != position:  # the rest of that one never came
            begin = position
        if position + size - begin < self.device.callers.length(thread, WRITE):
            if len(self.appends) >= CALLERS_MAX:  # of those that were killed meanwhile
                self.appends.clear()
            self.appends[thread] = begin, position + size
        return position - begin

    def ioctl(self, request: Request, command: int, argument: int) -> int | None:
        """Mirror evtchn_ioctl (A9): the structure lies in the caller's memory."""
        size = ARGUMENT_BYTES.get(command)
        if size is None:
            return 0 if command == IOCTL_DOOR and self._tells_of_the_door(request, argument) else request.unknown()
        data: bytes | None = b""
        if size:
            try:
                data = self.device.callers.memory(request.pid, argument, size)
            except OSError as failed:
                if failed.errno != errno.EFAULT:
                    raise
                data = None
        if command == evtchn.IOCTL_NOTIFY and data is not None:
            self._must_live()
            self.file.notify(_PORT.unpack(data)[0])
            return 0
        self._ask(request, command, data)
        return None

    def _tells_of_the_door(self, request: Request, argument: int) -> bool:
        """Tell it who knows the secret."""
        secret = self.device.secret
        try:
            if not secret or not compare_digest(read_memory(request.pid, argument, len(secret)), secret):
                return False
        except OSError:  # not even a pointer
            return False
        self._must_live()
        write_memory(request.pid, argument + len(secret), DOOR.pack(os.getpid(), self.file.door))
        return True

    def _ask(self, request: Request, command: int, data: bytes | None) -> None:
        """Pass an ioctl to the file's process."""

        def answered(number: int, value: int) -> None:
            if number:
                request.fail(number)
            else:
                request.result(value)

        self.device.after_releases(lambda: self.file.ioctl(command, data, answered))

    def poll(self, request: Request, kh: int, events: int) -> int:
        """Mirror evtchn_poll (A10.1)."""
        if kh:
            self.poller = lambda: request.session.wake_pollers(kh)
        mask = self.file.mask()
        if mask & events & select.POLLIN and not events & _BY_CALLS:
            self.looked = request.pid
        if self.short[0] == request.pid and not mask & select.POLLIN and self._is_ring_unsated(request):
            mask |= select.POLLIN | select.POLLRDNORM
        return mask

    def interrupt(self, request: Request) -> None:
        """End a read that waits; a call of the machine's own ends by itself."""
        for reader in self.readers:
            if reader.request is request:
                self.readers.remove(reader)
                request.interrupted()
                return

    def release(self, request: Request) -> bool:
        """Mirror evtchn_release (A10.4): the last reference is gone."""

        def released() -> None:
            self.device.released(self)
            request.reply()

        self.poller = None
        self.device.releasing(self)
        self.file.close(released)
        return True

    def _on_ready(self) -> None:
        """One event lets one reader return, in the order in which they came."""
        file = self.file
        while self.readers and file.ready():
            reader = self.readers.popleft()
            try:
                data = self._advance(reader)
                if data is None:
                    self.readers.appendleft(reader)
                    return
                reader.request.reply(data)
                self._gave(reader, data)
            except OSError as failed:
                reader.request.fail(failed.errno or errno.EIO)
        if self.poller is not None and file.ready():
            self.poller()


class _Reader:
    """A read that is under way: how much the kernel takes, and what it is a part of."""

    __slots__ = ("address", "inner", "length", "nonblock", "of_ring", "offset", "request", "room")

    def __init__(self, request: Request, offset: int, size: int, *, nonblock: bool, of_ring: bool) -> None:
        self.request = request
        self.offset = offset  # of its first byte in the whole call
        self.room = size  # less than the segment has, where a page ends, or the caller's memory
        self.address, self.length, self.inner = 0, -1, 0  # of the segment, when it is known; where in it this is
        self.nonblock = nonblock
        self.of_ring = of_ring
