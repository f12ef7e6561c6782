# SPDX-License-Identifier: Apache-2.0
"""What a device answers to calls that the kernel answers by itself for the regular file that FUSE makes of it.

`Regular.answer` is asked about a call that the filter (regular_calls.py) has handed over. Where the kernel's own answer is the
device's as well, above all an error that it finds before it looks at what kind of file this is, the call is let through: so each
method here only has to know when the kernel would go further than that. Which file a call is about is seen without asking any
file system for anything. The device's own server is asked, and waited for, where more is to be known of an open file: it has no
filter over itself. That of a run within the run has this one, and may be waiting for us: it is never asked.
"""

from __future__ import annotations

import errno
import fcntl
import os
import select
import struct
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING

from pvbus.view.seccomp import abi, regular_calls, sigio
from pvbus.view.seccomp.bpf import FIOASYNC
from pvbus.view.seccomp.patience import Patience
from pvbus.view.seccomp.seen import is_a_tree_of_ours, look

if TYPE_CHECKING:
    from pvbus.view.seccomp.regular_calls import Abi

Answer = int | None
"""What the call gives, an errno below zero; None: let it through."""
_Method = Callable[[abi.Call, "Abi"], Answer]

_IOCB, _AIO_TRANSFERS = struct.Struct("=16xH2xI40x"), {0, 1, 7, 8}
_INT_MAX, _LOFF_MAX = (1 << 31) - 1, (1 << 63) - 1
_USER_END = 1 << 47  # behind it no program has memory, and the kernel says so first
_CLONE_SOURCE, _DEDUPE_BYTES = struct.Struct("=q"), 24
_SYNC_FLAGS = 7
_FALLOCATE_MODES = {0, 1, 3, 0x8, 0x10, 0x11, 0x20, 0x40, 0x41, 0x80}
"""What the kernel takes for a mode before it looks at the file: FALLOC_FL_*, with KEEP_SIZE where that is allowed."""
_OF_EVERY_FILE = {0xC020660B, 0xC0045877, 0xC0045878, 0x80811501, 0x80111500}
"""FS_IOC_FIEMAP, FIFREEZE, FITHAW, FS_IOC_GETFSSYSFSPATH, FS_IOC_GETFSUUID: no driver ever sees them."""
_F_SETLEASE_ARGUMENTS = {0, 1, 2}


def _signed(low: int, high: int) -> int:
    return _signed64(low & 0xFFFFFFFF | (high & 0xFFFFFFFF) << 32)


