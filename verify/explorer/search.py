# SPDX-License-Identifier: Apache-2.0
"""Search the executions of a scenario: all of them, depth first, or some, by chance or by priorities.

`dfs`     depth first by replay from scratch. A partial order reduction (source sets and sleep sets) decides where to
          branch, and a table of states cuts what was seen before. A state is what each context has observed so far, memory,
          buffers and doorbells, told apart by 128 bits. native/reduce.c says how the two go together; that nothing is left
          out is compared with plain search on random programs, not proven.
`dpor`    the same reduction with sleep sets and without the table: no more memory than one path.
`states`  the table alone, every choice tried at every state: the yardstick of the other two.
`random`  a walk by chance; `pct`: priorities with two change points, a store buffer has a priority of its own.

With bounds on preemptions or on the delay of flushes there is no reduction: `dfs` is `states` then.
The verdict is `complete` only if every choice was tried or shown to lead to what was.
"""

from __future__ import annotations

import contextlib
import time
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, replace
from typing import Final

from pvbus.actors.runtime.config import VARIANTS  # bits of the machine header's variants word
from pvbus.verify.explorer.execution import (
    DEPTH_FIRST,
    FAILED,
    FOLLOW,
    PRIORITIES,
    RANDOM_WALK,
    DivergedError,
    End,
    Executions,
    ReplayError,
    read,
    written,
)
from pvbus.verify.explorer.guard import Guard
from pvbus.verify.explorer.model import Model
from pvbus.verify.explorer.scenario import Scenario
from pvbus.verify.explorer.trace import Row, columns, rows_of

SEARCHES: Final = {
    "dfs": "every execution, by states and partial order reduction",
    "dpor": "every execution, by partial order reduction and sleep sets",
    "states": "every execution, by states alone",
    "random": "executions by chance",
    "pct": "executions by priorities that change twice",
}
EXECUTIONS_MAX: Final = 10_000_000
STATES_MAX: Final = 40_000_000  # in the table: 2.4 GB when it grows for the last time
STEPS_MAX: Final = 4_096  # scheduling points of one execution: no end by then is a livelock; ours end after 30 to 200
FAIR_FROM: Final = 600  # from here on everybody has a turn, and nothing is searched
_LENGTH_FIRST: Final = 60  # of an execution, for the change points of pct, until one is known
_CHANGES: Final = 2
_PROGRESS_EACH: Final = 64  # executions
_WALKS_OF_ONE: Final = 8  # when one seems to lead to two places
_STOP, _FIRST, _RANDOM = range(3)
_THEN: Final = {"stop": _STOP, "first": _FIRST, "random": _RANDOM}

Progress = Callable[[int, int, int], None]  # executions, steps, choices that are left to be tried on the path


@dataclass(frozen=True)
class Failure:
    """What does not hold, the choices that lead there, and the trace with a column a context."""

    kind: str  # lost wake-up, deadlock, property, exception, livelock, endless loop, use after free, lock left by the dead
    message: str
    choices: tuple[str, ...]
    # the locations that were scheduling points: without them the choices mean nothing
    shared: tuple[int, ...]
    trace: str

    def __str__(self) -> str:
        return f"{self.kind}: {self.message}\n{self.trace}\nreplay: {' '.join(self.choices)}"


@dataclass(frozen=True)
class Result:
    """The outcome of a search: `complete`, `bounded (by what)` or `failed`, and how much was searched."""

    verdict: str
    executions: int
    steps: int
    states: int
    failure: Failure | None
    sites_dropped: frozenset[str]  # those of `drop` that a context came by


class SearchInterrupted(KeyboardInterrupt):
    """Somebody has had enough; `result` is what was found so far."""

    def __init__(self, result: Result) -> None:
        super().__init__()
        self.result = result


@dataclass(frozen=True)
class Run:
    """One execution along given choices: those taken, those open where it stopped, what failed, and the trace."""

    choices: tuple[str, ...]
    open_choices: tuple[str, ...]
    failure: Failure | None
    trace: str


@dataclass(frozen=True)
class Bounds:
    """What an execution may contain at most; None: as much as it likes."""

    deaths: int = 0
    preemptions: int | None = None
    flush_delay: int | None = None  # steps that a store may wait in a buffer

    def said(self) -> list[str]:
        """Say which of them bound the search."""
        limits = (
            (self.preemptions, "preemption{}"), (self.flush_delay, "step{} of flush delay"), (self.deaths or None, "death{}"),
        )  # fmt: skip
        return [f"{limit} {what.format('s' * (limit != 1))}" for limit, what in limits if limit is not None]


