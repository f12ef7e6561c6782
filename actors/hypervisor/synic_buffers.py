# SPDX-License-Identifier: Apache-2.0
"""The hypervisor's message buffers: 16 a port, in the Hyper-V segment, so that an heir finds what was posted.

Written and read by the hypervisor only. A message is posted by the one store that makes its buffer QUEUED, and gone by the one
that makes it FREE; its number (SEQ) gives the order. The queues here are an index over the segment, made anew by each heir.
Delivery does not belong here.
"""

from __future__ import annotations

from collections import defaultdict, deque
from dataclasses import dataclass
from typing import TYPE_CHECKING, Final

from pvbus.shm.hyperv import VP_HOST, Buffer, Header, Slot

if TYPE_CHECKING:
    from collections.abc import Iterator

    from pvbus.shm.memory import Memory

SEQ_MASK: Final = 0xFFFFFFFF
SERIALS_NEAR: Final = 1 << 20
"""Calls that one who lives may have made since, or had under way: far more than there are, and far fewer than serials."""


@dataclass(frozen=True)
class Queued:
    """A message in its buffer: its number, where it lies, whose it is, where it goes."""

    seq: int
    row: int
    index: int
    port: int
    vp: int  # VP_HOST: a message of the guest to its host, and `port` is a connection
    sint: int


