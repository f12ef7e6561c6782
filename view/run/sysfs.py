# SPDX-License-Identifier: Apache-2.0
"""/sys of a run: the domain's VMBus and event-channel device as the kernel would show them, and their uevents."""

from __future__ import annotations

import contextlib
from typing import TYPE_CHECKING

from pvbus.actors.client import attach
from pvbus.view.fuse import mount
from pvbus.view.run.fitting import Fitting
from pvbus.view.sysfs.points import BUS, MISC, MISC_MAJOR, MISC_NAME, PARENT, free_minors
from pvbus.view.sysfs.server import SysfsServer
from pvbus.view.sysfs.uevents import UeventSender

if TYPE_CHECKING:
    from pvbus.view.run.room import Room

OPTIONS = "allow_other,default_permissions"  # the kernel looks at the modes, as it does in sysfs
VERIFY = "SYSTEMD_DEVICE_VERIFY_SYSFS"  # 0: libudev takes what is no sysfs by its file system


class Sysfs(Fitting):
    """The trees that `SysfsServer` serves, a mount each."""

    title = "sysfs"

    def __init__(self) -> None:
        super().__init__()
        self._points: list[str] = []
        self._minor = 0

    def prepare(self, room: Room) -> None:
        """Mount a tree for each thing that the domain's platforms have."""
        with attach(room.machine) as machine:
            platforms = next(spec["platforms"] for spec in machine.status()["domains"] if spec["id"] == room.domain)
            if "hyperv" in platforms:
                with contextlib.suppress(TimeoutError):  # a driver's call takes its time: that is not the bus's coming up
                    machine.settle()  # in a guest the bus is up before there are programs
        self._points = [*((BUS, PARENT) if "hyperv" in platforms else ()), *((MISC,) if "xen" in platforms else ())]
        self._minor = (room.devices.minors if room.devices else free_minors())[0]
        for point in self._points:
            place = room.sys_entry(point)
            place.mkdir()
            self.fds.append(mount.mount_fuse(str(place), name="pvbus-sysfs", options=OPTIONS))
        if "xen" in platforms:
            for link in (f"class/misc/{MISC_NAME}", f"dev/char/{MISC_MAJOR}:{self._minor}"):
                room.sys_entry(link).symlink_to(f"../../{MISC}")
        room.environment[VERIFY] = "0"

    def serve(self, room: Room) -> None:
        """Answer every look, and send what the bus tells."""
        with attach(room.machine) as machine:
            fds = dict(zip(self._points, self.fds, strict=True))
            server = SysfsServer(machine, room.domain, fds, UeventSender(), self._minor)
            try:
                server.run()
            finally:
                server.close()
