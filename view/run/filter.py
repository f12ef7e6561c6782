# SPDX-License-Identifier: Apache-2.0
"""A filter over the command of a run, the server that answers the calls which it hands over, and who stands in for that.

The filter is installed by each child between fork and exec; its listener travels to the server over a socket pair, and a copy
of it to the stand-in over another. When the server has died, the stand-in lets every call through.
"""

from __future__ import annotations

import contextlib
import functools
import os
import select
import socket
import struct
from typing import TYPE_CHECKING

from pvbus.view.run.fitting import Fitting
from pvbus.view.seccomp import abi
from pvbus.view.seccomp.ledger import ROWS, Ledger, new_page, unanswered

if TYPE_CHECKING:
    from pvbus.view.run.room import Room

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


class Filter(Fitting):
    """A filter and its server; override `code` and `serve`."""

    def __init__(self) -> None:
        super().__init__()
        self.page = new_page()
        self.ways: list[Listeners] = []
        """To the server, and to its stand-in."""
        self.without_anybody = ""
        """What becomes of the programs when neither of them lives any more."""
        self._rows = 0

    def code(self) -> bytes:
        """Give the filter's program. OSError: there is none for this machine."""
        raise NotImplementedError

    def prepare(self, room: Room) -> None:
        """Look whether the kernel has what it takes, and have each child of the run filtered. OSError says what it lacks."""
        code = self.code()
        abi.probe(code)
        self.fds.append(self.new_way())
        room.in_child.append(functools.partial(self._install, code))

    def new_way(self) -> int:
        """Make one more way for listeners; give the descriptor of its end."""
        self.ways.append(Listeners())
        return self.ways[-1].theirs.detach()

    def _install(self, code: bytes) -> None:
        """In a child, between fork and exec: from here on its calls are handed over."""
        listener = abi.install(code)
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

    def next_listener(self, control: socket.socket) -> tuple[int, Ledger] | None:
        """In the server: take a listener, and the ledger of its calls; None if there will be none any more."""
        found = Listeners.receive(control)
        if found is None:
            return None
        owner, listener = found
        self._rows += 1
        return listener, Ledger(self.page, self._rows % ROWS, owner)


class StandIn(Fitting):
    """Who goes on with the programs' calls when the server has died: nothing is ours any more, and everything is let through.

    It outlives the run's other servers: a machine that was booted within the run makes calls until it has stopped in order.
    """

    title = "stand-in"
    is_last = True

    def __init__(self, over: Filter) -> None:
        super().__init__()
        self._filter = over
        self._listeners: set[int] = set()

    @property
    def obituary(self) -> str:
        """What is said when its process has died."""
        return f"the stand-in of {self._filter.title} has died; when that server dies as well, {self._filter.without_anybody}"

    def prepare(self, room: Room) -> None:
        """Make what tells of the server's end: a pipe of which nobody else has the other end."""
        if not self._filter.title:  # there is none
            self.title = ""
            return
        lives, lifeline = os.pipe2(os.O_CLOEXEC)
        self._filter.fds.append(lifeline)
        self.fds += [self._filter.new_way(), lives]

    def serve(self, room: Room) -> None:
        """Keep a copy of each listener until the server has died, and then serve it until its last process has ended."""
        self._filter.close_ways()
        control, lives = self.fds
        poller = select.poll()
        poller.register(lives, select.POLLIN)
        poller.register(control, select.POLLIN)
        kept: list[tuple[int, int]] = []
        waits = True
        with socket.socket(fileno=control) as end:
            while waits or kept or self._listeners:
                for fd, events in poller.poll():
                    if fd == lives:
                        poller.unregister(lives)
                        lives = -1
                    elif fd in self._listeners:
                        self._serve(poller, fd, events)
                    elif (found := Listeners.receive(end)) is not None:
                        kept.append(found)
                    else:  # the run has ended
                        poller.unregister(control)
                        waits = False
                while lives < 0 and kept:
                    self._take_over(poller, *kept.pop(0))

    def _take_over(self, poller: select.poll, owner: int, listener: int) -> None:
        """Go on with what the server has left."""
        taken = unanswered(self._filter.page, owner)
        if taken is None:  # whoever waits is to hear of it: from the kernel, and so does each that follows
            os.close(listener)
            return
        for call in taken:
            with contextlib.suppress(OSError):  # it is answered; or one of the next, which nobody has taken up, or is none
                abi.let_through(listener, call)
        poller.register(listener, select.POLLIN)
        self._listeners.add(listener)

    def _serve(self, poller: select.poll, listener: int, events: int) -> None:
        """Let a call through."""
        if not events & select.POLLIN:  # the last process under the filter has gone
            poller.unregister(listener)
            self._listeners.remove(listener)
            os.close(listener)
            return
        call = abi.receive(listener)
        if call is not None:
            abi.let_through(listener, call.id)
