# SPDX-License-Identifier: Apache-2.0
"""The host's looks at monitor pages: latency, arming, who is signalled, and when it looks no more."""

from collections.abc import Iterator

import pytest

from pvbus.actors.hypervisor.vmbus.channel import Channel
from pvbus.actors.hypervisor.vmbus.monitor import LOOKS_IDLE_MAX, Monitors, Watched
from pvbus.actors.hypervisor.vmbus.offers import event_connection
from pvbus.actors.runtime.vmbus_facts import V0_13, V5_3, Version
from pvbus.shm import monitor
from pvbus.tests.hypervisor.vmbus.rig import ECHO, INSTANCE, INTERRUPT_FRAME, MONITOR_FRAME, PacedDevice, Pages, Rig

LATENCY_100NS = 1000
LATENCY_NS = LATENCY_100NS * 100
NUMBER = 37
GUESTS = (MONITOR_FRAME + 1) * 4096
DRIVERS = 40 * 4096  # in the channel's memory


class Watch:
    """A server with an open channel whose trigger is 37, and what was signalled."""

    def __init__(self, pages: Pages, version: Version = V5_3) -> None:
        self.rig = Rig(pages, version)
        self.relid = self.rig.server.offer(ECHO, INSTANCE, PacedDevice(), monitor_id=NUMBER, latency_100ns=LATENCY_100NS)
        self.rig.connect()
        self.rig.give_pages(self.relid)
        self.rig.say(self.rig.opening(self.relid))
        self.signals: list[tuple[int, int]] = []
        self.monitors = Monitors(self.rig.server, pages, lambda *signal: self.signals.append(signal))
        self.monitors.follow()
        self.own, self.drivers = pages.own, pages.channel
        self.monitors.attach(self.relid, self.drivers, DRIVERS)

    def looking(self, now_ns: int = 0) -> "Watch":
        """Begin to look."""
        self.monitors.woken(self.relid, now_ns)
        return self

    def look_until(self, now_ns: int) -> None:
        """Look whenever it is due."""
        while (due := self.monitors.due_ns()) is not None and due <= now_ns:
            self.monitors.look(due)


@pytest.fixture
def pages() -> Iterator[Pages]:
    made = Pages()
    yield made
    made.close()


@pytest.fixture
def watch(pages: Pages) -> Watch:
    return Watch(pages)


@pytest.mark.parametrize("where", ["guest", "driver"])
def test_a_trigger_is_signalled_on_its_own_connection_after_its_latency_and_not_before(watch: Watch, where: str) -> None:
    watch.looking(now_ns=0)
    memory, page = (watch.own, GUESTS) if where == "guest" else (watch.drivers, DRIVERS)

    assert not monitor.trigger(memory, page, NUMBER)
    watch.look_until(LATENCY_NS)      # seen, and armed
    assert watch.signals == []
    watch.look_until(2 * LATENCY_NS)

    assert watch.signals == [(event_connection(watch.relid), 0)]
    assert not monitor.is_triggered(memory, page, NUMBER)


def test_many_triggers_within_a_latency_are_one_signal(watch: Watch) -> None:
    watch.looking()
    for _ in range(10):
        monitor.trigger(watch.drivers, DRIVERS, NUMBER)
    watch.look_until(10 * LATENCY_NS)

    assert len(watch.signals) == 1


def test_the_guest_s_page_says_what_each_trigger_means_and_nothing_of_a_channel_that_has_gone(watch: Watch) -> None:
    assert monitor.latency_100ns(watch.own, GUESTS, NUMBER) == LATENCY_100NS
    assert monitor.connection_of(watch.own, GUESTS, NUMBER) == event_connection(watch.relid)

    watch.rig.server.rescind(watch.relid)
    channel = watch.rig.server.offers.get(watch.relid)
    assert channel is not None
    watch.rig.server.offers.remove(channel)
    watch.monitors.follow()

    assert monitor.latency_100ns(watch.own, GUESTS, NUMBER) == monitor.connection_of(watch.own, GUESTS, NUMBER) == 0
    assert monitor.latency_100ns(watch.own, GUESTS, NUMBER - 1) == 0


