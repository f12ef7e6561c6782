# SPDX-License-Identifier: Apache-2.0
"""What the engine offers beside memory, and each of its checkers with a bug that it has to see."""

from collections.abc import Callable, Iterable
from functools import partial
from typing import Any

import pytest

from pvbus.shm._core_explored import Memory
from pvbus.verify.explorer import (
    SEARCHES,
    ContextDied,
    Failure,
    Model,
    ReplayError,
    Result,
    Scenario,
    Start,
    explore,
    follow,
    replay,
)
from pvbus.verify.explorer.search import Explorer
from pvbus.verify.scenarios.event_ring import EventRing

DRIVER = "driver-wakeup-order"
Body = Callable[["Bodies", Model], object]


class Bodies(Scenario):
    """Contexts given as functions; `holds` says what is wrong at the end."""

    name = "bodies"

    def __init__(
        self, *bodies: Body, mortal: tuple[str, ...] = (), servers: int = 0, holds: Callable[["Bodies"], str | None] | None = None
    ) -> None:
        self.bodies, self.mortal, self.servers, self.holds = bodies, mortal, servers, holds
        self.ends: set[tuple[Any, ...]] = set()

    def prepare(self, model: Model, variants: int) -> None:
        self.m, self.heap = Memory(model, 64), Memory(model, 8)
        model.name(self.m, "m")
        model.name(self.heap, "object")
        self.bell, self.lock, self.box = model.bell("bell"), model.lock("lock"), model.mailbox("box")
        model.allocate(self.heap)
        model.ticks(5, 7, at_most=2)

    def start(self, model: Model) -> Iterable[Start]:
        self.got: list[Any] = []
        for number, body in enumerate(self.bodies):
            server = number >= len(self.bodies) - self.servers
            yield f"t{number}", partial(body, self, model), server

    def broken(self, model: Model, stuck: list[str]) -> str | None:
        self.ends.add(tuple(self.got))
        return self.holds(self) if self.holds else None


def failure_of(result: Result) -> Failure:
    assert result.failure is not None
    return result.failure


# ---- what planted bugs look like


def locks_and_dies(s: Bodies, model: Model) -> None:
    model.acquire(s.lock)
    s.m.store64(0, 1)
    model.release(s.lock)


def heir(s: Bodies, model: Model) -> None:
    model.await_death("t0")
    if model.inherit(s.lock):
        model.release(s.lock)


def frees(s: Bodies, model: Model) -> None:
    model.free(s.heap)


def uses(s: Bodies, model: Model) -> None:
    if not s.m.load64(0):
        s.heap.load64(0, "use")


def frees_behind_a_flag(s: Bodies, model: Model) -> None:
    s.m.store64(0, 1)
    model.free(s.heap)


def frees_under_lock(s: Bodies, model: Model) -> None:
    model.acquire(s.lock)
    s.m.store64(0, 1)
    model.free(s.heap)
    model.release(s.lock)


def uses_under_lock(s: Bodies, model: Model) -> None:
    model.acquire(s.lock)
    uses(s, model)
    model.release(s.lock)


def polite(mine: int, other: int) -> Body:
    """Step back as long as the other wants to go through, too."""

    def body(s: Bodies, model: Model) -> None:
        while True:
            s.m.store64(mine, 1)
            s.m.smp_mb("polite")
            busy = s.m.load64(other)
            s.m.store64(mine, 0)
            s.m.smp_mb("polite")
            if not busy:
                return

    return body


def takes_twice(s: Bodies, model: Model) -> None:
    model.acquire(s.lock)
    model.acquire(s.lock)


def adds(s: Bodies, model: Model) -> None:
    s.m.store64(0, s.m.load64(0) + 1)


def not_two(s: Bodies) -> str | None:
    return None if s.m.load64(0) == 2 else f"two were added, and {s.m.load64(0)} is left"


def sends_in_any_order(s: Bodies, model: Model) -> None:
    for message in (1, 2) if model.choose(2) else (2, 1):
        model.post(s.box, message)


def receives_two(s: Bodies, model: Model) -> None:
    s.got = [model.receive(s.box), model.receive(s.box)]


def sends_and_forgets_to_ring(s: Bodies, model: Model) -> None:
    if not s.m.load64(0):
        model.ring(s.bell)


def says_that_it_is_awake(s: Bodies, model: Model) -> None:
    s.m.store64(0, 1)
    s.m.store64(0, 0)
    model.wait(s.bell)


