# SPDX-License-Identifier: Apache-2.0
"""A peer writes data and notifies, again and again; the user reads the event, looks at the data, and writes the port back.

The edge must be kept while the port is masked: every notify behind the last write-back is seen, so when all sleep, the user
has seen the peer's last data. Contexts: the peer (another process of the same file, with a submission ring of its own),
the user (a server: read, look, write back), the CPU and the hypervisor (servers).
"""

from __future__ import annotations

from collections.abc import Iterable
from functools import partial

from pvbus.shm._core_explored import Memory, UserFile
from pvbus.shm.layout import Irq
from pvbus.verify.explorer.model import Model
from pvbus.verify.explorer.scenario import Start, claimed, within
from pvbus.verify.scenarios.xen import XenScenario


class WriteBack(XenScenario):
    """`ports` ports, for each of which the peer writes and notifies `raises` times."""

    ranges = within(ports=(1, 8), raises=(1, 64))
    name = "write-back"
    claims = claimed("sc tso", {"raises": 1}) + claimed("sc", {}, {"ports": 2, "raises": 2}, preemptions=2)

    def __init__(self, *, ports: int = 1, raises: int = 2) -> None:
        self.ports = list(range(1, 1 + ports))
        self.raises = raises
        self.seen: dict[int, int] = {}
        self.reads = 0

    def prepare(self, model: Model, variants: int) -> None:
        """Make the pages, and the one that the peer writes its data into."""
        self.make(model, ports=self.ports, users=2, variants=variants)
        self.data = Memory(model, 4096)
        model.name(self.data, "data")

    def start(self, model: Model) -> Iterable[Start]:
        """Give the peer, the user, the CPU and the hypervisor."""
        self.seen, self.reads = dict.fromkeys(self.ports, 0), 0
        yield "peer", partial(self._peer, self.user(0)), False
        yield "user", partial(self._user, self.user(1)), True
        yield "cpu0", partial(self.cpu, model, 0), True
        yield "hypervisor", partial(self.hypervisor, model), True

    def _peer(self, file: UserFile) -> None:
        for number in range(1, 1 + self.raises):
            for port in self.ports:
                self.data.store32(4 * port, number, "data")
                file.notify(port)

    def _user(self, file: UserFile) -> None:
        while True:
            for port in file.read_ports(16):
                self.reads += 1
                self.seen[port] = self.data.load32(4 * port, "data")
                file.enable([port])

    def broken(self, model: Model, stuck: list[str]) -> str | None:
        """The user has seen the last data of each port, with no more events than there were notifies."""
        for port, seen in self.seen.items():
            if seen != self.raises:
                return f"the user sleeps, and has seen data {seen} of port {port}; {self.raises} was written and notified"
            if not self.irq(port) & Irq.ENABLED:
                return f"port {port} was written back, and is not enabled"
        if self.reads > self.raises * len(self.ports):
            return f"{self.raises * len(self.ports)} notifies, and {self.reads} events"
        return self.stranded(self.ports)
