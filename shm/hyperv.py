# SPDX-License-Identifier: Apache-2.0
"""The segment of a domain on the Hyper-V platform, drawn; `shm/native/hyperv.h` is the same in C, and a test compares them.

`pvbus-<run>-hD`, mapped by the machine's own processes. Page n of it is guest frame n; frames from 0x100000 on are channel
memory, memfds of their own. Frames::

    0          header                           129  interrupt page (host to guest | guest to host)
    1 + 4 v    state of virtual processor v     130, 131  monitor pages (host to guest, guest to host)
    2 + 4 v    its message page, by default     132  message buffers: 16 ports x 16 buffers of 272 B
    3 + 4 v    its event-flags page             149  work ring: 512 entries of 320 B
    4 + 4 v    spare                            189  32 frames of guest memory

A message slot, 16 to a message page, one for each SINT (`type` and `meta` are accessed as whole 32-bit words)::

    0 type u32, 0 = empty | 4 meta: size u8, flags u8 (bit 0 msg_pending), rsvd u16 | 8 sender u64: the port | 16 payload 240 B

The hypervisor fills an empty slot and writes `type` last; the guest copies, notes in TAKEN the number that stands in OFFERED,
frees the slot by compare-exchange of `type`, and then, behind a full barrier, looks at msg_pending. OFFERED and TAKEN are no
part of the ABI: an heir of either side learns from them which message came out.
"""

from typing import Final

PAGE: Final = 4096
VPS_MAX: Final = 32
SINTS: Final = 16
FLAGS: Final = 2048
MAGIC: Final = 0x48595631
VP_HOST: Final = 0xFFFFFFFE
SINT_VMBUS: Final = 2
MESSAGE_VMBUS: Final = 1
VECTOR_OF_IRQ0: Final = 0x30


class Frame:
    """Guest frame numbers."""

    VPS: Final = 1
    A_VP: Final = 4
    INTERRUPT: Final = 129
    MONITOR: Final = 130
    BUFFERS: Final = 132
    WORK: Final = 149
    SPARE: Final = 189
    SPARE_COUNT: Final = 32
    COUNT: Final = SPARE + SPARE_COUNT
    CHANNELS: Final = 0x100000
    STATE, MESSAGES, EVENT_FLAGS, UNUSED = range(4)  # of a virtual processor

    @staticmethod
    def of_vp(vp: int, which: int) -> int:
        """Give one of the four frames of a virtual processor."""
        return Frame.VPS + vp * Frame.A_VP + which

    @staticmethod
    def is_guest(frame: int) -> bool:
        """Whether the guest may use the frame as it likes: no header, no VP's state, no buffers and no work ring."""
        if Frame.VPS <= frame < Frame.INTERRUPT:
            return (frame - Frame.VPS) % Frame.A_VP != Frame.STATE
        return Frame.INTERRUPT <= frame < Frame.BUFFERS or Frame.SPARE <= frame < Frame.COUNT


BYTES: Final = Frame.COUNT * PAGE


class Header:
    """Frame 0. The work ring's words belong to the guest's processes, the rest to the hypervisor."""

    VERSION: Final = 0
    MAGIC: Final = 4
    VCPUS: Final = 8
    DOMID: Final = 12
    GUEST_OS_ID: Final = 16
    HYPERCALL: Final = 24
    TIME_ORIGIN_NS: Final = 32
    MESSAGE_SEQ: Final = 40
    WORK_HEAD: Final = 64
    WORK_TAIL: Final = 68
    FLAGS_ARE_RELIDS: Final = 72
    GLOBAL_TASKLETS: Final = 76
    POSTED: Final = 128
    DELIVERED: Final = 136
    SIGNALS: Final = 144
    EOMS: Final = 152
    INTERRUPTS: Final = 160
    INTERRUPTS_LOST: Final = 168
    IRQ_NONE: Final = 176
    MESSAGES: Final = 184
    EVENTS: Final = 192
    WORK_ITEMS: Final = 200


