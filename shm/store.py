# SPDX-License-Identifier: Apache-2.0
"""A record in a segment, replaced as a whole: its writer may die at any moment, and an heir reads the old one or the new one.

    0 which half holds the record, and its length | 4096 half 0 | 4096 + HALF_BYTES half 1 | CLAIMS

Behind it lies a word a channel that its ring writes (channel_heir.c): what changes with every batch of packets.

One writer. Readers are heirs: nobody reads while it is written.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from pvbus.shm.memory import Memory

HALF_BYTES = 1 << 20
HEAD_BYTES = 4096
CLAIMS = HEAD_BYTES + 2 * HALF_BYTES
CLAIMS_COUNT = 256
BYTES = CLAIMS + 8 * CLAIMS_COUNT
_HALF_ONE = 1 << 63


def write(memory: Memory, data: bytes) -> None:
    """Replace the record. Raises ValueError when it is longer than a half."""
    if len(data) > HALF_BYTES:
        raise ValueError(f"a record of {len(data)} bytes, at most {HALF_BYTES}")
    half = 0 if memory.load64(0) & _HALF_ONE else 1
    base = HEAD_BYTES + half * HALF_BYTES
    padded = data + b"\0" * (-len(data) % 8)
    for at in range(0, len(padded), 8):
        memory.store64(base + at, int.from_bytes(padded[at : at + 8], "little"))
    memory.store64_release(0, len(data) | (_HALF_ONE if half else 0))  # the record before the word that names it


def read(memory: Memory) -> bytes:
    """Give the record; empty when there is none."""
    word = memory.load64_acquire(0)
    length = word & ~_HALF_ONE
    base = HEAD_BYTES + (HALF_BYTES if word & _HALF_ONE else 0)
    data = b"".join(memory.load64(base + at).to_bytes(8, "little") for at in range(0, length, 8))
    return data[:length]
