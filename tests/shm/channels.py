# SPDX-License-Identifier: Apache-2.0
"""Both sides of a channel over one memory, for tests: the rings, the raw pages, and packets as bytes.

Each test owns its own; `guest` writes the ring at 0, `host` the one behind it.
"""

import struct
from typing import Any

from pvbus.shm.channel_ring import ChannelControl, PacketType
from pvbus.tests.shm.rig import Rig

RING_BYTES = 8192
DATA_BYTES = RING_BYTES - ChannelControl.BYTES


def packet_bytes(payload: int) -> int:
    """Give what a packet of so many payload bytes takes."""
    return 16 + (payload + 7) // 8 * 8 + 8


def padded(payload: bytes) -> bytes:
    """Give a payload as it arrives."""
    return payload + bytes(-len(payload) % 8)


class Channel:
    """Two views of one pair of rings, and what lies in the pages."""

    def __init__(self, rig: Rig, *, ring_bytes: int = RING_BYTES, at: int = 0, signal_always: bool = False) -> None:
        self.rig = rig
        self.ring_bytes = ring_bytes
        self.size = ring_bytes - ChannelControl.BYTES
        self.memory = rig.memory(2 * ring_bytes)
        for ring in (0, ring_bytes):    # as if so much had gone through already
            self.memory.store32(ring + ChannelControl.WRITE_INDEX, at)
            self.memory.store32(ring + ChannelControl.READ_INDEX, at)
        make = rig.core.ChannelRing
        self.guest = make(self.memory, 0, ring_bytes, ring_bytes, signal_always)
        self.host = make(self.memory, ring_bytes, 0, ring_bytes, signal_always)

    def control(self, field: int, ring: int = 0) -> int:
        """Read a word of a control page: 0 is guest to host."""
        word: int = self.memory.load32(ring * self.ring_bytes + field)
        return word

    def set_control(self, field: int, value: int, ring: int = 0) -> None:
        """Write a word of a control page, as the side that owns it or one that does not."""
        self.memory.store32(ring * self.ring_bytes + field, value)

    def data(self, at: int, size: int) -> bytes:
        """Read bytes of the guest's data, around the end."""
        words = [self.memory.load64(ChannelControl.BYTES + (at + i) % self.size) for i in range(0, size, 8)]
        return struct.pack(f"<{len(words)}Q", *words)

    def plant(self, at: int, raw: bytes) -> None:
        """Write bytes into the guest's data, as if it had sent them."""
        for i, word in enumerate(struct.unpack(f"<{len(raw) // 8}Q", raw)):
            self.memory.store64(ChannelControl.BYTES + (at + 8 * i) % self.size, word)

    def fill(self, free: int) -> None:
        """Send one packet of the guest that leaves so many bytes free."""
        self.guest.send(bytes(self.guest.state()["out_write_bytes_avail"] - free - packet_bytes(0)), 99)


def descriptor(offset: int, length: int, flags: int = 0, kind: int = PacketType.IN_BAND, transaction_id: int = 0) -> bytes:
    """Give 16 bytes that claim to begin a packet; offset and length count eights."""
    return struct.pack("<HHHHQ", kind, offset, length, flags, transaction_id)


def errno_of(call: Any, *arguments: Any) -> int:
    """Give the errno with which a call fails; 0 if it does not."""
    try:
        call(*arguments)
    except OSError as error:
        return error.errno or -1
    return 0
