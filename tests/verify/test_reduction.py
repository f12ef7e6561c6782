# SPDX-License-Identifier: Apache-2.0
"""The reductions leave nothing out: on random programs each search finds exactly the ends that plain search finds."""

import random
from collections.abc import Callable, Iterable
from contextlib import suppress
from functools import partial
from typing import Any

import pytest

from pvbus.shm._core_explored import Memory
from pvbus.verify.explorer import Model, Scenario, Start, explore

LOCATIONS = 3
OPERATIONS = (
    ("store", 6), ("load", 6), ("release", 2), ("acquire", 2), ("exchange", 2), ("cas", 2), ("or", 1), ("mb", 2), ("rmb", 1),
    ("wmb", 1), ("ring", 2), ("take", 1), ("wait", 1), ("lock", 1), ("unlock", 1), ("choose", 1), ("post", 1), ("receive", 1),
    ("clock", 1), ("if", 2), ("allocate", 1), ("heap", 1),
)  # fmt: skip
OF_DEATHS = (("await death", 3), ("inherit", 3), ("lock", 2), ("spin", 2))


def _done(call: Callable[..., None], *arguments: object) -> int:
    call(*arguments)
    return 0


ACCESSES: dict[str, Callable[[Memory, int, int], int]] = {
    "store": lambda m, at, value: m.store64(at, value, "s"),
    "release": lambda m, at, value: m.store64_release(at, value, "s"),
    "load": lambda m, at, value: m.load64(at, "l"),
    "acquire": lambda m, at, value: m.load64_acquire(at, "l"),
    "exchange": lambda m, at, value: m.exchange64(at, value, "x"),
    "cas": lambda m, at, value: m.compare_exchange64(at, 0, value, "c"),
    "cas of 1": lambda m, at, value: m.compare_exchange64(at, 1, value, "c"),
    "or": lambda m, at, value: m.fetch_or64(at, value, "o"),
    "mb": lambda m, at, value: _done(m.smp_mb, "b"),
    "rmb": lambda m, at, value: _done(m.smp_rmb, "b"),
    "wmb": lambda m, at, value: _done(m.smp_wmb, "b"),
}


def program(draw: random.Random, length: int, operations: tuple[tuple[str, int], ...]) -> list[tuple[str, int, int]]:
    names = draw.choices([name for name, _ in operations], [weight for _, weight in operations], k=length)
    return [(name, draw.randrange(LOCATIONS), draw.randint(1, 3)) for name in names]


class RandomProgram(Scenario):
    """Contexts of random operations; gathers what everybody saw and what is left, for each execution that ends."""

    name = "random program"

    def __init__(self, seed: int, contexts: int, length: int, *, deaths: int = 0) -> None:
        draw = random.Random(seed)
        operations = OPERATIONS + (OF_DEATHS if deaths else ())
        self.programs = [program(draw, length, operations) for _ in range(contexts)]
        self.ends: set[tuple[Any, ...]] = set()

    def prepare(self, model: Model, variants: int) -> None:
        self.memory, self.heap = Memory(model, 64), Memory(model, 8)
        model.name(self.memory, "m")
        model.name(self.heap, "h")
        self.bell, self.box = model.bell("bell"), model.mailbox("box")
        self.lock = model.bell("lock")  # not model.lock(): that the dead leave it is no failure here
        model.ticks(5, at_most=1)

    def start(self, model: Model) -> Iterable[Start]:
        self.seen: list[list[int]] = [[] for _ in self.programs]
        for number in range(len(self.programs)):
            yield f"t{number}", partial(self._run, model, number, self.seen[number]), False

    def _run(self, model: Model, number: int, seen: list[int]) -> None:
        held = live = skip = False
        for name, location, value in self.programs[number]:
            if skip:
                skip = False
            elif name in ACCESSES:
                seen.append(ACCESSES[name](self.memory, 8 * location, value))
            elif name == "if":
                skip = self.memory.load64(8 * location, "l") % 2 == 1
            elif name == "lock" and not held:
                model.acquire(self.lock)
                held = True
            elif name == "unlock" and held:
                model.release(self.lock)
                held = False
            elif name == "inherit" and not held:
                held = model.inherit(self.lock)
                seen.append(held)
            elif name == "await death":
                model.await_death(f"t{(number + value) % len(self.programs)}")
            elif name == "allocate" and not live and location == 0:
                live = model.allocate(self.heap, may_fail=True)
            elif name == "heap" and live:
                seen.append(self.heap.load64(0, "h"))
                model.free(self.heap)
                live = False
            elif name in POINTS:
                seen.append(POINTS[name](self, model, value))

    def broken(self, model: Model, stuck: list[str]) -> str | None:
        memory = tuple(self.memory.load64(8 * i) for i in range(LOCATIONS))
        rest = tuple(model.value(bell) for bell in (self.bell, self.lock, self.box))
        fates = tuple((row[3], row[5]) for row in model.standing())  # has it ended, is it dead
        self.ends.add((tuple(tuple(seen) for seen in self.seen), memory, rest, tuple(stuck), fates))
        return None


POINTS: dict[str, Callable[[RandomProgram, Model, int], int]] = {
    "ring": lambda p, model, value: _done(model.ring, p.bell),
    "take": lambda p, model, value: model.take(p.bell),
    "wait": lambda p, model, value: model.wait(p.bell),
    "choose": lambda p, model, value: model.choose(2),
    "post": lambda p, model, value: _done(model.post, p.box, value),
    "receive": lambda p, model, value: int(model.receive(p.box)),
    "clock": lambda p, model, value: model.clock(),
    "spin": lambda p, model, value: _done(model.spin, "turn"),
}