PLANTED = [
    ("lock left by the dead", "t0 died with lock", Bodies(locks_and_dies, mortal=("t0",)), {"deaths": 1}),
    ("use after free", "accesses object", Bodies(frees, uses), {}),
    ("use after free", "accesses object", Bodies(frees_behind_a_flag, uses), {}),
    ("use after free", "frees object twice", Bodies(frees, frees), {}),
    ("livelock", "there is no end", Bodies(polite(0, 8), polite(8, 0)), {}),
    ("exception", "takes lock a second time", Bodies(takes_twice), {}),
    ("property", "two were added, and 1 is left", Bodies(adds, adds, holds=not_two), {}),
    (
        "property", "wrong order",
        Bodies(sends_in_any_order, receives_two, holds=lambda s: None if s.got == [1, 2] else "wrong order"), {},
    ),
    ("deadlock", "t1 at wait", Bodies(sends_and_forgets_to_ring, says_that_it_is_awake), {}),
]  # fmt: skip


@pytest.mark.parametrize("search", SEARCHES)
@pytest.mark.parametrize(("kind", "message", "scenario", "arguments"), PLANTED, ids=[f"{row[0]}, {row[1]}" for row in PLANTED])
def test_a_planted_bug_is_seen(kind: str, message: str, scenario: Bodies, arguments: dict[str, Any], search: str) -> None:
    if (kind, search) == ("livelock", "random"):
        return  # chance is fair, and lets one of them through
    failure = failure_of(explore(scenario, search=search, executions=5000, **arguments))

    assert failure.kind == kind
    assert message in failure.message
    assert replay(scenario, failure, **arguments) == failure


CLEAN = [
    (Bodies(locks_and_dies, heir, servers=1, mortal=("t0",)), {"deaths": 1}, "bounded (1 death)"),
    (Bodies(locks_and_dies, locks_and_dies), {}, "complete"),
    (Bodies(frees_under_lock, uses_under_lock), {}, "complete"),
]


@pytest.mark.parametrize("model", ["sc", "tso", "arm"])
@pytest.mark.parametrize(("scenario", "arguments", "verdict"), CLEAN)
def test_what_is_right_is_clean(scenario: Bodies, arguments: dict[str, Any], verdict: str, model: str) -> None:
    result = explore(scenario, model=model, **arguments)

    assert result.failure is None, str(result.failure)
    assert result.verdict == verdict


# ---- deaths


def test_a_dead_context_does_not_unwind_and_its_stores_become_visible() -> None:
    refused: list[BaseException] = []

    def writes(s: Bodies, model: Model) -> None:
        try:
            s.m.store64(0, 1)
            model.ring(s.bell)
            s.m.store64(0, 2)
        finally:
            try:
                s.m.store64(8, 99)
            except ContextDied as error:  # the gate is closed
                refused.append(error)

    def reads(s: Bodies, model: Model) -> None:
        model.await_death("t0")
        s.got = [s.m.load64(0), s.m.load64(8)]

    scenario = Bodies(writes, reads, servers=1, mortal=("t0",))
    for model, ends in ("sc", {(), (0, 0), (1, 0), (2, 0)}), ("tso", {(), (0, 0), (1, 0)}):  # it begins, and rings
        result = explore(scenario, model=model, deaths=1)

        assert result.verdict == "bounded (1 death)", str(result.failure)
        assert scenario.ends == ends
        assert refused
        scenario.ends.clear()


# ---- choices, the clock, allocation


def test_each_number_is_chosen() -> None:
    scenario = Bodies(lambda s, model: s.got.extend([model.choose(3), model.choose(2)]))

    assert explore(scenario).verdict == "complete"
    assert scenario.ends == {(a, b) for a in range(3) for b in range(2)}


def test_the_clock_stands_or_moves_on_by_a_tick_and_not_too_often() -> None:
    scenario = Bodies(lambda s, model: s.got.extend([model.clock(), model.clock(), model.clock()]))

    explore(scenario)

    assert {end[-1] for end in scenario.ends} == {0, 5, 7, 10, 12, 14}
    assert all(list(end) == sorted(end) for end in scenario.ends)


def test_an_allocation_may_fail() -> None:
    def twice(s: Bodies, model: Model) -> None:
        model.free(s.heap)
        s.got.append(model.allocate(s.heap, may_fail=True))

    scenario = Bodies(twice)

    assert explore(scenario).verdict == "complete"
    assert scenario.ends == {(True,), (False,)}


# ---- bounds and searches


def test_bounds_are_named_in_the_verdict() -> None:
    scenario = EventRing(events=1)

    assert explore(scenario, preemptions=1).verdict == "bounded (1 preemption)"
    both = explore(scenario, model="tso", flush_delay=3, preemptions=2)
    assert both.verdict == "bounded (2 preemptions, 3 steps of flush delay)"
    assert explore(scenario, executions=5).verdict == "bounded (5 executions)"
    assert explore(scenario, search="random", executions=5).verdict == "bounded (5 executions, random)"
    assert explore(EventRing(events=4), seconds=0.1).verdict == "bounded (0.1 s)"


