# SPDX-License-Identifier: Apache-2.0
"""The interrupt handler once more, access by access in Python, so that a bug of the zoo can change one step of it.

It does what upcall.c, interrupt.c and event_ring.c do on the 2-level ABI, without what no scenario here needs: the log of
arrivals, overflow, the claim for an heir. As it stands it is right, and a test holds it to the same scenarios.
"""

from __future__ import annotations

from pvbus.shm.layout import Domain, File, FilePage, Irq, Machine, Vcpu
from pvbus.verify.explorer.model import Model
from pvbus.verify.scenarios import loops
from pvbus.verify.scenarios.xen import XenScenario

ALL = 2**64 - 1


class Handler:
    """One virtual CPU over the pages of a scenario."""

    def __init__(self, scenario: XenScenario, model: Model, vcpu: int) -> None:
        self.scenario = scenario
        self.model = model
        self.vcpu = vcpu
        self.domain, self.machine, self.page = scenario.domain, scenario.machine, scenario.page

    def run(self) -> None:
        """Take upcalls until there is none, then sleep."""
        while True:
            while self.upcall():
                pass
            if self.scenario.path.cpu_may_sleep(0, self.vcpu):
                loops.sleep(self.model, self.domain, self.vcpu, self.scenario.doorbells[self.vcpu])

    def upcall(self) -> bool:
        """Take the selector and serve what is due; False when there was no upcall."""
        flag = Domain.vcpu_info(self.vcpu, Domain.UPCALL_PENDING)
        if not self.domain.load8(flag, "upcall.look"):
            return False
        self.domain.exchange8(flag, 0, "upcall.clear")
        if self.domain.exchange64(Domain.vcpu_info(self.vcpu, Domain.PENDING_SEL), 0, "2l.sel.take"):
            due = self.domain.load64_acquire(Domain.EVTCHN_PENDING, "2l.scan.pending")
            due &= self.domain.load64(Domain.vcpu(self.vcpu, Vcpu.EVTCHN_MASK), "2l.scan.mine")
            due &= ~self.domain.load64(Domain.EVTCHN_MASK, "2l.scan.mask")
            for port in range(64):
                if due >> port & 1:
                    self.service(port)
        return True

    def service(self, port: int) -> None:
        """Claim the port, then handle it; one that is in service elsewhere is left for another look."""
        at = Domain.table(Domain.IRQ_WORDS, port)
        irq = self.domain.load64_acquire(at, "irq")
        while True:
            if irq & Irq.IN_SERVICE:
                self.domain.fetch_or64(Domain.vcpu_info(self.vcpu, Domain.PENDING_SEL), 1, "2l.sel.back")
                self.domain.exchange8(Domain.vcpu_info(self.vcpu, Domain.UPCALL_PENDING), 1, "upcall.back")
                return
            if not irq & Irq.SLOT or irq & (Irq.ACTIVE | Irq.EXPLICIT):
                return
            seen = self.domain.compare_exchange64(at, irq, self.claimed(irq), "irq.claim")
            if seen == irq:
                break
            irq = seen
        self.handle(port)

    def claimed(self, irq: int) -> int:
        """Give the irq word of a port that is being served."""
        return (irq | Irq.ACTIVE | Irq.EOI_PENDING | Irq.IN_SERVICE) + Irq.SERVED_ONE

    def handle(self, port: int) -> None:
        """Mask it, clear pending, no longer enabled, into the ring."""
        self.domain.fetch_or64(Domain.EVTCHN_MASK, 1 << port, "irq.mask")
        self.domain.fetch_and64(Domain.EVTCHN_PENDING, ~(1 << port) & ALL, "irq.clear")
        self.domain.fetch_and64(Domain.table(Domain.IRQ_WORDS, port), ~Irq.ENABLED & ALL, "irq.disable")
        self.push(port)

    def push(self, port: int) -> None:
        """Queue the port under the producer lock, end its service, wake a reader that may sleep."""
        lock = Machine.file(0, File.LOCK)
        while self.machine.compare_exchange32(lock, 0, 1 + self.vcpu, "evr_lock") != 0:
            self.model.spin("evr.lock.spin")
        self.queue(port)
        self.domain.fetch_and64(Domain.table(Domain.IRQ_WORDS, port), ~Irq.IN_SERVICE & ALL, "irq.served")
        self.machine.store32_release(lock, 0, "evr_lock")
        self.page.smp_mb("evr_wake")
        if not self.page.load32(FilePage.DOOR, "evr.door") and not self.page.exchange32(FilePage.DOOR, 1, "evr.door.raise"):
            self.model.ring(self.scenario.door, "door.send")

    def queue(self, port: int) -> None:
        """Store the entry, then the index that covers it."""
        prod = self.machine.load64(Machine.file(0, File.PROD), "evr.prod")
        self.page.store32(self.entry(prod), port, "evr.entry")
        self.page.smp_wmb("evr_publish")
        self.publish(prod, prod + 1)

    def entry(self, index: int) -> int:
        """Give the offset of an entry."""
        size = self.machine.load32(Machine.file(0, File.SIZE), "evr.size")
        return FilePage.RING + 4 * (index & 0xFFFFFFFF & (size - 1))

    def publish(self, old: int, new: int) -> None:
        """Let the producer index cover the entry."""
        self.machine.store64(Machine.file(0, File.PROD), new, "evr.prod")
        self.page.store64(FilePage.PROD, new, "evr.publish")


class ByHand(XenScenario):
    """Mixed into a scenario: its CPUs run a Handler instead of the production code."""

    handler: type[Handler] = Handler

    def cpu(self, model: Model, vcpu: int, budget: int = 256) -> None:
        """Run the CPU's loop."""
        self.handler(self, model, vcpu).run()
