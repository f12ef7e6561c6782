# SPDX-License-Identifier: Apache-2.0
"""What calls on the device's file give, where FUSE cannot say it: mended as their callers come out of the kernel (debugger.py).

A read that a signal has interrupted begins again where a driver's would, an unknown ioctl is ENOSYS, and stat and statfs show a
device in a file system of devices, not a regular file in FUSE.
"""

from __future__ import annotations

import contextlib
import errno
import functools
import os
import stat
import struct
from typing import TYPE_CHECKING, NamedTuple

from pvbus.view.fuse.caller import READ_CALLS
from pvbus.view.fuse.debugger import CAN_MEND, Debuggers, Leaving

if TYPE_CHECKING:
    from collections.abc import Callable, Generator

    from pvbus.actors.runtime.inbox import Inbox
    from pvbus.view.fuse.caller import Callers
    from pvbus.view.fuse.request import Request

_ERESTARTSYS = 512  # the kernel's own; no program ever sees it
_TMPFS_MAGIC = 0x01021994  # of a devtmpfs, too
_IOCTLS = {(False, 16), (True, 54)}


class _Layout(NamedTuple):
    """Where a call puts what it has found: its argument; there the mode, the device's number, in one word or two, the size."""

    argument: int
    mode: struct.Struct
    mode_at: int
    rdev: struct.Struct
    rdev_at: int
    size: struct.Struct
    size_at: int


_WORD, _LONG, _SHORT, _TWO = struct.Struct("=I"), struct.Struct("=Q"), struct.Struct("=H"), struct.Struct("=II")
_STATX = _Layout(4, _SHORT, 28, _TWO, 128, _LONG, 40)
_STAT = _Layout(1, _WORD, 24, _LONG, 40, _LONG, 48)
_STAT_32, _STAT64_32 = _Layout(1, _SHORT, 8, _WORD, 16, _WORD, 20), _Layout(1, _WORD, 16, _LONG, 32, _LONG, 44)
_STATS = {
    **dict.fromkeys([(False, 4), (False, 5), (False, 6)], _STAT), (False, 262): _STAT._replace(argument=2), (False, 332): _STATX,
    **dict.fromkeys([(True, 106), (True, 107), (True, 108)], _STAT_32),
    **dict.fromkeys([(True, 195), (True, 196), (True, 197)], _STAT64_32), (True, 300): _STAT64_32._replace(argument=2),
    (True, 383): _STATX,
}  # fmt: skip
"""stat, fstat, lstat, newfstatat, statx; of 32-bit programs (True) besides stat64, lstat64, fstat64, fstatat64."""
_STATFS = {
    (False, 137): (1, _LONG), (False, 138): (1, _LONG), (True, 99): (1, _WORD), (True, 100): (1, _WORD),
    (True, 268): (2, _WORD), (True, 269): (2, _WORD),
}  # fmt: skip
"""statfs and fstatfs, and of 32-bit programs their forms for large systems: the argument, and the type, which comes first."""
_STAT_CALLS, _STATFS_CALLS = {number for _, number in _STATS}, {number for _, number in _STATFS}


class Disguise:
    """Answers requests of one loop's sessions. `callers` tells which call each is in."""

    def __init__(self, inbox: Inbox, callers: Callers) -> None:
        self._inbox = inbox
        self._callers = callers
        self._debuggers = Debuggers(inbox)

    def interrupted(self, request: Request) -> None:
        """Answer a READ that waited and has been taken out of its queue: it ends, or begins again, as its signal wants it."""
        self._debuggers.see_out(request, lambda: request.fail(errno.EINTR), restart)

    def unknown(self, request: Request) -> None:
        """Answer an IOCTL that the driver does not know, once it is kept."""
        self._later(request, lambda: request.fail(errno.ENOTTY), not_implemented)

    def shows_stat(self, request: Request, rdev: int, answer: Callable[[], None]) -> bool:
        """Whether a GETATTR is for somebody who sees it; it is answered soon, then."""
        seen = CAN_MEND and self._callers.number(request.pid) in _STAT_CALLS
        if seen:
            self._later(request, answer, functools.partial(show_device, rdev))
        return seen

    def shows_statfs(self, request: Request, answer: Callable[[], None]) -> bool:
        """Whether a STATFS is; likewise."""
        seen = CAN_MEND and self._callers.number(request.pid) in _STATFS_CALLS
        if seen:
            self._later(request, answer, show_devtmpfs)
        return seen

    def _later(self, request: Request, answer: Callable[[], None], mend: Callable[[Leaving], None]) -> None:
        self._inbox.call_soon(lambda: self._debuggers.see_out(request, answer, mend))


def restart(leaving: Leaving) -> None:
    """Have a read begin again that has given EINTR, unless a handler without SA_RESTART has run: the kernel sees to that."""
    if leaving.value == -errno.EINTR and leaving.call in READ_CALLS:
        leaving.give(-_ERESTARTSYS)


def not_implemented(leaving: Leaving) -> None:
    """Have an ioctl give ENOSYS."""
    if leaving.value == -errno.ENOTTY and (leaving.is_32, leaving.call) in _IOCTLS:
        leaving.give(-errno.ENOSYS)


def show_device(rdev: int, leaving: Leaving) -> None:
    """Make the regular file in what a stat has found a character device."""
    layout = _STATS.get((leaving.is_32, leaving.call))
    if layout is None or leaving.value:
        return
    at = leaving.argument(layout.argument)
    number = (os.major(rdev), os.minor(rdev)) if layout.rdev is _TWO else (rdev,)
    with _memory(leaving.thread) as memory:
        found = os.pread(memory, layout.mode.size, at + layout.mode_at)
        if len(found) < layout.mode.size:  # it has been killed meanwhile: there is no memory any more
            return
        (mode,) = layout.mode.unpack(found)
        if stat.S_ISREG(mode):
            os.pwrite(memory, layout.mode.pack(stat.S_IMODE(mode) | stat.S_IFCHR), at + layout.mode_at)
            os.pwrite(memory, layout.rdev.pack(*number), at + layout.rdev_at)
            os.pwrite(memory, layout.size.pack(0), at + layout.size_at)


def show_devtmpfs(leaving: Leaving) -> None:
    """Make FUSE in what a statfs has found a file system of devices."""
    argument, kind = _STATFS.get((leaving.is_32, leaving.call), (-1, _WORD))
    if argument >= 0 and not leaving.value:
        with _memory(leaving.thread) as memory:
            os.pwrite(memory, kind.pack(_TMPFS_MAGIC), leaving.argument(argument))


@contextlib.contextmanager
def _memory(thread: int) -> Generator[int, None, None]:
    fd = os.open(f"/proc/{thread}/mem", os.O_RDWR | os.O_CLOEXEC)
    try:
        yield fd
    finally:
        os.close(fd)
