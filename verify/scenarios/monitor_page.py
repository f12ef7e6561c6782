# SPDX-License-Identifier: Apache-2.0
"""A trigger of a monitor page: a guest that triggers, against the host's looks, which end and begin again.

Guest and host are the production code (shm/monitor.py, hypervisor/vmbus/monitor.py); what the guest sends is one word, in the
place of a ring. `late`: a guest that looks whether anybody looks before it triggers.
"""

from __future__ import annotations

import uuid
from collections.abc import Iterable
from functools import partial
from typing import TYPE_CHECKING, Any, Final

from pvbus.actors.hypervisor.vmbus.channel import State
from pvbus.actors.hypervisor.vmbus.echo import Echo
from pvbus.actors.hypervisor.vmbus.endpoint import Endpoint
from pvbus.actors.hypervisor.vmbus.monitor import Monitors, Watched
from pvbus.actors.hypervisor.vmbus.server import Server
from pvbus.actors.runtime.vmbus_facts import V5_3
from pvbus.shm import monitor
from pvbus.shm._core_explored import Memory
from pvbus.shm.monitor import MonitorPage
from pvbus.verify.explorer.scenario import Scenario, Start, claimed, within

if TYPE_CHECKING:
    from pvbus.actors.hypervisor.vmbus.channel import Channel
    from pvbus.verify.explorer.model import Model

TRIGGER: Final = 37
LATENCY_100NS: Final = 10
_WORD: Final = MonitorPage.BYTES  # behind the page


class Impatient(Monitors):
    """A host that ends its looks after one that has found nothing."""

    looks_idle_max = 1


class LooksFirst(Impatient):
    """A host that looks for the last time before it says that it looks no more."""

    def _stop_looking(self, page: Watched, triggers: list[tuple[int, Channel]]) -> list[tuple[int, Channel]]:
        page.looking = False
        found = [one for one in triggers if monitor.is_triggered(page.memory, page.offset, one[0])]
        for number, _ in triggers:
            monitor.disable(page.memory, page.offset, number)
        return found


class MonitorTrigger(Scenario):
    """A guest sends so many words, each with a signal; the host has to see the last one."""

    ranges = within(words=(1, 64))
    name = "monitor-page"
    claims = claimed("sc tso arm", {}, {"words": 2})

    def __init__(self, words: int = 1, *, host: type[Monitors] = Impatient, late: bool = False) -> None:
        self.words, self.host, self.late = words, host, late

    def prepare(self, model: Model, variants: int) -> None:
        """Make the page, its group enabled, and the word behind it."""
        self.memory: Any = Memory(model, 2 * MonitorPage.BYTES)
        model.name(self.memory, "page")
        self.bell = model.bell("hypercall")

    def start(self, model: Model) -> Iterable[Start]:
        """Give the guest, and a host whose channel is open."""
        self.seen = 0
        server = Server(lambda _payload: 0, self, lambda _flag, _vp: None)
        relid = server.offer(
            uuid.UUID(int=1), uuid.UUID(int=2), Endpoint(Echo(), lambda _pages: None),  # type: ignore[arg-type,return-value]
            monitor_id=TRIGGER, latency_100ns=LATENCY_100NS,
        )  # fmt: skip
        channel = server.offers.get(relid)
        assert channel is not None
        channel.state, server.link.version = State.OPEN, V5_3
        host = self.host(server, self, lambda _connection, _flag: self._look())
        host.attach(relid, self.memory, 0)
        yield "guest", partial(self._send, model), False
        yield "host", partial(self._serve, model, host, relid), True

    def find(self, _frame: int) -> None:
        """Be a guest's memory without pages of its own."""

    def broken(self, model: Model, stuck: list[str]) -> str | None:
        """The last word was seen."""
        return None if self.seen == self.words else f"{self.words} words were sent, seen were {self.seen}"

    def _send(self, model: Model) -> None:
        memory = self.memory
        for number in range(1, self.words + 1):
            memory.store64(_WORD, number, "ring")
            memory.smp_mb("ring")   # a ring's own, before it says that it must be signalled
            looked = memory.load64(MonitorPage.TRIGGER_STATE, "mon.enabled") if self.late else 0
            must = monitor.trigger(memory, 0, TRIGGER)
            if not looked if self.late else must:
                model.ring(self.bell, "hypercall")

    def _look(self) -> None:
        self.seen = self.memory.load64(_WORD, "ring")

    def _serve(self, model: Model, host: Monitors, relid: int) -> None:
        now = 0
        host.opened(now)
        while True:
            while (due := host.due_ns()) is not None:
                now = due
                host.look(now)
            model.wait(self.bell, "wait for a hypercall")
            model.take(self.bell, "hypercall")
            host.woken(relid, now)
            self._look()
