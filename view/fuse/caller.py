# SPDX-License-Identifier: Apache-2.0
"""What a caller has really asked for: FUSE shows a driver less than the driver's own call does.

The kernel hands over a page of a buffer at a time (`pages_max` of the session), and so never two segments of readv or writev at
once. A driver sees whole segments, and the fault at their end. While its call waits for us, /proc shows which call it is. Who is
in another kind of call (io_uring), or may not be looked at, is taken by FUSE's word. What an ioctl points to lies in the caller's
memory.
"""

from __future__ import annotations

import errno
import fcntl
import os
import platform
import struct
import time
from collections import OrderedDict
from pathlib import Path
from typing import NamedTuple

from pvbus.view.fuse.mount import read_memory

READ, WRITE = "read", "write"
CALLERS_MAX = 64  # threads whose file in /proc stays open
LOOKS_MAX = 50  # it is on its way into its sleep: a few microseconds
IOV_MAX = 1024
LINE_BYTES_MAX = 256
_RUNNING = b"running"
_IN_RING = b"426 "  # io_uring_enter, for every machine and program
_VECTOR, _VECTOR_32 = struct.Struct("=QQ"), struct.Struct("=II")
_Calls = dict[int, tuple[str, struct.Struct | None, bool]]


def _calls(vector: struct.Struct, reads: tuple[int, ...], writes: tuple[int, ...]) -> _Calls:
    """Describe read, readv, preadv2, and write, writev, pwritev2: of what kind, the layout of a segment, whether with flags."""
    return {
        number: (kind, vector if at else None, at == 2)
        for kind, numbers in ((READ, reads), (WRITE, writes)) for at, number in enumerate(numbers)
    }  # fmt: skip


# A 32-bit program's calls have numbers of their own. On these machines each means something else to the others, but nothing that
# could wait for a READ or WRITE of ours: so there is no need to know whose a number is.
_KNOWN: _Calls = {
    "x86_64": _calls(_VECTOR, (0, 19, 327), (1, 20, 328)) | _calls(_VECTOR_32, (3, 145, 378), (4, 146, 379)),
    "aarch64": _calls(_VECTOR, (63, 65, 286), (64, 66, 287)) | _calls(_VECTOR_32, (3, 145, 392), (4, 146, 393)),
}.get(platform.machine(), {})
READ_CALLS = frozenset(number for number, (kind, _, _) in _KNOWN.items() if kind == READ)
"""The numbers of the calls that may wait for a READ of ours."""
_SPLICES = {  # sendfile, splice; and sendfile64 of 32-bit programs
    "x86_64": (40, 275, 187, 239, 313), "aarch64": (71, 76, 187, 239, 340),
}.get(platform.machine(), ())  # fmt: skip
MEMORY_S_MAX = 1.0  # in less than that no number of a thread can have been given to another
_QUERY, _QUERY_BYTES = struct.Struct("=QQQ"), 104  # procmap_query: its size, flags, the address
_ANSWER, _ANSWER_AT = struct.Struct("=QQ"), 32  # in it, the end and the flags of the mapping
_PROCMAP_QUERY = 3 << 30 | _QUERY_BYTES << 16 | ord("f") << 8 | 17
_ACCESSIBLE = 1 | 2  # readable, or writable: no processor here has pages that can be written only


def has_capability(thread: int, capability: int) -> bool:
    """Whether a thread has a capability, in our own user namespace. OSError: it has gone."""
    for line in Path(f"/proc/{thread}/status").read_bytes().split(b"\n"):
        if line.startswith(b"CapEff:") and int(line.split()[1], 16) & capability:
            return Path(f"/proc/{thread}/ns/user").stat().st_ino == Path("/proc/self/ns/user").stat().st_ino
    return False


class _MemoryFiles(NamedTuple):
    """What /proc has of a caller's memory, and until when it is taken for the caller's."""

    maps: int
    mem: int
    until_s: float

    def close(self) -> None:
        """Give the descriptors up."""
        os.close(self.maps)
        os.close(self.mem)