class Buffers:
    """The pool: a row of 16 for each port that has one."""

    def __init__(self, memory: Memory) -> None:
        self._memory = memory
        self._rows: dict[tuple[bool, int], int] = {}  # (of the host?, port or connection) -> row
        self._busy: dict[int, set[int]] = defaultdict(set)
        self._queues: dict[tuple[int, int], deque[Queued]] = defaultdict(deque)  # (vp, sint), or (VP_HOST, connection)
        self._done = self._last_serial()  # of the hypercall that our forerunner made last; 0: none
        last = memory.load32(Header.MESSAGE_SEQ)
        # Oldest first; the numbers run modulo 2^32, and fewer than 2^31 lie between the oldest and the last.
        for message in sorted(self._found(), key=lambda one: (one.seq - last - 1) & SEQ_MASK):
            self._rows[message.vp == VP_HOST, message.port] = message.row
            self._busy[message.row].add(message.index)
            self._queues[_queue(message)].append(message)

    def _last_serial(self) -> int:
        load, newest, last = self._memory.load32, (-1, 0), self._memory.load32(Header.MESSAGE_SEQ)
        for row in range(Buffer.ROWS):
            for index in range(Buffer.A_PORT):
                if load(Buffer.at(row, index, Buffer.VP)) == VP_HOST:
                    age = last - load(Buffer.at(row, index, Buffer.SEQ)) & SEQ_MASK
                    serial = load(Buffer.at(row, index, Buffer.STATE)) >> Buffer.SERIAL_SHIFT
                    newest = max(newest, (SEQ_MASK - age, serial))
        return newest[1]

    def is_done(self, serial: int) -> bool:
        """Whether our forerunner has put this call's message into a buffer; asked once, soon after its death."""
        behind = (serial - self._done) % Buffer.SERIALS
        is_it = self._done != 0 and behind == 0
        if is_it or SERIALS_NEAR < behind < Buffer.SERIALS - SERIALS_NEAR:  # long ago: they have come round
            self._done = 0
        return is_it

    def forget_calls(self) -> None:
        """No call is made again."""
        self._done = 0

    def _found(self) -> Iterator[Queued]:
        load = self._memory.load32
        for row in range(Buffer.ROWS):
            for index in range(Buffer.A_PORT):
                if load(Buffer.at(row, index, Buffer.STATE)) & Buffer.STATE_MASK == Buffer.QUEUED:
                    seq, vp, sint = (load(Buffer.at(row, index, field)) for field in (Buffer.SEQ, Buffer.VP, Buffer.SINT))
                    port = self._memory.load64(Buffer.at(row, index, Buffer.MESSAGE + Slot.SENDER))
                    yield Queued(seq, row, index, port, vp, sint)

    def reserve(self, port: int, *, host: bool) -> None:
        """Give a port its row: the one in which its messages lie, or a free one. Raises LookupError when all 16 are given."""
        if (host, port) not in self._rows:
            taken = set(self._rows.values())
            row = next((row for row in range(Buffer.ROWS) if row not in taken), None)
            if row is None:
                raise LookupError(f"all {Buffer.ROWS} message ports of the domain exist")
            self._rows[host, port] = row

    def drop(self, port: int, *, host: bool) -> None:
        """Take a port's row away, and with it what lies there."""
        row = self._rows[host, port]
        for message in [one for queue in self._queues.values() for one in queue if one.row == row]:
            self.free(message)
        for index in list(self._busy[row]):  # taken, and not done with
            self._memory.store32(Buffer.at(row, index, Buffer.STATE), Buffer.FREE)
        self._busy[row].clear()
        del self._rows[host, port]

    def is_full(self, port: int, *, host: bool) -> bool:
        """Whether all 16 buffers of a port are in use."""
        return len(self._busy[self._rows[host, port]]) == Buffer.A_PORT

    def put(self, port: int, vp: int, sint: int, message_type: int, payload: bytes, serial: int = 0) -> None:
        """Post a message; the caller has seen that a buffer is free. `serial`: by which an heir knows the hypercall again."""
        memory = self._memory
        row = self._rows[vp == VP_HOST, port]
        index = next(index for index in range(Buffer.A_PORT) if index not in self._busy[row])
        seq = (memory.load32(Header.MESSAGE_SEQ) + 1) & SEQ_MASK or 1  # 0 is no number
        memory.store32(Header.MESSAGE_SEQ, seq)
        for field, value in ((Buffer.SEQ, seq), (Buffer.VP, vp), (Buffer.SINT, sint)):
            memory.store32(Buffer.at(row, index, field), value)
        base = Buffer.at(row, index, Buffer.MESSAGE)
        memory.store32(base + Slot.TYPE, message_type)
        memory.store32(base + Slot.META, len(payload))
        memory.store64(base + Slot.SENDER, port)
        for at in range(0, len(payload), 8):
            memory.store64(base + Slot.PAYLOAD + at, int.from_bytes(payload[at:at + 8], "little"))
        memory.store32_release(Buffer.at(row, index, Buffer.STATE), Buffer.QUEUED | serial << Buffer.SERIAL_SHIFT)
        message = Queued(seq, row, index, port, vp, sint)
        self._busy[row].add(index)
        self._queues[_queue(message)].append(message)

    def first(self, vp: int, sint: int) -> Queued | None:
        """Give the oldest message for a slot, or for the host's connection `sint` if `vp` is VP_HOST."""
        queue = self._queues[vp, sint]
        return queue[0] if queue else None

    def count(self, vp: int, sint: int) -> int:
        """How many messages wait for a slot."""
        return len(self._queues[vp, sint])

    def waiting(self) -> list[tuple[int, int]]:
        """Give the (vp, sint) that messages of the host wait for."""
        return [key for key, queue in self._queues.items() if queue and key[0] != VP_HOST]

    def take(self, message: Queued) -> None:
        """Take a message out of its queue and leave its buffer in use: an heir finds it there."""
        self._queues[_queue(message)].remove(message)

    def free(self, message: Queued) -> None:
        """Be done with a message."""
        at = Buffer.at(message.row, message.index, Buffer.STATE)
        self._memory.store32(at, self._memory.load32(at) & ~Buffer.STATE_MASK | Buffer.FREE)
        self._busy[message.row].discard(message.index)
        queue = self._queues[_queue(message)]
        if message in queue:
            queue.remove(message)

    def base(self, message: Queued) -> int:
        """Give the offset of the message itself, laid out as a slot."""
        return Buffer.at(message.row, message.index, Buffer.MESSAGE)

    def read(self, message: Queued) -> tuple[int, bytes]:
        """Give type and payload of a message."""
        base, memory = self.base(message), self._memory
        size = memory.load32(base + Slot.META) & Slot.META_SIZE
        words = (memory.load64(base + Slot.PAYLOAD + at).to_bytes(8, "little") for at in range(0, size, 8))
        return memory.load32(base + Slot.TYPE), b"".join(words)[:size]


def _queue(message: Queued) -> tuple[int, int]:
    return message.vp, message.port if message.vp == VP_HOST else message.sint
