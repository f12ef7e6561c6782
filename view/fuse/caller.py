# SPDX-License-Identifier: Apache-2.0
"""What a caller has really asked for: FUSE shows a driver less than the driver's own call does.

The kernel gathers the segments of readv and writev into one request, and cuts a buffer off where its memory ends. A driver sees
each segment, and the fault. While its call waits for us, /proc shows which call it is. Who is in another kind of call (io_uring,
a 32-bit program), or may not be looked at, is taken by FUSE's word. What an ioctl points to lies in the caller's memory.
"""

from __future__ import annotations

import os
import platform
import struct
from collections import OrderedDict

from pvbus.view.fuse.mount import read_memory

READ, WRITE = "read", "write"
CALLERS_MAX = 64  # threads whose file in /proc stays open
LOOKS_MAX = 50  # it is on its way into its sleep: a few microseconds
IOV_MAX = 1024
_NUMBERS = {
    "x86_64": {READ: (0, 19), WRITE: (1, 20)},
    "aarch64": {READ: (63, 65), WRITE: (64, 66)},
}.get(platform.machine(), {READ: (-1, -1), WRITE: (-1, -1)})
_VECTOR = struct.Struct("=QQ")
PAGE_BITS = 12
SHORTCUTS_MAX = 64  # then the page is looked at once more


class Callers:
    """The threads that have called lately."""

    def __init__(self) -> None:
        self._files: OrderedDict[int, int] = OrderedDict()
        self._pages: OrderedDict[int, list[int]] = OrderedDict()  # the page, /proc's file of the memory, how often it served
        self._last_text, self._last_size, self._last_address = b"running", 0, 0

    def segments(self, thread: int, kind: str, size: int) -> tuple[list[int], int]:
        """Give the lengths of the segments that a thread reads or writes, and the address of the first.

        `size` is what FUSE has of them; one segment of that, at address 0, where nothing else is known.
        """
        text = self._look(thread)
        if text == self._last_text and size == self._last_size:  # the same buffer, and all of it
            return [size], self._last_address
        simple, vectored = _NUMBERS[kind]
        words = text.split()
        found: list[int] = []
        address = 0
        try:
            number = int(words[0]) if len(words) > 3 else -2
            if number == simple:
                address, length = int(words[2], 16), int(words[3], 16)
                found = [length]
                if length == size:
                    self._last_text, self._last_size, self._last_address = text, size, address
            elif number == vectored:
                count = min(int(words[3], 16), IOV_MAX)
                vectors = read_memory(thread, int(words[2], 16), count * _VECTOR.size)
                address = _VECTOR.unpack_from(vectors)[0] if count else 0
                found = [length for _, length in _VECTOR.iter_unpack(vectors)]
        except (OSError, ValueError):
            found = []
        return (found, address) if sum(found) >= size else ([size], 0)

    def memory(self, thread: int, address: int, size: int) -> bytes:
        """Read a caller's structure; EFAULT for what it cannot read itself.

        process_vm_readv says what can be read, and takes three times as long as a look into /proc, which reads protected pages
        as well: so that is for a page from which the same thread's last structure came.
        """
        known = self._pages.get(thread)
        page = address >> PAGE_BITS
        if known is not None and known[0] == page == (address + size - 1) >> PAGE_BITS and known[2] < SHORTCUTS_MAX:
            known[2] += 1
            try:
                data = os.pread(known[1], size, address)
            except OSError:
                data = b""
            if len(data) == size:
                return data
        data = read_memory(thread, address, size)
        if known is not None:
            os.close(known[1])
            del self._pages[thread]
        self._remember_page(thread, page)
        return data

    def _remember_page(self, thread: int, page: int) -> None:
        try:
            self._pages[thread] = [page, os.open(f"/proc/{thread}/mem", os.O_RDONLY | os.O_CLOEXEC), 0]
        except OSError:  # every look is a long one
            return
        if len(self._pages) > CALLERS_MAX:
            os.close(self._pages.popitem(last=False)[1][1])

    def _look(self, thread: int) -> bytes:
        """Give the line of a thread that waits: the number of its call, and six words; nothing, if it cannot be had."""
        fd = self._files.get(thread)
        for _ in range(LOOKS_MAX):
            try:
                if fd is None:
                    fd = self._remember(thread)
                text = os.pread(fd, 256, 0)
            except OSError:  # gone, and its number perhaps another's: the next look opens anew
                self._forget(thread)
                return b""
            if not text.startswith(b"running"):
                return text
            os.sched_yield()  # it may wait for this very processor
        return b""

    def _remember(self, thread: int) -> int:
        fd = os.open(f"/proc/{thread}/syscall", os.O_RDONLY | os.O_CLOEXEC)
        self._files[thread] = fd
        if len(self._files) > CALLERS_MAX:
            os.close(self._files.popitem(last=False)[1])
        return fd

    def _forget(self, thread: int) -> None:
        fd = self._files.pop(thread, None)
        if fd is not None:
            os.close(fd)
