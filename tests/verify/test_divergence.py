# SPDX-License-Identifier: Apache-2.0
"""What a scenario gets wrong without noticing: it is said, and is neither a complete search nor a failure of the code."""

import dataclasses
import itertools
from collections.abc import Callable, Iterable
from typing import Any

import pytest

from pvbus.shm._core_explored import Memory
from pvbus.verify.explorer import Model, Scenario, Start, explore
from pvbus.verify.explorer.execution import DivergedError
from pvbus.verify.explorer.walk import Walker
from pvbus.verify.scenarios.one_reference import OneReference
from pvbus.verify.searching import Job, ScenarioError, search, shortened

NUMBERS = itertools.count(1)
DEPTH_FIRST = ("dfs", "dpor", "states")


class Odd(Scenario):
    """Two contexts that run the same body over one page."""

    name = "odd"

    def __init__(self, body: Callable[["Odd"], object], judged: Callable[[], Any] = lambda: None) -> None:
        self.body, self.judged = body, judged

    def prepare(self, model: Model, variants: int) -> None:
        """Make the page."""
        self.page = Memory(model, 64)
        model.name(self.page, "page")

    def start(self, model: Model) -> Iterable[Start]:
        """Give the two."""
        yield "one", self._run, False
        yield "other", self._run, False

    def _run(self) -> None:
        self.body(self)

    def broken(self, model: Model, stuck: list[str]) -> Any:
        """Judge as one is told."""
        return self.judged()


def counts_on(odd: Odd) -> None:
    """Write what no other execution writes."""
    odd.page.store32(0, next(NUMBERS), "count")
    odd.page.load32(0, "look")
    odd.page.store32(4, 1, "end")


def sometimes(odd: Odd) -> None:
    """Leave a step out, one time in three."""
    if next(NUMBERS) % 3:
        odd.page.store32(0, 1, "perhaps")
    odd.page.load32(0, "look")
    odd.page.store32(0, 2, "end")


def always(odd: Odd) -> None:
    """Do the same each time."""
    odd.page.store32(0, odd.page.load32(0, "look") + 1, "add")


@pytest.mark.parametrize("name", DEPTH_FIRST)
@pytest.mark.parametrize("model", ["sc", "tso", "arm"])
@pytest.mark.parametrize("body", [counts_on, sometimes])
def test_executions_that_differ_by_themselves_are_no_complete_search(body: Callable[[Odd], None], model: str, name: str) -> None:
    with pytest.raises(DivergedError, match="the same choices have led to different executions"):
        explore(Odd(body), model=model, search=name)


def test_what_differs_is_named() -> None:
    with pytest.raises(DivergedError, match=r"\(one 'count page\+0x0 := 0x\w+', one 'count page\+0x0 := 0x\w+'\)"):
        explore(Odd(counts_on))


def test_a_judgement_that_is_another_the_next_time_is_no_failure() -> None:
    verdicts = iter(["unlucky", *[None] * 100])

    with pytest.raises(DivergedError, match="property: unlucky; and then, nothing fails"):
        explore(Odd(always, lambda: next(verdicts)))


@pytest.mark.parametrize("answer", [True, False, 5])
def test_a_judgement_that_is_no_sentence_is_a_mistake(answer: object) -> None:
    with pytest.raises(ScenarioError, match="broken\\(\\) gives a sentence, or None when all holds"):
        search(Job("odd", lambda: Odd(always, lambda: answer), {}, "sc"), show=False)


def test_a_context_of_which_nothing_would_run_is_a_mistake() -> None:
    class Lazy(Odd):
        def _run(self) -> Any:
            yield self.page.load32(0)

    with pytest.raises(ValueError, match="one is a generator or a coroutine"):
        explore(Lazy(always))


def test_more_stores_than_a_buffer_holds_say_nothing_about_the_code() -> None:
    def stores(odd: Odd) -> None:
        for number in range(300):
            odd.page.store32(0, number, "store")
        odd.page.load32(0, "look")

    with pytest.raises(ValueError, match="more than 192 stores wait in the buffer of one"):
        explore(Odd(stores), model="tso")


# ---- long, and endless


def test_an_execution_that_is_only_long_is_no_livelock() -> None:
    result = explore(OneReference(events=16), executions=3)

    assert result.verdict == "bounded (3 executions)"
    assert result.steps > 3 * 1000


@pytest.mark.parametrize("name", ["dfs", "random"])
def test_a_livelock_replays_as_one_and_is_short_to_write_down(name: str) -> None:
    def spins(odd: Odd) -> None:
        odd.page.store32(0, 1, "set")
        while odd.page.load32(0, "look") < 2:
            pass

    job = Job("odd", lambda: Odd(spins), {}, "sc", arguments={"search": name})
    failure = search(job, show=False).result.failure
    assert failure is not None
    recording, walked = shortened(job, dataclasses.replace(failure))
    again = Walker.of(job.make, recording).to_the_end(recording.choices)

    assert (walked.kind, again.kind) == ("livelock", "livelock")
    assert again.rows == walked.rows
    assert "no end within 4,096 steps" in again.message
    assert len(recording.choices) <= 600
