# SPDX-License-Identifier: Apache-2.0
"""User processes hand ports to the hypervisor while it falls asleep and wakes: is the last entry ever taken?

Contexts: the users (UserFile.notify, each over its own submission ring, all ringing one doorbell) and the
hypervisor (a server: drain, announce sleep, sleep, wake). A user rings only for an announcement that it has
not rung for; the announcement counts, or a second sleep would look like the first.
"""

from __future__ import annotations

from collections.abc import Iterable
from functools import partial
from typing import Final

from pvbus.shm._core_explored import Context, EventPath, Memory, UserFile
from pvbus.shm.layout import Domain, File, FilePage, Irq, Machine, Port, PublicPage, Submission, SubmissionRing
from pvbus.verify.explorer.model import FilePort, Model
from pvbus.verify.explorer.scenario import Scenario, Start, claimed, within
from pvbus.verify.scenarios import loops

PORTS: Final = 64  # in a word of the bitmap; 0 is none


class SubmissionRings(Scenario):
    """`users` processes of one file; each notifies `notifies` IPI ports of its own, once each."""

    ranges = within(users=(1, 8), notifies=(1, 63))
    name = "submission-ring"
    claims = claimed("sc tso arm", {"notifies": 2}, {"notifies": 3}, {"users": 2, "notifies": 1})

    def __init__(self, *, users: int = 1, notifies: int = 2) -> None:
        if users * notifies >= PORTS:
            raise ValueError(f"users={users} notifies={notifies}: each has a port of its own, and there are {PORTS - 1}")
        self.users = users
        self.ports = [[1 + user * notifies + i for i in range(notifies)] for user in range(users)]

    def prepare(self, model: Model, variants: int) -> None:
        """Make the pages; the hypervisor has announced its sleep."""
        self.door, self.kick = model.bell("door"), model.bell("kick")
        self.machine = Memory(model, Machine.BYTES)
        self.domain = Memory(model, Domain.BYTES)
        self.page = Memory(FilePort(model, self.door, self.kick), FilePage.BYTES)
        self.public = Memory(model, PublicPage.BYTES)
        self.rings = [Memory(model, SubmissionRing.BYTES) for _ in range(self.users)]
        for name in ("machine", "domain", "page", "public"):
            model.name(getattr(self, name), name)
        self.machine.store32(Machine.VARIANTS, variants)
        self.machine.store32(Machine.file(0, File.STATE), File.OPEN)
        self.public.store32(PublicPage.HYPERVISOR_SLEEPING, 1)
        self.path = EventPath(self.machine, {0: self.domain})
        for index, ring in enumerate(self.rings):
            model.name(ring, f"ring{index}")
            self.machine.store32(Machine.submission(index, Submission.STATE), Submission.ATTACHED)
            self.path.attach_submission(index, ring, 0)
            for port in self.ports[index]:
                self._bind(port)

    def _bind(self, port: int) -> None:
        self.domain.store64(Domain.table(Domain.PORT_WORDS, port), Port.pack(Port.IPI))
        self.domain.store64(Domain.table(Domain.IRQ_WORDS, port), 1 | Irq.ENABLED)
        self.page.fetch_or64(FilePage.BITMAP + port // 64 * 8, 1 << port % 64)

    def start(self, model: Model) -> Iterable[Start]:
        """Give the users and the hypervisor."""
        for index, ring in enumerate(self.rings):
            file = UserFile(Context(self.page, ring, self.public, -1, -1, 0, FilePage.BITMAP))
            yield f"user{index}", partial(self._user, file, self.ports[index]), False
        yield "hypervisor", partial(self.hypervisor, model), True

    def _user(self, file: UserFile, ports: list[int]) -> None:
        for port in ports:
            file.notify(port)

    def hypervisor(self, model: Model) -> None:
        """Run the hypervisor's loop."""
        loops.hypervisor(model, self.path, self.public, self.kick, self.door)

    def broken(self, model: Model, stuck: list[str]) -> str | None:
        """Every notify has reached its port."""
        pending = self.domain.load64(Domain.EVTCHN_PENDING)
        lost = [port for ports in self.ports for port in ports if not pending >> port & 1]
        return f"the hypervisor sleeps, and notifies of {lost} lie in a submission ring" if lost else None