class Callers:
    """The threads that have called lately."""

    def __init__(self) -> None:
        self._files: OrderedDict[int, int] = OrderedDict()
        self._memories: OrderedDict[int, _MemoryFiles] = OrderedDict()
        self._may_ask = True
        self._asked = bytearray(_QUERY_BYTES)
        self._asked_at = -1
        self._whole_text, self._whole = _RUNNING, (0, 0, 0)

    def segment(self, thread: int, kind: str, offset: int, size: int) -> tuple[int, int, int]:
        """Give address and length of the segment in which `size` bytes at `offset` of a call lie, and where in it they begin.

        Where nothing else is known, the call has one segment, which ends with them, and its address is 0. Refused is what a
        driver without such methods never sees: EINVAL for a splice, EOPNOTSUPP for a write with flags.
        """
        fd = self._files.get(thread)
        try:
            text = os.pread(fd, LINE_BYTES_MAX, 0) if fd is not None else b""
        except OSError:  # gone, and its number perhaps another's
            self._forget(thread)
            text = b""
        if text == self._whole_text and size == self._whole[1] and not offset:  # the same buffer again, and all of it
            return self._whole
        segments = self._segments(thread, text if text and not text.startswith(_RUNNING) else self._look(thread), kind)
        if sum(length for _, length in segments) < offset + size:  # that is not the call in which it waits for us
            return 0, offset + size, offset
        inner = offset
        for address, length in segments:
            if inner < length:
                return address, length, inner
            inner -= length
        return 0, offset + size, offset

    def length(self, thread: int, kind: str) -> int:
        """Give how many bytes a thread's call is about; 0 if that is not known."""
        return sum(length for _, length in self._segments(thread, self._look(thread), kind))

    def number(self, thread: int) -> int:
        """Give the number of the call that a thread waits in; -1 if that is not known."""
        number = self._look(thread).partition(b" ")[0]
        return int(number) if number.isdigit() else -1

    def is_in_ring(self, thread: int) -> bool:
        """Whether a thread waits in io_uring_enter, or is one of the kernel's for that."""
        return self._look(thread).startswith(_IN_RING)

    def _segments(self, thread: int, text: bytes, kind: str) -> list[tuple[int, int]]:
        """Give the address and the length of each segment that a thread reads or writes, by its line of /proc."""
        words = text.split()
        refused = 0
        try:
            number = int(words[0]) if len(words) > 3 else -2
            called, vector, has_flags = _KNOWN.get(number, ("", None, False))
            if called == kind and vector is None:
                address, length = int(words[2], 16), int(words[3], 16)
                self._whole_text, self._whole = text, (address, length, 0)
                return [(address, length)]
            if called == kind and has_flags and int(words[6], 16) & ~os.RWF_HIPRI:
                refused = errno.EOPNOTSUPP
            elif called == kind and vector is not None:
                count = min(int(words[3], 16), IOV_MAX)
                return list(vector.iter_unpack(read_memory(thread, int(words[2], 16), count * vector.size)))
        except (OSError, ValueError):
            return []
        if number in _SPLICES:
            refused = errno.EINVAL
        if refused:
            raise OSError(refused, os.strerror(refused))
        return []

    def memory(self, thread: int, address: int, size: int) -> bytes:
        """Read a caller's structure; EFAULT for what it cannot read itself.

        process_vm_readv says what can be read. /proc/PID/mem takes a third of the time and reads protected pages as well: it is
        asked where /proc/PID/maps, in a quarter, says that the caller may read there itself.
        """
        known = self._memories.get(thread)
        if known is None or known.until_s < time.monotonic():
            known = self._open_memory(thread)
        if known is not None and self._may_ask:
            if address != self._asked_at:
                _QUERY.pack_into(self._asked, 0, _QUERY_BYTES, 0, address)
                self._asked_at = address
            try:
                fcntl.ioctl(known.maps, _PROCMAP_QUERY, self._asked)
                end, flags = _ANSWER.unpack_from(self._asked, _ANSWER_AT)
                if flags & _ACCESSIBLE and address + size <= end:
                    data = os.pread(known.mem, size, address)
                    if len(data) == size:
                        return data
            except OSError as failed:  # nothing is there, or the process is another one now: the long look tells
                self._may_ask = failed.errno != errno.ENOTTY  # a kernel before 6.11 cannot be asked
        return read_memory(thread, address, size)

    def _open_memory(self, thread: int) -> _MemoryFiles | None:
        """Open a thread's files anew: its number may be another's by now."""
        old = self._memories.pop(thread, None)
        if old is not None:
            old.close()
        try:
            maps = os.open(f"/proc/{thread}/maps", os.O_RDONLY | os.O_CLOEXEC)
        except OSError:  # every look is a long one
            return None
        try:
            mem = os.open(f"/proc/{thread}/mem", os.O_RDONLY | os.O_CLOEXEC)
        except OSError:
            os.close(maps)
            return None
        self._memories[thread] = known = _MemoryFiles(maps, mem, time.monotonic() + MEMORY_S_MAX)
        if len(self._memories) > CALLERS_MAX:
            self._memories.popitem(last=False)[1].close()
        return known

    def _look(self, thread: int) -> bytes:
        """Give the line of a thread that waits, if need be anew: the number of its call, and six words; nothing, if it cannot
        be had.
        """
        fd = self._files.get(thread)
        for _ in range(LOOKS_MAX):
            try:
                if fd is None:
                    fd = self._remember(thread)
                text = os.pread(fd, LINE_BYTES_MAX, 0)
            except OSError:  # gone, and its number perhaps another's: the next look opens anew
                self._forget(thread)
                return b""
            if not text.startswith(_RUNNING):
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
