# SPDX-License-Identifier: Apache-2.0
"""Monitored notifications: the host's looks at monitor pages, on behalf of which it signals as the guest would by hypercall.

A channel that was offered with a monitor has a trigger of its own (shm/monitor.py). The guest's page is the second one of its
INITIATE_CONTACT. A driver, which is a user process, writes a page of its own instead, laid out the same, in its channel's memory:
one driver cannot take another's triggers away. What is read there decides nothing but when a channel is looked at.

A page is looked at every latency, the smallest of its triggers, for as long as that pays: after LOOKS_IDLE_MAX looks that found
nothing its groups are disabled, and the guest signals by hypercall, which enables them again. Pure; the clock is handed in.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from pvbus.actors.hypervisor.vmbus.channel import State
from pvbus.actors.hypervisor.vmbus.offers import event_connection
from pvbus.actors.runtime.vmbus_facts import PAGE_BYTES, uses_interrupt_page
from pvbus.shm import monitor
from pvbus.shm.monitor import MonitorPage

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    from pvbus.actors.hypervisor.vmbus.channel import Channel
    from pvbus.actors.hypervisor.vmbus.gpadl import GuestMemory
    from pvbus.actors.hypervisor.vmbus.server import Server
    from pvbus.shm.memory import Memory

LOOKS_IDLE_MAX = 16
"""Of a page without a trigger, each of some 30 us; then a hypercall a signal is cheaper."""
LATENCY_100NS_DEFAULT = 10_000
LATENCY_100NS_MAX = 0xFFFF
CONTACT = 0  # key of the guest's own page; the others are keyed by relid
EVENT_CONNECTION = 2  # below 2.4: all channels; which one is in the interrupt page


class Watched:
    """A page that is looked at, and what was seen there."""

    def __init__(self, memory: Memory, offset: int) -> None:
        self.memory, self.offset = memory, offset
        self.looking = False
        self.idle = 0
        self.next_ns = 0
        self.armed_ns: dict[int, int] = {}  # when an armed trigger's latency is over


class Monitors:
    """Every monitor page of a domain. `signal(connection, flag)` is HvSignalEvent."""

    looks_idle_max = LOOKS_IDLE_MAX

    def __init__(self, server: Server, memory: GuestMemory, signal: Callable[[int, int], object]) -> None:
        self._server, self._memory, self._signal = server, memory, signal
        self._pages: dict[int, Watched] = {}
        self._described: dict[int, tuple[int, int]] = {}  # what stands in the guest's page: id -> latency, connection
        self.signals = self.looks = 0

    def allocate(self) -> int | None:
        """Give the lowest trigger that no channel has; None: all 128 are taken."""
        taken = {channel.monitor_id for channel in self._server.offers}
        return next((number for number in range(MonitorPage.IDS) if number not in taken), None)

    def _monitored(self) -> Iterator[tuple[int, Channel]]:
        for channel in self._server.offers:
            if channel.monitor_id is not None:
                yield channel.monitor_id, channel

    def _connection(self, channel: Channel) -> int:
        return EVENT_CONNECTION if uses_interrupt_page(self._server.link.version) else event_connection(channel.relid)

    # ---- pages

    def follow(self) -> None:
        """Follow the connection and the offers: find the guest's page, and write there what each trigger means."""
        contact = self._server.link.contact
        address = contact.monitor_guest_to_host if contact is not None else 0
        found = self._memory.find(address // PAGE_BYTES) if address else None
        now = self._pages.get(CONTACT)
        if found is None:
            self._pages.pop(CONTACT, None)
            self._described = {}
            return
        if now is None or (now.memory, now.offset) != found:
            self._described = {}
            now = self._pages[CONTACT] = Watched(*found)
        wanted = {number: (channel.latency_100ns, self._connection(channel)) for number, channel in self._monitored()}
        for number in sorted(self._described.keys() | wanted.keys()):
            meaning = wanted.get(number, (0, 0))
            if self._described.get(number) != meaning:
                monitor.describe(now.memory, now.offset, number, *meaning)
        self._described = wanted

    def attach(self, relid: int, memory: Memory, offset: int) -> None:
        """Take the page of a driver up; what it has triggered under a forerunner of ours is seen by the first look."""
        self._pages[relid] = Watched(memory, offset)

    def detach(self, relid: int) -> None:
        """Let it go."""
        self._pages.pop(relid, None)

    def _triggers(self, key: int) -> list[tuple[int, Channel]]:
        """Give what is looked at in a page: channels that are open."""
        return [
            (number, channel) for number, channel in self._monitored()
            if channel.state is State.OPEN and key in (CONTACT, channel.relid)
        ]  # fmt: skip

    # ---- looking

    def woken(self, relid: int, now_ns: int) -> None:
        """The guest has signalled by hypercall: that is its trigger, too, and its pages are worth looks from now on."""
        channel = self._server.offers.get(relid)
        if channel is None or channel.monitor_id is None:
            return
        for key in (CONTACT, relid):
            page = self._pages.get(key)
            if page is not None:
                monitor.take(page.memory, page.offset, channel.monitor_id)
                page.armed_ns.pop(channel.monitor_id, None)
                self._look_on(page, key, now_ns)

    def _look_on(self, page: Watched, key: int, now_ns: int) -> None:
        triggers = self._triggers(key)
        if not triggers:
            page.looking = False
            return
        if not page.looking:
            for number, _ in triggers:
                monitor.enable(page.memory, page.offset, number)
        page.looking, page.idle = True, 0
        page.next_ns = now_ns + min(channel.latency_100ns for _, channel in triggers) * 100

    def opened(self, now_ns: int) -> None:
        """Begin to look at pages of channels that are open now; those of a forerunner's drivers, too."""
        for key, page in self._pages.items():
            if not page.looking and key != CONTACT and page.next_ns == 0:
                self._look_on(page, key, now_ns)

    def due_ns(self) -> int | None:
        """When `look` is wanted."""
        return min((page.next_ns for page in self._pages.values() if page.looking), default=None)

    def look(self, now_ns: int, *, all_due: bool = False) -> None:
        """Look at the pages whose time has come. `all_due`: at every page, and no trigger waits for its latency."""
        for key, page in list(self._pages.items()):
            if self._pages.get(key) is page and page.looking and (all_due or page.next_ns <= now_ns):
                self.looks += 1
                self._inspect(page, key, now_ns, all_due=all_due)

    def _inspect(self, page: Watched, key: int, now_ns: int, *, all_due: bool) -> None:
        triggers = self._triggers(key)
        if not triggers:
            page.looking = False
            return
        page.next_ns = now_ns + min(channel.latency_100ns for _, channel in triggers) * 100
        found = _triggered(page, triggers)
        page.idle = 0 if found or all_due else page.idle + 1
        if page.idle >= self.looks_idle_max:
            found = self._stop_looking(page, triggers)
            if found:  # triggered while it was enabled: nobody will say so
                self._look_on(page, key, now_ns)
        for number, channel in found:
            self._answer(page, key, number, channel, now_ns, all_due=all_due)

    def _stop_looking(self, page: Watched, triggers: list[tuple[int, Channel]]) -> list[tuple[int, Channel]]:
        """Disable their groups; give what has been triggered by then."""
        page.looking = False
        for number, _ in triggers:
            monitor.disable(page.memory, page.offset, number)
        return _triggered(page, triggers)

    def _answer(self, page: Watched, key: int, number: int, channel: Channel, now_ns: int, *, all_due: bool) -> None:
        """Arm a trigger, or signal for it once it has been armed for its latency."""
        if monitor.arm(page.memory, page.offset, number):
            page.armed_ns[number] = now_ns + channel.latency_100ns * 100
        if not all_due and now_ns < page.armed_ns.get(number, 0):
            return
        page.armed_ns.pop(number, None)
        if not monitor.take(page.memory, page.offset, number):
            return
        self.signals += 1
        if uses_interrupt_page(self._server.link.version) and key != CONTACT:
            self._server.set_guest_signal(channel.relid)
        self._signal(self._connection(channel), 0)


def _triggered(page: Watched, triggers: list[tuple[int, Channel]]) -> list[tuple[int, Channel]]:
    return [trigger for trigger in triggers if monitor.is_triggered(page.memory, page.offset, trigger[0])]
