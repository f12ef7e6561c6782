# SPDX-License-Identifier: Apache-2.0
"""What the kernel knows of a path without asking its file system: who answers for a filter must wait for nobody under it.

The file system can be a server's that makes filtered calls itself, as those of a run within the run do. A walk to a name in
such a tree asks it; one to its root, and one to an open file by /proc, do not.
"""

from __future__ import annotations

import ctypes
import os
import stat
import struct
from pathlib import Path
from typing import NamedTuple

from pvbus.view.fuse.evtchn import DEVICE_INODE

_AT_FDCWD, _AT_STATX_DONT_SYNC = -100, 0x4000
_STATX = struct.Struct("=28xH2xQ96xII112x")
_libc = ctypes.CDLL(None, use_errno=True)


TREE = b" - fuse.pvbus pvbus "
"""What a line of mountinfo has for the /dev/xen of a run."""


class Seen(NamedTuple):
    """Mode and inode, and major and minor number of the mount."""

    mode: int
    inode: int
    mount: tuple[int, int]

    @property
    def is_device(self) -> bool:
        """Whether it looks like a device of a run, whichever's."""
        return self.inode == DEVICE_INODE and stat.S_ISREG(self.mode)


def look(path: str) -> Seen:
    """Look where a path leads. OSError."""
    found = ctypes.create_string_buffer(_STATX.size)
    if _libc.statx(_AT_FDCWD, os.fsencode(path), _AT_STATX_DONT_SYNC, 0, found):
        raise OSError(ctypes.get_errno(), f"{path}: {os.strerror(ctypes.get_errno())}")
    mode, inode, major, minor = _STATX.unpack(found)
    return Seen(mode, inode, (major, minor))


def is_a_tree_of_ours(tid: int, mount: tuple[int, int]) -> bool:
    """Whether a mount, as a thread sees it, is the /dev/xen of a run."""
    number = f" {mount[0]}:{mount[1]} ".encode()
    lines = Path(f"/proc/{tid}/mountinfo").read_bytes().split(b"\n")
    return any(number in line and TREE in line for line in lines)
