# SPDX-License-Identifier: Apache-2.0
"""Namespaces and mounts by the system calls themselves: nothing has to be installed, and the host's own tree is left alone.

What is mounted here lies in a mount namespace that the caller has made (`isolate`), and goes with its last process.
"""

from __future__ import annotations

import ctypes
import errno
import fcntl
import os
import socket
import stat
import struct
from pathlib import Path

CLONE_NEWNS = 0x00020000
CLONE_NEWUSER = 0x10000000
CLONE_NEWNET = 0x40000000

MS_NOSUID, MS_NODEV = 2, 4
MS_BIND, MS_REC, MS_PRIVATE = 0x1000, 0x4000, 0x40000
MNT_DETACH = 2
PR_SET_PDEATHSIG = 1
PR_SET_CHILD_SUBREAPER = 36
SIOCGIFFLAGS, SIOCSIFFLAGS, IFF_UP = 0x8913, 0x8914, 1

FUSE_DEVICE = "/dev/fuse"

_libc = ctypes.CDLL(None, use_errno=True)


class _IoVec(ctypes.Structure):
    _fields_ = (("base", ctypes.c_void_p), ("length", ctypes.c_size_t))


_one_vector = ctypes.POINTER(_IoVec)
for _copy in (_libc.process_vm_readv, _libc.process_vm_writev):
    _copy.argtypes = (ctypes.c_int, _one_vector, ctypes.c_ulong, _one_vector, ctypes.c_ulong, ctypes.c_ulong)
    _copy.restype = ctypes.c_ssize_t


def _check(result: int, what: str) -> int:
    if result < 0:
        number = ctypes.get_errno()
        raise OSError(number, f"{what}: {os.strerror(number)}")
    return result


def unshare(flags: int) -> None:
    """Leave namespaces for new ones."""
    _check(_libc.unshare(flags), "unshare")


def mount(source: str, target: str, kind: str | None, flags: int = 0, options: str | None = None) -> None:
    """Mount, with the errors of the system call."""
    kind_, options_ = kind and os.fsencode(kind), options and os.fsencode(options)
    _check(
        _libc.mount(os.fsencode(source), os.fsencode(target), kind_, ctypes.c_ulong(flags), options_),
        f"mount {kind or source} on {target}",
    )


def unmount(target: str, flags: int = MNT_DETACH) -> None:
    """Mirror umount2(2)."""
    _check(_libc.umount2(os.fsencode(target), flags), f"unmount {target}")


def bind(source: str, target: str) -> None:
    """Show at `target`, which exists, what lies at `source`, with all that is mounted below it."""
    mount(source, target, None, MS_BIND | MS_REC)


def mount_fuse(target: str, *, directory: bool = True, name: str = "pvbus", options: str = "allow_other") -> int:
    """Mount a FUSE file system on a directory, or on a file that is its only node; give its descriptor, for a `Session`.

    Nobody serves it yet: look at nothing below it before a session runs, in another process or thread.
    """
    fd = os.open(FUSE_DEVICE, os.O_RDWR | os.O_CLOEXEC)
    kind = stat.S_IFDIR if directory else stat.S_IFREG
    given = f"fd={fd},rootmode={kind | 0o755:o},user_id={os.geteuid()},group_id={os.getegid()}"
    try:
        mount(name, target, f"fuse.{name}", MS_NOSUID | MS_NODEV, f"{given},{options}" if options else given)
    except OSError:
        os.close(fd)
        raise
    return fd


def isolate(*, network: bool = True) -> None:
    """Give this process a mount and, unless told otherwise, a network namespace of its own; a user namespace if it needs one.

    In a user namespace it is root, and its own user outside. Mounts made from here on are seen by its descendants only.
    """
    uid, gid = os.geteuid(), os.getegid()
    flags = CLONE_NEWNS | (CLONE_NEWNET if network else 0)
    try:
        unshare(flags)
    except PermissionError:
        unshare(flags | CLONE_NEWUSER)
        Path("/proc/self/setgroups").write_text("deny", encoding="ascii")
        Path("/proc/self/uid_map").write_text(f"0 {uid} 1", encoding="ascii")
        Path("/proc/self/gid_map").write_text(f"0 {gid} 1", encoding="ascii")
    mount("none", "/", None, MS_REC | MS_PRIVATE)
    if network:
        loopback_up()


def loopback_up() -> None:
    """Switch the loopback interface of a fresh network namespace on."""
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as sock:
        asked = fcntl.ioctl(sock, SIOCGIFFLAGS, struct.pack("16sH14x", b"lo", 0))
        flags = struct.unpack("16sH14x", asked)[1]
        fcntl.ioctl(sock, SIOCSIFFLAGS, struct.pack("16sH14x", b"lo", flags | IFF_UP))


def die_with_parent(number: int) -> None:
    """Have the kernel send us a signal when the thread that forked us ends."""
    _check(_libc.prctl(PR_SET_PDEATHSIG, number, 0, 0, 0), "prctl")


def adopt_orphans() -> None:
    """Be the parent of every descendant whose own parent has ended."""
    _check(_libc.prctl(PR_SET_CHILD_SUBREAPER, 1, 0, 0, 0), "prctl")


_buffer = ctypes.create_string_buffer(16384)  # of the one thread that serves; the longest vector of segments fits
_ours = _IoVec(ctypes.addressof(_buffer), 0)
_theirs = _IoVec()
_ours_at, _theirs_at = ctypes.pointer(_ours), ctypes.pointer(_theirs)


def read_memory(pid: int, address: int, size: int) -> bytes:
    """Read the memory of the process that a thread belongs to. EFAULT for an address that cannot be read."""
    _ours.length = _theirs.length = size
    _theirs.base = address
    if _libc.process_vm_readv(pid, _ours_at, 1, _theirs_at, 1, 0) != size:
        number = ctypes.get_errno()
        raise OSError(number if number not in (0, errno.ESRCH) else errno.EFAULT, "the caller's memory")
    return ctypes.string_at(_buffer, size)


def write_memory(pid: int, address: int, data: bytes) -> int:
    """Write into the memory of the process that a thread belongs to, as far as it can be written; give how far."""
    ctypes.memmove(_buffer, data, len(data))
    _ours.length = _theirs.length = len(data)
    _theirs.base = address
    copied: int = _libc.process_vm_writev(pid, _ours_at, 1, _theirs_at, 1, 0)
    return max(copied, 0)
