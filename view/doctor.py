# SPDX-License-Identifier: Apache-2.0
"""`pvbus doctor`: does this host give a machine what it needs, and what have dead machines left here?

Looks at limits, the kernel and the native core, at the run directories, and at segments in /dev/shm that no
living process holds. With `--clean` it takes away what is left, and only that: a run directory is cleaned
under its lock, and a segment that any process has mapped or open is another machine's, whichever run
directory that has.
"""

from __future__ import annotations

import os
import re
import resource
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

from pvbus.actors.runtime import rundir
from pvbus.actors.supervisor.limits import DESCRIPTORS_OF_A_MACHINE, DESCRIPTORS_PER_FILE
from pvbus.actors.supervisor.pool import SPARES
from pvbus.shm.layout import DOMAINS_MAX, FILES_MAX, Domain, Machine

DESCRIPTORS_OF_A_USER = 5  # what who opens a file keeps of it, and some air
PROCESSES_NEEDED = 64 + SPARES
SHM_BYTES_NEEDED = Machine.BYTES + 2 * Domain.BYTES  # the default machine
SHM_BYTES_WISHED = Machine.BYTES + DOMAINS_MAX * Domain.BYTES
SEGMENT = re.compile(r"pvbus-([a-z0-9]{4,32})-\w+")


class Check(NamedTuple):
    """One thing that a machine needs: "ok", "limited" (it runs, smaller than it could) or "lacking"."""

    name: str
    level: str
    found: str
    advice: str = ""


class Leftover(NamedTuple):
    """What a dead machine has left."""

    kind: str
    path: str
    machine: str


# ---- what the host gives


def checks() -> list[Check]:
    """Look at everything a machine needs of its host."""
    return [_python(), _native(), _kernel(), _cores(), _shm(), _descriptors(), _processes(), _run_root()]


def _python() -> Check:
    found = ".".join(map(str, sys.version_info[:3]))
    if sys.version_info < (3, 11):  # noqa: UP036 - this is who says so
        return Check("python", "lacking", found, "pvbus needs Python 3.11 or newer")
    return Check("python", "ok", found)


def _native() -> Check:
    try:
        from pvbus.shm import _core
    except ImportError as error:
        return Check("native core", "lacking", str(error), "build it: make setup")
    return Check("native core", "ok", Path(_core.__file__ or "?").name)


def _kernel() -> Check:
    release = os.uname().release
    missing = [name for name in ("pidfd_open", "memfd_create", "eventfd") if not hasattr(os, name)]
    if not missing:
        try:
            os.close(os.pidfd_open(os.getpid()))
            os.close(os.memfd_create("pvbus-doctor", os.MFD_ALLOW_SEALING))
        except OSError as error:
            missing = [error.strerror or "a system call"]
    if missing:
        return Check(
            "kernel",
            "lacking",
            f"{release}: {', '.join(missing)}",
            "pvbus needs Linux 5.3 or newer, without a filter",
        )
    return Check("kernel", "ok", release)


def _cores() -> Check:
    count = len(os.sched_getaffinity(0))
    advice = "with one core every hand-over costs a context switch: correct, and slow" if count < 2 else ""
    return Check("cores", "ok" if count > 1 else "limited", str(count), advice)


def _shm() -> Check:
    try:
        room = os.statvfs(rundir.SHM_DIRECTORY)
    except OSError as error:
        return Check(
            "shared memory", "lacking", error.strerror or "", f"mount a tmpfs at {rundir.SHM_DIRECTORY}"
        )
    free = room.f_bavail * room.f_frsize
    found = f"{free // 2**20} MiB free in {rundir.SHM_DIRECTORY}"
    if not os.access(rundir.SHM_DIRECTORY, os.W_OK) or free < SHM_BYTES_NEEDED:
        advice = (
            f"the default machine needs {SHM_BYTES_NEEDED // 2**20 + 1} MiB there (containers: --shm-size)"
        )
        return Check("shared memory", "lacking", found, advice)
    if free < SHM_BYTES_WISHED:
        advice = f"{DOMAINS_MAX} domains need {SHM_BYTES_WISHED // 2**20 + 1} MiB (containers: --shm-size)"
        return Check("shared memory", "limited", found, advice)
    return Check("shared memory", "ok", found)


