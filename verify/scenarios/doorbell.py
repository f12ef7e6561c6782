# SPDX-License-Identifier: Apache-2.0
"""The doorbells themselves: a sleeper announces that it may sleep and looks again; who has work for it looks whether to ring.

Three of them, each with the smallest thing that rings it. `cpu`: the hypervisor raises a port, the CPU takes upcalls.
`hypervisor`: a user notifies, the hypervisor drains. `file`: a CPU queues events for a user that waits until its
descriptor is readable, as select, poll and asyncio do, and reads only then: the byte that says so has to go when the ring
is empty, or the user never sleeps again, and must not go when it is not, or it sleeps over an event.
"""

from __future__ import annotations

import select
from collections.abc import Iterable
from functools import partial

from pvbus.verify.explorer.model import Model
from pvbus.verify.explorer.scenario import Start, claimed, within
from pvbus.verify.scenarios.xen import XenScenario

SLEEPERS = ("cpu", "hypervisor", "file")


class Doorbell(XenScenario):
    """`sleeper`: whose doorbell it is; `events`: how many times there is work for it."""

    ranges = within(events=(1, 63))
    name = "doorbell"
    claims = claimed("sc tso arm", {}, {"events": 1}, {"sleeper": "hypervisor"}, {"sleeper": "file"})

    def __init__(self, *, sleeper: str = "cpu", events: int = 2) -> None:
        if sleeper not in SLEEPERS:
            raise ValueError(f"no sleeper {sleeper!r}: {', '.join(SLEEPERS)}")
        self.sleeper = sleeper
        self.ports = list(range(1, 1 + events))
        self.read: list[int] = []

    def prepare(self, model: Model, variants: int) -> None:
        """Make the pages; for the file's doorbell the events are pending."""
        self.make(model, ports=self.ports, variants=variants)
        for port in self.ports if self.sleeper == "file" else ():
            self.path.set_pending(0, port)

    def start(self, model: Model) -> Iterable[Start]:
        """Give the sleeper and who rings."""
        self.read = []
        if self.sleeper == "cpu":
            yield "cpu0", partial(self.cpu, model, 0), True
            yield "sender", partial(self._sender, model), False
        elif self.sleeper == "hypervisor":
            yield "hypervisor", partial(self.hypervisor, model), True
            yield "user", self._user, False
        else:
            yield "cpu0", partial(self._upcalls, model), False
            yield "user", partial(self._readable, model), True
            yield "hypervisor", partial(self.hypervisor, model), True

    def _sender(self, model: Model) -> None:
        for port in self.ports:
            vcpu = self.path.set_pending(0, port)
            if vcpu >= 0:
                model.ring(self.doorbells[vcpu], "cpu.kick")

    def _user(self) -> None:
        file = self.user()
        for port in self.ports:
            file.notify(port)

    def _upcalls(self, model: Model) -> None:
        while (served := self.path.upcall(0, 0, 1)) is not None:
            for _ in served[1]:
                model.ring(self.door, "door.send")

    def _readable(self, model: Model) -> None:
        file = self.user()
        while True:
            model.wait(self.door, "select")
            if file.poll() & select.POLLIN:
                self.read += file.read_ports(16)
            else:
                file.context.drain_door()

    def broken(self, model: Model, stuck: list[str]) -> str | None:
        """Everybody sleeps, and nothing is left to do."""
        if self.sleeper == "hypervisor":
            lost = [port for port in self.ports if not self.is_pending(port)]
            return f"the hypervisor sleeps, and notifies of {lost} lie in a submission ring" if lost else None
        if self.came() != self.ports:
            return f"the CPU sleeps; {self.ports} were raised, {self.came()} came"
        if self.sleeper == "file" and self.read != self.ports:
            return f"the user sleeps and has read {self.read}; {self.ports} came"
        return None