class Vp:
    """State of a virtual processor. Registers and OFFERED by the hypervisor, TAKEN, EOM and counters by its CPU process."""

    SCONTROL: Final = 0
    SIEFP: Final = 8
    SIMP: Final = 16
    EOM: Final = 24
    SINT: Final = 32
    EOM_SEEN: Final = 160
    TPR: Final = 168
    IRR: Final = 192
    TASKLETS: Final = 256
    VECTOR: Final = 260
    HANDLED: Final = 264
    IRQS: Final = 320
    IRQ_NONE: Final = 328
    MESSAGES: Final = 336
    EVENTS: Final = 344
    EOMS: Final = 352
    COALESCED: Final = 360
    OFFERED: Final = 384
    TAKEN: Final = 448
    STIMER: Final = 512
    TASKLET_MESSAGE: Final = 1
    TASKLET_EVENT: Final = 2

    @staticmethod
    def at(vp: int, field: int) -> int:
        """Give the offset of a field of a virtual processor's state."""
        return Frame.of_vp(vp, Frame.STATE) * PAGE + field

    @staticmethod
    def sint(vp: int, sint: int) -> int:
        """Give the offset of a SINT register."""
        return Vp.at(vp, Vp.SINT + 8 * sint)


class Sint:
    """Bits of a SINT register."""

    VECTOR: Final = 0xFF
    MASKED: Final = 1 << 16
    AUTO_EOI: Final = 1 << 17
    POLLING: Final = 1 << 18


class Slot:
    """A message slot, by the ABI."""

    TYPE: Final = 0
    META: Final = 4
    SENDER: Final = 8
    PAYLOAD: Final = 16
    BYTES: Final = 256
    PAYLOAD_BYTES: Final = 240
    META_SIZE: Final = 0xFF
    META_PENDING: Final = 0x100

    @staticmethod
    def at(frame: int, sint: int, field: int) -> int:
        """Give the offset of a field of a slot of the message page that lies in `frame`."""
        return frame * PAGE + sint * Slot.BYTES + field


def flag_word(frame: int, sint: int, flag: int) -> int:
    """Give the offset of the 64-bit word with an event flag (bit `flag` % 64) in the event-flags page that lies in `frame`."""
    return frame * PAGE + sint * (FLAGS // 8) + flag // 64 * 8


class Buffer:
    """A message buffer of the hypervisor's. VP is VP_HOST for messages of the guest to its host."""

    FREE, QUEUED = range(2)
    STATE_MASK: Final = 0xFF  # above it, for a message of the guest, the serial of its hypercall
    SERIAL_SHIFT: Final = 8
    SERIALS: Final = 1 << 24
    STATE: Final = 0
    SEQ: Final = 4
    VP: Final = 8
    SINT: Final = 12
    MESSAGE: Final = 16
    BYTES: Final = 272
    ROWS: Final = 16
    A_PORT: Final = 16

    @staticmethod
    def at(row: int, index: int, field: int) -> int:
        """Give the offset of a field of a buffer; a row of them belongs to one port."""
        return Frame.BUFFERS * PAGE + (row * Buffer.A_PORT + index) * Buffer.BYTES + field


class Work:
    """An entry of the work ring: a message that a CPU process has copied; it stays until the workqueue is done with it."""

    FREE, FILLED, TAKEN, CLAIMED = range(4)  # claimed: the virtual processor in bits 15:8; free: for which lap, in bits 31:16
    STATE: Final = 0
    SEQ: Final = 4
    WHEN_NS: Final = 8
    MESSAGE: Final = 16
    VP: Final = 272
    NUMBER: Final = 276
    BYTES: Final = 320
    ENTRIES: Final = 512

    @staticmethod
    def at(index: int, field: int) -> int:
        """Give the offset of a field of an entry; indices run freely."""
        return Frame.WORK * PAGE + index % Work.ENTRIES * Work.BYTES + field
