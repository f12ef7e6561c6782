# SPDX-License-Identifier: Apache-2.0
"""`--frontend seccomp`: on top of the FUSE tree, a filter over the command whose opens of the device get an injected socket.

What no filter catches (a 32-bit program, a link of another name) still finds the FUSE file. The filter is installed by each
child between fork and exec; its listener travels to the server over a socket pair, and a copy of it to the stand-in over another.
When the server has died, the stand-in lets every call through: the device's path leads to the FUSE file, and all else goes on.
"""

from __future__ import annotations

import contextlib
import os
import select
import socket
import struct
from pathlib import Path

from pvbus.view.run.fitting import Fitting, connect, new_inbox
from pvbus.view.run.room import EnvironmentLacksError, Room
from pvbus.view.seccomp import abi
from pvbus.view.seccomp.ledger import ROWS, Ledger, new_page, unanswered
from pvbus.view.seccomp.server import Frontend

DEVICE = "/dev/xen/evtchn"
_PID = struct.Struct("=i")


class Listeners:
    """A socket pair that filters' listeners travel over, each with the process whose filter it is."""

    def __init__(self) -> None:
        self.ours, self.theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)

    def send(self, listener: int) -> None:
        """Send ours."""
        socket.send_fds(self.ours, [_PID.pack(os.getpid())], [listener])

    @staticmethod
    def receive(end: socket.socket) -> tuple[int, int] | None:
        """Give the process and the listener; None if there will be none any more."""
        said, fds, _, _ = socket.recv_fds(end, _PID.size, 1)
        return (_PID.unpack(said)[0], fds[0]) if fds else None


class SeccompFrontend(Fitting):
    """The filter and its server."""

    title = "seccomp"

    def __init__(self) -> None:
        super().__init__()
        self.page = new_page()
        self.ways: list[Listeners] = []
        """To the server, and to its stand-in."""

    def prepare(self, room: Room) -> None:
        """Look whether the kernel has what it takes, and have each child of the run filtered."""
        try:
            abi.probe()
        except OSError as error:
            raise EnvironmentLacksError(f"no seccomp user notification: {error.strerror}") from error
        self.fds.append(self.new_way())
        room.in_child.append(self._filter)

    def new_way(self) -> int:
        """Make one more way for listeners; give the descriptor of its end."""
        self.ways.append(Listeners())
        return self.ways[-1].theirs.detach()

    def _filter(self) -> None:
        """In a child, between fork and exec: from here on its calls are handed over."""
        listener = abi.install()
        to_server, *others = self.ways
        to_server.send(listener)
        for way in others:
            with contextlib.suppress(OSError):  # nobody stands in any more, which the run has said: the server goes on
                way.send(listener)
        os.close(listener)

    def close_ways(self) -> None:
        """In a server: leave the ends of those that send to who does."""
        for way in self.ways:
            way.ours.close()

    def serve(self, room: Room) -> None:
        """Answer the calls of every child."""
        inbox = new_inbox(self.title)
        frontend = Frontend(inbox, connect(inbox, room.machine), room.domain, is_device)
        self.close_ways()
        rows = 0
        with socket.socket(fileno=self.fds[0]) as control:

            def arrived(_events: int) -> None:
                nonlocal rows
                found = Listeners.receive(control)
                if found is None:  # the run has ended: those that it has left are killed, and so are we
                    inbox.remove_fd(control.fileno())
                    return
                owner, listener = found
                frontend.add_listener(listener, Ledger(self.page, rows % ROWS, owner))
                rows += 1

            inbox.add_fd(control.fileno(), select.EPOLLIN, arrived)
            while True:
                inbox.get()  # everything is handled inside


class StandIn(Fitting):
    """Who goes on with the programs' calls when the server has died: nothing is ours any more, and everything is let through."""

    title = "stand-in"

    def __init__(self, frontend: SeccompFrontend) -> None:
        super().__init__()
        self._frontend = frontend

    @property
    def obituary(self) -> str:
        """What is said when its process has died."""
        return "the stand-in of seccomp has died; when the server dies as well, its programs open no file any more"

    def prepare(self, room: Room) -> None:
        """Make what tells of the server's end: a pipe of which nobody else has the other end."""
        lives, lifeline = os.pipe2(os.O_CLOEXEC)
        self._frontend.fds.append(lifeline)
        self.fds += [self._frontend.new_way(), lives]

    def serve(self, room: Room) -> None:
        """Keep a copy of each listener until the server has died, and then serve it."""
        self._frontend.close_ways()
        control, lives = self.fds
        kept: list[tuple[int, int]] = []
        poller = select.poll()
        for fd in (control, lives):
            poller.register(fd, select.POLLIN)
        with socket.socket(fileno=control) as end:
            while lives >= 0:
                for fd, _ in poller.poll():
                    if fd == lives:
                        lives = -1
                    elif (found := Listeners.receive(end)) is not None:
                        kept.append(found)
                    else:
                        poller.unregister(control)  # the run has ended
            poller.unregister(self.fds[1])
            for owner, listener in kept:
                self._take_over(poller, owner, listener)
            while True:
                for fd, events in poller.poll():
                    if fd != control:
                        self._serve(poller, fd, events)
                    elif (found := Listeners.receive(end)) is not None:
                        self._take_over(poller, *found)
                    else:
                        poller.unregister(control)

    def _take_over(self, poller: select.poll, owner: int, listener: int) -> None:
        """Go on with what the server has left."""
        taken = unanswered(self._frontend.page, owner)
        if taken is None:  # whoever waits is to hear of it: from the kernel, and so does each that follows
            os.close(listener)
            return
        for call in taken:
            with contextlib.suppress(OSError):  # it is answered; or one of the next, which nobody has taken up, or is none
                abi.let_through(listener, call)
        poller.register(listener, select.POLLIN)

    @staticmethod
    def _serve(poller: select.poll, listener: int, events: int) -> None:
        """Let a call through."""
        if not events & select.POLLIN:  # the last process under the filter has gone
            poller.unregister(listener)
            os.close(listener)
            return
        call = abi.receive(listener)
        if call is not None:
            abi.let_through(listener, call.id)


def fittings() -> list[Fitting]:
    """Give the front end and what belongs to it."""
    frontend = SeccompFrontend()
    return [frontend, StandIn(frontend)]


def is_device(path: str) -> bool:
    """Whether a path leads to the device of the tree."""
    with contextlib.suppress(OSError):
        return Path(path).samefile(DEVICE)
    return False