class Regular:
    """Answers for the device's files of one mount, and of runs within the run; `directory` is where it is mounted."""

    def __init__(self, directory: str, signals: sigio.Signals) -> None:
        self._signals = signals
        self._patience = Patience()
        self._mount = look(directory).mount
        self._methods: dict[tuple[int, int], tuple[_Method, Abi]] = {}
        for known in regular_calls.here():
            methods: dict[int, _Method] = {
                known.read: self._transfer, known.write: self._transfer, known.mmap: self._mmap, known.ioctl: self._ioctl,
                known.fallocate: self._fallocate, known.readahead: self._readahead,
                known.sync_file_range: self._sync_file_range, known.copy_file_range: self._copy_file_range,
                known.io_submit: self._io_submit,
                **dict.fromkeys(known.fcntl, self._fcntl),
            }  # fmt: skip
            self._methods |= {(known.audit, number): (method, known) for number, method in methods.items()}

    def answer(self, call: abi.Call) -> Answer:
        """Give what the device answers."""
        found = self._methods.get((call.audit, call.number))
        return found[0](call, found[1]) if found is not None else None

    # ---- whose file

    def _is_ours(self, tid: int, fd: int) -> bool:
        """Whether a thread's descriptor is an open device of ours; one by O_PATH is none."""
        mount = _mount_of(tid, fd)
        return mount is not None and (mount == self._mount or is_a_tree_of_ours(tid, mount)) and not _flags(tid, fd) & os.O_PATH

    @staticmethod
    def _reads(tid: int, fd: int) -> bool:
        return _flags(tid, fd) & os.O_ACCMODE in (os.O_RDONLY, os.O_RDWR)

    @staticmethod
    def _writes(tid: int, fd: int) -> bool:
        return _flags(tid, fd) & os.O_ACCMODE in (os.O_WRONLY, os.O_RDWR)

    # ---- the calls

    def _transfer(self, call: abi.Call, known: Abi) -> Answer:
        """Mirror evtchn_read and evtchn_write for what FUSE does not get to see, as the kernel looks at the pointer first."""
        fd, address, count = call.arguments[:3]
        is_read = call.number == known.read
        if address >= _USER_END or not self._is_ours(call.tid, fd):
            return None
        if not (self._reads if is_read else self._writes)(call.tid, fd):
            return None
        if count < regular_calls.SHORT:
            return 0
        return self._ask(call, _before_the_pointer) if is_read else None

    def _mmap(self, call: abi.Call, known: Abi) -> Answer:
        """Refuse a private mapping, as any file whose driver has no such method."""
        _, length, _, flags, fd, offset = call.arguments
        is_private = flags & 0xF == 2
        if not is_private or not length or (not known.halves and offset % os.sysconf("SC_PAGESIZE")):
            return None
        return -errno.ENODEV if self._is_ours(call.tid, fd) and self._reads(call.tid, fd) else None

    def _ioctl(self, call: abi.Call, _: Abi) -> Answer:
        """Mirror the end of evtchn_ioctl (A9.9) for what FUSE does not pass on as it is, or not at all."""
        fd, request, argument = call.arguments[:3]
        request &= 0xFFFFFFFF
        if request in _OF_EVERY_FILE or not self._is_ours(call.tid, fd):
            return None
        if request == FIOASYNC:
            wanted = abi.read_memory(call.tid, argument, 4)
            if wanted is None:
                return None
            return self._ask(call, lambda copy: self._switch(call, copy, on=any(wanted)))
        if request in (regular_calls.FICLONE, regular_calls.FICLONERANGE):
            source: int | None = argument
            if request == regular_calls.FICLONERANGE:
                raw = abi.read_memory(call.tid, argument, _CLONE_SOURCE.size)
                source = _CLONE_SOURCE.unpack(raw)[0] if raw else None
            return -errno.EINVAL if source is not None and self._is_ours(call.tid, source) else None
        if request == regular_calls.FIDEDUPERANGE:
            return -errno.EINVAL if abi.read_memory(call.tid, argument, _DEDUPE_BYTES) else None
        return -errno.ENOTTY if request == regular_calls.FIOQSIZE else -errno.ENOSYS

    def _fcntl(self, call: abi.Call, _: Abi) -> Answer:
        """Refuse leases, but to who may have none at all, and O_DIRECT; see to SIGIO."""
        fd, command, argument = call.arguments[:3]
        command &= 0xFFFFFFFF
        if not self._is_ours(call.tid, fd):
            return None
        if command == regular_calls.F_SETLEASE:
            return -errno.EINVAL if argument & 0xFFFFFFFF in _F_SETLEASE_ARGUMENTS and _is_root(call.tid) else None
        if command == fcntl.F_SETFL and argument & regular_calls.O_DIRECT:
            return -errno.EINVAL
        owner = abi.read_memory(call.tid, argument, sigio.OWNER.size) if command == regular_calls.F_SETOWN_EX else b""
        if owner is None:
            return None
        return self._ask(call, lambda copy: self._asynchronous(call, command, owner or _signed32(argument), copy))

    def _asynchronous(self, call: abi.Call, command: int, argument: int | bytes, copy: int) -> Answer:
        """See to SIGIO, and show O_ASYNC, by a copy of the descriptor."""
        if command == fcntl.F_GETFL:
            return fcntl.fcntl(copy, fcntl.F_GETFL) | (os.O_ASYNC if self._signals.is_on(copy) else 0)
        if command == fcntl.F_SETFL and isinstance(argument, int):
            self._switch(call, copy, on=bool(argument & os.O_ASYNC))
        elif self._signals.is_on(copy):
            if command != regular_calls.F_SETSIG and not _shares_our_numbers(call.tid):
                self._signals.tell(copy, call.tid, regular_calls.F_SETOWN, 0)  # here its number would be somebody else's
                return None
            self._signals.tell(copy, call.tid, command, argument)
        return None

    def _switch(self, call: abi.Call, copy: int, *, on: bool) -> Answer:
        if on != self._signals.is_on(copy):
            self._signals.switch(copy, call.tid, call.arguments[0] & 0xFFFFFFFF, on=on)
        return 0

    def _ask(self, call: abi.Call, question: Callable[[int], Answer]) -> Answer:
        """Give the answer to a question about a copy of the call's descriptor, which asks the device's server.

        OSError: of a device of a run within the run, even whose close could wait for us, or when the server does not answer.
        """
        fd = call.arguments[0] & 0xFFFFFFFF
        if _mount_of(call.tid, fd) != self._mount:
            raise BlockingIOError(errno.EWOULDBLOCK, f"descriptor {fd} of {call.tid} is no device of this run")

        def ask() -> Answer:
            copy = abi.descriptor_of(call.tid, fd)
            try:
                return question(copy)
            finally:
                os.close(copy)

        return self._patience.ask(ask)

    def _fallocate(self, call: abi.Call, known: Abi) -> Answer:
        """Refuse it: there is nothing to allocate."""
        fd, mode, *rest = call.arguments
        offset, length = (_signed(*rest[:2]), _signed(*rest[2:4])) if known.halves else (_signed64(rest[0]), _signed64(rest[1]))
        if mode & 0xFFFFFFFF not in _FALLOCATE_MODES or offset < 0 or length <= 0 or not self._is_ours(call.tid, fd):
            return None
        return -errno.ENODEV if self._writes(call.tid, fd) else None

    def _readahead(self, call: abi.Call, _: Abi) -> Answer:
        """Refuse it: no page of it is ever kept."""
        fd = call.arguments[0]
        return -errno.EINVAL if self._is_ours(call.tid, fd) and self._reads(call.tid, fd) else None

    def _sync_file_range(self, call: abi.Call, known: Abi) -> Answer:
        """Refuse it: it has no ranges."""
        fd, *rest = call.arguments
        if known.halves:
            offset, length, flags = _signed(*rest[:2]), _signed(*rest[2:4]), rest[4]
        else:
            offset, length, flags = _signed64(rest[0]), _signed64(rest[1]), rest[2]
        if flags & 0xFFFFFFFF & ~_SYNC_FLAGS or offset < 0 or not 0 <= offset + length <= _LOFF_MAX or length < 0:
            return None
        return -errno.ESPIPE if self._is_ours(call.tid, fd) else None

    def _copy_file_range(self, call: abi.Call, _: Abi) -> Answer:
        """Refuse it: neither end may be a device."""
        fd, offset, to, offset_to, _length, flags = call.arguments
        if flags & 0xFFFFFFFF or not (self._is_ours(call.tid, fd) or self._is_ours(call.tid, to)):
            return None
        for at in (offset, offset_to):
            if at and abi.read_memory(call.tid, at, 8) is None:
                return None
        exist = all(os.path.lexists(f"/proc/{call.tid}/fd/{each & 0xFFFFFFFF}") for each in (fd, to))
        return -errno.EINVAL if exist else None

    def _io_submit(self, call: abi.Call, known: Abi) -> Answer:
        """Refuse a transfer by aio that comes first, as a driver without such methods does; what comes later is let through."""
        _, count, requests = call.arguments[:3]
        pointer = abi.read_memory(call.tid, requests, 4 if known.halves else 8) if _signed64(count) > 0 else None
        request = abi.read_memory(call.tid, int.from_bytes(pointer, "little"), _IOCB.size) if pointer else None
        if request is None:
            return None
        operation, fd = _IOCB.unpack(request)
        return -errno.EINVAL if operation in _AIO_TRANSFERS and self._is_ours(call.tid, fd) else None


