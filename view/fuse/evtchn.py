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
import stat
import struct
from collections import deque
from pathlib import Path
from typing import TYPE_CHECKING

from pvbus.actors.client import evtchn, frontend
from pvbus.actors.runtime import messages as m
from pvbus.view.fuse.abi import FOPEN_DIRECT_IO, FOPEN_NONSEEKABLE, FOPEN_STREAM, Attributes
from pvbus.view.fuse.caller import READ, WRITE, Callers
from pvbus.view.fuse.mount import write_memory
from pvbus.view.fuse.node import Handle, Node, error

if TYPE_CHECKING:
    from collections.abc import Callable

    from pvbus.actors.runtime.clock import Timer
    from pvbus.actors.runtime.inbox import Inbox
    from pvbus.actors.runtime.peer import Peer
    from pvbus.view.fuse.session import Request

ARGUMENT_BYTES = {
    evtchn.IOCTL_BIND_VIRQ: 4, evtchn.IOCTL_BIND_INTERDOMAIN: 8, evtchn.IOCTL_BIND_UNBOUND_PORT: 4, evtchn.IOCTL_UNBIND: 4,
    evtchn.IOCTL_NOTIFY: 4, evtchn.IOCTL_RESET: 0, evtchn.IOCTL_RESTRICT_DOMID: 2, evtchn.IOCTL_BIND_STATIC: 4,
}  # fmt: skip
BYTES_A_CALL = 4096  # the driver reads and writes at most a page at once
RELEASE_NS_MAX = 1_000_000_000  # a close that takes longer holds up no open and no bind any more
_PORT = struct.Struct("=I")


class Device(Node):
    """The node. `machine` is a connection to the machine's supervisor in `inbox`, whose loop also serves the session."""

    def __init__(self, inbox: Inbox, machine: Peer, domain: int = 0) -> None:
        self.inbox = inbox
        self.machine = machine
        self.domain = domain
        self.callers = Callers()
        self._releasing: dict[OpenFile, Timer] = {}
        self._behind: deque[Callable[[], None]] = deque()

    def attributes(self) -> Attributes:
        """Give root's own file: FUSE shows a regular one."""
        return Attributes(stat.S_IFREG | 0o600)

    def open(self, request: Request, flags: int) -> Handle | None:
        """Open a file of the machine for the calling process."""
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
        self.poller: Callable[[], None] | None = None
        file.on_ready = self._on_ready

    def read(self, request: Request, offset: int, size: int, flags: int) -> bytes | int | None:
        """Mirror evtchn_read (A4), once for each segment."""
        if size >= _PORT.size and flags & os.O_NONBLOCK and not self.file.ready():
            return errno.EAGAIN
        reader = _Reader(request, size, nonblock=bool(flags & os.O_NONBLOCK))
        if self._advance(reader):
            return bytes(reader.collected)
        self.readers.append(reader)
        return None

    def _advance(self, reader: _Reader) -> bool:
        """Read as far as there is something; True when the call is over. OSError ends it only if nothing was read before."""
        if reader.unknown:
            if reader.room >= _PORT.size and not self.file.ready():
                return False  # whatever it is, it waits
            reader.unknown = False
            if reader.room != _PORT.size or self.file.pending() > 1:  # else there is one port, and room for one
                callers = self.device.callers
                reader.segments, reader.address = callers.segments(reader.request.pid, READ, reader.room)
        try:
            while reader.segments:
                length = reader.segments[0]
                want = min(length & ~3, BYTES_A_CALL)
                if want:
                    if not self.file.ready():
                        if reader.nonblock:
                            raise error(errno.EAGAIN)
                        return False
                    data = self._take(reader, want)
                    reader.collected += data
                    want = len(data)
                reader.segments.pop(0)
                if want < length:
                    break
        except OSError:
            if not reader.collected:
                raise
        return True

    def _take(self, reader: _Reader, want: int) -> bytes:
        """Take entries for a segment; EFAULT, and nothing is taken, if they reach beyond the caller's memory."""
        file = self.file
        if file.dead:
            raise error(errno.EIO)
        room = reader.room - len(reader.collected)
        if want > room and not file.mask() & select.POLLERR:
            there = min(want, 4 * file.pending())
            if there > room:
                if reader.address and not reader.collected:  # what fits is copied all the same
                    write_memory(reader.request.pid, reader.address, file.peek(there // 4)[:room])
                raise error(errno.EFAULT)
        return file.read(want)

    def write(self, request: Request, offset: int, data: bytes, flags: int) -> int:
        """Mirror evtchn_write (A5), once for each segment."""
        done = 0
        for length in self.device.callers.segments(request.pid, WRITE, len(data))[0]:
            count = min(length & ~3, BYTES_A_CALL)
            if done + count > len(data):
                if done:
                    break
                raise error(errno.EFAULT)
            if count:
                self.file.write(data[done : done + count])
            done += count
            if count < length:
                break
        return done

    def ioctl(self, request: Request, command: int, argument: int) -> int | None:
        """Mirror evtchn_ioctl (A9): the structure lies in the caller's memory."""
        size = ARGUMENT_BYTES.get(command)
        if size is None:
            raise error(errno.ENOTTY)  # the driver's ENOSYS does not get through FUSE
        data: bytes | None = b""
        if size:
            try:
                data = self.device.callers.memory(request.pid, argument, size)
            except OSError as failed:
                if failed.errno != errno.EFAULT:
                    raise
                data = None
        if command == evtchn.IOCTL_NOTIFY and data is not None:
            self.file.notify(_PORT.unpack(data)[0])
            return 0

        def answered(number: int, value: int) -> None:
            if number:
                request.fail(number)
            else:
                request.result(value)

        self.device.after_releases(lambda: self.file.ioctl(command, data, answered))
        return None

    def poll(self, request: Request, kh: int, events: int) -> int:
        """Mirror evtchn_poll (A10.1)."""
        if kh:
            self.poller = lambda: request.session.wake_pollers(kh)
        return self.file.mask()

    def interrupt(self, request: Request) -> None:
        """End a read that waits; a call of the machine's own ends by itself."""
        for reader in self.readers:
            if reader.request is request:
                self.readers.remove(reader)
                if reader.collected:
                    request.reply(bytes(reader.collected))
                else:
                    request.fail(errno.EINTR)
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
                if self._advance(reader):
                    reader.request.reply(bytes(reader.collected))
                else:
                    self.readers.appendleft(reader)
            except OSError as failed:
                reader.request.fail(failed.errno or errno.EIO)
        if self.poller is not None and file.ready():
            self.poller()


class _Reader:
    """A read that is under way: what is asked for, and what it has."""

    __slots__ = ("address", "collected", "nonblock", "request", "room", "segments", "unknown")

    def __init__(self, request: Request, size: int, *, nonblock: bool) -> None:
        self.request = request
        self.room = size  # the bytes that FUSE can hand over: less than the segments have, where memory ends
        self.segments = [size]
        self.address = 0
        self.unknown = True  # whether that is all that was asked for
        self.nonblock = nonblock
        self.collected = bytearray()
