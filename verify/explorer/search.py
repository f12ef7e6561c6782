# SPDX-License-Identifier: Apache-2.0
"""Depth-first search over the interleavings of a scenario, by replay from scratch, with state hashing.

An execution is a list of choices: `name`, a context takes its next step; `name=2`, it takes it in another way (a choice
of the scenario, a failing allocation, a clock that moved on, an older store read); `name~`, its oldest buffered store
reaches memory (`name~2`: a younger one overtakes); `name!`, it dies. A state is what each context has observed so far, memory, buffers and
doorbells (exact, no digests), so a state that was seen before is not entered again. The verdict says
`complete` only if every choice was tried.
"""

from __future__ import annotations

import contextlib
import random
import re
import time
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from typing import Any, Final

from pvbus.actors.runtime.config import VARIANTS  # bits of the machine header's variants word
from pvbus.verify.explorer.contexts import WAIT, Context
from pvbus.verify.explorer.model import Model
from pvbus.verify.explorer.primitives import UseAfterFree
from pvbus.verify.explorer.scenario import Scenario
from pvbus.verify.explorer.trace import columns

EXECUTIONS_MAX: Final = 1_000_000
STEPS_MAX: Final = 1_000  # scheduling points of one execution; ours end after 30 to 200
ALONE_STEPS_MIN: Final = 200  # as long as this with nobody else able to run is a livelock, not bad luck


_CHOICE: Final = re.compile(r"(.*?)(?:([=~!])([0-9]*))?$")


class ReplayError(RuntimeError):
    """A list of choices does not fit: another scenario, other code, other parameters."""


@dataclass(frozen=True)
class Failure:
    """What does not hold, the choices that lead there, and the trace with a column a context."""

    kind: str  # lost wake-up, deadlock, property, exception, livelock
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


@dataclass(frozen=True)
class Run:
    """One execution along given choices: those taken, those open where it stopped, what failed, and the trace."""

    choices: tuple[str, ...]
    open_choices: tuple[str, ...]
    failure: Failure | None
    trace: str


@dataclass
class _Node:
    """A state on the current path: what may be chosen there, and how far the search has come."""

    choices: list[str]
    at: int = 0


@dataclass
class _End:
    """How one execution ended."""

    kind: str | None = None
    message: str = ""
    pruned: bool = False
    too_long: bool = False
    choices: list[str] = field(default_factory=list)


