# SPDX-License-Identifier: Apache-2.0
"""The run directory: where a running machine is found, and how it is told from what a dead one left.

`$XDG_RUNTIME_DIR/pvbus` (else `/tmp/pvbus-<uid>`) holds a directory for each machine, 0700, with
`machine.sock` and `run_id` in it. Its supervisor writes it; clients, `doctor` and the next start read it. The
supervisor holds a lock on the directory (flock) for as long as it lives: that, and not a pid in a file, says
whether a machine is alive, from its first moment on and without races between two that start at once.
"""

from __future__ import annotations

import contextlib
import errno
import fcntl
import os
import re
import shutil
import socket
import stat
import struct
import time
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

NAME = re.compile(r"[a-z0-9][a-z0-9-]{0,31}")
SOCKET_NAME = "machine.sock"
RUN_ID_NAME = "run_id"
RUN_ID = re.compile(r"[a-z0-9]{4,32}")
SHM_DIRECTORY = Path("/dev/shm")
CONNECT_S_MAX = 2.0
"""How long a connection may take to be queued; only a supervisor that is stopped keeps one waiting."""
LOCK_TRIES = 20
LOCK_PAUSE_S = 0.01
"""Who looks whether a machine lives holds its lock for a moment; a start waits at most 0.2 s for that to
pass.
"""
BACKLOG = 64

_held: dict[Path, int] = {}
"""The locks of the machines that this process runs; the kernel releases them at its death, however it dies.
"""


class Machine(NamedTuple):
    """Tell of one directory: `alive` if its socket takes connections, `held` if a supervisor has its lock."""

    name: str
    path: Path
    alive: bool
    held: bool
    run_id: str


def run_root() -> Path:
    """Return the directory that holds all machines of this user.

    $PVBUS_RUN_ROOT names it where the uid does not: in a user namespace, where everybody is root.
    """
    given = os.environ.get("PVBUS_RUN_ROOT")
    if given:
        return Path(given)
    runtime = os.environ.get("XDG_RUNTIME_DIR")
    return Path(runtime) / "pvbus" if runtime else Path(f"/tmp/pvbus-{os.geteuid()}")


def run_directory(name: str) -> Path:
    """Return the directory of a machine; ValueError for a name that is none."""
    if not NAME.fullmatch(name):
        raise ValueError(
            f"{name!r} is no machine name: a-z, 0-9 and '-', at most 32, beginning with a letter or a digit"
        )
    return run_root() / name


def create(name: str, run_id: str = "") -> Path:
    """Make and lock the machine's directory, cleaning what a dead one of that name left; return its path.

    FileExistsError if the machine runs, PermissionError for a directory that is another's or open to others.
    """
    path = run_directory(name)
    path.parent.mkdir(parents=True, mode=0o700, exist_ok=True)
    _check_private(path.parent)
    for _ in range(LOCK_TRIES):
        with contextlib.suppress(FileExistsError):
            path.mkdir(mode=0o700)
        _check_private(path)
        fd = _lock(path)
        if fd is not None:
            break
        if connectable(path):
            raise FileExistsError(errno.EEXIST, f"machine {name} is running", str(path))
        time.sleep(LOCK_PAUSE_S)
    else:
        raise FileExistsError(errno.EEXIST, f"machine {name} is starting or stopping", str(path))
    _held[path] = fd
    _empty(path)
    if run_id:
        (path / RUN_ID_NAME).write_text(run_id + "\n")
    return path


def remove(name: str) -> None:
    """Remove the directory of a machine that this process runs, and release its lock."""
    path = run_directory(name)
    fd = _held.pop(path, None)
    if fd is not None:
        shutil.rmtree(path, ignore_errors=True)
        os.close(fd)


def list_machines() -> list[Machine]:
    """Return the machines of this user, the dead ones included, in the order of their names."""
    try:
        paths = sorted(path for path in run_root().iterdir() if NAME.fullmatch(path.name) and path.is_dir())
    except FileNotFoundError:
        return []
    return [Machine(path.name, path, connectable(path), _is_held(path), _run_id(path)) for path in paths]


