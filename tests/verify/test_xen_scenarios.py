# SPDX-License-Identifier: Apache-2.0
"""The scenarios of the event path: clean as far as a bounded search looks, and each property sees what is planted.

To their ends they are searched by `pvbus explore --all`.
"""

import itertools
from typing import Any

import pytest

from pvbus.actors.hypervisor.irqs import IrqLayer
from pvbus.shm.layout import Irq
from pvbus.verify.explorer import MODELS, Model, Scenario, explore
from pvbus.verify.scenarios.cpu_death import CpuDeath
from pvbus.verify.scenarios.doorbell import Doorbell
from pvbus.verify.scenarios.handed_out import HandedOut
from pvbus.verify.scenarios.hypervisor_death import HypervisorDeath
from pvbus.verify.scenarios.one_reference import OneReference
from pvbus.verify.scenarios.port_life import PortLife
from pvbus.verify.scenarios.ring_growth import RingGrowth
from pvbus.verify.scenarios.ring_reset import RingReset
from pvbus.verify.scenarios.unbinding import Unbinding
from pvbus.verify.scenarios.write_back import WriteBack
from pvbus.verify.zoo.by_hand import ByHand
from pvbus.verify.zoo.by_hand_fifo import FifoByHand

EXECUTIONS = 400


class PortLifeByHand(ByHand, PortLife):
    """The handler of the zoo, without any of its bugs."""


BOUNDED: list[tuple[Scenario, dict[str, Any]]] = [
    (PortLife(), {}),
    (PortLife((("raise", 1), ("move", 1), ("raise", 1)), cpus=2), {}),
    (PortLife((("raise", 1), ("move", 1)), cpus=2), {}),
    (PortLifeByHand(), {}),
    (FifoByHand((("eoi", 1), ("raise", 1)), before=(1,)), {}),
    (WriteBack(), {}),
    (WriteBack(ports=2, raises=2), {}),
    (RingGrowth(), {}),
    (RingGrowth(doublings=2), {}),
    (RingReset(), {}),
    (RingReset(readers=2, events=3), {}),
    (Unbinding(), {}),
    (Unbinding(release=True, cpus=2), {}),
    (OneReference(), {}),
    (CpuDeath(reader=True), {"deaths": 1}),
    (HypervisorDeath(), {"deaths": 1}),
    (HypervisorDeath(enable=True), {"deaths": 1}),
    (HypervisorDeath(abi="fifo"), {"deaths": 1, "preemptions": 2}),
    (HypervisorDeath(abi="fifo", enable=True), {"deaths": 1}),
    (HypervisorDeath(abi="early"), {"deaths": 1}),
    (HandedOut(), {"deaths": 1}),
]


@pytest.mark.parametrize(("scenario", "bounds"), BOUNDED, ids=lambda value: type(value).__name__)
def test_nothing_fails_as_far_as_one_looks(scenario: Scenario, bounds: dict[str, Any]) -> None:
    for model in MODELS:
        result = explore(scenario, model=model, executions=EXECUTIONS, **bounds)

        assert result.failure is None, f"{model}: {result.failure}"


def test_a_ring_that_is_doubled_keeps_its_entries_wherever_its_indices_stand() -> None:
    for at, unread in itertools.product(range(4), range(3)):
        result = explore(RingGrowth(at=at, unread=unread, events=0))

        assert (result.verdict, str(result.failure)) == ("complete", "None"), f"index {at}, {unread} unread"


def test_a_port_that_is_claimed_while_it_moves_stays_masked() -> None:
    result = explore(PortLife((("raise", 1), ("move", 1))))

    assert (result.verdict, str(result.failure)) == ("complete", "None")


@pytest.mark.parametrize("sleeper", ["hypervisor", "file"])
def test_a_doorbell_rings_when_there_is_work(sleeper: str) -> None:
    result = explore(Doorbell(sleeper=sleeper), model="tso")

    assert (result.verdict, str(result.failure)) == ("complete", "None")


