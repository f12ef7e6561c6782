# SPDX-License-Identifier: Apache-2.0
"""`--xenstore`: Debian's xenstored as a daemon of the run, and /dev/xen/xenbus as the way to it.

xenstored reads the port and the page of the kernel's connection from /proc/xen, a directory that only a kernel can make. So it
gets a /proc of its own, in which nothing else is. The page and its socket lie in STATE, in the run's own /dev.
"""

from __future__ import annotations

import os
import select
import shutil
import signal
import socket
import struct
import subprocess
from pathlib import Path
from typing import TYPE_CHECKING

from pvbus.shm.memory import Memory
from pvbus.view.fuse import mount
from pvbus.view.run.fitting import Fitting
from pvbus.view.run.room import EnvironmentLacksError, Room
from pvbus.view.xen.device import XenbusDevice
from pvbus.view.xen.ring import PAGE_BYTES

if TYPE_CHECKING:
    from pvbus.actors.runtime.inbox import Inbox
    from pvbus.actors.runtime.peer import Peer
    from pvbus.view.run.evtchn import XenDevices

STATE = Path("/dev/.xenstored")
XENBUS = "/dev/xen/xenbus"
PACKAGES = "Debian: xen-utils-4.17 for xenstored, xenstore-utils for xenstore-read and its like"
READY_S_MAX = 20.0  # xenstored takes a tenth of a second
_READ, _HEADER = 2, struct.Struct("=IIII")
_PORT = struct.Struct("=i")


def find_xenstored() -> str:
    """Give the path of the newest xenstored. EnvironmentLacksError names the packages."""
    found = sorted(map(str, Path("/usr/lib").glob("xen-*/bin/xenstored")))
    program = found[-1] if found else shutil.which("xenstored")
    if program is None:
        raise EnvironmentLacksError(f"there is no xenstored ({PACKAGES})")
    return program


class Xenstore(Fitting):
    """xenstored, and the kernel's side of its connection, which the server of /dev/xen has in its process."""

    def __init__(self) -> None:
        super().__init__()
        self.program = find_xenstored()
        self.page = -1
        self.told: socket.socket | None = None
        self.daemon: subprocess.Popen[bytes] | None = None

    def prepare(self, room: Room) -> None:
        """Make the shared page, and have /dev/xen/xenbus served."""
        devices: XenDevices | None = room.devices
        if devices is None or room.domain != 0:
            raise EnvironmentLacksError(f"xenstored runs in domain 0, not in domain {room.domain}")
        STATE.mkdir(mode=0o700)
        (STATE / "run").mkdir()
        (STATE / "capabilities").write_text("control_d\n", encoding="ascii")  # this is the domain of the toolstack
        for name in ("privcmd", "xenbus"):
            (STATE / name).symlink_to(f"/dev/xen/{name}")
        self.page = os.open(STATE / "xsd_kva", os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
        os.ftruncate(self.page, PAGE_BYTES)
        self.told, tell = socket.socketpair()
        self.told.settimeout(READY_S_MAX)
        devices.fds += [tell.detach(), self.page]
        at = len(devices.fds) - 2

        def node(inbox: Inbox, machine: Peer, room: Room) -> XenbusDevice:
            tell_fd, page_fd = devices.fds[at : at + 2]
            page = Memory(page_fd, PAGE_BYTES)
            device = XenbusDevice(inbox, machine, room.domain, page, lambda port: _say(tell_fd, port))
            inbox.add_fd(tell_fd, select.EPOLLIN, lambda _: _watch_daemon(inbox, tell_fd, device))
            return device

        devices.nodes["xenbus"] = node

    def dress(self, room: Room) -> None:
        """Wait for the port of the kernel's connection, and write it down where xenstored looks for it."""
        assert self.told is not None
        try:
            said = self.told.recv(_PORT.size)
        except TimeoutError:
            said = b""
        port = _PORT.unpack(said)[0] if said else -1
        if port <= 0:
            raise EnvironmentLacksError(f"xenbus has no event channel: {os.strerror(-port) if said else 'no answer'}")
        (STATE / "xsd_port").write_text(f"{port}\n", encoding="ascii")

    def start(self, room: Room) -> None:
        """Start xenstored and wait until it answers."""

        def in_child() -> None:
            mount.die_with_parent(signal.SIGKILL)
            os.setsid()  # the terminal's signals are for the command
            signal.pthread_sigmask(signal.SIG_SETMASK, [])
            mount.unshare(mount.CLONE_NEWNS)
            mount.mount("tmpfs", "/proc", "tmpfs")
            Path("/proc/xen").mkdir()
            mount.bind(str(STATE), "/proc/xen")
            for hook in room.in_child:
                hook()

        self.daemon = subprocess.Popen(
            [self.program, "-N"], stdin=subprocess.DEVNULL, preexec_fn=in_child,  # noqa: PLW1509 -- we have no threads
            env={**os.environ, **room.environment, "XENSTORED_RUNDIR": str(STATE / "run"), "XENSTORED_ROOTDIR": str(STATE)},
        )  # fmt: skip
        room.daemons[self.daemon.pid] = "xenstored"
        ended = os.pidfd_open(self.daemon.pid)
        try:
            assert self.told is not None
            with self.told:
                socket.send_fds(self.told, [b"xenstored"], [ended])  # who waits for its answer then hears of its end
            self._await_answer(ended)
        finally:
            os.close(ended)

    def _await_answer(self, ended: int) -> None:
        """Read the root of the store, through the device and the event channel."""
        assert self.daemon is not None
        fd = os.open(XENBUS, os.O_RDWR | os.O_CLOEXEC)
        try:
            os.write(fd, _HEADER.pack(_READ, 1, 0, 2) + b"/\0")
            poller = select.poll()
            poller.register(fd, select.POLLIN)
            poller.register(ended, select.POLLIN)
            ready = dict(poller.poll(READY_S_MAX * 1000))
            if ended in ready:
                raise EnvironmentLacksError(f"xenstored did not start (exit code {self.daemon.wait()})")
            if not ready:
                raise EnvironmentLacksError(f"xenstored did not answer within {READY_S_MAX:.0f} s")
            os.read(fd, 4096)
        finally:
            os.close(fd)


def _say(fd: int, port: int) -> None:
    os.write(fd, _PORT.pack(port))


def _watch_daemon(inbox: Inbox, told: int, device: XenbusDevice) -> None:
    """In the server: take the descriptor of xenstored's process, and end every wait for it when it ends."""
    with socket.socket(fileno=os.dup(told)) as receiver:
        _, fds, _, _ = socket.recv_fds(receiver, 64, 1)
    inbox.remove_fd(told)
    for pidfd in fds:

        def ended(_events: int, pidfd: int = pidfd) -> None:
            inbox.remove_fd(pidfd)
            device.end()  # the run says why, unless it is its own end

        inbox.add_fd(pidfd, select.EPOLLIN, ended)
