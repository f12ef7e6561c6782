# SPDX-License-Identifier: Apache-2.0
"""A message comes while the work ring is full, on a machine with one processor: does the tasklet give way to who makes room?

Contexts: the virtual CPU (ISR and message tasklet, hv_interrupt.c; then it naps for a millisecond, as its process does with a
message that waits) and the workqueue, which shares the processor: it runs when the CPU has left its tasklet, and handles one
item.
"""

from __future__ import annotations

from collections.abc import Iterable
from functools import partial
from typing import TYPE_CHECKING

from pvbus.shm.hyperv import MESSAGE_VMBUS, Header, Slot, Vp, Work
from pvbus.verify.explorer.scenario import claimed
from pvbus.verify.scenarios import loops
from pvbus.verify.scenarios.work_ring import NUMBER_FIRST, WorkRings

if TYPE_CHECKING:
    from pvbus.verify.explorer.model import Model
    from pvbus.verify.explorer.scenario import Start


class WorkRingFull(WorkRings):
    """One message in the slot; of the ring's entries the first holds an item, and the tail has come round to it."""

    name = "work-ring-full"
    claims = claimed("sc tso arm", {})

    def __init__(self) -> None:
        super().__init__(cpus=1)

    def prepare(self, model: Model, variants: int) -> None:
        """Fill slot and ring."""
        super().prepare(model, variants)
        self.nap = model.bell("nap")
        self.hv.store32(Work.at(0, Work.STATE), Work.FILLED)
        self.hv.store32(Work.at(0, Work.MESSAGE + Slot.TYPE), MESSAGE_VMBUS)
        self.hv.store32(Work.at(0, Work.NUMBER), NUMBER_FIRST - 1)
        self.hv.store32(Header.WORK_TAIL, Work.ENTRIES)

    def start(self, model: Model) -> Iterable[Start]:
        """Give the CPU and the workqueue."""
        yield "cpu0", partial(self._naps, model), False
        yield "workqueue", partial(self._takes_one, model), True

    def _naps(self, model: Model) -> None:
        self.path.hv_run(0, 0)
        model.ring(self.bell, "cpu.idle")
        while self.hv.load32(Vp.at(0, Vp.TASKLETS), "hv.tasklets"):
            model.wait(self.nap, "cpu.nap")
            model.take(self.nap, "cpu.nap.over")
            self.path.hv_run(0, 0)

    def _takes_one(self, model: Model) -> None:
        model.wait(self.bell, "workqueue.wait")
        ring = self.ring()
        if ring.take() is None:
            raise AssertionError("the ring is full")
        ring.done()
        loops.ring_eventfd(model, self.hv, self.nap, "time passes")

    def broken(self, model: Model, stuck: list[str]) -> str | None:
        """The message lies in the entry that has come free."""
        entry = self.hv.load32(Work.at(0, Work.NUMBER))
        state = self.hv.load32(Work.at(0, Work.STATE)) & 0xFF
        if (state, entry) == (Work.FILLED, NUMBER_FIRST):
            return None
        return f"message {NUMBER_FIRST} is not in the work ring: state {state}, number {entry}"
