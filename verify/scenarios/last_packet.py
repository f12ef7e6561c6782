# SPDX-License-Identifier: Apache-2.0
"""A channel's last packet and the message that rescinds it have come together: is its driver told before the channel goes?

Contexts: the virtual CPU (ISR and both tasklets, hv_interrupt.c; then the doorbells that they ask for, as its process rings them)
and the workqueue (a server), which handles the rescind: from then on nobody looks into the channel's rings any more.
"""

from __future__ import annotations

from collections.abc import Iterable
from functools import partial
from typing import Final

from pvbus.actors.workqueue.work import WorkRing
from pvbus.shm._core_explored import EventPath, Memory
from pvbus.shm.hyperv import BYTES, MESSAGE_VMBUS, SINT_VMBUS, Frame, Header, Slot, Vp, flag_word
from pvbus.shm.layout import Domain, Machine
from pvbus.verify.explorer.model import Model
from pvbus.verify.explorer.scenario import Scenario, Start, claimed
from pvbus.verify.scenarios import loops

VECTOR: Final = 0x37
RELID: Final = 3
NUMBER: Final = 1000


class LastPacket(Scenario):
    """The host has signalled channel 3, and then posted a message about it."""

    name = "last-packet"
    claims = claimed("sc tso arm", {})

    def prepare(self, model: Model, variants: int) -> None:
        """Set the channel's flag, fill the slot, and request the interrupt."""
        self.door, self.work = model.bell("driver"), model.bell("workqueue")
        self.irq, self.exits = model.bell("irq"), model.bell("exits")
        self.machine, self.domain, self.hv = (Memory(model, size) for size in (Machine.BYTES, Domain.BYTES, BYTES))
        for name in ("machine", "domain", "hv"):
            model.name(getattr(self, name), name)
        self.machine.store32(Machine.VARIANTS, variants)
        self.path = EventPath(self.machine, {0: self.domain})
        self.path.set_hyperv(0, self.hv, -1)
        messages, flags = Frame.of_vp(0, Frame.MESSAGES), Frame.of_vp(0, Frame.EVENT_FLAGS)
        self.hv.store32(Header.FLAGS_ARE_RELIDS, 1)
        self.hv.store32(Vp.at(0, Vp.VECTOR), VECTOR)
        self.hv.store64(Vp.at(0, Vp.SIMP), messages << 12 | 1)
        self.hv.store64(Vp.at(0, Vp.SIEFP), flags << 12 | 1)
        self.hv.store64(Vp.at(0, Vp.IRR), 1 << VECTOR)
        self.hv.store64(flag_word(flags, SINT_VMBUS, RELID), 1 << RELID)
        self.hv.store32(Vp.at(0, Vp.OFFERED) + 4 * SINT_VMBUS, NUMBER)
        self.hv.store64(Slot.at(messages, SINT_VMBUS, Slot.PAYLOAD), NUMBER)
        self.hv.store32(Slot.at(messages, SINT_VMBUS, Slot.META), 8)
        self.hv.store32(Slot.at(messages, SINT_VMBUS, Slot.TYPE), MESSAGE_VMBUS)

    def start(self, model: Model) -> Iterable[Start]:
        """Give the CPU and the workqueue."""
        self.told: bool | None = None
        yield "cpu0", partial(self.cpu, model), True
        yield "workqueue", partial(self._workqueue, model), True

    def cpu(self, model: Model) -> None:
        """Run the CPU's loop."""
        loops.hyperv_cpu(model, self.path, self.hv, 0, self.irq, exits=self.exits, work=self.work, ring=partial(self.ring, model))

    def ring(self, model: Model, relid: int) -> None:
        """Ring the doorbell of a channel's driver."""
        if relid == RELID:
            loops.ring_eventfd(model, self.hv, self.door, "driver.ring")

    def _workqueue(self, model: Model) -> None:
        ring = WorkRing(self.hv)
        while True:
            loops.await_eventfd(model, self.hv, self.work, "workqueue")
            while ring.take() is not None:
                self.told = bool(model.take(self.door, "rescind"))
                ring.done()

    def broken(self, model: Model, stuck: list[str]) -> str | None:
        """The rescind was handled, and the driver had been told of its packet by then."""
        if self.told is None:
            return "the rescind was never handled"
        return None if self.told else "the channel was taken away, and its driver had not been told of the last packet"
