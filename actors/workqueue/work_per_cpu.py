# SPDX-License-Identifier: Apache-2.0
"""The work ring as the driver of 2012 empties its workqueue (X19a): first in, first out for each CPU, and between CPUs no order.

A variant (`work-per-cpu`), and the ground of zoo 10: what the host says through two CPUs may be heard in another order than it
was said. There a worker of each CPU decides the order by who runs first; here the CPUs take turns, so that it can be repeated.
"""

from __future__ import annotations

from pvbus.actors.workqueue.work import STATE_MASK, WorkRing
from pvbus.shm.hyperv import Slot, Work


class PerCpuWorkRing(WorkRing):
    """Take the oldest message of the CPU whose turn it is. What is done before its time becomes an entry without a message."""

    _served = -1    # the CPU whose message was taken last

    def _next(self) -> int:
        head = self._head()
        oldest: dict[int, int] = {}
        for index in range(head, head + Work.ENTRIES):
            state = self._memory.load32_acquire(Work.at(index, Work.STATE), "work_publish") & STATE_MASK
            if state == Work.FREE:
                break
            kind = self._memory.load32(Work.at(index, Work.MESSAGE + Slot.TYPE), "work.entry")
            if state != Work.CLAIMED and kind:
                oldest.setdefault(self._memory.load32(Work.at(index, Work.VP), "work.vp"), index)
        if not oldest:
            return head
        self._served = min(oldest, key=lambda vp: (vp <= self._served, vp))
        return oldest[self._served] & 0xFFFFFFFF

    def _release(self, index: int) -> None:
        if index == self._head():
            super()._release(index)
            return
        # Emptied, then filled again with nothing: the head comes by, and drops it.
        self._memory.store32(Work.at(index, Work.MESSAGE + Slot.TYPE), 0, "work.entry")
        self._memory.store32_release(Work.at(index, Work.STATE), Work.FILLED, "work.taken")
