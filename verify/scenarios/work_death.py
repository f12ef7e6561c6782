# SPDX-License-Identifier: Apache-2.0
"""The workqueue is killed at any step of a work item, and its heir goes on: is each message handled, and only one twice?

Claim, do, release: an entry is TAKEN while its message is handled, then the head moves behind it, then it is free. An heir begins
again what its forerunner has not ended, which may be half done; what had come to its end stays so. Contexts: one a virtual CPU,
with one message each, the workqueue, which may die anywhere, and its heir.
"""

from __future__ import annotations

from collections.abc import Iterable
from functools import partial
from typing import TYPE_CHECKING

from pvbus.shm.hyperv import Header, Vp
from pvbus.verify.explorer.scenario import claimed, within
from pvbus.verify.scenarios.work_ring import NUMBER_FIRST, WorkRings

if TYPE_CHECKING:
    from pvbus.actors.workqueue.work import WorkRing
    from pvbus.verify.explorer.model import Model
    from pvbus.verify.explorer.scenario import Start


class WorkDeath(WorkRings):
    """`cpus` virtual CPUs with a message each."""

    ranges = within(cpus=(1, 8))
    name = "work-death"
    claims = claimed("sc tso arm", {}, deaths=1) + claimed("sc tso", {"cpus": 2}, deaths=1)
    mortal = ("workqueue",)

    def __init__(self, *, cpus: int = 1) -> None:
        super().__init__(cpus=cpus)
        self.ended: list[int] = []

    def start(self, model: Model) -> Iterable[Start]:
        """Give the CPUs, the workqueue and its heir."""
        self.ended = []
        yield from super().start(model)
        yield "heir", partial(self._heir, model), True

    def _heir(self, model: Model) -> None:
        """Look at once, as a workqueue does when it is born; then be one."""
        model.await_death("workqueue")
        ring = self.ring()
        self.empty(ring)
        while True:
            model.wait(self.bell, "heir.wait")
            model.take(self.bell, "heir.take")
            self.empty(ring)

    def empty(self, ring: WorkRing) -> None:
        """Handle what is there, and note here, where no death can come between, what has come to its end."""
        while (payload := ring.take()) is not None:
            vp = int.from_bytes(payload, "little") - NUMBER_FIRST
            if vp in self.ended:
                raise AssertionError(f"the message of CPU {vp} was handled to its end, and came again")
            handled = Vp.at(vp, Vp.STIMER)
            self.hv.store64(handled, self.hv.load64(handled) + 1, "handled")
            ring.done()
            self.ended.append(vp)

    def broken(self, model: Model, stuck: list[str]) -> str | None:
        """Each message has been handled; at most one, which its forerunner was at, twice; and the ring is empty."""
        counts = [self.hv.load64(Vp.at(vp, Vp.STIMER)) for vp in range(self.cpus)]
        head, tail = self.hv.load32(Header.WORK_HEAD), self.hv.load32(Header.WORK_TAIL)
        again = sum(counts) - self.cpus
        if min(counts) >= 1 and again <= 1 and head == tail:
            return None
        return f"messages handled {counts} times; head {head}, tail {tail}"
