# SPDX-License-Identifier: Apache-2.0
"""/dev/xen/xenbus: what a domain's kernel offers its processes as their way to xenstored.

The kernel's side of it is here: the shared page, and an event channel of the machine, on which xenstored and we notify each
other. `XenbusDevice` moves bytes between the page and the multiplexer (xenbus.py); `XenbusHandle` is an open file.
"""

from __future__ import annotations

import errno
import os
import struct
import sys
from collections import deque
from collections.abc import Callable

from pvbus.actors.client import frontend
from pvbus.actors.client.evtchn import IOCTL_BIND_UNBOUND_PORT
from pvbus.actors.runtime import messages as m
from pvbus.actors.runtime.inbox import Inbox
from pvbus.actors.runtime.peer import Peer
from pvbus.shm.memory import Memory
from pvbus.view.fuse.abi import FOPEN_DIRECT_IO, FOPEN_NONSEEKABLE, FOPEN_STREAM
from pvbus.view.fuse.node import DeviceNode, Handle, error
from pvbus.view.fuse.request import Request
from pvbus.view.xen.ring import Ring, RingBroken
from pvbus.view.xen.xenbus import ProtocolError, Xenbus

POLLIN, POLLOUT, POLLERR = 0x41, 0x104, 0x8  # with their RDNORM and WRNORM
BATCH_BYTES = 4096


class XenbusDevice(DeviceNode):
    """The node, and the connection behind it. `on_port` is told the port that xenstored is to bind, or an errno below zero."""

    def __init__(self, inbox: Inbox, machine: Peer, domain: int, page: Memory, on_port: Callable[[int], None]) -> None:
        self.bus = Xenbus()
        self.ring = Ring(page)
        self.broken = False
        self.handles: dict[int, XenbusHandle] = {}
        self.file: frontend.FrontendFile | None = None
        self._port = 0
        self._on_port = on_port
        message = m.OpenEvtchn(domain=domain, comm="xenbus", mode=os.O_RDWR)
        frontend.open_file(inbox, machine, message, lambda file: self._opened(file, domain), lambda number: on_port(-number))

    def _opened(self, file: frontend.FrontendFile, domain: int) -> None:
        def bound(number: int, port: int) -> None:
            self._port = port
            self._on_port(-number if number else port)

        self.file = file
        file.on_ready = self._notified
        file.ioctl(IOCTL_BIND_UNBOUND_PORT, struct.pack("=I", domain), bound)

    def open(self, request: Request, flags: int) -> Handle:
        """Open it: one more user of the connection."""
        handle = XenbusHandle(self)
        self.handles[handle.user.number] = handle
        return handle

    def _notified(self) -> None:
        """The other side has written, or has made room; or the machine has gone."""
        file = self.file
        if file is None or file.dead:
            self.fail("the machine has gone")
            return
        while file.ready():
            file.write(file.read(BATCH_BYTES))
        self.move()

    def move(self) -> None:
        """Move bytes both ways for as long as there are any, and tell xenstored."""
        try:
            while not self.broken and self._moved():
                self._notify()
        except (RingBroken, ProtocolError, OSError, ValueError) as failed:
            self.fail(str(failed))

    def _moved(self) -> bool:
        sent = self.ring.put(bytes(self.bus.outgoing[:BATCH_BYTES]))
        del self.bus.outgoing[:sent]
        received = self.ring.take()
        for number in self.bus.receive(received):
            self.handles[number].wake()
        return bool(sent or received)

    def _notify(self) -> None:
        if self.file is not None and self._port:
            self.file.notify(self._port)

    def fail(self, why: str) -> None:
        """Say what has gone wrong, and end."""
        if not self.broken:
            print(f"pvbus: xenbus: {why}", file=sys.stderr, flush=True)
            self.end()

    def end(self) -> None:
        """Nothing comes of it any more: every user hears EIO."""
        self.broken = True
        for handle in list(self.handles.values()):
            handle.wake()


class XenbusHandle(Handle):
    """One open of it."""

    open_flags = FOPEN_DIRECT_IO | FOPEN_NONSEEKABLE | FOPEN_STREAM

    def __init__(self, device: XenbusDevice) -> None:
        self.device = device
        self.user = device.bus.open()
        self.readers: deque[tuple[Request, int]] = deque()
        self.poller: Callable[[], None] | None = None

    def read(self, request: Request, offset: int, size: int, flags: int) -> bytes | None:
        """Give what has been answered; wait for it unless O_NONBLOCK is set."""
        if self.user.replies:
            return self._take(size)
        if offset:  # a further page of a buffer whose first is full: that waits for nothing
            return b""
        if self.device.broken:
            raise error(errno.EIO)
        if flags & os.O_NONBLOCK:
            raise error(errno.EAGAIN)
        self.readers.append((request, size))
        return None

    def _take(self, size: int) -> bytes:
        data = bytes(self.user.replies[:size])
        del self.user.replies[:size]
        return data

    def write(self, request: Request, offset: int, data: bytes, flags: int) -> int:
        """Take requests, in any pieces."""
        if self.device.broken:
            raise error(errno.EIO)
        self.device.bus.write(self.user, data)
        self.device.move()
        self.wake()  # what is refused here is answered at once
        return len(data)

    def poll(self, request: Request, kh: int, events: int) -> int:
        """Say whether there is something to read; a request always finds room."""
        if kh:
            self.poller = lambda: request.session.wake_pollers(kh)
        return POLLOUT | (POLLIN if self.user.replies else 0) | (POLLERR if self.device.broken else 0)

    def wake(self) -> None:
        """Something can be read: let who waits for it know."""
        while self.readers and self.user.replies:
            request, size = self.readers.popleft()
            request.reply(self._take(size))
        while self.readers and self.device.broken:
            self.readers.popleft()[0].fail(errno.EIO)
        if self.poller is not None and (self.user.replies or self.device.broken):
            self.poller()

    def interrupt(self, request: Request) -> None:
        """End a read that waits."""
        for reader in self.readers:
            if reader[0] is request:
                self.readers.remove(reader)
                request.interrupted()
                return

    def release(self, request: Request) -> bool:
        """End what its user has left with xenstored."""
        self.poller = None
        del self.device.handles[self.user.number]
        self.device.bus.close(self.user)
        self.device.move()
        return False