def _before_the_pointer(copy: int) -> Answer:
    """Give what a read fails with before the driver copies anything; one that would wait, or give something, is let through."""
    poller = select.poll()
    poller.register(copy, select.POLLIN)
    ready = dict(poller.poll(0)).get(copy, 0)
    if ready & select.POLLHUP:
        return None
    if ready & select.POLLERR:
        return -errno.EFBIG
    return -errno.EAGAIN if not ready and not os.get_blocking(copy) else None


def _mount_of(tid: int, fd: int) -> tuple[int, int] | None:
    """Give the mount that a thread's descriptor of a device lies in; None for one of anything else."""
    fd &= 0xFFFFFFFF
    try:
        seen = look(f"/proc/{tid}/fd/{fd}") if fd <= _INT_MAX else None
    except OSError:  # there is none
        return None
    return seen.mount if seen is not None and seen.is_device else None


def _flags(tid: int, fd: int) -> int:
    """Give the flags that a descriptor's file is open with. OSError: there is none."""
    lines = Path(f"/proc/{tid}/fdinfo/{fd & 0xFFFFFFFF}").read_bytes().split(b"\n")
    return next(int(line.split()[1], 8) for line in lines if line.startswith(b"flags:"))


def _signed64(value: int) -> int:
    return value - (1 << 64) if value >> 63 else value


def _signed32(value: int) -> int:
    return (value + (1 << 31)) % (1 << 32) - (1 << 31)


def _is_root(tid: int) -> bool:
    """Whether the device is a thread's own, as seen in our user namespace."""
    return abi.uids_of(tid)[3] == 0


def _shares_our_numbers(tid: int) -> bool:
    """Whether a thread is in our pid namespace."""
    return Path(f"/proc/{tid}/ns/pid").stat().st_ino == Path("/proc/self/ns/pid").stat().st_ino
