# SPDX-License-Identifier: Apache-2.0
"""Two ports that have been spurious too often are written back: each must be unmasked when its own time has come.

Contexts: the hypervisor (writes the ports back in either order, then sleeps until the next end of interrupt is due, again
and again, as its loop does) and perhaps the CPU (a server). Time is a word of the machine's page, which moves in that sleep.
"""

from __future__ import annotations

from collections.abc import Iterable
from functools import partial
from typing import Final

from pvbus.shm.layout import TICK_NS, Domain, Irq, Machine
from pvbus.verify.explorer.model import Model
from pvbus.verify.explorer.scenario import Start, claimed
from pvbus.verify.scenarios.xen import XenScenario

BEGIN_NS: Final = 1_000 * TICK_NS
SPURIOUS: Final = {1: 4, 2: 1}  # how often each port has been spurious before this time
DUE_NS: Final = {port: BEGIN_NS + (TICK_NS << count + 1 - 2) for port, count in SPURIOUS.items()}
ROUNDS_MAX: Final = 2 * len(SPURIOUS)


class LateEoi(XenScenario):
    """Port 1 has to wait eight ticks, port 2 one. With `waiting` their next events wait, and a CPU serves them."""

    name = "late-eoi"
    claims = claimed("sc tso arm", {}) + claimed("sc tso", {"waiting": True})

    def __init__(self, *, waiting: bool = False) -> None:
        self.waiting = waiting
        self.ended_ns: dict[int, int] = {}

    def prepare(self, model: Model, variants: int) -> None:
        """Make the pages: the ports are their user's."""
        self.make(model, ports=tuple(SPURIOUS), variants=variants)
        self.machine.store64(Machine.CLOCK_OFFSET_NS, BEGIN_NS)
        for port, count in SPURIOUS.items():
            self.domain.store64(Domain.table(Domain.IRQ_WORDS, port), 1 | Irq.ACTIVE | Irq.EOI_PENDING)
            self.domain.store64(Domain.table(Domain.EOI_WORDS, port), count)
            self.path.mask(0, port)
            if self.waiting:
                self.path.set_pending(0, port)

    def start(self, model: Model) -> Iterable[Start]:
        """Give the hypervisor and, if there is something for it to do, the CPU."""
        self.ended_ns = {}
        yield "hypervisor", partial(self._hypervisor, model), False
        if self.waiting:
            yield "cpu0", partial(self.cpu, model, 0), True

    def _hypervisor(self, model: Model) -> None:
        order = (1, 2) if model.choose(2, "which is first") == 0 else (2, 1)
        for port in order:
            self.write_back(port)
        for _ in range(ROUNDS_MAX):
            until = self.domain.load64(Domain.EOI_NEXT_NS, "sleep until")
            if not until:
                return
            self.machine.store64(Machine.CLOCK_OFFSET_NS, until, "clock")
            for code in self.path.expire():
                model.ring(self.doorbells[code & 0xFF], "cpu.kick")
            for port in SPURIOUS:
                if port not in self.ended_ns and not self.irq(port) & Irq.DELAYED:
                    self.ended_ns[port] = until

    def write_back(self, port: int) -> None:
        """End the port's interrupt, which was spurious once more."""
        self.path.eoi(0, port, 0, 1)

    def broken(self, model: Model, stuck: list[str]) -> str | None:
        """Each port's interrupt has ended at its time, and its event has come."""
        for port, due in DUE_NS.items():
            ended = self.ended_ns.get(port)
            if ended != due:
                when = "never" if ended is None else f"after {(ended - BEGIN_NS) // TICK_NS} ticks"
                return f"the interrupt of port {port} was due after {(due - BEGIN_NS) // TICK_NS} ticks, and ended {when}"
        expected = sorted(SPURIOUS) if self.waiting else []
        return None if sorted(self.came()) == expected else f"came {self.came()}, and {expected} were waiting"