class Explorer:
    """One search: a prepared scenario, its model, and what has been seen."""

    def __init__(
        self, scenario: Scenario, model: str, variant: str | None, drop: Iterable[str], bounds: Bounds | None = None
    ) -> None:
        self.scenario = scenario
        self.bounds = bounds or Bounds()
        self.model = Model(model, drop)
        if variant is not None and variant not in VARIANTS:
            raise ValueError(f"no variant {variant!r}: {', '.join(VARIANTS)}")
        scenario.prepare(self.model, 0 if variant is None else VARIANTS[variant])
        self.model.freeze()
        self.executions = Executions(scenario, self.model)
        self.guard = Guard(self.executions)

    def configure(
        self, strategy: int, then: int = _RANDOM, *, table: bool = False, reduce: bool = False, sleep: bool = False
    ) -> None:
        """Tell the engine how to choose; forgets what was seen."""
        bounds = self.bounds
        preemptions, delay = (-1 if limit is None else limit for limit in (bounds.preemptions, bounds.flush_delay))
        self.executions.contexts()
        self.model.configure(strategy, then, STEPS_MAX, FAIR_FROM, bounds.deaths, preemptions, delay, table, reduce, sleep)

    # ---- all of them

    def run(
        self, search: str, executions_max: int, seconds: float | None, seed: int, progress: Progress | None = None
    ) -> Result:
        """Search until a failure, the end, or a bound."""
        deadline = None if seconds is None else time.monotonic() + seconds
        if search not in SEARCHES:
            raise ValueError(f"no search {search!r}: {', '.join(SEARCHES)}")
        with self.guard.on():
            if search in ("random", "pct"):
                return self._draw(search, executions_max, seconds, deadline, seed, progress)
            return self._depth_first(search, executions_max, seconds, deadline, progress)

    def _depth_first(
        self, search: str, executions_max: int, seconds: float | None, deadline: float | None, progress: Progress | None
    ) -> Result:
        free = self.bounds.preemptions is None and self.bounds.flush_delay is None
        self.configure(
            DEPTH_FIRST, table=search != "dpor" or not free, reduce=search != "states" and free, sleep=search != "states" and free
        )
        executions, cut, more = 0, False, True
        while more:
            if executions == executions_max:
                return self._result(f"bounded ({executions} executions)", executions)
            if deadline is not None and time.monotonic() >= deadline:
                return self._result(f"bounded ({seconds} s)", executions)
            if self.model.states >= STATES_MAX:
                return self._result(f"bounded ({STATES_MAX} states)", executions)
            executions += 1
            end = self._again()
            self._go_on(executions)
            if self.model.grown:  # a location turned out to be shared: begin anew, knowing it
                self.model.forget()
                cut = False
                continue
            if end.kind is not None:
                return self._failed(executions, end)
            if end.outcome == FAILED:
                raise RuntimeError("the engine has stopped, and no context has failed")
            cut |= self.model.cut
            more = self.model.backtrack()
            if progress is not None and executions % _PROGRESS_EACH == 0:
                progress(executions, self.model.steps, self.model.waiting)
        limits = self.bounds.said() + ([f"{FAIR_FROM} steps an execution"] if cut else [])
        return self._result(f"bounded ({', '.join(limits)})" if limits else "complete", executions)

    def _draw(
        self, search: str, executions_max: int, seconds: float | None, deadline: float | None, seed: int,
        progress: Progress | None,
    ) -> Result:  # fmt: skip
        self.configure(PRIORITIES if search == "pct" else RANDOM_WALK)
        executions, longest = 0, _LENGTH_FIRST
        while executions < executions_max and (deadline is None or time.monotonic() < deadline):
            self.model.seed((seed << 32) + executions, _CHANGES, longest)
            executions += 1
            end = self.executions.run()
            self._go_on(executions)
            longest = max(longest, self.model.depth)
            if not self.model.grown and end.kind is not None:
                return self._failed(executions, end)
            if progress is not None and executions % _PROGRESS_EACH == 0:
                progress(executions, self.model.steps, 0)
        what = f"{executions} executions" if executions == executions_max else f"{seconds} s"
        return self._result(f"bounded ({what}, {search})", executions)

    def _go_on(self, executions: int) -> None:
        try:
            self.guard.check()
        except KeyboardInterrupt:
            raise SearchInterrupted(self._result("bounded (interrupted)", executions)) from None

    def _again(self) -> End:
        try:
            return self.executions.run()
        except ReplayError as error:
            raise DivergedError(self._diverged(error.choices)) from None

    def _diverged(self, choices: Sequence[str]) -> str:
        """Say what differs from one execution to the next, if it shows once more."""
        walks: list[list[Row]] = []
        for _ in range(_WALKS_OF_ONE):
            with contextlib.suppress(ReplayError, ValueError):
                walks.append(rows_of(self.follow(choices, "stop")[1].trace)[0])
        first = next(((a, b) for other in walks[1:] for a, b in zip(walks[0], other, strict=False) if a != b), None)
        seen = ", ".join(f"{row.context} {row.text!r}" for row in first) if first is not None else ""
        return (
            f"the same choices have led to different executions{f' ({seen})' if seen else ''}: something depends on more than it "
            "has observed, on random numbers, time, id(), the order of a set, or what an execution has left for the next"
        )

    def _failed(self, executions: int, end: End) -> Result:
        result = self._result("failed", executions)
        return replace(result, failure=self.explained(end))

    def _result(self, verdict: str, executions: int) -> Result:
        dropped = frozenset(self.model.sites_dropped)
        return Result(verdict, executions, self.model.steps, self.model.states, None, dropped)

    # ---- one of them

    def follow(self, choices: Sequence[str], then: str, seed: int = 0) -> tuple[End, Run]:
        """Run along choices with a trace, then stop, or go on with the first choice or by chance."""
        model = self.model
        names = self.executions.contexts()
        self.configure(FOLLOW, _THEN[then])
        model.seed(seed, 0, 0)
        model.set_follow(read(choices, names))
        model.trace = []
        try:
            with self.guard.on():
                outcome = self.executions.run(keep=True)
                self.guard.check()
            taken, open_choices = written(model.taken(), names), written(model.open(), names)
            trace = columns([*model.trace, *self.executions.where_they_stand()], names)
        finally:
            model.clear()
            model.trace = None
        shared = tuple(sorted(model.shared))
        failure = None if outcome.kind is None else Failure(outcome.kind, outcome.message, tuple(taken), shared, trace)
        return outcome, Run(tuple(taken), tuple(open_choices), failure, trace)

    def explained(self, end: End) -> Failure:
        """Run a failed execution once more for its trace."""
        outcome, run = self.follow(end.choices, "first")
        if outcome.kind != end.kind:
            again = f"{outcome.kind}: {outcome.message}" if outcome.kind else "nothing fails"
            raise DivergedError(f"{self._diverged(end.choices)} ({end.kind}: {end.message}; and then, {again})")
        shared = tuple(sorted(self.model.shared))
        return Failure(end.kind or "", end.message, tuple(end.choices), shared, run.trace)


