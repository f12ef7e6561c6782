# SPDX-License-Identifier: Apache-2.0
"""Where the trees stand: a /sys of one's own in a mount namespace, the kernel's with ours laid over it.

The caller is in a mount namespace that nobody else sees (`pvbus.view.fuse.mount.isolate`). What is mounted below the kernel's
/sys, cgroups for example, is put back where it was. The result can be read and, but for our own trees, not be written.
"""

from __future__ import annotations

from pathlib import Path
from typing import NamedTuple

from pvbus.view.fuse.mount import MS_NODEV, MS_NOSUID, bind, mount, mount_fuse, unmount

SYS = "/sys"
BUS, PARENT = "bus/vmbus", "devices/VMBUS:00"
MISC_NAME = "xen!evtchn"
MISC = f"devices/virtual/misc/{MISC_NAME}"
MISC_MAJOR = 10
MISC_MINOR_MAX = 127    # of those that the kernel gives to whoever asks for any
FUSE_OPTIONS = "allow_other,default_permissions"


class Placed(NamedTuple):
    """What was laid over /sys."""

    fds: dict[str, int]     # of the FUSE mounts, by BUS, PARENT and MISC: those that are there
    minor: int              # of the event-channel device


def place(staging: Path, *, vmbus: bool, xen: bool) -> Placed:
    """Lay our trees over /sys. Nobody may look below them before they are served.

    `staging` is an empty directory; nothing is mounted on it afterwards. OSError says what the kernel refused.
    """
    minor = free_minor()
    mount("tmpfs", str(staging), "tmpfs", MS_NOSUID | MS_NODEV, "mode=755")
    ours, kernels, old = staging / "ours", staging / "kernels", staging / "old"
    for directory in (ours, kernels, old):
        directory.mkdir()
    points = [*((BUS, PARENT) if vmbus else ()), *((MISC,) if xen else ())]
    for point in points:
        (ours / point).mkdir(parents=True)
    if xen:
        _link_misc(ours, minor)
    bind(SYS, str(old))
    _mount_kernels(str(kernels))
    mount("pvbus", SYS, "overlay", 0, f"lowerdir={ours}:{kernels}")
    for below in topmost(mounts_below(str(old))):
        if Path(SYS, below).exists():
            bind(str(old / below), f"{SYS}/{below}")
    fds = {point: mount_fuse(f"{SYS}/{point}", name="pvbus-sysfs", options=FUSE_OPTIONS) for point in points}
    unmount(str(staging))
    return Placed(fds, minor)


def _link_misc(ours: Path, minor: int) -> None:
    """The links that lead to the event-channel device."""
    for directory in ("class/misc", "dev/char"):
        (ours / directory).mkdir(parents=True)
    (ours / "class/misc" / MISC_NAME).symlink_to(f"../../{MISC}")
    (ours / "dev/char" / f"{MISC_MAJOR}:{minor}").symlink_to(f"../../{MISC}")


def free_minor() -> int:
    """Give the number that a misc device that asks for any would get: the highest that no other has."""
    taken = {path.name for path in Path(SYS, "dev/char").iterdir()}
    return next(minor for minor in range(MISC_MINOR_MAX, -1, -1) if f"{MISC_MAJOR}:{minor}" not in taken)


def _mount_kernels(target: str) -> None:
    """Show the kernel's own tree: of this network namespace, or, where a container refuses that, as it was."""
    try:
        mount("sysfs", target, "sysfs")
    except PermissionError:
        bind(SYS, target)


def mounts_below(directory: str) -> list[str]:
    """Give what is mounted below a directory, as paths from there, parents first."""
    head = directory.rstrip("/") + "/"
    lines = Path("/proc/self/mountinfo").read_text(encoding="utf-8", errors="surrogateescape").splitlines()
    points = [line.split(" ")[4].encode().decode("unicode_escape") for line in lines]
    return [point.removeprefix(head) for point in points if point.startswith(head)]


def topmost(points: list[str]) -> list[str]:
    """Leave out what comes with another: a bind takes along what is mounted below."""
    return [point for point in points if not any(point.startswith(other + "/") for other in points)]
