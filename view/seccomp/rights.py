# SPDX-License-Identifier: Apache-2.0
"""Whether the kernel would let a thread open the device: a filter sees an open before the kernel has looked at its modes."""

from __future__ import annotations

import os
from pathlib import Path

from pvbus.view.fuse.caller import has_capability

CAP_DAC_OVERRIDE = 1 << 1
FOR_THE_KERNEL = os.O_PATH | os.O_DIRECT | os.O_DIRECTORY
"""Flags whose answer is none of the driver's."""
_READ, _WRITE = 4, 2
_WANTED = {os.O_RDONLY: _READ, os.O_WRONLY: _WRITE}  # and for the other modes both


def is_the_drivers(tid: int, path: str, flags: int) -> bool:
    """Whether an open with these flags gets as far as to the driver. OSError: the thread or the file has gone."""
    if flags & FOR_THE_KERNEL or flags & (os.O_CREAT | os.O_EXCL) == os.O_CREAT | os.O_EXCL:
        return False
    lines = os.fsdecode(Path(f"/proc/{tid}/status").read_bytes()).split("\n")[:-1]  # a name can be any bytes
    status = dict(line.split(":", 1) for line in lines)
    file = Path(path).stat()
    if int(status["Uid"].split()[3]) == file.st_uid:
        granted = file.st_mode >> 6
    elif "system.posix_acl_access" in os.listxattr(path):  # for the kernel to look at
        return False
    elif file.st_gid in {int(status["Gid"].split()[3]), *map(int, status["Groups"].split())}:
        granted = file.st_mode >> 3
    else:
        granted = file.st_mode
    wanted = _WANTED.get(flags & os.O_ACCMODE, _READ | _WRITE)
    return granted & wanted == wanted or has_capability(tid, CAP_DAC_OVERRIDE)
