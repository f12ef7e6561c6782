# SPDX-License-Identifier: Apache-2.0
"""A file lets go of a port while its handler runs: nothing that came before is lost, and nothing happens afterwards.

Contexts: the hypervisor (raises the port as often as asked, then executes the call: unbind, or the release of the whole
file) and the CPUs (servers). When the call has returned, the file's page and the port belong to somebody else; whoever
still puts something into the ring then, or marks the irq word, does so in memory that has been freed.
"""

from __future__ import annotations

from collections.abc import Iterable
from functools import partial

from pvbus.actors.hypervisor import calls
from pvbus.actors.hypervisor.irqs import IrqLayer
from pvbus.shm.layout import Domain, FilePage, Irq, Port
from pvbus.verify.explorer.model import Model
from pvbus.verify.explorer.scenario import Start, claimed, within
from pvbus.verify.scenarios.xen import XenScenario

MARK = 0xDEAD  # what the next owner of the page writes into it


class Unbinding(XenScenario):
    """`before` are the ports raised just before the call, `pending` those that wait for the CPU from the beginning.

    With `release` the file is closed; otherwise port 1 is unbound.
    """

    ranges = within(before=(1, 63), pending=(1, 63), ports=(1, 63), cpus=(1, 8))
    name = "unbinding"
    claims = (
        claimed("sc tso arm", {}, {"release": True, "ports": (1,), "pending": (1,), "before": ()})
        + claimed("sc tso", {"release": True}, {"release": True, "cpus": 2})
    )

    def __init__(
        self, *, before: tuple[int, ...] = (1,), pending: tuple[int, ...] = (), ports: tuple[int, ...] = (1, 2),
        release: bool = False, cpus: int = 1,
    ) -> None:  # fmt: skip
        if strange := {*before, *pending, *(() if release else (1,))} - set(ports):
            raise ValueError(f"port {min(strange)} is none of ports={','.join(map(str, ports))}")
        self.before, self.pending, self.ports = tuple(before), tuple(pending), tuple(ports)
        self.release = release
        self.cpus = cpus
        self.delivered = 0

    def prepare(self, model: Model, variants: int) -> None:
        """Make the pages; the CPUs are awake."""
        self.make(model, ports=self.ports, cpus=self.cpus, variants=variants)
        for port in self.pending:
            self.path.set_pending(0, port)

    def start(self, model: Model) -> Iterable[Start]:
        """Give the hypervisor and the CPUs."""
        yield "hypervisor", partial(self._hypervisor, model, self.irq_layer(model)), False
        for vcpu in range(self.cpus):
            yield f"cpu{vcpu}", partial(self.cpu, model, vcpu), True

    def _hypervisor(self, model: Model, irqs: IrqLayer) -> None:
        self.delivered = 0
        for port in self.before:
            vcpu = self.path.set_pending(0, port)
            if vcpu >= 0:
                model.ring(self.doorbells[vcpu], "cpu.kick")
        self.call(model, irqs)
        self.delivered = self.page.load64(FilePage.PROD, "freed.look")
        for at in range(len(self.before) + len(self.pending)):  # the page is somebody else's
            self.page.store32(FilePage.RING + 4 * at, MARK, "freed.use")

    def call(self, model: Model, irqs: IrqLayer) -> None:
        """Execute the call."""
        self.run_call(model, calls.release(irqs, 0, 0) if self.release else calls.unbind_irq(irqs, 0, 0, 1))

    def broken(self, model: Model, stuck: list[str]) -> str | None:
        """The call ends; before it, what had been raised came (A8.1); behind it, nobody touches what it freed."""
        if stuck:
            return None  # the search says who waits for whom
        prod = self.page.load64(FilePage.PROD)
        if prod != self.delivered or any(entry != MARK for entry in self.came()):
            return "use after free: an event was put into the ring after the call had returned"
        for port in self.ports if self.release else (1,):
            if self.irq(port) & (Irq.SLOT | Irq.IN_SERVICE | Irq.ACTIVE):
                return f"use after free: the irq word of port {port} is {self.irq(port):#x} after the call had returned"
            if self.domain.load64(Domain.table(Domain.PORT_WORDS, port)) & 7 != Port.FREE:
                return f"port {port} is still open"
            if self.is_pending(port):
                return f"port {port} is pending, and free: who gets it next has an event that was not raised for it"
        raised = len({*self.before, *self.pending})
        if not self.release and prod != raised:
            return f"{raised} events were raised before the call, {prod} came"
        return None
