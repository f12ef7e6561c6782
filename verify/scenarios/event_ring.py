# SPDX-License-Identifier: Apache-2.0
"""The interrupt handler fills an event ring while a reader empties it and sleeps: where the driver loses a
wake-up.

Contexts: one a virtual CPU (upcall, then a byte into the doorbell of each file that it returns, as its
process does), the reader (a blocking UserFile.read after the other until it has every event), the
hypervisor (a server: re-arms the doorbell when a reader asks for it), and, if wanted, a sender that raises
the ports while the CPU is at work. All of them run the production code; the only thing modelled here is the
doorbell, a counter of bytes.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from functools import partial
from typing import Final

from pvbus.shm._core_explored import Context, EventPath, Memory, UserFile
from pvbus.shm.layout import (
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
from pvbus.verify.explorer.scenario import Scenario, Start, claimed, within
from pvbus.verify.scenarios import loops

RING_ENTRIES: Final = 64
PORT_FIRST: Final = 1


class EventRing(Scenario):
    """`events` ports, each raised once, on `cpus` virtual CPUs in turn, for one reader that asks for
    `batch` ports a call.

    `upcall_budget` is how many events one upcall serves: with 1, each is an upcall of its own, as on
    hardware. With `sender` the ports are raised by a context of their own, and the CPUs sleep and are
    kicked; without, they are pending at the start. With `heir` each CPU's process dies when its work is
    done, and its heir wakes every file that may have missed its byte. Several `readers` are processes that
    share the file, each with a submission ring of its own. With an heir or several readers they read on for
    ever, and have to fall asleep in the end.
    """

    ranges = within(events=(1, 64), cpus=(1, 8), batch=(1, 1024), upcall_budget=(1, 1024), readers=(1, 6))
    name = "event-ring"
    claims = (
        *claimed("sc tso arm", {"events": 1}, {"events": 2}, {"events": 3}, {"events": 2, "batch": 1}),
        *claimed("sc tso arm", {"events": 2, "upcall_budget": 256}, {"events": 1, "sender": True}),
        *claimed("sc tso arm", {"events": 1, "heir": True}, {"events": 1, "readers": 2}),
        *claimed("sc tso", {"events": 4}, {"cpus": 2}),
    )

    def __init__(
        self, *, events: int = 2, cpus: int = 1, batch: int = 16, upcall_budget: int = 1,
        sender: bool = False, heir: bool = False, readers: int = 1,
    ) -> None:
        self.events = events
        self.cpus = cpus
        self.batch = batch
        self.upcall_budget = upcall_budget
        self.sender = sender
        self.heir = heir
        self.readers = readers
        self.endless = heir or readers > 1
        self.ports = list(range(PORT_FIRST, PORT_FIRST + events))
        self.read: list[int] = []

    # ---- pages

    def prepare(self, model: Model, variants: int) -> None:
        """Make the pages as hypervisor, file and cpu processes leave them when the ports are bound."""
        self.door, self.kick = model.bell("door"), model.bell("kick")
        self.doorbells = [model.bell(f"cpu{vcpu}") for vcpu in range(self.cpus)]
        self.machine = Memory(model, Machine.BYTES)
        self.domain = Memory(model, Domain.BYTES)
        self.page = Memory(FilePort(model, self.door, self.kick), FilePage.BYTES)
        self.rings = [Memory(model, SubmissionRing.BYTES) for _ in range(self.readers)]
        self.public = Memory(model, PublicPage.BYTES)
        for name in ("machine", "domain", "page", "public"):
            model.name(getattr(self, name), name)
        for index, ring in enumerate(self.rings):
            model.name(ring, f"ring{index}")
        self._bind_file(variants)
        self.path = EventPath(self.machine, {0: self.domain})
        self.path.attach_file(0, self.page)
        for index, ring in enumerate(self.rings):
            self.path.attach_submission(index, ring, 0)
        for port in self.ports:
            self._bind_port(port)
            if not self.sender:
                self.path.set_pending(0, port)

    def _bind_file(self, variants: int) -> None:
        machine = self.machine
        machine.store32(Machine.VARIANTS, variants)
        machine.store32(Machine.file(0, File.STATE), File.OPEN)
        machine.store32(Machine.file(0, File.SIZE), RING_ENTRIES)
        for index in range(self.readers):
            machine.store32(Machine.submission(index, Submission.STATE), Submission.ATTACHED)
        self.page.store32(FilePage.SIZE, RING_ENTRIES)
        self.public.store32(PublicPage.HYPERVISOR_SLEEPING, 1)

    def _bind_port(self, port: int) -> None:
        vcpu = (port - PORT_FIRST) % self.cpus
        self.domain.store64(Domain.table(Domain.PORT_WORDS, port), Port.pack(Port.VIRQ, vcpu=vcpu))
        self.domain.store64(Domain.table(Domain.IRQ_WORDS, port), 1 | Irq.ENABLED)
        self.domain.fetch_or64(Domain.vcpu(vcpu, Vcpu.EVTCHN_MASK) + port // 64 * 8, 1 << port % 64)

    # ---- contexts

    def start(self, model: Model) -> Iterable[Start]:
        """Give the CPUs, the reader, the hypervisor and perhaps the sender."""
        self.read = []
        for vcpu in range(self.cpus):
            yield f"cpu{vcpu}", partial(self._cpu, model, vcpu), self.sender
        for index, ring in enumerate(self.rings):
            file = UserFile(Context(self.page, ring, self.public, -1, -1, 0, FilePage.BITMAP))
            yield f"reader{index or ''}", partial(self._reader, file.read_ports), self.endless
        yield "hypervisor", partial(loops.hypervisor, model, self.path, self.public, self.kick, self.door), True
        if self.sender:
            yield "sender", partial(self._sender, model), False

    def _cpu(self, model: Model, vcpu: int) -> None:
        """What CpuProcess does: work until there is nothing, then sleep, if anybody is there to wake it."""
        while True:
            while (served := self.path.upcall(0, vcpu, self.upcall_budget)) is not None:
                for _ in served[1]:
                    model.ring(self.door, "door.send")
            if self.heir:
                self._wake_files(model)
            if not self.sender:
                return
            if self.path.cpu_may_sleep(0, vcpu):
                model.wait(self.doorbells[vcpu], "cpu.wait")
                model.take(self.doorbells[vcpu], "cpu.take")
                self.domain.store32(Domain.vcpu(vcpu, Vcpu.SLEEPING), 0, "cpu.awake")

    def _wake_files(self, model: Model) -> None:
        """What CpuProcess does for an heir: the dead may have raised a door and not sent the byte."""
        page = self.page
        unread = page.load64(FilePage.PROD, "heir.prod") != page.load64(FilePage.CONS, "heir.cons")
        if unread or page.load32(FilePage.DOOR, "heir.door"):
            page.store32(FilePage.DOOR, 1, "heir.door")
            model.ring(self.door, "door.send")

    def _reader(self, read_ports: Callable[[int], list[int]]) -> None:
        while self.endless or len(self.read) < self.events:
            self.read += read_ports(self.batch)

    def _sender(self, model: Model) -> None:
        for port in self.ports:
            vcpu = self.path.set_pending(0, port)
            if vcpu >= 0:
                model.ring(self.doorbells[vcpu], "cpu.kick")

    # ---- what must hold

    def broken(self, model: Model, stuck: list[str]) -> str | None:
        """Ports read are ports raised, each once, those of one CPU in their order; and nobody sleeps on a
        non-empty ring.
        """
        unread = self.page.load64(FilePage.PROD) - self.page.load64(FilePage.CONS)
        if unread:
            return f"the reader sleeps, and {unread} event(s) lie unread in the ring"
        if stuck:
            missing = self.events - len(self.read)
            return f"{missing} event(s) were raised and never reached the ring; waiting: {', '.join(stuck)}"
        for vcpu in range(self.cpus):
            raised = self.ports[vcpu :: self.cpus]
            read = [port for port in self.read if (port - PORT_FIRST) % self.cpus == vcpu]
            if self.readers > 1:  # they claim in order, and return in any
                read.sort()
            if read != raised:
                return f"ports read {self.read}, but raised {self.ports}"
        return None
