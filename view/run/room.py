# SPDX-License-Identifier: Apache-2.0
"""The namespaces of a run, and what is in place there: our own /dev, our entries in /sys.

Made once, by the process that starts the command; fittings (fitting.py) put devices in. Everything here is a mount in a private
namespace and goes with its last process; the host's own tree is not touched, and nothing is written to a disk.
"""

from __future__ import annotations

import contextlib
import os
import re
from pathlib import Path
from typing import TYPE_CHECKING

from pvbus.view.fuse import mount

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    from pvbus.view.run.evtchn import XenDevices

STAGE = "/dev/.pvbus"
"""Where /sys is put together; it is gone before the command starts."""
OF_A_RUN = {"xen", ".xenstored"}
"""What a /dev of ours has besides the host's: a run within a run has its own."""


class EnvironmentLacksError(OSError):
    """What this system does not have or allow; the text is a sentence."""


class Room:
    """One run: which machine and domain it shows, and the tree that is being built."""

    def __init__(self, machine: str, domain: int) -> None:
        self.machine = machine
        self.domain = domain
        self.environment: dict[str, str] = {}
        """Variables of the command, and of what fittings start."""
        self.in_child: list[Callable[[], None]] = []
        """Called in the command's process, and in those of daemons, between fork and exec."""
        self.devices: XenDevices | None = None
        """What serves /dev/xen; fittings add their nodes to it when they prepare."""
        self.daemons: dict[int, str] = {}
        """What fittings have started, by its process: whose end is worth a line."""

    def enter(self) -> None:
        """Leave the host's namespaces for good, and make our own /dev and the stage."""
        if not Path(mount.FUSE_DEVICE).exists():
            raise EnvironmentLacksError(f"there is no {mount.FUSE_DEVICE}: load the kernel module fuse")
        if not os.access(mount.FUSE_DEVICE, os.R_OK | os.W_OK):
            raise EnvironmentLacksError(f"{mount.FUSE_DEVICE} may not be opened by this user (crw-rw-rw- is its usual mode)")
        with _lacking("namespaces of its own (as root, or with unprivileged user namespaces allowed)"):
            mount.isolate()
        with _lacking("a /dev of its own"):
            _own_dev()
            Path(STAGE).mkdir()
            mount.mount("tmpfs", STAGE, "tmpfs")

    def sys_entry(self, path: str) -> Path:
        """Give a place for an entry of /sys, such as "bus/vmbus", its directories made; `place_sys` puts all of them in place."""
        place = Path(STAGE, "sys", path)
        place.parent.mkdir(parents=True, exist_ok=True)
        return place

    def place_sys(self) -> None:
        """Show the entries of the stage in /sys, over the host's, which becomes read-only; take the stage away."""
        staged = Path(STAGE, "sys")
        if staged.is_dir():
            with _lacking("an overlay over /sys (kernel module overlay)"):
                below = list(_mounted_below("/sys"))
                old = os.open("/sys", os.O_PATH | os.O_DIRECTORY)
                try:
                    mount.mount("overlay", "/sys", "overlay", 0, f"lowerdir={staged}:{_kernels_sys()}")
                    for path in below:
                        mount.bind(f"/proc/self/fd/{old}/{path}", f"/sys/{path}")
                    for path in list(_mounted_below(str(staged))):
                        mount.bind(str(staged / path), f"/sys/{path}")
                finally:
                    os.close(old)
        mount.unmount(STAGE)
        Path(STAGE).rmdir()
        _look_again()


@contextlib.contextmanager
def _lacking(what: str) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        raise EnvironmentLacksError(f"the kernel does not give it {what}: {error.strerror}") from error


def _kernels_sys() -> str:
    """Give the kernel's own /sys: as our network namespace has it, or, where a container refuses that, as it was."""
    own = Path(STAGE, "kernel")
    own.mkdir()
    try:
        mount.mount("sysfs", str(own), "sysfs")
    except PermissionError:
        return "/sys"
    return str(own)


def _own_dev() -> None:
    """Cover /dev with a directory of its own in which everything of the old one is, and where there is room for /dev/xen."""
    old = os.open("/dev", os.O_PATH | os.O_DIRECTORY)
    try:
        mount.mount("tmpfs", "/dev", "tmpfs", mount.MS_NOSUID, "mode=755")
        origin = f"/proc/self/fd/{old}"
        for entry in os.scandir(origin):
            target = Path("/dev", entry.name)
            if entry.name in OF_A_RUN:
                continue
            with contextlib.suppress(FileNotFoundError):  # it has just been removed
                _show(entry, target)
        Path("/dev/xen").mkdir()
    finally:
        os.close(old)


def _show(entry: os.DirEntry[str], target: Path) -> None:
    """Make an entry of the old /dev one of ours."""
    if entry.is_symlink():
        target.symlink_to(Path(entry.path).readlink())
        return
    is_directory = entry.is_dir()
    if is_directory:
        target.mkdir()
    else:
        target.touch()
    try:
        mount.bind(entry.path, str(target))
    except FileNotFoundError:
        if is_directory:
            target.rmdir()
        else:
            target.unlink()
        raise


def _look_again() -> None:
    """Go to our own place in /dev or /sys, if we are in one of the host's."""
    with contextlib.suppress(OSError):  # it has been removed
        here = Path.cwd()
        if here.parts[1:2] in (("dev",), ("sys",)):
            os.chdir(here)


def _mounted_below(directory: str) -> Iterator[str]:
    """Yield what is mounted right below a directory, not what is mounted below that; relative, the nearest first."""
    points = set()
    for line in os.fsdecode(Path("/proc/self/mountinfo").read_bytes()).split("\n")[:-1]:
        point = re.sub(r"\\(\d{3})", lambda octal: chr(int(octal[1], 8)), line.split(" ")[4])
        if point.startswith(f"{directory}/"):
            points.add(point.removeprefix(f"{directory}/"))
    kept: list[str] = []
    for point in sorted(points):
        if not any(point.startswith(f"{above}/") for above in kept):
            kept.append(point)
            yield point
