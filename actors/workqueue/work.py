# SPDX-License-Identifier: Apache-2.0
"""The consuming end of the work ring: messages that the CPU processes have copied out of their slots, in their order.

The ring is drawn in shm/hyperv.py; its producers are in shm/native/hv_interrupt.c. This process is its only consumer and owns the
head. An entry stays TAKEN until its message has been handled, so an heir repeats it:

    FREE --claimed, published--> FILLED --take--> TAKEN --done: head moved, then--> FREE for the next lap

A free entry carries the lap for which it is free in bits 31:16. Without it, a producer that was stopped between reading the tail
and claiming would claim, a lap later, an entry behind the head, and its message would lie there unseen.
"""

from __future__ import annotations

import struct
from typing import TYPE_CHECKING

from pvbus.actors.runtime.inbox import InvariantError
from pvbus.shm.hyperv import MESSAGE_VMBUS, VPS_MAX, Header, Slot, Vp, Work

if TYPE_CHECKING:
    from pvbus.shm.memory import Memory

STATE_MASK = 0xFF
LAP_SHIFT = 16
LAP_MASK = 0xFFFF
DROPS_MAX = 1_000_000
"""Each death of a CPU leaves one entry without a message, or one message twice."""


class WorkRing:
    """Take messages of a domain's segment, one at a time."""

    def __init__(self, memory: Memory) -> None:
        self._memory = memory
        self._held: int | None = None   # the entry whose message is being handled
        last = self._head() - 1 & 0xFFFFFFFF
        if self._memory.load32_acquire(Work.at(last, Work.STATE), "work.taken") & STATE_MASK == Work.TAKEN:
            self._free(last)    # our forerunner died between the two steps of `done`
        self.voids = 0          # entries whose producer died
        self.repeats = 0        # messages that had been handled when they came again
        self.foreign = 0        # messages of other types, and impossible ones

    def take(self) -> bytes | None:
        """Give the payload of the next message, None if there is none. It must be `done` before the next one is taken."""
        if self._held is not None:
            raise InvariantError("a work item is taken before the last one is done")
        for _ in range(DROPS_MAX):
            head = self._next()
            # SYNC(work_publish): the state before the message, which its producer has written first.
            state = self._memory.load32_acquire(Work.at(head, Work.STATE), "work_publish") & STATE_MASK
            if state in (Work.FREE, Work.CLAIMED):
                return None
            payload = self._payload(head, repeated=state == Work.TAKEN)
            if payload is not None:
                self._held = head
                return payload
            self._drop(head)
        raise InvariantError(f"{DROPS_MAX} work items in a row hold no message")

    def _head(self) -> int:
        return self._memory.load32(Header.WORK_HEAD, "work.head")

    def _next(self) -> int:
        """Say which entry is taken next."""
        return self._head()

    def _payload(self, head: int, *, repeated: bool) -> bytes | None:
        """Copy an entry, then look at the copy; None if it is not to be handled."""
        load32 = self._memory.load32
        kind = load32(Work.at(head, Work.MESSAGE + Slot.TYPE), "work.entry")
        if kind == 0:
            self.voids += 1
            return None
        vp, number = load32(Work.at(head, Work.VP), "work.vp"), load32(Work.at(head, Work.NUMBER), "work.number")
        size = load32(Work.at(head, Work.MESSAGE + Slot.META), "work.entry") & Slot.META_SIZE
        if kind != MESSAGE_VMBUS or size > Slot.PAYLOAD_BYTES or vp >= VPS_MAX:
            self.foreign += 1
            return None
        handled = Vp.at(vp, Vp.HANDLED)
        # A CPU that died between publishing and freeing its slot has an heir that publishes again. An item of our forerunner's is
        # no such repetition: it may have died with half of it done.
        if not repeated and load32(handled, "work.handled") == number:
            self.repeats += 1
            return None
        payload = b"".join(
            struct.pack("<Q", self._memory.load64(Work.at(head, Work.MESSAGE + Slot.PAYLOAD + at), "work.entry"))
            for at in range(0, size, 8)
        )[:size]
        # First TAKEN, then the number: who dies in between leaves an item that is repeated, not one that is thrown away.
        self._memory.store32_release(Work.at(head, Work.STATE), Work.TAKEN, "work.taken")
        self._memory.store32_release(handled, number, "work.handled")
        return payload

    def done(self) -> None:
        """Give the entry back: its message has been handled."""
        if self._held is None:
            raise InvariantError("a work item is done that nobody has taken")
        held, self._held = self._held, None
        self._release(held)

    def _drop(self, head: int) -> None:
        # Emptied first: TAKEN with a message in it would be repeated by an heir.
        self._memory.store32(Work.at(head, Work.MESSAGE + Slot.TYPE), 0, "work.entry")
        self._memory.store32_release(Work.at(head, Work.STATE), Work.TAKEN, "work.taken")
        self._release(head)

    def _release(self, head: int) -> None:
        """Move the head, then free: while the entry is TAKEN it is nobody else's, so an heir knows what is left to do."""
        self._memory.store32_release(Header.WORK_HEAD, head + 1 & 0xFFFFFFFF, "work.head")
        self._free(head)

    def _free(self, index: int) -> None:
        lap = index // Work.ENTRIES + 1 & LAP_MASK
        # SYNC(work_room): the copy is made and its effects are there before a producer finds the entry free.
        self._memory.store32_release(Work.at(index, Work.STATE), Work.FREE | lap << LAP_SHIFT, "work_room")
