# SPDX-License-Identifier: Apache-2.0
"""The life of a port between pending and written back, while its CPU is at work: is it masked exactly while its user has it?

Contexts: the hypervisor, which does what its script says, and the CPUs (servers: upcall, sleep, wake). The hypervisor is
one process: raising, ending interrupts and moving ports never overlap with each other, only with the CPUs. Nobody reads:
what has come, and how often, stands in the ring at the end.

Steps: ("raise", port) · ("await", n): until n entries have come · ("eoi", port): its user writes it back ·
("move", port): to the last CPU.
"""

from __future__ import annotations

from collections.abc import Iterable
from functools import partial

from pvbus.actors.hypervisor.irqs import IrqLayer
from pvbus.shm.layout import FilePage, Port
from pvbus.verify.explorer.model import Model
from pvbus.verify.explorer.scenario import Start, claimed, within
from pvbus.verify.scenarios import script_of
from pvbus.verify.scenarios.xen import XenScenario

Step = tuple[str, int]
_RAISE, _AWAIT, _EOI = ("raise", 1), ("await", 1), ("eoi", 1)


class PortLife(XenScenario):
    """`script`: the hypervisor's steps; every port begins on CPU 0."""

    ranges = within(cpus=(1, 8))
    name = "port-life"
    claims = (
        *claimed("sc tso arm", {"script": (_RAISE, _AWAIT, _EOI)}, {"script": (_RAISE, _EOI, _AWAIT, _EOI)}),
        *claimed("sc tso arm", {"script": (_RAISE, ("raise", 2))}),
        *claimed("sc tso arm", {"script": (_RAISE, _AWAIT, ("move", 1), _RAISE), "cpus": 2}),
        *claimed("sc tso", {}, {"script": (_RAISE, ("move", 1))}),
        *claimed("sc", {"script": (_RAISE, ("move", 1)), "cpus": 2}, preemptions=2),
    )
    port_state = Port.UNBOUND  # it can be moved

    def __init__(
        self, script: tuple[Step, ...] = (_RAISE, _AWAIT, _RAISE, _EOI), *, cpus: int = 1
    ) -> None:
        self.script = script_of(script, "raise", "await", "move", "eoi")
        self.cpus = cpus
        self.ports = sorted({of for what, of in self.script if what != "await"})

    def prepare(self, model: Model, variants: int) -> None:
        """Make the pages, every port on CPU 0."""
        self.make(model, ports=(), cpus=self.cpus, variants=variants)
        for port in self.ports:
            self.bind(port)

    def start(self, model: Model) -> Iterable[Start]:
        """Give the hypervisor and the CPUs."""
        yield "hypervisor", partial(self._script, model, self.irq_layer(model)), False
        for vcpu in range(self.cpus):
            yield f"cpu{vcpu}", partial(self.cpu, model, vcpu), True

    def _script(self, model: Model, irqs: IrqLayer) -> None:
        for what, of in self.script:
            if what == "await":
                while self.page.load64(FilePage.PROD, "await") & 0xFFFFFFFF < of:
                    model.spin("await")
            elif what == "move":
                self.move(irqs, of)
            else:
                vcpu = self.write_back(of) if what == "eoi" else self.path.set_pending(0, of)
                if vcpu >= 0:
                    model.ring(self.doorbells[vcpu], "cpu.kick")

    def write_back(self, port: int) -> int:
        """End the port's interrupt; give the vCPU whose doorbell is to be rung, or -1."""
        return self.path.eoi(0, port, 0)

    def move(self, irqs: IrqLayer, port: int) -> None:
        """Have the last CPU serve the port."""
        irqs.set_affinity(0, port, self.cpus - 1)

    def broken(self, model: Model, stuck: list[str]) -> str | None:
        """Each port came, and again only after it was written back; it is masked exactly while its user has it."""
        came = self.came()
        for port in self.ports:
            raised, ended = self.script.count(("raise", port)), self.script.count(("eoi", port))
            if came.count(port) > min(raised, 1 + ended):
                return f"port {port} came {came.count(port)} times, raised {raised} times and written back {ended} times"
            if raised and port not in came:
                return f"port {port} was raised and never came"
        return self.stranded(self.ports)