def ends(seed: int, contexts: int, length: int, model: str, search: str, **bounds: Any) -> tuple[set[Any], Any]:
    scenario = RandomProgram(seed, contexts, length, deaths=bounds.get("deaths", 0))
    result = explore(EndsInDeadlock(scenario), model=model, search=search, **bounds)
    assert result.failure is None, str(result.failure)
    return scenario.ends, result


class EndsInDeadlock(Scenario):
    """The same with everybody a server: a deadlock is an end like others."""

    name = "ends"

    def __init__(self, inner: RandomProgram) -> None:
        self.inner = inner

    def prepare(self, model: Model, variants: int) -> None:
        self.inner.prepare(model, variants)

    def start(self, model: Model) -> Iterable[Start]:
        for name, run, _ in self.inner.start(model):
            yield name, self._tolerant(run), True

    def _tolerant(self, run: Callable[[], object]) -> Callable[[], None]:
        def body() -> None:
            with suppress(AssertionError):  # two allocate the same: an end like others
                run()

        return body

    def broken(self, model: Model, stuck: list[str]) -> str | None:
        return self.inner.broken(model, stuck)


@pytest.mark.parametrize("model", ["sc", "tso", "arm"])
@pytest.mark.parametrize(("contexts", "length", "seeds"), [(2, 6, range(40)), (3, 4, range(100, 120)), (2, 8, range(200, 210))])
def test_each_search_finds_the_ends_that_plain_search_finds(contexts: int, length: int, seeds: range, model: str) -> None:
    compared = 0
    for seed in seeds:
        plain, result = ends(seed, contexts, length, model, "states", executions=4000)
        if result.verdict != "complete":
            continue  # too large for plain search
        for search in ("dfs", "dpor"):
            found, result = ends(seed, contexts, length, model, search)
            assert (result.verdict, found) == ("complete", plain), f"seed {seed}, {search}"
        compared += 1

    assert compared > len(seeds) // 2


@pytest.mark.parametrize("model", ["sc", "tso", "arm"])
@pytest.mark.parametrize(("contexts", "length", "deaths", "seeds"), [
    (2, 6, 1, range(300, 325)), (3, 4, 1, range(400, 415)), (3, 3, 2, range(500, 515)),
])  # fmt: skip
def test_each_search_finds_the_ends_with_deaths(contexts: int, length: int, deaths: int, seeds: range, model: str) -> None:
    compared = 0
    whole = f"bounded ({deaths} death{'s' * (deaths > 1)})"
    for seed in seeds:
        plain, result = ends(seed, contexts, length, model, "states", executions=4000, deaths=deaths)
        if result.verdict != whole:
            continue
        for search in ("dfs", "dpor"):
            found, result = ends(seed, contexts, length, model, search, deaths=deaths)
            assert (result.verdict, found) == (whole, plain), f"seed {seed}, {search}"
        compared += 1

    assert compared > len(seeds) // 2


@pytest.mark.parametrize("search", ["states", "dfs", "dpor"])
def test_a_compare_exchange_finds_the_newest_once_its_own_stores_have_gone(search: str) -> None:
    scenario = RandomProgram(0, 2, 0)
    scenario.programs = [
        [("load", 1, 1), ("store", 2, 1), ("cas of 1", 0, 2)],
        [("store", 0, 1), ("release", 1, 1), ("load", 2, 1)],
    ]
    result = explore(EndsInDeadlock(scenario), model="arm", search=search)

    assert result.verdict == "complete"
    assert {(seen[0][0], seen[0][2]) for seen, *_ in scenario.ends} == {(0, 0), (0, 1), (1, 0), (1, 1)}


@pytest.mark.parametrize("search", ["states", "dfs", "dpor"])
def test_a_lock_is_inherited_behind_the_death_only(search: str) -> None:
    scenario = RandomProgram(0, 2, 0, deaths=1)
    scenario.programs = [[("lock", 0, 1), ("load", 0, 1)], [("inherit", 0, 1), ("store", 0, 1)]]
    explore(EndsInDeadlock(scenario), search=search, deaths=1)

    inherited = {(seen[1][0], fates[0][1]) for seen, _, _, _, fates in scenario.ends if seen[1]}
    assert inherited == {(False, False), (False, True), (True, True)}


def test_the_stores_of_a_buffer_that_nobody_compares_reach_memory_in_one_order() -> None:
    scenario = RandomProgram(0, 2, 0)
    scenario.programs = [[("store", 0, 1), ("store", 1, 1), ("store", 2, 1)], [("load", 0, 1)]]
    result = explore(EndsInDeadlock(scenario), model="arm", search="dpor")

    assert result.verdict == "complete"
    assert result.executions <= 4  # of six orders, and the load's places in each


def test_the_reductions_save_executions() -> None:
    counts = dict.fromkeys(("states", "dfs", "dpor"), 0)
    for seed in range(20):
        for search in counts:
            counts[search] += ends(seed, 2, 6, "tso", search)[1].executions

    assert counts["dfs"] * 2 < counts["states"]
    assert counts["dpor"] * 2 < counts["states"]


def test_who_allocates_second_is_another_than_who_allocates_first() -> None:
    assert ends(4021, 3, 5, "tso", "dfs")[0] == ends(4021, 3, 5, "tso", "states")[0]
