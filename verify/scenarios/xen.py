# SPDX-License-Identifier: Apache-2.0
"""What scenarios of the event path share: the pages of a domain with one open file, and the loops over them.

The pages are made as hypervisor, file and cpu processes leave them when the file's ports are bound (2-level ABI). All
code that runs is the production's; modelled are the doorbells, and who is called when (loops.py).
"""

from __future__ import annotations

from collections.abc import Generator, Iterable, Sequence
from typing import Final

from pvbus.actors.hypervisor import calls
from pvbus.actors.hypervisor.irqs import IrqLayer
from pvbus.actors.hypervisor.ports import DomainState, EventChannels
from pvbus.shm._core_explored import Context, EventPath, Memory, UserFile
from pvbus.shm.channel import cpu_is_idle
from pvbus.shm.layout import (
    PORTS_2L,
    Domain,
    File,
    FilePage,
    Irq,
    Machine,
    Port,
    PublicPage,
    Submission,
    SubmissionRing,
    Vcpu,
)
from pvbus.verify.explorer.model import FilePort, Model
from pvbus.verify.explorer.scenario import Scenario
from pvbus.verify.scenarios import loops

VALID: Final = 64  # ports that the domain has ever handed out


class XenScenario(Scenario):
    """One domain, one open file in slot 0. Its ports are IPIs unless said otherwise: a notify raises the port itself."""

    port_state = Port.IPI

    def make(
        self, model: Model, *, ports: Sequence[int], cpus: int = 1, entries: int = 64, users: int = 1, variants: int = 0
    ) -> None:
        """Make pages and doorbells; bind `ports` to the file, the first on CPU 0, the next on CPU 1, and so on."""
        self.cpus = cpus
        self.door, self.kick = model.bell("door"), model.bell("kick")
        self.doorbells = [model.bell(f"bell{vcpu}") for vcpu in range(cpus)]
        self.machine = Memory(model, Machine.BYTES)
        self.domain = Memory(model, Domain.BYTES)
        self.page = Memory(FilePort(model, self.door, self.kick), FilePage.BYTES)
        self.public = Memory(model, PublicPage.BYTES)
        self.rings = [Memory(model, SubmissionRing.BYTES) for _ in range(users)]
        for name in ("machine", "domain", "page", "public"):
            model.name(getattr(self, name), name)
        self.machine.store32(Machine.VARIANTS, variants)
        self.machine.store32(Machine.file(0, File.STATE), File.OPEN)
        self.machine.store32(Machine.file(0, File.SIZE), entries)
        self.page.store32(FilePage.SIZE, entries)
        self.public.store32(PublicPage.HYPERVISOR_SLEEPING, 1)
        self.domain.store32(Domain.PORTS_MAX, PORTS_2L)
        self.domain.store32(Domain.VALID_EVTCHNS, VALID)
        self.path = EventPath(self.machine, {0: self.domain})
        self.path.attach_file(0, self.page)
        for index, ring in enumerate(self.rings):
            model.name(ring, f"ring{index}")
            self.machine.store32(Machine.submission(index, Submission.STATE), Submission.ATTACHED)
            self.path.attach_submission(index, ring, 0)
        for at, port in enumerate(ports):
            self.bind(port, at % cpus)

    def bind(self, port: int, vcpu: int = 0) -> None:
        """Give the file a port, enabled and unmasked."""
        self.domain.store64(Domain.table(Domain.PORT_WORDS, port), Port.pack(self.port_state, vcpu=vcpu))
        self.domain.store64(Domain.table(Domain.IRQ_WORDS, port), 1 | Irq.ENABLED)
        self.domain.fetch_or64(Domain.vcpu(vcpu, Vcpu.EVTCHN_MASK) + port // 64 * 8, 1 << port % 64)
        self.page.fetch_or64(FilePage.BITMAP + port // 64 * 8, 1 << port % 64)

    # ---- who acts

    def user(self, index: int = 0) -> UserFile:
        """Give the file as a user process has it, over a submission ring of its own."""
        return UserFile(Context(self.page, self.rings[index], self.public, -1, -1, 0, FilePage.BITMAP))

    def irq_layer(self, model: Model) -> IrqLayer:
        """Give the irq layer and the event channels as a new hypervisor process has them."""
        domains = {0: DomainState(0, self.cpus, self.domain)}
        return IrqLayer(EventChannels(domains, self.path, lambda _, vcpu: model.ring(self.doorbells[vcpu], "cpu.kick")))

    def hypervisor(self, model: Model) -> None:
        """Run the hypervisor's loop; begins asleep and announced."""
        loops.hypervisor(model, self.path, self.public, self.kick, self.door, doorbells=self.doorbells)

    def cpu(self, model: Model, vcpu: int, budget: int = 256) -> None:
        """Run a CPU's loop; begins awake."""
        loops.cpu(model, self.path, self.domain, vcpu, self.doorbells[vcpu], self.door, budget)

    def run_call(self, model: Model, steps: Generator[calls.Wait, None, int]) -> int:
        """Run a call as the hypervisor does: it waits for CPUs to be idle, or for a turn of the others; give its value."""
        while True:
            try:
                wait = next(steps)
            except StopIteration as stop:
                return int(stop.value)
            if isinstance(wait, calls.Flush):
                while not all(self.is_idle(vcpu) for vcpu in range(self.cpus)):
                    model.spin("flush")
            else:
                model.spin("again")

    def is_idle(self, vcpu: int) -> bool:
        """Tell whether the hypervisor takes a CPU for idle."""
        return cpu_is_idle(self.domain, vcpu)

    # ---- what can be seen at the end

    def came(self) -> list[int]:
        """Give the ports that were put into the event ring, from its beginning; it must not have wrapped."""
        count = self.page.load64(FilePage.PROD) & 0xFFFFFFFF
        return [self.page.load32(FilePage.RING + 4 * at) for at in range(count)]

    def irq(self, port: int) -> int:
        """Give a port's irq word."""
        return self.domain.load64(Domain.table(Domain.IRQ_WORDS, port))

    def is_masked(self, port: int) -> bool:
        """Tell whether the port's mask bit is set."""
        return bool(self.domain.load64(Domain.EVTCHN_MASK + port // 64 * 8) >> port % 64 & 1)

    def is_pending(self, port: int) -> bool:
        """Tell whether the port's pending bit is set."""
        return bool(self.domain.load64(Domain.EVTCHN_PENDING + port // 64 * 8) >> port % 64 & 1)

    def stranded(self, ports: Iterable[int]) -> str | None:
        """Nobody runs any more: a port must be masked exactly while its user has it, and pending only while masked."""
        for port in ports:
            irq = self.irq(port)
            if irq & Irq.ENABLED and self.is_masked(port):
                return f"port {port} is masked for ever: nobody has it, so nobody will write it back"
            if not irq & Irq.ENABLED and not self.is_masked(port):
                return f"port {port} is unmasked while its user has it"
            if self.is_pending(port) and not self.is_masked(port):
                return f"port {port} is pending, and nobody comes to serve it"
        return None
