# SPDX-License-Identifier: Apache-2.0
"""An event ring is doubled while a CPU fills it and a reader empties it: is any entry torn, lost or read twice?

Contexts: the CPU (one upcall; its ports are pending at the start), the file process (doubles the ring, then the new
port's first event is raised, as a bind does), the hypervisor (a server) and the reader (a server: reads for ever). The
ring is small, so that its indices wrap within reach: `at` is where they stand, `unread` how many entries lie there.
"""

from __future__ import annotations

from collections.abc import Iterable
from functools import partial

from pvbus.shm._core_explored import UserFile
from pvbus.shm.layout import File, FilePage, Machine
from pvbus.verify.explorer.model import Model
from pvbus.verify.explorer.scenario import Start, claimed, within
from pvbus.verify.scenarios import power_of_two
from pvbus.verify.scenarios.xen import XenScenario

UNREAD_FIRST = 40  # ports that lie in the ring before; their numbers say so


class RingGrowth(XenScenario):
    """`entries` the ring has before, `doublings` it makes, `events` come meanwhile."""

    ranges = within(entries=(2, 64), doublings=(1, 4), at=(0, 1024), unread=(0, 64), events=(0, 16))
    name = "ring-growth"
    claims = claimed("sc tso", {}) + claimed(
        "sc tso arm", {"doublings": 2, "events": 0},
        *({"at": at, "unread": unread, "events": 0} for at in range(4) for unread in range(3)),
    )  # fmt: skip

    def __init__(self, *, entries: int = 2, doublings: int = 1, at: int = 1, unread: int = 1, events: int = 1) -> None:
        power_of_two("entries", entries)
        if unread + events > entries:
            raise ValueError(f"{unread} unread entries and {events} events do not fit into {entries}: that is an overflow")
        self.entries, self.doublings, self.at = entries, doublings, at
        self.unread = [UNREAD_FIRST + number for number in range(unread)]
        self.ports = list(range(1, 1 + events))
        self.read: list[int] = []

    def prepare(self, model: Model, variants: int) -> None:
        """Make the pages, the ring with its unread entries, and the pending ports."""
        self.make(model, ports=self.ports, entries=self.entries, variants=variants)
        prod = self.at + len(self.unread)
        for place, port in enumerate(self.unread, self.at):
            self.page.store32(FilePage.RING + 4 * (place % self.entries), port)
        self.page.store64(FilePage.CONS, self.at)
        self.page.store64(FilePage.PROD, prod)
        self.machine.store64(Machine.file(0, File.PROD), prod)
        self.machine.store64(Machine.file(0, File.CONS_SEEN), self.at)
        for port in self.ports:
            self.path.set_pending(0, port)

    def start(self, model: Model) -> Iterable[Start]:
        """Give the CPU, the file process, the reader and the hypervisor."""
        self.read = []
        yield "cpu0", partial(self._cpu, model), False
        yield "file", self._file, False
        yield "reader", partial(self._reader, self.user()), True
        yield "hypervisor", partial(self.hypervisor, model), True

    def _cpu(self, model: Model) -> None:
        while (served := self.path.upcall(0, 0, 256)) is not None:
            for _ in served[1]:
                model.ring(self.door, "door.send")

    def _file(self) -> None:
        for _ in range(self.doublings):
            self.grow()

    def grow(self) -> None:
        """Double the ring."""
        self.path.grow(0)

    def _reader(self, user: UserFile) -> None:
        while True:
            self.read += user.read_ports(1)

    def broken(self, model: Model, stuck: list[str]) -> str | None:
        """What lay in the ring and what came have been read, each once and in order; the ring has grown."""
        if stuck:
            return None
        if self.read != [*self.unread, *self.ports]:
            return f"read {self.read}, but there were {[*self.unread, *self.ports]}"
        size = self.page.load32(FilePage.SIZE)
        return None if size == self.entries << self.doublings else f"the ring has {size} entries"
