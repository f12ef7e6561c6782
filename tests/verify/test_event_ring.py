# SPDX-License-Identifier: Apache-2.0
"""The first proof: the driver's wake-up order loses a wake-up, ours does not; and each checker sees what is
planted.
"""

from collections.abc import Callable, Iterable

import pytest

from pvbus.verify.explorer import Failure, Model, ReplayError, Start, explore, replay
from pvbus.verify.scenarios.event_ring import EventRing

DRIVER = "driver-wakeup-order"


def failure_of(scenario: EventRing, **arguments: object) -> Failure:
    failure = explore(scenario, **arguments).failure  # type: ignore[arg-type]
    assert failure is not None
    return failure


# ---- the driver's order


@pytest.mark.parametrize("model", ["sc", "tso"])
def test_the_driver_s_own_wake_up_order_loses_a_wake_up(model: str) -> None:
    result = explore(EventRing(), model=model, variant=DRIVER, executions=1000)

    assert result.verdict == "failed"
    assert result.failure is not None
    assert result.failure.kind == "lost wake-up"
    assert "1 event(s) lie unread" in result.failure.message


def test_two_cpus_lose_it_too() -> None:
    assert failure_of(EventRing(cpus=2), variant=DRIVER, executions=2000).kind == "lost wake-up"


def test_the_trace_has_a_column_a_context_and_ends_where_everyone_stands() -> None:
    trace = failure_of(EventRing(), variant=DRIVER).trace.splitlines()

    assert trace[0].split() == ["#", "cpu0", "reader", "hypervisor"]
    assert any("evr.publish" in line for line in trace)
    reader = trace[0].index("reader")
    waits = [line[reader:].strip() for line in trace if "door.wait" in line]
    assert waits == ["[wait door.wait (door)]"]


# ---- ours


@pytest.mark.parametrize("model", ["sc", "tso"])
@pytest.mark.parametrize(
    "scenario",
    [
        EventRing(events=1),
        EventRing(events=2),
        EventRing(events=2, batch=1),
        EventRing(events=2, upcall_budget=256),
        EventRing(events=1, sender=True),
        EventRing(events=1, heir=True),
        EventRing(events=1, readers=2),
    ],
    ids=[
        "one", "two", "two, one a read", "two in one upcall", "one, and a sender", "one, and an heir",
        "one, and two readers",
    ],
)
def test_ours_loses_nothing_in_any_interleaving(scenario: EventRing, model: str) -> None:
    result = explore(scenario, model=model)

    assert result.failure is None, str(result.failure)
    assert result.verdict == "complete"


def test_two_cpus_and_a_bounded_search_say_that_it_was_bounded() -> None:
    result = explore(EventRing(cpus=2), executions=2000)

    assert result.failure is None, str(result.failure)
    assert result.verdict == "bounded (2000 executions)"


@pytest.mark.parametrize(("model", "events"), [("sc", 3), ("tso", 3), ("arm", 1), ("arm", 2)])
def test_ours_passes_with_more_events_and_on_arm(model: str, events: int) -> None:
    result = explore(EventRing(events=events), model=model)

    assert (result.verdict, str(result.failure)) == ("complete", "None")


# ---- barriers


@pytest.mark.parametrize(
    ("scenario", "site"),
    [
        (EventRing(), "evr_wake"),
        (EventRing(), "evr_wake@reader"),
        (EventRing(events=1, sender=True), "cpu_sleep"),
        (EventRing(events=1, sender=True), "cpu_sleep@cpu0"),
    ],
)
def test_without_the_barrier_a_wake_up_is_lost_under_tso(scenario: EventRing, site: str) -> None:
    assert failure_of(scenario, model="tso", drop=[site]).kind == "lost wake-up"


@pytest.mark.parametrize("site", ["evr_wake", "evr_publish"])
def test_under_sequential_consistency_no_barrier_is_missed(site: str) -> None:
    result = explore(EventRing(), drop=[site])

    assert (result.verdict, result.sites_dropped) == ("complete", frozenset({site}))


def test_the_producer_s_side_of_evr_wake_is_redundant_under_tso() -> None:
    # push_locked ends the service with a locked AND after P is published: that empties the store buffer on
    # x86.
    assert explore(EventRing(), model="tso", drop=["evr_wake@cpu0"]).verdict == "complete"


# ---- determinism and replay


def test_the_same_search_gives_the_same_result() -> None:
    first, second = (explore(EventRing(), model="tso", variant=DRIVER) for _ in range(2))

    assert first == second


@pytest.mark.parametrize(
    "arguments",
    [{"variant": DRIVER}, {"model": "tso", "drop": ["evr_wake"]}],
    ids=["driver's order", "no barrier"],
)
def test_a_failure_replays_to_the_same_trace(arguments: dict[str, object]) -> None:
    failure = failure_of(EventRing(), **arguments)

    again = replay(EventRing(), failure, **arguments)  # type: ignore[arg-type]

    assert again == failure


def test_choices_that_do_not_fit_are_refused() -> None:
    failure = failure_of(EventRing(), variant=DRIVER)
    foreign = Failure(failure.kind, failure.message, ("gpu7",), failure.shared, "")

    with pytest.raises(ReplayError, match="no context 'gpu7'"):
        replay(EventRing(), foreign)


# ---- planted bugs: a checker that cannot fail is a defect


class SilentCpu(EventRing):
    """Forgets the byte that the ring asks for."""

    def _cpu(self, model: Model, vcpu: int) -> None:
        while self.path.upcall(0, vcpu, self.upcall_budget) is not None:
            pass


class DoublingReader(EventRing):
    """Counts what it has read twice."""

    def _reader(self, read_ports: Callable[[int], list[int]]) -> None:
        super()._reader(lambda most: [port for port in read_ports(most) for _ in range(2)])


class BackwardReader(EventRing):
    """Turns the order around, but only when both came at once: most interleavings are right."""

    def _reader(self, read_ports: Callable[[int], list[int]]) -> None:
        super()._reader(lambda most: read_ports(most)[::-1])


class BrittleReader(EventRing):
    """Believes that a read never gives two ports."""

    def _reader(self, read_ports: Callable[[int], list[int]]) -> None:
        super()._reader(lambda most: [port for (port,) in [read_ports(most)]])


class DeafSender(EventRing):
    """A context that waits for what nobody sends."""

    def start(self, model: Model) -> Iterable[Start]:
        yield from super().start(model)
        yield "deaf", lambda: model.wait(self.doorbells[0], "never"), False

    def broken(self, model: Model, stuck: list[str]) -> str | None:
        return None


class SleeplessReader(EventRing):
    """Looks into the doorbell instead of emptying the ring: as long as a byte lies there, it goes round."""

    def _reader(self, read_ports: Callable[[int], list[int]]) -> None:
        while True:
            self.model.wait(self.door, "look")

    def prepare(self, model: Model, variants: int) -> None:
        super().prepare(model, variants)
        self.model = model


@pytest.mark.parametrize(
    ("scenario", "kind", "message"),
    [
        (SilentCpu(), "lost wake-up", "unread"),
        (DoublingReader(), "property", "but raised"),
        (BackwardReader(), "property", "[2, 1]"),
        (BrittleReader(), "exception", "ValueError"),
        (DeafSender(events=1), "deadlock", "deaf at wait never"),
        (SleeplessReader(events=1), "livelock", "reader runs for ever"),
    ],
    ids=lambda value: value if isinstance(value, str) else type(value).__name__,
)
def test_a_planted_bug_is_seen(scenario: EventRing, kind: str, message: str) -> None:
    failure = failure_of(scenario)

    assert failure.kind == kind
    assert message in failure.message
