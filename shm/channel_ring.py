# SPDX-License-Identifier: Apache-2.0
"""A VMBus channel's rings, drawn: offsets of a control page and types of packets (`shm/native/channel_ring.h` is the same in C).

The rings lie in one sealed memfd a channel: guest to host first, host to guest behind it. Each side has a ChannelRing
(pvbus.shm.memory) whose `out` is the ring that it writes. Numbers only; what reads and writes rings is C.
"""

from typing import Final


class ChannelControl:
    """The page before a ring's data. write_index, pending_send_sz and the features are the writer's, the others the reader's."""

    WRITE_INDEX: Final = 0
    READ_INDEX: Final = 4
    INTERRUPT_MASK: Final = 8
    PENDING_SEND_SZ: Final = 12
    FEATURE_BITS: Final = 64
    FEATURE_PENDING_SEND_SZ: Final = 1
    BYTES: Final = 4096  # data follow


class PacketType:
    """What a descriptor can say. A ring passes on whatever type it finds; a host takes those of HOST_TAKES."""

    IN_BAND: Final = 6
    TRANSFER_PAGES: Final = 7
    GPA_DIRECT: Final = 9
    COMPLETION: Final = 0xB
    HOST_TAKES: Final = frozenset({IN_BAND, TRANSFER_PAGES, GPA_DIRECT, COMPLETION})


PACKET_HEADER_BYTES: Final = 16
PACKET_TRAILER_BYTES: Final = 8
PACKET_PAYLOAD_BYTES_MAX: Final = 0xFFFF * 8 - PACKET_HEADER_BYTES  # its length counts eights in 16 bits


def packet_bytes(payload_bytes: int) -> int:
    """Give what a packet takes of its ring: descriptor, payload in eights, trailer."""
    return PACKET_HEADER_BYTES + -(-payload_bytes // 8) * 8 + PACKET_TRAILER_BYTES