def test_a_trigger_that_belongs_to_nobody_is_left_alone(watch: Watch) -> None:
    watch.looking()
    monitor.trigger(watch.drivers, DRIVERS, NUMBER + 1)
    monitor.trigger(watch.own, GUESTS, 0)
    watch.look_until(5 * LATENCY_NS)

    assert watch.signals == []
    assert monitor.is_triggered(watch.drivers, DRIVERS, NUMBER + 1)


def test_after_so_many_looks_at_nothing_it_looks_no_more_until_a_hypercall(watch: Watch) -> None:
    watch.looking()
    watch.look_until(LOOKS_IDLE_MAX * LATENCY_NS - 1)
    assert not monitor.trigger(watch.drivers, DRIVERS, NUMBER)     # still looked at
    watch.look_until(100 * LATENCY_NS)

    assert len(watch.signals) == 1
    assert watch.monitors.due_ns() is None
    assert monitor.trigger(watch.drivers, DRIVERS, NUMBER)     # nobody looks: by hypercall
    watch.looking(now_ns=100 * LATENCY_NS)
    assert not monitor.is_triggered(watch.drivers, DRIVERS, NUMBER)    # the hypercall was its signal
    assert watch.monitors.due_ns() == 101 * LATENCY_NS


def test_a_trigger_between_the_last_look_and_its_end_is_found(watch: Watch) -> None:
    watch.looking()

    class Late(Monitors):
        """Its guest triggers just before the group is disabled."""

        def _stop_looking(self, page: Watched, triggers: list[tuple[int, Channel]]) -> list[tuple[int, Channel]]:
            assert not monitor.trigger(watch.drivers, DRIVERS, NUMBER)
            return super()._stop_looking(page, triggers)

    late = Late(watch.rig.server, watch.rig.pages, lambda *signal: watch.signals.append(signal))
    late.attach(watch.relid, watch.drivers, DRIVERS)
    late.opened(0)
    late.looks_idle_max = 1
    for _ in range(3):
        late.look(late.due_ns() or 0)

    assert len(watch.signals) == 1


def test_whoever_settles_waits_for_no_latency(watch: Watch) -> None:
    watch.looking()
    monitor.trigger(watch.drivers, DRIVERS, NUMBER)
    watch.monitors.look(1, all_due=True)

    assert len(watch.signals) == 1


def test_an_heir_sees_what_was_triggered_under_its_forerunner(watch: Watch) -> None:
    watch.looking()
    monitor.trigger(watch.drivers, DRIVERS, NUMBER)
    heir = Monitors(watch.rig.server, watch.rig.pages, lambda *signal: watch.signals.append(signal))
    heir.attach(watch.relid, watch.drivers, DRIVERS)
    heir.follow()
    heir.opened(5)
    for _ in range(2):
        heir.look(heir.due_ns() or 0)

    assert len(watch.signals) == 1


def test_a_channel_that_is_closed_is_not_looked_at(watch: Watch) -> None:
    watch.looking()
    watch.rig.server.rescind(watch.relid)
    monitor.trigger(watch.drivers, DRIVERS, NUMBER)
    watch.look_until(3 * LATENCY_NS)

    assert watch.signals == []
    assert watch.monitors.due_ns() is None


def test_below_2_4_a_driver_s_trigger_sets_its_bit_of_the_interrupt_page_and_signals_connection_2(pages: Pages) -> None:
    watch = Watch(pages, V0_13).looking()
    monitor.trigger(watch.drivers, DRIVERS, NUMBER)
    watch.look_until(2 * LATENCY_NS)

    assert watch.signals == [(2, 0)]
    assert watch.own.load64(INTERRUPT_FRAME * 4096 + 2048) == 1 << watch.relid


def test_a_page_full_of_lies_costs_its_writer_its_signals_and_nothing_else(watch: Watch) -> None:
    watch.looking()
    for at in range(0, 4096, 8):
        watch.drivers.store64(DRIVERS + at, 2**64 - 1)
    watch.look_until(20 * LATENCY_NS)

    assert set(watch.signals) <= {(event_connection(watch.relid), 0)}
    assert monitor.latency_100ns(watch.own, GUESTS, NUMBER) == LATENCY_100NS
