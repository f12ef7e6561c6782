# SPDX-License-Identifier: Apache-2.0
"""`--frontend seccomp`: on top of the FUSE tree, a filter over the command whose opens of the device get an injected socket.

What no filter catches (a 32-bit program, a link of another name) still finds the FUSE file, and so does every open when the
server has died (filter.py).
"""

from __future__ import annotations

import contextlib
import os
import select
import socket

from pvbus.view.run.filter import Filter, StandIn
from pvbus.view.run.fitting import Fitting, connect, new_inbox
from pvbus.view.run.room import EnvironmentLacksError, Room
from pvbus.view.seccomp import bpf
from pvbus.view.seccomp.seen import is_a_tree_of_ours, look
from pvbus.view.seccomp.server import Frontend

DIRECTORY = "/dev/xen"


class SeccompFrontend(Filter):
    """The filter and its server."""

    title = "seccomp"

    def __init__(self) -> None:
        super().__init__()
        self.without_anybody = "its programs open no file any more"

    def code(self) -> bytes:
        """Give the filter that hands over opens."""
        return bpf.program(bpf.here())

    def prepare(self, room: Room) -> None:
        """Say in a sentence what the kernel lacks."""
        try:
            super().prepare(room)
        except OSError as error:
            raise EnvironmentLacksError(f"no seccomp user notification: {error.strerror}") from error

    def serve(self, room: Room) -> None:
        """Answer the calls of every child."""
        inbox = new_inbox(self.title)
        frontend = Frontend(inbox, connect(inbox, room.machine), room.domain, is_device)
        self.close_ways()
        with socket.socket(fileno=self.fds[0]) as control:

            def arrived(_events: int) -> None:
                found = self.next_listener(control)
                if found is None:  # the run has ended: those that it has left are killed, and so are we
                    inbox.remove_fd(control.fileno())
                else:
                    frontend.add_listener(*found)

            inbox.add_fd(control.fileno(), select.EPOLLIN, arrived)
            while True:
                inbox.get()  # everything is handled inside


def fittings() -> list[Fitting]:
    """Give the front end and what belongs to it."""
    frontend = SeccompFrontend()
    return [frontend, StandIn(frontend)]


def is_device(path: str) -> bool:
    """Whether a path by way of /proc/PID leads to the device of the run. One of a run within it is never walked to: whoever
    serves that makes calls which wait for us.
    """
    with contextlib.suppress(OSError):
        ours, directory = look(DIRECTORY).mount, look(os.path.dirname(path)).mount  # noqa: PTH120 - a Path drops what it takes for nothing
        if directory == ours or not is_a_tree_of_ours(int(path.split("/")[2]), directory):
            found = look(path)
            return found.is_device and found.mount == ours
    return False
