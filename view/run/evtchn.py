# SPDX-License-Identifier: Apache-2.0
"""The directory /dev/xen of a run.

`XenDevices` serves the directory; another fitting that has a node for it (privcmd, gntdev) puts it into `nodes`.
"""

from __future__ import annotations

import os
import sys
from typing import TYPE_CHECKING

from pvbus.view.fuse.caller import Callers
from pvbus.view.fuse.disguise import Disguise
from pvbus.view.fuse.evtchn import Device
from pvbus.view.fuse.node import Directory
from pvbus.view.fuse.session import Session
from pvbus.view.run.fitting import Fitting, connect, new_inbox, serve_session
from pvbus.view.sysfs.points import MISC_MAJOR, free_minors
from pvbus.view.xen.privcmd import Mute, Privcmd, machine_op

if TYPE_CHECKING:
    from collections.abc import Callable

    from pvbus.actors.runtime.inbox import Inbox
    from pvbus.actors.runtime.peer import Peer
    from pvbus.view.fuse.node import Node
    from pvbus.view.run.room import Room


SECRET_BYTES = 16


class XenDevices(Fitting):
    """/dev/xen through FUSE."""

    title = "evtchn"

    def __init__(self) -> None:
        super().__init__()
        self.secret = os.urandom(SECRET_BYTES)
        """What servers of the run know each other by."""
        self.minors: list[int] = []
        """Of the nodes, the device's first."""
        self.nodes: dict[str, Callable[[Inbox, Peer, Room], Node]] = {
            "evtchn": lambda inbox, machine, room: Device(inbox, machine, room.domain, self.secret),
            "privcmd": lambda _, machine, room: Privcmd(machine_op(machine, room.domain)),
            "gntdev": lambda _inbox, _machine, _room: Mute(),
        }
        """What makes the nodes of /dev/xen, by their names; called in the server's process."""

    def prepare(self, room: Room) -> None:
        """Mount /dev/xen."""
        self.mount_fuse("/dev/xen", options="allow_other,default_permissions")  # the kernel looks at the modes
        self.minors = free_minors()
        room.devices = self

    def serve(self, room: Room) -> None:
        """Answer for every open file."""
        inbox = new_inbox(self.title)
        machine = connect(inbox, room.machine)

        def say(peer: Peer) -> None:
            """The run's own stop of a machine comes when its servers are gone: this one nobody here has asked for."""
            if peer is machine:
                said = f"pvbus run: machine {room.machine!r} has stopped; its devices answer with errors"
                print(said, file=sys.stderr, flush=True)

        inbox.on_hangup = say
        nodes = {name: make(inbox, machine, room) for name, make in self.nodes.items()}
        for node, minor in zip(nodes.values(), self.minors, strict=False):
            node.rdev = os.makedev(MISC_MAJOR, minor)
        disguise = Disguise(inbox, Callers())
        # A page at a time: segments come apart (caller.py).
        serve_session(inbox, Session(self.fds[0], Directory(nodes), pages_max=1, disguise=disguise))