class Explorer:
    """One search: a prepared scenario, its model, and what has been seen."""

    def __init__(
        self, scenario: Scenario, model: str, variant: str | None, drop: Iterable[str], deaths: int = 0
    ) -> None:
        self.deaths_max, self.deaths = deaths, 0
        self.scenario = scenario
        self.model = Model(model, drop)
        if variant is not None and variant not in VARIANTS:
            raise ValueError(f"no variant {variant!r}: {', '.join(VARIANTS)}")
        scenario.prepare(self.model, 0 if variant is None else VARIANTS[variant])
        self.model.freeze()
        self.visited: set[tuple[Any, ...]] = set()
        self.path: list[_Node] = []
        self.open_choices: list[str] = []  # at the end of the last execution
        # at the end of the last execution that was no search
        self.where_they_stand: list[tuple[str, str]] = []

    # ---- one execution

    def _begin(self) -> list[Context]:
        self.model.running = None
        self.model.reset()
        contexts = [
            Context(number, name, run, server=server)
            for number, (name, run, server) in enumerate(self.scenario.start(self.model))
        ]
        self.model.contexts = contexts
        self.deaths = 0
        for context in contexts:
            self._go(context)
        return contexts

    def _go(self, context: Context) -> None:
        self.model.running = context
        context.resume()
        self.model.running = None

    def _take(self, contexts: dict[str, Context], choice: str) -> None:
        name, mark, rest = _CHOICE.match(choice).groups()  # type: ignore[union-attr]
        context = contexts.get(name)
        if context is None:
            raise ReplayError(f"no context {name!r}")
        if mark == "!":
            context.dead = True
            self.model.dead |= context.bit
            self.model.steps += 1
            self.deaths += 1
            if self.model.trace is not None:
                self.model.trace.append((name, "† dies"))
        elif mark == "~":
            if not context.buffer:
                raise ReplayError(f"{name} has no store to flush")
            self.model.flush(context)
        elif not self.model.enabled(context) or context.dead or int(rest or 0) >= context.ways:
            raise ReplayError(f"{choice} cannot go on: {self.model.describe(context)}")
        else:
            self.model.way = int(rest or 0)
            self._go(context)

    def _choices(self, contexts: list[Context]) -> list[str]:
        found = []
        for context in contexts:
            if not context.dead and self.model.enabled(context):
                found += [context.name + (f"={way}" if way else "") for way in range(context.ways)]
        found += [context.name + "~" for context in contexts if context.buffer]
        if self.deaths < self.deaths_max and found:
            mortal = self.scenario.mortal
            found += [
                c.name + "!" for c in contexts
                if not c.finished and not c.dead and (not mortal or c.name in mortal)
            ]
        return found

    def _end(self, contexts: list[Context]) -> _End:
        for context in contexts:
            if context.error is not None:
                if isinstance(context.error, UseAfterFree):
                    return _End("use after free", str(context.error))
                return _End("exception", f"{context.name}: {type(context.error).__name__}: {context.error}")
        stuck = [c for c in contexts if not c.finished and not c.server and not c.dead]
        for lock, name in self.model._locks.items():
            owner = self.model.cells[lock] - 1
            if owner >= 0 and contexts[owner].dead:
                return _End("lock left by the dead", f"{contexts[owner].name} died with {name}, and nobody took it over")
        message = self.scenario.broken(self.model, [context.name for context in stuck])
        if message is None and stuck:
            message = "nobody can go on: " + ", ".join(f"{c.name} at {self.model.describe(c)}" for c in stuck)
            return _End("deadlock", message)
        waits = any(context.operation is not None and context.operation[0] == WAIT for context in stuck)
        return _End(("lost wake-up" if waits else "property") if message else None, message or "")

    def execute(
        self, prefix: Sequence[str], *, search: bool = True, pick: Callable[[Sequence[str]], str] | None = None,
        stop: bool = False,
    ) -> _End:
        """Run one execution: the choices of `prefix`, then, searching, the first choice of each new state."""
        contexts = self._begin()
        by_name = {context.name: context for context in contexts}
        done: list[str] = []
        alone, last = 0, ""
        try:
            while True:
                if search and len(done) < len(prefix):
                    last = prefix[len(done)]
                    self._take(by_name, last)
                    done.append(last)
                    continue
                choices = self._choices(contexts)
                self.open_choices = choices
                if stop and len(done) == len(prefix):
                    end = _End()
                    break
                if not choices or any(context.error is not None for context in contexts):
                    end = self._end(contexts)
                    break
                alone = alone + 1 if choices == [last] else 0
                if len(done) >= STEPS_MAX:
                    end = _End(too_long=True)
                    if alone >= ALONE_STEPS_MIN:
                        end = _End("livelock", f"{last} runs for ever, and nobody else can")
                    break
                if search and not self._enter(contexts, choices):
                    end = _End(pruned=True)
                    break
                last = prefix[len(done)] if len(done) < len(prefix) else choices[0] if pick is None else pick(choices)
                self._take(by_name, last)
                done.append(last)
        finally:
            if not search:
                describe = self.model.describe
                self.where_they_stand = [(c.name, f"[{describe(c)}]") for c in contexts if not c.finished]
            for context in contexts:
                context.abandon()
        end.choices = done
        return end

    def _enter(self, contexts: list[Context], choices: list[str]) -> bool:
        """Put a state on the path; False if it was seen before. Where there is no choice, looking it up
        costs more than it saves.
        """
        if len(choices) > 1:
            state = self.model.state(contexts)
            if state in self.visited:
                return False
            self.visited.add(state)
        self.path.append(_Node(choices))
        return True

    # ---- all of them

    def _backtrack(self) -> list[str] | None:
        while self.path and self.path[-1].at + 1 == len(self.path[-1].choices):
            self.path.pop()
        if not self.path:
            return None
        self.path[-1].at += 1
        return [node.choices[node.at] for node in self.path]

    def run_random(self, executions_max: int, seed: int, seconds: float | None) -> Result:
        """Draw executions until one fails, or the bound."""
        draw = random.Random(seed)
        executions, until = 0, None if seconds is None else time.monotonic() + seconds
        while executions < executions_max and (until is None or time.monotonic() < until):
            executions += 1
            end = self.execute((), search=False, pick=draw.choice)
            if not self.model.footprint.grown and end.kind is not None:
                return self._result("failed", executions, self.explained(end))
        return self._result(f"bounded ({executions} random executions)", executions)

    def run(self, executions_max: int, seconds: float | None = None) -> Result:
        """Search until a failure, the end, or the bound."""
        executions, too_long, until = 0, False, None if seconds is None else time.monotonic() + seconds
        prefix: list[str] | None = []
        while prefix is not None:
            if executions == executions_max:
                return self._result(f"bounded ({executions} executions)", executions)
            if until is not None and time.monotonic() >= until:
                return self._result(f"bounded ({seconds} s)", executions)
            executions += 1
            end = self.execute(prefix)
            if self.model.footprint.grown:  # a location turned out to be shared: begin anew, knowing it
                self.visited.clear()
                self.path.clear()
                too_long = False
                prefix = []
                continue
            if end.kind is not None:
                return self._result("failed", executions, self.explained(end))
            too_long |= end.too_long
            prefix = self._backtrack()
        verdict = f"bounded ({STEPS_MAX} steps an execution)" if too_long else "complete"
        return self._result(verdict, executions)

    def explained(self, end: _End) -> Failure:
        """Run a failed execution once more for its trace."""
        self.model.trace = []
        with contextlib.suppress(ReplayError):
            self.execute(end.choices, search=False)
        self.model.trace += self.where_they_stand
        trace = columns(self.model.trace, [name for name, _, _ in self.scenario.start(self.model)])
        self.model.trace = None
        shared = tuple(sorted(self.model.footprint.shared))
        return Failure(end.kind or "", end.message, tuple(end.choices), shared, trace)

    def _result(self, verdict: str, executions: int, failure: Failure | None = None) -> Result:
        steps, dropped = self.model.steps, frozenset(self.model.dropped_seen)
        return Result(verdict, executions, steps, len(self.visited), failure, dropped)


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
) -> Result:
    """Search every interleaving of `scenario` under a memory model, until one fails.

    `model` is `sc` or `tso`. `variant` names a defect of the driver to be switched on (VARIANTS). `drop`
    names barriers that are left out, everywhere (`evr_wake`) or in one context (`evr_wake@reader`).
    `executions` and `seconds` bound the search, `preemptions` and `deaths` what an execution may contain; the verdict then
    says `bounded`. `search` is `dfs` or `random`, drawn by `seed`. Deterministic: the same arguments give the same
    result, step by step.
    """
    explorer = Explorer(scenario, model, variant, drop, deaths)
    if search == "random":
        return explorer.run_random(executions, seed, seconds)
    return explorer.run(executions, seconds)


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
    if then not in ("stop", "first", "random"):
        raise ValueError(f"then {then!r}: stop, first, random")
    explorer = Explorer(scenario, model, variant, drop, deaths)
    explorer.model.footprint.shared.update(shared)
    draw = random.Random(seed)
    explorer.model.trace = []
    pick = draw.choice if then == "random" else None
    end = explorer.execute(choices, search=False, pick=pick, stop=then == "stop")
    trace = [*explorer.model.trace, *explorer.where_they_stand]
    text = columns(trace, [name for name, _, _ in scenario.start(explorer.model)])
    failure = None
    if end.kind is not None:
        located = tuple(sorted(explorer.model.footprint.shared))
        failure = Failure(end.kind, end.message, tuple(end.choices), located, text)
    return Run(tuple(end.choices), tuple(explorer.open_choices), failure, text)


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
    explorer = Explorer(scenario, model, variant, drop, deaths)
    explorer.model.footprint.shared.update(failure.shared)
    end = explorer.execute(failure.choices, search=False)
    return None if end.kind is None else explorer.explained(end)