def clean(name: str) -> list[str]:
    """Remove what a dead machine left, its segments included; return what was removed, BlockingIOError if it
    lives.
    """
    path = run_directory(name)
    if not path.exists():
        return []
    _check_private(path)
    fd = _lock(path)
    if fd is None:
        raise BlockingIOError(errno.EBUSY, f"machine {name} is running", str(path))
    try:
        removed = _empty(path)
        path.rmdir()
    finally:
        os.close(fd)
    return [*removed, str(path)]


def bind_machine(path: Path) -> socket.socket:
    """Return the listening `machine.sock` of a directory."""
    sock = socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    with _short_name(path) as short:
        sock.bind(f"{short}/{SOCKET_NAME}")
    sock.listen(BACKLOG)
    return sock


def connect_machine(path: Path, timeout_s: float = CONNECT_S_MAX) -> socket.socket:
    """Return a connection to the machine in `path`, its uid checked; OSError if none answers there."""
    sock = socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    try:
        sock.settimeout(timeout_s)
        with _short_name(path) as short:
            sock.connect(f"{short}/{SOCKET_NAME}")
        check_peer_uid(sock)
        sock.settimeout(None)
    except BaseException:
        sock.close()
        raise
    return sock


def connectable(path: Path) -> bool:
    """Return whether a machine of ours takes connections there."""
    try:
        connect_machine(path).close()
    except OSError:
        return False
    return True


def check_peer_uid(sock: socket.socket) -> None:
    """Raise PermissionError unless the other side's process runs under our uid (SO_PEERCRED)."""
    credentials = sock.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, struct.calcsize("iII"))
    uid = struct.unpack("iII", credentials)[1]
    if uid != os.geteuid():
        raise PermissionError(errno.EPERM, f"the other side runs as uid {uid}, not {os.geteuid()}")


@contextlib.contextmanager
def _short_name(path: Path) -> Iterator[str]:
    """Name a directory in few letters: a socket's address has 107, a temporary directory easily more."""
    fd = os.open(path, os.O_PATH | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        yield f"/proc/self/fd/{fd}"
    finally:
        os.close(fd)


def _check_private(path: Path) -> None:
    status = path.lstat()
    if not stat.S_ISDIR(status.st_mode):
        raise PermissionError(errno.EPERM, "not a directory", str(path))
    if status.st_uid != os.geteuid():
        raise PermissionError(errno.EPERM, f"belongs to uid {status.st_uid}", str(path))
    if status.st_mode & 0o077:
        raise PermissionError(errno.EPERM, f"open to others (mode {status.st_mode & 0o777:04o})", str(path))


def _lock(path: Path, how: int = fcntl.LOCK_EX) -> int | None:
    """Lock a directory and return the descriptor, None if another has it or it was removed meanwhile."""
    try:
        fd = os.open(path, os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW | os.O_CLOEXEC)
    except FileNotFoundError:
        return None
    try:
        fcntl.flock(fd, how | fcntl.LOCK_NB)
        if os.path.samestat(os.fstat(fd), path.lstat()):
            return fd
    except (BlockingIOError, FileNotFoundError):
        pass
    os.close(fd)
    return None


def _is_held(path: Path) -> bool:
    if path in _held:
        return True
    fd = _lock(path, fcntl.LOCK_SH)
    if fd is None:
        return path.exists()
    os.close(fd)
    return False


def _run_id(path: Path) -> str:
    try:
        text = (path / RUN_ID_NAME).read_text(encoding="ascii", errors="replace").strip()
    except OSError:
        return ""
    return text if RUN_ID.fullmatch(text) else ""


def _empty(path: Path) -> list[str]:
    """Remove what lies in a locked directory and the segments of the run it names."""
    removed: list[str] = []
    run_id = _run_id(path)
    if run_id:
        for segment in sorted(SHM_DIRECTORY.glob(f"pvbus-{run_id}-*")):
            if segment.lstat().st_uid == os.geteuid():
                segment.unlink(missing_ok=True)
                removed.append(str(segment))
    for entry in sorted(path.iterdir()):
        if entry.is_dir() and not entry.is_symlink():
            shutil.rmtree(entry, ignore_errors=True)
        else:
            entry.unlink(missing_ok=True)
        removed.append(str(entry))
    return removed