def test_a_search_ends_where_its_table_of_states_would_take_too_much(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("pvbus.verify.explorer.search.STATES_MAX", 200)

    assert explore(EventRing(events=3)).verdict == "bounded (200 states)"
    assert explore(EventRing(events=3), search="dpor", executions=1000).verdict == "bounded (1000 executions)"


def test_preemptions_are_counted() -> None:
    assert explore(Bodies(adds, adds, holds=not_two), preemptions=0).failure is None
    assert explore(Bodies(adds, adds, holds=not_two), preemptions=1).failure is not None


def test_a_store_that_may_not_wait_is_seen() -> None:
    def buffers(mine: int, other: int) -> Body:
        def body(s: Bodies, model: Model) -> None:
            s.m.store64(mine, 1)
            s.got.append(s.m.load64(other))

        return body

    scenario = Bodies(buffers(0, 8), buffers(8, 0), holds=lambda s: "both read nothing" if s.got == [0, 0] else None)

    assert explore(scenario, model="tso").failure is not None
    assert explore(scenario, model="tso", flush_delay=0).failure is None


@pytest.mark.parametrize("search", SEARCHES)
@pytest.mark.parametrize("model", ["sc", "tso", "arm"])
def test_each_search_finds_the_wake_up_that_the_driver_loses_within_a_thousand_executions(search: str, model: str) -> None:
    result = explore(EventRing(), model=model, search=search, variant=DRIVER, executions=1000)

    assert failure_of(result).kind == "lost wake-up"


# ---- the same again


@pytest.mark.parametrize("search", SEARCHES)
@pytest.mark.parametrize("model", ["sc", "tso", "arm"])
def test_the_same_arguments_give_the_same_result(search: str, model: str) -> None:
    first, second = (
        explore(EventRing(), model=model, search=search, variant=DRIVER, executions=1000, seed=7) for _ in range(2)
    )

    assert first == second


def test_ten_thousand_replays_give_one_trace() -> None:
    failure = failure_of(explore(EventRing(), model="tso", variant=DRIVER))
    explorer = Explorer(EventRing(), "tso", DRIVER, ())
    for location in failure.shared:
        explorer.model.share(location)
    explorer.follow(failure.choices, "first")  # leaves the engine set up to follow them
    traces: set[tuple[tuple[str, str], ...]] = set()
    for _ in range(10_000):
        trace: list[tuple[str, str]] = []
        explorer.model.trace = trace
        explorer.executions.run()
        traces.add(tuple(trace))

    assert len(traces) == 1
    assert len(traces.pop()) > 20


def test_another_seed_gives_another_walk() -> None:
    walks = {
        follow(EventRing(), (), then="random", seed=seed, shared=failure_of(explore(EventRing(), variant=DRIVER)).shared).choices
        for seed in range(5)
    }

    assert len(walks) > 1


# ---- along given choices


def test_a_prefix_is_followed_to_its_end_and_says_what_is_open_there() -> None:
    failure = failure_of(explore(EventRing(), variant=DRIVER))
    half = failure.choices[: len(failure.choices) // 2]

    run = follow(EventRing(), half, shared=failure.shared, variant=DRIVER)

    assert run.choices == half
    assert run.failure is None
    assert failure.choices[len(half)] in run.open_choices
    assert follow(EventRing(), failure.choices, shared=failure.shared, variant=DRIVER).failure == failure


@pytest.mark.parametrize("choices", [("nobody",), ("t0=3",), ("t0~",), ("t1!",), ("t0", "t0", "t0", "t0", "t0")])
def test_choices_that_do_not_fit_are_refused(choices: tuple[str, ...]) -> None:
    with pytest.raises(ReplayError):
        follow(Bodies(adds, adds), choices, model="tso")


def test_names_that_would_read_as_choices_are_refused() -> None:
    class Odd(Bodies):
        def start(self, model: Model) -> Iterable[Start]:
            yield "a=1", lambda: None, False

    with pytest.raises(ValueError, match="names of contexts"):
        explore(Odd())


def test_a_foreign_memory_or_bell_is_refused() -> None:
    failure = failure_of(explore(Bodies(lambda s, model: model.ring(-99))))
    assert "no doorbell, lock or mailbox -99" in failure.message
    failure = failure_of(explore(Bodies(lambda s, model: model.free(object()))))
    assert "belongs to another model" in failure.message
    assert failure.kind == "exception"