def _descriptors() -> Check:
    """A machine raises its soft limit to the hard one; who opens files lives with the soft one."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    wished = FILES_MAX * DESCRIPTORS_PER_FILE + DESCRIPTORS_OF_A_MACHINE
    if hard != resource.RLIM_INFINITY and hard < wished:
        files = max(0, hard - DESCRIPTORS_OF_A_MACHINE) // DESCRIPTORS_PER_FILE
        advice = f"about {files} files can be open at once; for all {FILES_MAX}: ulimit -Hn {wished}"
        return Check("descriptors", "limited" if hard >= DESCRIPTORS_OF_A_MACHINE else "lacking", str(hard), advice)
    if soft != resource.RLIM_INFINITY and soft < FILES_MAX * DESCRIPTORS_OF_A_USER:
        advice = f"one process can hold about {soft // DESCRIPTORS_OF_A_USER} files open; for more: ulimit -n"
        return Check("descriptors", "ok", str(soft), advice)
    return Check("descriptors", "ok", "no limit" if soft == resource.RLIM_INFINITY else str(soft))


def _processes() -> Check:
    limit = resource.getrlimit(resource.RLIMIT_NPROC)[0]
    wished = FILES_MAX + PROCESSES_NEEDED
    if limit == resource.RLIM_INFINITY or limit >= wished:
        return Check("processes", "ok", "no limit" if limit == resource.RLIM_INFINITY else str(limit))
    advice = f"an open file is a process of its own; for all {FILES_MAX}: ulimit -u {wished}"
    return Check("processes", "limited" if limit >= PROCESSES_NEEDED else "lacking", str(limit), advice)


def _run_root() -> Check:
    root = rundir.run_root()
    try:
        status = root.lstat()
    except FileNotFoundError:
        parent = root.parent
        writable = parent.is_dir() and os.access(parent, os.W_OK)
        advice = (
            "" if writable else f"{parent} must exist and be writable, or XDG_RUNTIME_DIR name another place"
        )
        return Check("run directory", "ok" if writable else "lacking", f"{root}, not made yet", advice)
    except OSError as error:
        return Check(
            "run directory",
            "lacking",
            f"{root}: {error.strerror}",
            "XDG_RUNTIME_DIR must name a place of yours",
        )
    if status.st_uid != os.geteuid() or status.st_mode & 0o077 or not root.is_dir():
        found = f"{root}, uid {status.st_uid}, mode {status.st_mode & 0o777:04o}"
        return Check(
            "run directory", "lacking", found, "it must be a directory of yours, closed to others: chmod 0700"
        )
    return Check("run directory", "ok", str(root))


# ---- what dead machines left


def leftovers(name: str | None = None) -> list[Leftover]:
    """Find what dead machines left, of one machine or of all."""
    machines = rundir.list_machines()
    found = [
        Leftover("run directory", str(machine.path), machine.name)
        for machine in machines
        if not machine.held and name in (None, machine.name)
    ]
    owners = {machine.run_id: machine for machine in machines if machine.run_id}
    held: set[str] | None = None
    for path in sorted(rundir.SHM_DIRECTORY.glob("pvbus-*")):
        match = SEGMENT.fullmatch(path.name)
        if match is None or path.lstat().st_uid != os.geteuid():
            continue
        owner = owners.get(match[1])
        if (owner is not None and owner.held) or (name is not None and (owner is None or owner.name != name)):
            continue
        held = _held_segments() if held is None else held
        if path.name not in held:
            found.append(Leftover("segment", str(path), owner.name if owner is not None else ""))
    return found


def _held_segments() -> set[str]:
    """Find the names of segments that some process has mapped or open."""
    held: set[str] = set()
    prefix = f"{rundir.SHM_DIRECTORY}/"
    for process in Path("/proc").iterdir():
        if process.name.isdigit():
            held.update(path.removeprefix(prefix) for path in _paths_of(process) if path.startswith(prefix))
    return held


def _paths_of(process: Path) -> Iterator[str]:
    try:
        for line in (process / "maps").read_text(encoding="utf-8", errors="replace").splitlines():
            yield line.partition("/")[1] + line.partition("/")[2]
        for link in (process / "fd").iterdir():
            yield str(link.readlink())
    except OSError:  # it has ended, or is another user's and cannot map what only we may open
        return


def clean(left: list[Leftover]) -> tuple[list[str], list[str]]:
    """Take leftovers away; return what was removed, and a sentence for each that was not."""
    removed: list[str] = []
    kept: list[str] = []
    for item in left:
        try:
            if item.kind == "segment":
                Path(item.path).unlink(missing_ok=True)
                removed.append(item.path)
            else:
                removed.extend(rundir.clean(item.machine))
        except OSError as error:
            kept.append(f"{item.path}: {error.strerror}")
    return list(dict.fromkeys(removed)), kept


def examine(name: str | None = None, *, take_away: bool = False) -> dict[str, Any]:
    """Do what `pvbus doctor` does, and give the findings as plain data."""
    found = checks()
    left = leftovers(name)
    removed, kept = clean(left) if take_away else ([], [])
    return {
        "ok": all(check.level != "lacking" for check in found) and (not left or (take_away and not kept)),
        "checks": [check._asdict() for check in found],
        "leftovers": [] if take_away and not kept else [item._asdict() for item in left],
        "removed": removed,
        "kept": kept,
    }
