# SPDX-License-Identifier: Apache-2.0
"""What waits in the submission rings of an open file: notifies and write-backs that the hypervisor has not
taken.

The rings are memfds between a user and the hypervisor; the file's process keeps them for heirs, and /proc
lets the same user look at them there. They are written by users, so what they hold is shown, and never acted
upon. Read-only.
"""

from __future__ import annotations

import os
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

from pvbus.shm.layout import MAGIC_SUBMISSION, SUBMISSION_ENTRIES, SUBMISSIONS_MAX, SubmissionRing
from pvbus.shm.memory import Memory

_PORT_MASK = (1 << 30) - 1


class Waiting(NamedTuple):
    """What lies in a file's submission rings: (operation, port) -> how many."""

    entries: Counter[tuple[int, int]]
    rings: int

    def notifies(self, port: int) -> int:
        """Count the notifies of a port."""
        return self.entries[SubmissionRing.NOTIFY, port]

    def write_backs(self, port: int) -> int:
        """Count how often a port has been written back."""
        return self.entries[SubmissionRing.ENABLE, port]


def waiting(process_pid: int) -> Waiting | None:
    """Look into the submission rings that a file's process holds; None when /proc does not let us."""
    found: Counter[tuple[int, int]] = Counter()
    rings = 0
    try:
        for path in _ring_paths(process_pid):
            found.update(_entries(path))
            rings += 1
    except OSError:
        return None
    return Waiting(found, rings) if rings else None


def _ring_paths(pid: int) -> Iterator[Path]:
    held = sorted(Path(f"/proc/{pid}/fd").iterdir())
    found = 0
    for path in held:
        try:
            target = str(path.readlink())
        except OSError:  # closed while we looked
            continue
        if target.startswith("/memfd:pvbus-") and "-submission" in target and found < SUBMISSIONS_MAX:
            found += 1
            yield path


def _entries(path: Path) -> Iterator[tuple[int, int]]:
    fd = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
    try:
        ring = Memory(fd, SubmissionRing.BYTES, False)
    finally:
        os.close(fd)
    try:
        head, tail = ring.load32(SubmissionRing.HEAD), ring.load32_acquire(SubmissionRing.TAIL)
        count = tail - head & 0xFFFFFFFF
        if ring.load32(SubmissionRing.MAGIC) != MAGIC_SUBMISSION or count > SUBMISSION_ENTRIES:
            return
        for position in range(head, head + count):
            entry = ring.load32(SubmissionRing.DATA + 4 * (position % SUBMISSION_ENTRIES))
            yield entry >> 30, entry & _PORT_MASK
    finally:
        ring.close()
