# SPDX-License-Identifier: Apache-2.0
"""SIGIO of the device's file: O_ASYNC, F_SETOWN and F_SETSIG, for which FUSE has no request.

The machine tells an open file of ours of events by a byte in its doorbell, one end of a socket pair, and there is one while a
read would not block. So the kernel itself sends the signal when the doorbell is asked for it: with the owner and the signal of
the caller's file, the caller's rights, and the caller's number of the descriptor, which is a part of what the signal tells. The
kernel takes that number from who asks: so a thread does, with a table of descriptors and an identity of its own.
"""

from __future__ import annotations

import ctypes
import fcntl
import os
import struct
from collections.abc import Callable

from pvbus.view.fuse.evtchn import DOOR, IOCTL_DOOR
from pvbus.view.seccomp import abi
from pvbus.view.seccomp.patience import Patience
from pvbus.view.seccomp.regular_calls import F_SETOWN_EX, F_SETSIG

F_GETSIG, F_GETOWN_EX = 11, 16
OWNER = struct.Struct("=ii")  # struct f_owner_ex
_CLONE_FILES = 0x400
_SETRESUID = {"x86_64": 117, "aarch64": 147}.get(os.uname().machine, -1)
_libc = ctypes.CDLL(None, use_errno=True)


class Signals:
    """Asks doorbells for signals. `secret` is what the device's server knows us by."""

    def __init__(self, secret: bytes) -> None:
        self._secret = secret

    def is_on(self, file: int) -> bool:
        """Whether an open device, of which this is a descriptor, sends signals. OSError: it is not of our run."""
        door = self._door(file)
        try:
            return bool(fcntl.fcntl(door, fcntl.F_GETFL) & os.O_ASYNC)
        finally:
            os.close(door)

    def switch(self, file: int, tid: int, fd: int, *, on: bool) -> None:
        """Have it send signals, or none any more, as thread `tid` wants it through its descriptor `fd`. OSError likewise."""
        owner, number = fcntl.fcntl(file, F_GETOWN_EX, bytes(OWNER.size)), fcntl.fcntl(file, F_GETSIG)
        door = self._door(file)

        def ask() -> None:
            try:
                same = os.dup2(door, fd, inheritable=False)
            except OSError:  # a number that we cannot have: the signal tells ours
                same = door
            fcntl.fcntl(same, F_SETSIG, number)
            if OWNER.unpack(owner)[1]:
                fcntl.fcntl(same, F_SETOWN_EX, owner)
            flags = fcntl.fcntl(same, fcntl.F_GETFL)
            fcntl.fcntl(same, fcntl.F_SETFL, flags | os.O_ASYNC if on else flags & ~os.O_ASYNC)

        try:
            _as_the_caller(tid, ask)
        finally:
            os.close(door)

    def tell(self, file: int, tid: int, command: int, argument: int | bytes) -> None:
        """Pass on F_SETOWN, F_SETOWN_EX or F_SETSIG, which the caller's own file is told of, too. OSError likewise."""
        door = self._door(file)
        try:
            _as_the_caller(tid, lambda: fcntl.fcntl(door, command, argument))
        finally:
            os.close(door)

    def _door(self, file: int) -> int:
        """Give a descriptor of an open device's doorbell."""
        asked = bytearray(self._secret + bytes(DOOR.size))
        fcntl.ioctl(file, IOCTL_DOOR, asked)
        pid, door = DOOR.unpack_from(asked, len(self._secret))
        return abi.descriptor_of(pid, door)


def _as_the_caller(tid: int, action: Callable[[], object]) -> None:
    """Do something under the user of a thread, with descriptors that are nobody else's."""
    real, effective, _, _ = abi.uids_of(tid)

    def act() -> None:
        if _libc.unshare(_CLONE_FILES):
            raise OSError(ctypes.get_errno(), "a table of descriptors of its own")
        if (real, effective) != (os.getuid(), os.geteuid()) and _libc.syscall(_SETRESUID, real, effective, effective):
            raise OSError(ctypes.get_errno(), "another user")  # the call itself, not the library's: this thread's alone
        action()

    Patience().ask(act)
