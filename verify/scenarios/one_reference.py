# SPDX-License-Identifier: Apache-2.0
"""Two threads share one reference to an open file: one sleeps in read, the other writes ports back. Does one hold up the other?

Contexts: the reading thread (blocking reads until it has had every event), the writing thread (writes the port back when
the reader has had it), the CPU and the hypervisor (servers). The port is raised once before, and again by the hypervisor
as soon as it may come: the second event is behind the mask until the first has been written back.
"""

from __future__ import annotations

from collections.abc import Iterable
from functools import partial

from pvbus.shm._core_explored import UserFile
from pvbus.shm.layout import Domain, Irq
from pvbus.verify.explorer.model import Model
from pvbus.verify.explorer.scenario import Start, claimed, within
from pvbus.verify.scenarios.xen import XenScenario

PORT = 1


class OneReference(XenScenario):
    """`events` of one port, each but the first masked until the one before was written back.

    `handed`: the first has been read before it begins, and is to be written back; the second waits behind the mask.
    """

    ranges = within(events=(1, 32))
    name = "one-reference"
    claims = claimed("sc tso arm", {"events": 1}, {"handed": True}) + claimed("sc", {})

    def __init__(self, *, events: int = 2, handed: bool = False) -> None:
        self.events, self.handed = events, handed
        self.read: list[int] = []

    def prepare(self, model: Model, variants: int) -> None:
        """Make the pages; the first event is pending, or has been handed out."""
        self.make(model, ports=(PORT,), variants=variants)
        self.told = model.bell("told")
        if self.handed:
            self.domain.store64(Domain.table(Domain.IRQ_WORDS, PORT), 1 | Irq.ACTIVE | Irq.EOI_PENDING | Irq.SERVED_ONE)
            self.path.mask(0, PORT)
        self.path.set_pending(0, PORT)

    def start(self, model: Model) -> Iterable[Start]:
        """Give the threads, the CPU and the hypervisor."""
        self.read = [PORT] * self.handed
        file = self.user()
        yield "reader", partial(self._reader, model, file), False
        yield "writer", partial(self._writer, model, file), False
        yield "cpu0", partial(self.cpu, model, 0), True
        yield "hypervisor", partial(self.hypervisor, model), True

    def _reader(self, model: Model, file: UserFile) -> None:
        while len(self.read) < self.events:
            self.read += self.do_read(model, file)
            model.ring(self.told, "told")

    def _writer(self, model: Model, file: UserFile) -> None:
        for event in range(self.events - 1):
            raised = event == 0 and self.handed
            if not raised:
                model.wait(self.told, "told.wait")
                model.take(self.told, "told.take")
            self.do_write(model, file)
            if not raised:
                file.notify(PORT)

    def do_read(self, model: Model, file: UserFile) -> list[int]:
        """Read, and sleep while there is nothing."""
        return file.read_ports(1)

    def do_write(self, model: Model, file: UserFile) -> None:
        """Write the port back."""
        file.enable([PORT])

    def broken(self, model: Model, stuck: list[str]) -> str | None:
        """Every event has been read; the search says who waits for whom otherwise."""
        return None if stuck or self.read == [PORT] * self.events else f"read {self.read}"