@pytest.mark.checklist("E12")
def test_a_cpu_may_die_at_any_step_and_each_event_still_comes_once() -> None:
    result = explore(CpuDeath(events=2), deaths=1)

    assert result.failure is None, str(result.failure)
    assert result.verdict.startswith(("complete", "bounded (1 death"))


def test_three_events_into_a_ring_of_two_are_told_when_one_is_dropped() -> None:
    result = explore(RingReset(events=3, resets=0))

    assert (result.verdict, str(result.failure)) == ("complete", "None")


def test_without_the_barrier_between_flag_and_announcement_a_busy_cpu_counts_as_idle_under_arm() -> None:
    tso = explore(Unbinding(), model="tso", drop=["cpu_idle"])
    arm = explore(Unbinding(), model="arm", drop=["cpu_idle"])

    assert (tso.verdict, tso.sites_dropped) == ("complete", frozenset({"cpu_idle"}))
    assert arm.failure is not None
    assert "1 events were raised before the call, 0 came" in arm.failure.message


# ---- planted bugs: a property that cannot fail is a defect


class Hasty(IrqLayer):
    """Looks for a claim, and then unmasks."""

    def unmask(self, domid: int, port: int) -> None:
        """Turn the two round."""
        claimed = self.word(domid, port) & Irq.REASONS
        self.channels.unmask_and_raise(domid, port)
        if claimed:
            self.channels.path.mask(domid, port)


class Hurried(PortLife):
    """A move by such a layer."""

    def irq_layer(self, model: Model) -> IrqLayer:
        """Give it in place of ours."""
        return Hasty(super().irq_layer(model).channels)


def test_who_looks_before_the_unmask_misses_a_claim() -> None:
    result = explore(Hurried((("raise", 1), ("move", 1))))

    assert result.failure is not None
    assert "port 1" in result.failure.message


class Forgetful(CpuDeath):
    """An heir that begins as if nobody had been there before."""

    def recover(self) -> None:
        """Do nothing."""


class Careless(HandedOut):
    """An heir that closes nothing."""

    def repair(self, irqs: IrqLayer) -> None:
        """Do nothing."""


class Silent(CpuDeath):
    """An heir that sends no byte for what its forerunner may have queued."""

    def wake(self, model: Model) -> None:
        """Do nothing."""


class Deaf(Doorbell):
    """A user that believes each byte to be an event."""

    def _readable(self, model: Model) -> None:
        file = self.user()
        while True:
            model.wait(self.door, "select")
            model.take(self.door, "recv")
            if file.poll():
                self.read += file.read_ports(1)


class Lossy(RingReset):
    """A reader that takes EFBIG for nothing to read."""

    def _reader(self, file: Any, index: int) -> None:
        super()._reader(file, index)
        self.told[index] = False


class Late(WriteBack):
    """A user that looks at the data before it waits for the event."""

    def _user(self, file: Any) -> None:
        while True:
            early = self.data.load32(4, "data")
            for port in file.read_ports(16):
                self.seen[port] = early
                file.enable([port])


class Abandoned(Unbinding):
    """Unbinds and leaves the channel open."""

    def call(self, model: Model, irqs: IrqLayer) -> None:
        """Disable, and no more."""
        irqs.disable(0, 1)


@pytest.mark.parametrize(
    ("scenario", "bounds", "message"),
    [
        (Forgetful(), {"deaths": 1}, "came [], but raised [1]"),
        (Careless(), {"deaths": 1}, "port 1 is bound False, and port 2 was handed out next"),
        (Silent(reader=True), {"deaths": 1, "search": "random"}, "the reader sleeps"),
        (Deaf(sleeper="file"), {}, "the user sleeps"),
        (Lossy(events=3, resets=0), {}, "an event was dropped"),
        (Late(raises=1), {"search": "random"}, "the user sleeps, and has seen data 0"),
        (Abandoned(), {}, "irq word of port 1"),
    ],
    ids=lambda value: type(value).__name__ if isinstance(value, Scenario) else "",
)
def test_a_planted_bug_is_seen(scenario: Scenario, bounds: dict[str, Any], message: str) -> None:
    failure = explore(scenario, executions=3000, **bounds).failure

    assert failure is not None
    assert message in failure.message
