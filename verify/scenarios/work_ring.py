# SPDX-License-Identifier: Apache-2.0
"""CPUs put messages into the work ring while the workqueue empties it: is each message handled, and once?

Contexts: one a virtual CPU (ISR and message tasklet, hv_interrupt.c; then a byte into the workqueue's doorbell), each with one
message in its slot, and the workqueue (a server: WorkRing until it is empty, then sleep).
"""

from __future__ import annotations

from collections.abc import Iterable
from functools import partial

from pvbus.actors.workqueue.work import WorkRing
from pvbus.shm._core_explored import EventPath, Memory
from pvbus.shm.hyperv import BYTES, MESSAGE_VMBUS, SINT_VMBUS, Frame, Header, Slot, Vp, Work
from pvbus.shm.layout import Domain, Machine
from pvbus.verify.explorer.model import Model
from pvbus.verify.explorer.scenario import Scenario, Start, claimed, within

VECTOR = 0x37
NUMBER_FIRST = 1000


class WorkRings(Scenario):
    """`cpus` virtual CPUs with a message each."""

    ranges = within(cpus=(1, 8))
    name = "work-ring"
    claims = claimed("sc tso", {}) + claimed("sc tso arm", {"cpus": 1})

    def __init__(self, *, cpus: int = 2) -> None:
        self.cpus = cpus

    def prepare(self, model: Model, variants: int) -> None:
        """Fill the slots, and request the interrupts."""
        self.bell = model.bell("workqueue")
        self.machine, self.domain, self.hv = (Memory(model, size) for size in (Machine.BYTES, Domain.BYTES, BYTES))
        for name in ("machine", "domain", "hv"):
            model.name(getattr(self, name), name)
        self.machine.store32(Machine.VARIANTS, variants)
        self.path = EventPath(self.machine, {0: self.domain})
        self.path.set_hyperv(0, self.hv, -1)
        for vp in range(self.cpus):
            frame = Frame.of_vp(vp, Frame.MESSAGES)
            self.hv.store64(Vp.at(vp, Vp.SIMP), frame << 12 | 1)
            self.hv.store32(Vp.at(vp, Vp.VECTOR), VECTOR)
            self.hv.store64(Vp.at(vp, Vp.IRR), 1 << VECTOR)
            self.hv.store32(Vp.at(vp, Vp.OFFERED) + 4 * SINT_VMBUS, NUMBER_FIRST + vp)
            self.hv.store64(Slot.at(frame, SINT_VMBUS, Slot.PAYLOAD), NUMBER_FIRST + vp)
            self.hv.store32(Slot.at(frame, SINT_VMBUS, Slot.META), 8)
            self.hv.store32(Slot.at(frame, SINT_VMBUS, Slot.TYPE), MESSAGE_VMBUS)

    def start(self, model: Model) -> Iterable[Start]:
        """Give the CPUs and the workqueue."""
        for vp in range(self.cpus):
            yield f"cpu{vp}", partial(self._cpu, model, vp), False
        yield "workqueue", partial(self._workqueue, model), True

    def _cpu(self, model: Model, vp: int) -> None:
        if self.path.hv_run(0, vp)[2]:
            model.ring(self.bell, "workqueue.ring")

    def ring(self) -> WorkRing:
        """Make the consumer."""
        return WorkRing(self.hv)

    def _workqueue(self, model: Model) -> None:
        ring = self.ring()
        while True:
            model.wait(self.bell, "workqueue.wait")
            model.take(self.bell, "workqueue.take")
            self.empty(ring)

    def empty(self, ring: WorkRing) -> None:
        """Handle what is there."""
        while (payload := ring.take()) is not None:
            vp = int.from_bytes(payload, "little") - NUMBER_FIRST
            handled = Vp.at(vp if 0 <= vp < self.cpus else 0, Vp.STIMER)    # a word that nobody else uses
            self.hv.store64(handled, self.hv.load64(handled) + 1, "handled")
            ring.done()

    def broken(self, model: Model, stuck: list[str]) -> str | None:
        """Each message has been handled once, and the ring is empty."""
        counts = [self.hv.load64(Vp.at(vp, Vp.STIMER)) for vp in range(self.cpus)]
        head, tail = self.hv.load32(Header.WORK_HEAD), self.hv.load32(Header.WORK_TAIL)
        if counts == [1] * self.cpus and head == tail:
            return None
        left = [i for i in range(4) if self.hv.load32(Work.at(i, Work.STATE)) & 0xFF == Work.FILLED]
        return f"messages handled {counts} times; head {head}, tail {tail}, filled entries {left}"

