# SPDX-License-Identifier: Apache-2.0
"""What may end a search from outside, and what a context or a scenario may do that is no step: each is said as what it is."""

import os
import signal
import time
from collections.abc import Iterable, Iterator

import pytest

from pvbus.shm._core_explored import Memory
from pvbus.verify.explorer import Model, guard
from pvbus.verify.explorer.scenario import Scenario, Start
from pvbus.verify.explorer.search import SearchInterrupted, explore
from pvbus.verify.searching import Job, ScenarioError, recorded, search

SLEEP_S = 100.0


class Misbehaving(Scenario):
    """Two contexts that count, and something that goes wrong `where` it is told to."""

    name = "misbehaving"

    def __init__(self, where: str) -> None:
        self.where = where
        self.interrupts = 0

    def prepare(self, model: Model, variants: int) -> None:
        """Make the page."""
        del variants
        if self.where == "prepare":
            raise KeyError("a page")
        self.page = Memory(model, 8)
        model.name(self.page, "page")

    def start(self, model: Model) -> Iterable[Start]:
        """Give the two."""
        del model
        yield "one", self._count, False
        yield "other", self._count, False

    def _count(self) -> None:
        self.page.store32(0, self.page.load32(0, "look") + 1, "count")
        if self.where == "raise":
            raise LookupError("nothing there")
        if self.where == "interrupt" and self.interrupts == 0:
            self.interrupts += 1
            os.kill(os.getpid(), signal.SIGINT)
            sum(range(100))  # the handler runs here, in the context
        while self.where == "loop":
            pass
        if self.where == "sleep":
            os.kill(os.getpid(), signal.SIGINT)
            time.sleep(SLEEP_S)

    def broken(self, model: Model, stuck: list[str]) -> str | None:
        """Judge nothing."""
        del model, stuck
        if self.where == "judge":
            raise ZeroDivisionError("no events")
        return None


def job(where: str) -> Job:
    """Return the search of a scenario that goes wrong there."""
    return Job("misbehaving", lambda: Misbehaving(where), {}, "sc")


@pytest.fixture
def interruptible() -> Iterator[None]:
    """Have SIGINT raise KeyboardInterrupt, also in a background job, where it is ignored from the start."""
    inherited = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    signal.signal(signal.SIGINT, inherited)


@pytest.mark.usefixtures("interruptible")
def test_an_interrupt_inside_a_context_is_no_failure_of_the_code_under_test() -> None:
    with pytest.raises(SearchInterrupted) as stopped:
        explore(Misbehaving("interrupt"))

    assert (stopped.value.result.verdict, stopped.value.result.failure) == ("bounded (interrupted)", None)
    assert stopped.value.result.executions >= 1
    assert signal.getsignal(signal.SIGINT) is signal.default_int_handler
    assert search(job("interrupt"), show=False).interrupted


@pytest.mark.usefixtures("interruptible")
def test_an_interrupt_reaches_a_context_that_waits_for_something_outside(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(guard, "PATIENCE_S", 0.02)
    began_s = time.monotonic()

    run = search(job("sleep"), show=False)

    assert run.interrupted
    assert run.result.failure is None
    assert time.monotonic() - began_s < SLEEP_S / 2
    assert signal.getitimer(signal.ITIMER_REAL) == (0.0, 0.0)


def test_a_context_that_never_stops_is_a_failure_and_not_shortened_for_hours(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(guard, "STILL_S", 0.02)

    run = search(job("loop"), show=False)

    assert run.result.failure is not None
    assert run.result.failure.kind == "endless loop"
    assert "one: it has run for" in run.result.failure.message
    assert recorded(run.job, run.result.failure).kind == "endless loop"


@pytest.mark.parametrize(("where", "sentence"), [("prepare", "KeyError: 'a page'"), ("judge", "ZeroDivisionError: no events")])
def test_a_mistake_of_the_scenario_itself_is_said_with_its_place(where: str, sentence: str) -> None:
    with pytest.raises(ScenarioError, match=rf"mistake in the scenario itself: {sentence} \(test_guard.py, line \d+\)"):
        search(job(where), show=False)


def test_what_a_context_raises_is_a_failure_with_its_place() -> None:
    failure = explore(Misbehaving("raise")).failure

    assert failure is not None
    assert failure.kind == "exception"
    assert "LookupError: nothing there (test_guard.py, line " in failure.message
