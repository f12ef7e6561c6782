# SPDX-License-Identifier: Apache-2.0
"""An inbox under test: a clock that stands still, and connections whose other ends are plain sockets."""

from __future__ import annotations

import contextlib
import os
import resource
import socket
from collections.abc import Iterator
from typing import ClassVar

from pykka._envelope import Envelope

from pvbus.actors.runtime import wire
from pvbus.actors.runtime.clock import ManualClock
from pvbus.actors.runtime.inbox import Inbox
from pvbus.actors.runtime.peer import Peer, Received
from pvbus.actors.runtime.wire import Message


class InboxCall(Message, frozen=True, kw_only=True):
    value: int = 0
    data: bytes = b""


class InboxPlain(Message, frozen=True, kw_only=True):
    fds_max: ClassVar[int | None] = 0


class Rig:
    """An inbox with a clock that stands still, and connections whose other ends are plain sockets."""

    def __init__(self) -> None:
        self.clock = ManualClock()
        self.inbox = Inbox(self.clock, "rig")
        self.hangups: list[Peer] = []
        self.inbox.on_hangup = self.hangups.append
        self.sockets: list[socket.socket] = []

    def connect(self, name: str = "peer") -> tuple[Peer, socket.socket]:
        ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        self.sockets.append(theirs)
        return self.inbox.add_peer(ours, name), theirs

    def pump(self) -> list[Received]:
        """Run the loop until nothing is left to do, and return what an actor would have got."""
        got: list[Received] = []
        # Two turns: what the first one's callbacks cause is seen by the second.
        for _ in range(2):
            self.inbox.call_soon(lambda: self.inbox.put(Envelope("end")))
            while (message := self.inbox.get().message) != "end":
                got.append(message)
            self.inbox._turn(sleep=False)
        return got


def send(sock: socket.socket, message: Message, request: int = 0, *, reply: bool = False) -> None:
    wire.send_frame(sock, wire.encode(message, request, reply=reply))


def receive(sock: socket.socket) -> wire.Frame:
    data, fds = wire.recv_frame(sock)
    wire.close_fds(fds)
    return wire.decode(data)


@contextlib.contextmanager
def descriptors_left(room: int) -> Iterator[None]:
    """Let this process have so many descriptors more, and no further one."""
    limits = resource.getrlimit(resource.RLIMIT_NOFILE)
    free: list[int] = []
    try:
        while len(free) <= room:
            free.append(os.dup(0))
    finally:
        wire.close_fds(free)
    resource.setrlimit(resource.RLIMIT_NOFILE, (free[-1], limits[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, limits)
