# SPDX-License-Identifier: Apache-2.0
"""`--frontend seccomp`: on top of the FUSE tree, a filter over the command whose opens of the device get an injected socket.

What no filter catches (a 32-bit program, a link of another name) still finds the FUSE file. The filter is installed by each
child between fork and exec; its listener travels to the server over a socket pair.
"""

from __future__ import annotations

import contextlib
import os
import select
import socket
from pathlib import Path

from pvbus.view.run.fitting import Fitting, connect, new_inbox
from pvbus.view.run.room import EnvironmentLacksError, Room
from pvbus.view.seccomp import abi
from pvbus.view.seccomp.server import Frontend

DEVICE = "/dev/xen/evtchn"


class SeccompFrontend(Fitting):
    """The filter and its server."""

    title = "seccomp"

    def __init__(self) -> None:
        super().__init__()
        self.ours: socket.socket | None = None

    def prepare(self, room: Room) -> None:
        """Look whether the kernel has what it takes, and have each child of the run filtered."""
        try:
            abi.probe()
        except OSError as error:
            raise EnvironmentLacksError(f"no seccomp user notification: {error.strerror}") from error
        self.ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        self.fds.append(theirs.detach())
        room.in_child.append(self._filter)

    def _filter(self) -> None:
        """In a child, between fork and exec: from here on its calls are handed over."""
        assert self.ours is not None
        listener = abi.install()
        socket.send_fds(self.ours, [b"listener"], [listener])
        os.close(listener)

    def serve(self, room: Room) -> None:
        """Answer the calls of every child."""
        inbox = new_inbox(self.title)
        frontend = Frontend(inbox, connect(inbox, room.machine), room.domain, is_device)
        with socket.socket(fileno=self.fds.pop()) as control:
            if self.ours is not None:
                self.ours.close()

            def arrived(_events: int) -> None:
                _, fds, _, _ = socket.recv_fds(control, 64, 1)
                if not fds:  # the run has ended: those that it has left are killed, and so are we
                    inbox.remove_fd(control.fileno())
                for listener in fds:
                    frontend.add_listener(listener)

            inbox.add_fd(control.fileno(), select.EPOLLIN, arrived)
            while True:
                inbox.get()  # everything is handled inside


def is_device(path: str) -> bool:
    """Whether a path leads to the device of the tree."""
    with contextlib.suppress(OSError):
        return Path(path).samefile(DEVICE)
    return False
