# SPDX-License-Identifier: Apache-2.0
"""The hypervisor links ports into a FIFO queue while the CPU takes them out: is every one of them found?

Contexts: the hypervisor (raises, and ends interrupts, as its script says; rings the CPU that sleeps) and the
CPU (a server: upcall, sleep, wake). Both run the production code; only the doorbell is modelled. The event
ring is the CPU's alone here: nobody reads, so what has come, and in which order, stands in it at the end.
"""

from __future__ import annotations

from collections.abc import Iterable
from functools import partial
from typing import Final

from pvbus.shm._core_explored import EventPath, Memory
from pvbus.shm.layout import ABI_FIFO, PORTS_FIFO, Domain, Fifo, File, FilePage, Irq, Machine, Port, Vcpu
from pvbus.verify.explorer.model import Model
from pvbus.verify.explorer.scenario import Scenario, Start, claimed, within
from pvbus.verify.scenarios import script_of

RING_ENTRIES: Final = 64
CONTROL: Final = Domain.guest_page(0)
ARRAY_FRAME: Final = 1


def word_at(port: int) -> int:
    """Give the offset of a port's event word."""
    return Domain.guest_page(ARRAY_FRAME) + 4 * port


def move_to_fifo(domain: Memory, *, pages: int = 1) -> None:
    """Leave a domain as it is on the FIFO ABI, with its control block, and one page of its event array or none."""
    for at, value in (
        (Domain.ABI, ABI_FIFO), (Domain.PORTS_MAX, PORTS_FIFO), (Domain.ARRAY, (ARRAY_FRAME + 1) * pages),
        (Domain.ARRAY_PAGES, pages), (Domain.VALID_EVTCHNS, 64), (Domain.vcpu(0, Vcpu.CONTROL), CONTROL),
    ):  # fmt: skip
        domain.store32(at, value)


class FifoQueue(Scenario):
    """`script`: what the hypervisor does, (`raise`, port) or (`eoi`, port); `before`: ports that it has
    raised by then; `waiting`: ports that their user has, and that were raised again.

    `urgent` ports have priority 0, the others the default one. `upcall_budget` is how many events one
    upcall serves.
    """

    ranges = within(before=(1, 63), waiting=(1, 63), urgent=(1, 63), upcall_budget=(1, 1024))
    name = "fifo-queue"
    claims = claimed(
        "sc tso arm", {}, {"script": (("raise", 1),)}, {"script": (("raise", 2),), "before": (1,)},
        {"script": (("raise", 1),), "before": (1,)}, {"script": (("raise", 2),), "before": (1,), "urgent": (2,)},
        {"script": (("eoi", 1), ("raise", 1)), "before": (1,)},
    )  # fmt: skip

    def __init__(
        self, script: tuple[tuple[str, int], ...] = (("raise", 1), ("raise", 2)), *, before: tuple[int, ...] = (),
        waiting: tuple[int, ...] = (), urgent: tuple[int, ...] = (), upcall_budget: int = 256,
    ) -> None:  # fmt: skip
        self.script = script_of(script, "raise", "eoi")
        for port in waiting:
            if ("eoi", port) not in self.script or port in before:
                raise ValueError(f"waiting={port}: its user has it; not raised before, and the script writes it back, eoi:{port}")
        self.before = before
        self.waiting = waiting
        self.urgent = urgent
        self.upcall_budget = upcall_budget
        self.raised = [*before, *waiting, *(port for what, port in self.script if what == "raise")]

    def prepare(self, model: Model, variants: int) -> None:
        """Make the pages of a domain that is on the FIFO ABI, its ports bound to one file and unmasked."""
        self.doorbell = model.bell("cpu0")
        self.machine = Memory(model, Machine.BYTES)
        self.domain = Memory(model, Domain.BYTES)
        self.page = Memory(model, FilePage.BYTES)
        for name in ("machine", "domain", "page"):
            model.name(getattr(self, name), name)
        self.machine.store32(Machine.VARIANTS, variants)
        self.machine.store32(Machine.file(0, File.STATE), File.OPEN)
        self.machine.store32(Machine.file(0, File.SIZE), RING_ENTRIES)
        self.page.store32(FilePage.SIZE, RING_ENTRIES)
        domain = self.domain
        move_to_fifo(domain)
        self.path = EventPath(self.machine, {0: domain})
        self.path.attach_file(0, self.page)
        for port in set(self.raised):
            domain.store64(Domain.table(Domain.PORT_WORDS, port), Port.pack(Port.IPI))
            domain.store64(Domain.table(Domain.IRQ_WORDS, port), 1 | Irq.ENABLED)
        for port in self.urgent:
            domain.store64(Domain.table(Domain.QUEUE_WORDS, port), Fifo.with_priority(0, 0))
        for port in self.waiting:
            domain.store64(Domain.table(Domain.IRQ_WORDS, port), 1 | Irq.ACTIVE | Irq.EOI_PENDING)
            domain.store32(word_at(port), Fifo.MASKED)
        for port in (*self.before, *self.waiting):
            self.path.set_pending(0, port)

    def start(self, model: Model) -> Iterable[Start]:
        """Give the CPU and the hypervisor."""
        yield "cpu0", partial(self._cpu, model), True
        yield "hypervisor", partial(self._hypervisor, model), False

    def _hypervisor(self, model: Model) -> None:
        for what, port in self.script:
            if (self.end(port) if what == "eoi" else self.set_pending(port)) >= 0:
                model.ring(self.doorbell, "cpu.kick")

    def set_pending(self, port: int) -> int:
        """Raise a port; give the vCPU whose doorbell is to be rung, or -1."""
        return self.path.set_pending(0, port)

    def end(self, port: int) -> int:
        """End a port's interrupt; give the vCPU whose doorbell is to be rung, or -1."""
        return self.path.eoi(0, port, 0)

    def _cpu(self, model: Model) -> None:
        """What CpuProcess does, but for the bytes of the file's doorbell: nobody reads."""
        while True:
            while self.path.upcall(0, 0, self.upcall_budget) is not None:
                pass
            if self.path.cpu_may_sleep(0, 0):
                model.wait(self.doorbell, "cpu.wait")
                model.take(self.doorbell, "cpu.take")
                self.domain.store32(Domain.vcpu(0, Vcpu.SLEEPING), 0, "cpu.awake")

    def came(self) -> list[int]:
        """Give what lies in the event ring."""
        count = self.page.load64(FilePage.PROD)
        return [self.page.load32(FilePage.RING + 4 * i) for i in range(count)]

    def broken(self, model: Model, stuck: list[str]) -> str | None:
        """Every port raised has come; none is linked, none is pending and unmasked, and the CPU sleeps."""
        came = self.came()
        for port in sorted(set(self.raised)):
            word = self.domain.load32(word_at(port))
            left = word & Fifo.LINKED or (word & Fifo.PENDING and not word & Fifo.MASKED)
            if port not in came or left:
                return f"port {port} was raised, and the CPU sleeps: word {word:#x}, came {came}"
            if came.count(port) + bool(word & Fifo.PENDING) > self.raised.count(port):
                return f"port {port} was raised {self.raised.count(port)} times, came {came.count(port)} times: word {word:#x}"
        order = [*self.before, *(port for what, port in self.script if what == "raise" or port in self.waiting)]
        if not self.urgent and len(set(self.raised)) == len(self.raised) == len(order) and came != order:
            return f"came {came}, but raised {order}"  # what was raised under a mask is queued when its user writes it back
        return None
