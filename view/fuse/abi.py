# SPDX-License-Identifier: Apache-2.0
"""What the kernel and we write on /dev/fuse: numbers and layouts of FUSE 7.x, in the byte order of this machine.

Facts of the interface (fuse(4)) and nothing else: what is done with them stands in session.py.
"""

from __future__ import annotations

import struct
import time
from typing import NamedTuple

VERSION_MAJOR = 7
VERSION_MINOR_MIN = 23  # the size of INIT's answer, and poll's events
VERSION_MINOR = 38  # what we have looked at; the kernel speaks it if it knows more

# ---- opcodes

LOOKUP, FORGET, GETATTR, SETATTR, READLINK = 1, 2, 3, 4, 5
OPEN, READ, WRITE, STATFS, RELEASE, FSYNC = 14, 15, 16, 17, 18, 20
SETXATTR, GETXATTR, LISTXATTR, REMOVEXATTR, FLUSH, INIT, OPENDIR, READDIR, RELEASEDIR = 21, 22, 23, 24, 25, 26, 27, 28, 29
ACCESS, INTERRUPT, DESTROY, IOCTL, POLL, BATCH_FORGET = 34, 36, 38, 39, 40, 42

SYMLINK, MKNOD, MKDIR, UNLINK, RMDIR, RENAME, LINK, CREATE, RENAME2 = 6, 8, 9, 10, 11, 12, 13, 35, 45

NOTIFY_POLL = 1

# ---- flags

INIT_ATOMIC_O_TRUNC = 1 << 3  # O_TRUNC is a flag of OPEN, not a SETATTR behind it
INIT_BIG_WRITES = 1 << 5
INIT_PARALLEL_DIROPS = 1 << 18
INIT_POSIX_ACL = 1 << 20  # access control lists are the kernel's to look at
INIT_MAX_PAGES = 1 << 22  # we say how many pages of a buffer a request has

FOPEN_DIRECT_IO = 1
FOPEN_NONSEEKABLE = 4
FOPEN_STREAM = 16

POLL_SCHEDULE_NOTIFY = 1
READ_LOCKOWNER = 2  # of read(2) and its like; what the kernel reads into its own pages is without it
SETATTR_MODE, SETATTR_UID, SETATTR_GID, SETATTR_SIZE, SETATTR_MTIME, SETATTR_MTIME_NOW = 1, 2, 4, 8, 32, 256

# ---- layouts

IN_HEADER = struct.Struct("=IIQQIIIHH")
OUT_HEADER = struct.Struct("=IiQ")
INIT_IN = struct.Struct("=IIII")
INIT_OUT = struct.Struct("=IIIIHHIIHHI28x")
OPEN_IN = struct.Struct("=II")
OPEN_OUT = struct.Struct("=QII")
READ_IN = WRITE_IN = struct.Struct("=QQIIQII")
WRITE_ANSWER = struct.Struct("=IiQII")  # an answer is a header and what stands behind it; the frequent ones are packed in one go
RELEASE_IN = struct.Struct("=QIIQ")
FSYNC_IN = struct.Struct("=QII")
GETATTR_IN = struct.Struct("=IIQ")
SETATTR_IN = struct.Struct("=IIQQQQQQIIIIIIII")
IOCTL_IN = struct.Struct("=QIIQII")
IOCTL_ANSWER = struct.Struct("=IiQiIII")
POLL_IN = struct.Struct("=QQII")
POLL_ANSWER = struct.Struct("=IiQII")
POLL_WAKEUP = struct.Struct("=Q")
INTERRUPT_IN = struct.Struct("=Q")
FORGET_IN = struct.Struct("=Q")
BATCH_FORGET_IN = struct.Struct("=II")
FORGET_ONE = struct.Struct("=QQ")
GETXATTR_IN = GETXATTR_OUT = SETXATTR_IN = struct.Struct("=II")
STATFS_OUT = struct.Struct("=QQQQQIIII24x")
DIRENT = struct.Struct("=QQII")
ATTR_OUT_HEAD = struct.Struct("=QII")
ENTRY_OUT_HEAD = struct.Struct("=QQQQII")
ATTR = struct.Struct("=QQQQQQIIIIIIIIII")

IN_HEADER_BYTES = IN_HEADER.size
OUT_HEADER_BYTES = OUT_HEADER.size
NAME_BYTES_MAX = 255
LOOKUP_BYTES_MAX = 1025  # a name as the kernel may ask for it, and its NUL
BLOCK_BYTES = 4096


class Attributes(NamedTuple):
    """What stat shows of a node; `mode` has its type. Times are seconds."""

    mode: int
    size: int = 0
    nlink: int = 1
    uid: int = 0
    gid: int = 0
    rdev: int = 0
    time_s: int = 0

    def pack(self, inode: int) -> bytes:
        """Give the kernel's form of it."""
        blocks = 0 if self.rdev else (self.size + 511) // 512
        return ATTR.pack(
            inode, self.size, blocks, self.time_s, self.time_s, self.time_s, 0, 0, 0,
            self.mode, self.nlink, self.uid, self.gid, self.rdev, BLOCK_BYTES, 0,
        )  # fmt: skip


def changed_attributes(body: memoryview) -> dict[str, int]:
    """Give the fields of `Attributes` that a SETATTR changes, but for the size."""
    valid, _, _, _, _, _, mtime_s, _, _, _, _, mode, _, uid, gid, _ = SETATTR_IN.unpack_from(body)
    said = (
        (SETATTR_MODE, "mode", mode), (SETATTR_UID, "uid", uid), (SETATTR_GID, "gid", gid),
        (SETATTR_MTIME, "time_s", int(time.time()) if valid & SETATTR_MTIME_NOW else mtime_s),
    )  # fmt: skip
    return {name: value for bit, name, value in said if valid & bit}


def text_at(body: memoryview, at: int) -> bytes:
    """Give the name that stands there, without its NUL."""
    return bytes(body[at : at + LOOKUP_BYTES_MAX]).split(b"\0", 1)[0]


def dirent(inode: int, offset: int, mode: int, name: bytes) -> bytes:
    """Give an entry of READDIR's answer; `offset` is where the one behind it is asked for."""
    entry = DIRENT.pack(inode, offset, len(name), (mode >> 12) & 0xF) + name
    return entry + bytes(-len(entry) % 8)