def explore(
    scenario: Scenario,
    *,
    model: str = "sc",
    variant: str | None = None,
    drop: Iterable[str] = (),
    executions: int = EXECUTIONS_MAX,
    search: str = "dfs",
    seed: int = 0,
    seconds: float | None = None,
    preemptions: int | None = None,
    deaths: int = 0,
    flush_delay: int | None = None,
    progress: Progress | None = None,
) -> Result:
    """Search every interleaving of `scenario` under a memory model, until one fails.

    `model` is `sc`, `tso` or `arm`. `variant` names a defect of the driver to be switched on (VARIANTS). `drop`
    names barriers that are left out, and acquire and release accesses that become relaxed, everywhere (`evr_wake`) or in
    one context (`evr_wake@reader`). `search` is one of SEARCHES; `seed` is for those by chance.
    `executions` and `seconds` bound the search, `preemptions`, `flush_delay` and `deaths` what an execution may contain; the
    verdict says so. `progress` hears now and then of executions, steps, and choices that are left to be tried on the path.
    Deterministic, unless `seconds` ends it: the same arguments give the same result, step by step.
    """
    explorer = Explorer(scenario, model, variant, drop, Bounds(deaths, preemptions, flush_delay))
    return explorer.run(search, executions, seconds, seed, progress)


def follow(
    scenario: Scenario,
    choices: Sequence[str],
    *,
    then: str = "stop",
    seed: int = 0,
    shared: Iterable[int] = (),
    model: str = "sc",
    variant: str | None = None,
    drop: Iterable[str] = (),
    deaths: int = 0,
) -> Run:
    """Run one execution along a list of choices (`shared`: of the failure that they come from), then `stop` there, go on
    with the `first` choice each time, or at `random`. Raises ReplayError if the choices do not fit.
    """
    if then not in _THEN:
        raise ValueError(f"then {then!r}: {', '.join(_THEN)}")
    explorer = Explorer(scenario, model, variant, drop, Bounds(deaths))
    for location in shared:
        explorer.model.share(location)
    return explorer.follow(choices, then, seed)[1]


def replay(
    scenario: Scenario,
    failure: Failure,
    *,
    model: str = "sc",
    variant: str | None = None,
    drop: Iterable[str] = (),
    deaths: int = 0,
) -> Failure | None:
    """Run the execution of a failure again, by its choices; give what fails now, or None. Raises
    ReplayError if they do not fit.
    """
    return follow(
        scenario, failure.choices, then="first", shared=failure.shared, model=model, variant=variant, drop=drop, deaths=deaths
    ).failure
