# SPDX-License-Identifier: Apache-2.0
"""User notification of seccomp(2): its structures and calls, and what it takes to look into the process that made the call.

Nothing here knows what an event channel is. Calls that Python has no name for go through ctypes.
"""

from __future__ import annotations

import contextlib
import ctypes
import errno
import fcntl
import mmap
import os
import struct
from pathlib import Path
from typing import NamedTuple

from pvbus.view.seccomp import bpf

_NOTIFICATION = struct.Struct("=QIIiIQ6Q")
_RESPONSE = struct.Struct("=QqiI")
_ADD_FD = struct.Struct("=QIIII")
_RECV, _SEND, _ADDFD, _SET_FLAGS = 0xC0502100, 0xC0182101, 0x40182103, 0x40082104
_SET_MODE_FILTER = 1
_NEW_LISTENER, _WAIT_KILLABLE = 1 << 3, 1 << 5
_CONTINUE = 1
_ADDFD_SEND = 2
_SYNC_WAKE_UP = 1
_PR_SET_NO_NEW_PRIVS = 38
_PIDFD_THREAD = os.O_EXCL
STRING_BYTES_MAX = 4096  # PATH_MAX

_libc = ctypes.CDLL(None, use_errno=True)
_libc.syscall.restype = ctypes.c_long

class _Program(ctypes.Structure):
    _fields_ = (("length", ctypes.c_ushort), ("filter", ctypes.c_char_p))


class _Iovec(ctypes.Structure):
    _fields_ = (("base", ctypes.c_void_p), ("length", ctypes.c_size_t))


class Call(NamedTuple):
    """A system call that waits for its answer: who (a thread's id) makes which, with what."""

    id: int
    tid: int
    number: int
    arguments: tuple[int, ...]
    audit: int
    """Of which kind of program it is, and so which number means what."""


def _failed(what: str) -> OSError:
    number = ctypes.get_errno()
    return OSError(number, f"{what}: {os.strerror(number)}")


def install(code: bytes) -> int:
    """Put a filter over the calling thread and all that comes of it, for ever; give the listener's descriptor.

    To be called between fork and exec. From the moment on that it returns, each of the filtered calls waits for an answer
    on the listener. OSError where the kernel has no user notification, or another listener is in place already (EBUSY).
    """
    machine = bpf.here()
    steps = _Program(len(code) // 8, code)
    # Killable: once the front end has taken a call up, only death ends it. A bind would otherwise be made twice when a
    # signal comes in the middle. On the device those calls cannot be interrupted either.
    flags = _NEW_LISTENER | _WAIT_KILLABLE
    listener = int(_libc.syscall(machine.seccomp, _SET_MODE_FILTER, flags, ctypes.byref(steps)))
    if listener < 0 and ctypes.get_errno() == errno.EACCES:  # who may not filter setuid programs promises to run none
        _libc.prctl(_PR_SET_NO_NEW_PRIVS, 1, 0, 0, 0)
        listener = int(_libc.syscall(machine.seccomp, _SET_MODE_FILTER, flags, ctypes.byref(steps)))
    if listener < 0:
        raise _failed("user notification (Linux 5.19)")
    return listener


def probe(code: bytes) -> None:
    """Try in a child whether this filter can be installed here. OSError says what stands against it."""
    pid = os.fork()
    if pid == 0:
        number = errno.EIO
        try:
            os.close(install(code))
            number = 0
        except OSError as error:
            number = error.errno or errno.EIO
        finally:
            os._exit(number)
    number = os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])
    if number:
        raise OSError(number, os.strerror(number))


def tune(listener: int) -> None:
    """Have the kernel wake whoever answers on the caller's own CPU, where it can (Linux 6.6)."""
    with contextlib.suppress(OSError):  # an older kernel answers EINVAL, and is slower
        fcntl.ioctl(listener, _SET_FLAGS, _SYNC_WAKE_UP)


def receive(listener: int) -> Call | None:
    """Take up the next call; None if its caller has gone meanwhile."""
    buffer = bytearray(_NOTIFICATION.size)
    try:
        fcntl.ioctl(listener, _RECV, buffer)
    except FileNotFoundError:
        return None
    call, tid, _, number, audit, _, *arguments = _NOTIFICATION.unpack(buffer)
    return Call(call, tid, number, tuple(arguments), audit)


def _send(listener: int, response: bytes) -> None:
    with contextlib.suppress(FileNotFoundError):  # the caller has been killed: nobody waits for this
        fcntl.ioctl(listener, _SEND, response)


def answer(listener: int, call: Call, value: int) -> None:
    """End a call with a value."""
    _send(listener, _RESPONSE.pack(call.id, value, 0, 0))


