# SPDX-License-Identifier: Apache-2.0
"""A CPU's process is killed at any step of an upcall, and its heir goes on: each event comes once, and nobody sleeps over it.

Claim, do, release: the irq word says that a port is in service, the ring's record which entry is being queued under the
lock, and the lock whose it is. Contexts: the CPU, which may die anywhere; its heir, which begins when it has died and does
what CpuProcess does when it is reborn; the hypervisor (a server) and, if wanted, a reader (a server).
"""

from __future__ import annotations

from collections.abc import Iterable
from functools import partial

from pvbus.shm._core_explored import UserFile
from pvbus.shm.layout import Domain, File, FilePage, Irq, Machine, Vcpu
from pvbus.verify.explorer.model import Model
from pvbus.verify.explorer.scenario import Start, claimed, within
from pvbus.verify.scenarios.xen import XenScenario


class CpuDeath(XenScenario):
    """`events` ports, pending when the CPU begins. With `reader` a user reads them all and falls asleep."""

    ranges = within(events=(1, 32))
    name = "cpu-death"
    claims = claimed("sc tso arm", {}, {"events": 2}, {"reader": True}, deaths=1)
    mortal = ("cpu0",)

    def __init__(self, *, events: int = 1, reader: bool = False) -> None:
        self.ports = list(range(1, 1 + events))
        self.reader = reader
        self.read: list[int] = []

    def prepare(self, model: Model, variants: int) -> None:
        """Make the pages; every port is pending."""
        self.make(model, ports=self.ports, variants=variants)
        for port in self.ports:
            self.path.set_pending(0, port)

    def start(self, model: Model) -> Iterable[Start]:
        """Give the CPU, its heir, the hypervisor and the reader."""
        self.read = []
        yield "cpu0", partial(self.cpu, model, 0), True
        yield "heir", partial(self._heir, model), True
        if self.reader:
            yield "reader", partial(self._reader, self.user()), True
            yield "hypervisor", partial(self.hypervisor, model), True

    def _heir(self, model: Model) -> None:
        model.await_death("cpu0")
        self.domain.store32(Domain.vcpu(0, Vcpu.SLEEPING), 0, "cpu.awake")
        self.recover()
        while (served := self.path.upcall(0, 0, 256)) is not None:
            for _ in served[1]:
                model.ring(self.door, "door.send")
        self.wake(model)
        self.cpu(model, 0)

    def recover(self) -> None:
        """Finish what the dead one held, and look everywhere."""
        self.path.cpu_recover(0, 0)

    def wake(self, model: Model) -> None:
        """Mirror CpuProcess._go: the dead may have raised a door and not sent the byte."""
        page = self.page
        unread = page.load64(FilePage.PROD, "heir.prod") != page.load64(FilePage.CONS, "heir.cons")
        if unread or page.load32(FilePage.DOOR, "heir.door"):
            page.store32(FilePage.DOOR, 1, "heir.door")
            model.ring(self.door, "door.send")

    def _reader(self, user: UserFile) -> None:
        while True:
            self.read += user.read_ports(16)

    def broken(self, model: Model, stuck: list[str]) -> str | None:
        """Each event has come once, in order, and was read if somebody reads; the ring's lock is free."""
        came = self.came()
        if came != self.ports:
            return f"came {came}, but raised {self.ports}"
        if self.reader and self.read != self.ports:
            return f"the reader sleeps, has read {self.read}, and {self.ports} came"
        if owner := self.machine.load32(Machine.file(0, File.LOCK)):
            return f"the producer lock is left behind by {owner:#x}"
        for port in self.ports:
            if self.irq(port) & Irq.IN_SERVICE:
                return f"port {port} is in service for ever"
        return self.stranded(self.ports)
