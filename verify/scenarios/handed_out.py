# SPDX-License-Identifier: Apache-2.0
"""The hypervisor is killed at any step while it hands out a port and binds it: does its heir give it back, or leave it whole?

The first port of a domain whose words nobody has counted yet: the number of valid ports grows before the port's word is written,
so an heir, which looks at valid ports only, misses none. What was handed out and not bound is closed; what was bound stays.
Contexts: the hypervisor, which may die anywhere; its heir, which then hands out one more; and an inspector, which looks at the
words of all valid ports meanwhile, once, and decides nothing by them.
"""

from __future__ import annotations

from collections.abc import Iterable
from functools import partial

from pvbus.actors.hypervisor import recovery
from pvbus.actors.hypervisor.irqs import IrqLayer
from pvbus.shm.layout import Domain, Irq, Port
from pvbus.verify.explorer.model import Model
from pvbus.verify.explorer.scenario import Start, claimed
from pvbus.verify.scenarios.xen import XenScenario


class HandedOut(XenScenario):
    """Port 1 is handed out as an IPI and bound to file 0."""

    name = "handed-out"
    claims = claimed("sc tso arm", {}, deaths=1)
    mortal = ("hypervisor",)

    def prepare(self, model: Model, variants: int) -> None:
        """Make the pages; the domain has no port."""
        self.make(model, ports=(), variants=variants)
        self.domain.store32(Domain.VALID_EVTCHNS, 0)

    def start(self, model: Model) -> Iterable[Start]:
        """Give the hypervisor, its heir and the inspector."""
        self.next = 0
        self.seen: list[int] = []
        yield "hypervisor", partial(self._hypervisor, model), False
        yield "heir", partial(self._heir, model), True
        yield "inspector", self._inspect, False

    def _hypervisor(self, model: Model) -> None:
        irqs = self.irq_layer(model)
        irqs.bind(0, irqs.channels.bind_ipi(0, 0), 0, static=False)

    def _inspect(self) -> None:
        valid = self.domain.load32(Domain.VALID_EVTCHNS, "inspect")
        for port in range(1, min(valid, 2)):
            self.seen.append(self.domain.load64(Domain.table(Domain.PORT_WORDS, port), "inspect") & 7)
            self.domain.load64(Domain.table(Domain.IRQ_WORDS, port), "inspect")

    def _heir(self, model: Model) -> None:
        model.await_death("hypervisor")
        irqs = self.irq_layer(model)
        self.repair(irqs)
        self.next = irqs.channels.bind_ipi(0, 0)

    def repair(self, irqs: IrqLayer) -> None:
        """Close what nobody has."""
        recovery.repair(irqs.channels, irqs)

    def broken(self, model: Model, stuck: list[str]) -> str | None:
        """A port that is bound is open, and no other's; one that is not is given to the next."""
        state = self.domain.load64(Domain.table(Domain.PORT_WORDS, 1)) & 7
        bound = bool(self.irq(1) & Irq.SLOT)
        if any(seen not in (Port.FREE, Port.IPI) for seen in self.seen):
            return f"an inspector has seen port 1 in the states {self.seen}"
        if state != Port.IPI:
            return f"port 1 is in state {state}, bound {bound}, after it was handed out"
        if not self.next:
            return None if bound else "nobody has died, and port 1 is not bound"
        if self.next != 1 + bound:
            return f"port 1 is bound {bound}, and port {self.next} was handed out next"
        return None if self.domain.load32(Domain.VALID_EVTCHNS) > self.next else f"port {self.next} is not a valid one"
