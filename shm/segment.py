# SPDX-License-Identifier: Apache-2.0
"""Segments and memfds: who makes them, who may map them.

Machine pages are `multiprocessing.shared_memory` segments, made and unlinked by the supervisor only; everybody else maps a
descriptor that was handed over. (Attaching by name would register with the resource tracker before Python 3.13, and the
attacher's exit would unlink the segment.) What users map is a memfd sealed against truncation: a shared file that a user
shrinks kills the next process that touches it with SIGBUS.
"""

from __future__ import annotations

import contextlib
import fcntl
import os
import sys
from pathlib import Path
from typing import TYPE_CHECKING

from pvbus.shm.layout import LAYOUT_VERSION
from pvbus.shm.memory import Memory

if TYPE_CHECKING:
    from multiprocessing.shared_memory import SharedMemory

SHM_ROOT = "/dev/shm"
_SEALS = fcntl.F_SEAL_SHRINK | fcntl.F_SEAL_GROW | fcntl.F_SEAL_SEAL


class LayoutError(RuntimeError):
    """A page is of another layout version, or no page of ours at all."""


class Segment:
    """A named segment, owned by the supervisor: created here, unlinked here."""

    def __init__(self, name: str, size: int) -> None:
        self.name = name
        self._shared = _create_untracked(name, size)
        self.fd = os.open(f"{SHM_ROOT}/{name}", os.O_RDWR | os.O_CLOEXEC)
        self.memory = Memory(self.fd, size)

    def close(self) -> None:
        """Unmap and unlink; nobody can map it by name any more."""
        self.memory.close()
        os.close(self.fd)
        self._shared.close()
        with contextlib.suppress(FileNotFoundError):
            Path(SHM_ROOT, self.name).unlink()


def _create_untracked(name: str, size: int) -> SharedMemory:
    """Create a segment without the resource tracker: the fork server removes what a killed supervisor leaves."""
    from multiprocessing import resource_tracker  # the supervisor only: children never import multiprocessing
    from multiprocessing.shared_memory import SharedMemory

    if sys.version_info >= (3, 13):
        return SharedMemory(name=name, create=True, size=size, track=False)
    register = resource_tracker.register
    resource_tracker.register = lambda *_: None
    try:
        return SharedMemory(name=name, create=True, size=size)
    finally:
        resource_tracker.register = register


def sealed_memfd(name: str, size: int) -> int:
    """Make a memfd of `size` bytes that nobody can shrink, grow or unseal; give its descriptor."""
    fd = os.memfd_create(name, os.MFD_CLOEXEC | os.MFD_ALLOW_SEALING)
    os.ftruncate(fd, size)
    fcntl.fcntl(fd, fcntl.F_ADD_SEALS, _SEALS)
    return fd


def read_only(fd: int) -> int:
    """Give a second descriptor of the same memfd through which it can only be read."""
    os.fchmod(fd, 0o444)
    return os.open(f"/proc/self/fd/{fd}", os.O_RDONLY | os.O_CLOEXEC)


def stamp(memory: Memory, magic: int, version_at: int = 0, magic_at: int = 4) -> None:
    """Write version and magic of a fresh page."""
    memory.store32(version_at, LAYOUT_VERSION)
    memory.store32(magic_at, magic)


def check(memory: Memory, magic: int, what: str, version_at: int = 0, magic_at: int = 4) -> None:
    """Refuse a page of another kind or version. Raises LayoutError with both numbers."""
    version, found = memory.load32(version_at), memory.load32(magic_at)
    if version != LAYOUT_VERSION or found != magic:
        message = f"{what}: layout version {version}, magic {found:#x}; expected {LAYOUT_VERSION}, {magic:#x}"
        raise LayoutError(message)


def write_text(memory: Memory, offset: int, size: int, text: str) -> None:
    """Write a NUL-padded UTF-8 name of at most `size` - 1 bytes."""
    data = text.encode()[: size - 1].ljust(size, b"\0")
    for i, byte in enumerate(data):
        memory.store8(offset + i, byte)


def read_text(memory: Memory, offset: int, size: int) -> str:
    """Read a NUL-padded UTF-8 name."""
    data = bytes(memory.load8(offset + i) for i in range(size))
    return data.split(b"\0", 1)[0].decode(errors="replace")