def refuse(listener: int, call: Call, number: int) -> None:
    """End a call with an errno."""
    _send(listener, _RESPONSE.pack(call.id, 0, -number, 0))


def let_through(listener: int, call: int) -> None:
    """Have the kernel carry out the call of that id, as if there were no filter."""
    _send(listener, _RESPONSE.pack(call, 0, 0, _CONTINUE))


def inject(listener: int, call: Call, fd: int, *, cloexec: bool) -> bool:
    """End a call with a new descriptor of its caller's, a copy of `fd`; False if the caller has gone. OSError EMFILE."""
    request = _ADD_FD.pack(call.id, _ADDFD_SEND, fd, 0, os.O_CLOEXEC if cloexec else 0)
    try:
        fcntl.ioctl(listener, _ADDFD, request)
    except FileNotFoundError:
        return False
    return True


# ---- the caller

_VECTOR = ctypes.POINTER(_Iovec)
for _copy in (_libc.process_vm_readv, _libc.process_vm_writev):
    _copy.argtypes = (ctypes.c_int, _VECTOR, ctypes.c_ulong, _VECTOR, ctypes.c_ulong, ctypes.c_ulong)
    _copy.restype = ctypes.c_ssize_t


_COPY_BYTES_MAX = 16384  # a vector of 1,024 segments
_buffer = ctypes.create_string_buffer(_COPY_BYTES_MAX)  # one thread serves
_ours, _theirs = _Iovec(ctypes.addressof(_buffer), 0), _Iovec()
_ours_at, _theirs_at = ctypes.pointer(_ours), ctypes.pointer(_theirs)


def read_memory(tid: int, address: int, size: int) -> bytes | None:
    """Copy `size` bytes, 16,384 at most, out of a process; None for a bad pointer. OSError: it may not be looked into."""
    _theirs.base = address
    _ours.length = _theirs.length = size
    copied = _libc.process_vm_readv(tid, _ours_at, 1, _theirs_at, 1, 0)
    if copied < 0 and ctypes.get_errno() != errno.EFAULT:
        raise _failed(f"process_vm_readv of {tid}")
    return ctypes.string_at(_buffer, size) if copied == size else None


def write_memory(tid: int, address: int, data: bytes) -> bool:
    """Copy into a process; False for a bad pointer. OSError for a process that may not be written into."""
    ctypes.memmove(_buffer, data, len(data))
    _theirs.base = address
    _ours.length = _theirs.length = len(data)
    copied = _libc.process_vm_writev(tid, _ours_at, 1, _theirs_at, 1, 0)
    if copied < 0 and ctypes.get_errno() != errno.EFAULT:
        raise _failed(f"process_vm_writev of {tid}")
    return bool(copied == len(data))


def read_string(tid: int, address: int) -> bytes | None:
    """Copy a path out of a process, a page at a time; None for a bad pointer and for one that does not end."""
    found = b""
    while len(found) < STRING_BYTES_MAX:
        at = address + len(found)
        piece = read_memory(tid, at, min(256, mmap.PAGESIZE - at % mmap.PAGESIZE))
        if piece is None:
            return None
        text, end, _ = piece.partition(b"\0")
        found += text
        if end:
            return found
    return None


def _numbers_of(tid: int, name: bytes) -> list[int]:
    """Give what a line of a thread's status says. OSError ESRCH when it has gone."""
    for line in Path(f"/proc/{tid}/status").read_bytes().split(b"\n"):
        if line.startswith(name):
            return [int(word) for word in line.split()[1:]]
    raise ProcessLookupError(errno.ESRCH, f"no process {tid}")


def group_of(tid: int) -> int:
    """Give the process that a thread belongs to. OSError ESRCH when it has gone."""
    return _numbers_of(tid, b"Tgid:")[0]


def uids_of(tid: int) -> tuple[int, int, int, int]:
    """Give a thread's user: real, effective, saved, and of the file system. OSError likewise."""
    real, effective, saved, of_files = _numbers_of(tid, b"Uid:")
    return real, effective, saved, of_files


def descriptor_of(tid: int, fd: int) -> int:
    """Make a copy of a thread's descriptor, close-on-exec. OSError EBADF, ESRCH, EPERM."""
    machine = bpf.here()
    pidfd = int(_libc.syscall(machine.pidfd_open, tid, _PIDFD_THREAD))
    if pidfd < 0:  # before Linux 6.9 for the first thread of a process only
        pidfd = os.pidfd_open(group_of(tid))
    try:
        copy = int(_libc.syscall(machine.pidfd_getfd, pidfd, fd, 0))
        if copy < 0:
            raise _failed(f"pidfd_getfd of {tid}")
        return copy
    finally:
        os.close(pidfd)
