# SPDX-License-Identifier: Apache-2.0
"""A guest's VMBus in one piece: work ring, requests, connection, channels, bus and driver, put together for who runs them.

The process calls `take_work` when a CPU has rung it, and the timers that are due; everything else leaves through `Outside`, whose
answers go on by themselves. A work item is done when its message has been handled, not when what it has begun ends: probing and
removing are queued with the device, and an heir connects anew, because a host forgets every channel at INITIATE_CONTACT.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from pvbus.actors.runtime.vmbus_facts import SPOKEN
from pvbus.actors.workqueue.bus import Bus
from pvbus.actors.workqueue.channels import Channels
from pvbus.actors.workqueue.connection import Connection
from pvbus.actors.workqueue.discovery import Platform, Vmbus
from pvbus.actors.workqueue.tasks import Outside, Tasks
from pvbus.actors.workqueue.waits import Requests, Steps
from pvbus.actors.workqueue.work import WorkRing
from pvbus.actors.workqueue.work_per_cpu import PerCpuWorkRing

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from pvbus.actors.runtime.clock import Clock, Timers
    from pvbus.shm.memory import Memory

ITEMS_A_TURN = 64
"""Then the messages of this process get a look."""


class Guest:
    """All of it. `stalls`, `leaves_dirty` and `rescind_queued` switch the driver's defects H6, H9 and H12 on, `per_cpu` X19a."""

    def __init__(
        self, memory: Memory, outside: Outside, clock: Clock, timers: Timers, *, log: Callable[[str], None],
        send_uevent: Callable[[list[str]], None], platform: Platform | None = None, versions: Sequence[int] = SPOKEN,
        stalls: bool = False, leaves_dirty: bool = False, rescind_queued: bool = False, per_cpu: bool = False,
    ) -> None:  # fmt: skip
        self._log = log
        self.ring = PerCpuWorkRing(memory) if per_cpu else WorkRing(memory)
        self.tasks = Tasks(outside, clock, timers.add)
        self.requests = Requests()
        self.connection = Connection(memory, self.requests, log, versions=versions, stalls=stalls)
        self.channels = Channels(self.connection, self.requests, self.spawn, log, rescind_queued=rescind_queued)
        self.bus = Bus(self.channels, self.spawn, log, send_uevent)
        self.vmbus = Vmbus(platform or Platform(), memory, self.channels, self.bus, log, leaves_dirty=leaves_dirty)

    def spawn(self, steps: Steps[Any]) -> None:
        """Start a function that nobody waits for; its error is logged."""
        self.tasks.start(steps, self._ended)

    def _ended(self, result: object) -> None:
        if isinstance(result, OSError):
            self._log(str(result))

    def take_work(self) -> bool:
        """Handle what the CPUs have queued, in order. True: a turn is over, and there may be more."""
        for _ in range(ITEMS_A_TURN):
            payload = self.ring.take()
            if payload is None:
                return False
            self.channels.onmessage(payload)
            self.tasks.pump()
            self.ring.done()
        return True
