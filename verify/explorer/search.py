# SPDX-License-Identifier: Apache-2.0
"""Depth-first search over the interleavings of a scenario, by replay from scratch, with state hashing.

An execution is a list of choices: the name of a context that takes its next step, or `name~` for the flush
of its oldest buffered store. A state is what each context has observed so far, memory, buffers and
doorbells (exact, no digests), so a state that was seen before is not entered again. The verdict says
`complete` only if every choice was tried.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from typing import Any, Final

from pvbus.actors.runtime.config import VARIANTS  # bits of the machine header's variants word
from pvbus.verify.explorer.contexts import WAIT, Context
from pvbus.verify.explorer.model import Model
from pvbus.verify.explorer.scenario import Scenario
from pvbus.verify.explorer.trace import columns

EXECUTIONS_MAX: Final = 1_000_000
STEPS_MAX: Final = 1_000  # scheduling points of one execution; ours end after 30 to 200
ALONE_STEPS_MIN: Final = 200  # as long as this with nobody else able to run is a livelock, not bad luck


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

    def __init__(self, scenario: Scenario, model: str, variant: str | None, drop: Iterable[str]) -> None:
        self.scenario = scenario
        self.model = Model(model, drop)
        if variant is not None and variant not in VARIANTS:
            raise ValueError(f"no variant {variant!r}: {', '.join(VARIANTS)}")
        scenario.prepare(self.model, 0 if variant is None else VARIANTS[variant])
        self.model.freeze()
        self.visited: set[tuple[Any, ...]] = set()
        self.path: list[_Node] = []
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
        for context in contexts:
            self._go(context)
        return contexts

    def _go(self, context: Context) -> None:
        self.model.running = context
        context.resume()
        self.model.running = None

    def _take(self, contexts: dict[str, Context], choice: str) -> None:
        context = contexts.get(choice.removesuffix("~"))
        if context is None:
            raise ReplayError(f"no context {choice!r}")
        if not choice.endswith("~"):
            if not self.model.enabled(context):
                raise ReplayError(f"{choice} cannot go on: {self.model.describe(context)}")
            self._go(context)
            return
        if not context.buffer:
            raise ReplayError(f"{context.name} has no store to flush")
        self.model.flush(context)

    def _choices(self, contexts: list[Context]) -> list[str]:
        enabled = self.model.enabled
        found = [context.name for context in contexts if enabled(context)]
        found += [context.name + "~" for context in contexts if context.buffer]
        return found

    def _end(self, contexts: list[Context]) -> _End:
        for context in contexts:
            if context.error is not None:
                return _End("exception", f"{context.name}: {type(context.error).__name__}: {context.error}")
        stuck = [context for context in contexts if not context.finished and not context.server]
        message = self.scenario.broken(self.model, [context.name for context in stuck])
        if message is None and stuck:
            message = "nobody can go on: " + ", ".join(f"{c.name} at {self.model.describe(c)}" for c in stuck)
            return _End("deadlock", message)
        waits = any(context.operation is not None and context.operation[0] == WAIT for context in stuck)
        return _End(("lost wake-up" if waits else "property") if message else None, message or "")

    def execute(self, prefix: Sequence[str], *, search: bool = True) -> _End:
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
                last = prefix[len(done)] if len(done) < len(prefix) else choices[0]
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

    def run(self, executions_max: int) -> Result:
        """Search until a failure, the end, or the bound."""
        executions, too_long = 0, False
        prefix: list[str] | None = []
        while prefix is not None:
            if executions == executions_max:
                return self._result(f"bounded ({executions} executions)", executions)
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
) -> Result:
    """Search every interleaving of `scenario` under a memory model, until one fails.

    `model` is `sc` or `tso`. `variant` names a defect of the driver to be switched on (VARIANTS). `drop`
    names barriers that are left out, everywhere (`evr_wake`) or in one context (`evr_wake@reader`).
    `executions` bounds the search; the verdict then says `bounded`. Deterministic: the same arguments give
    the same result, step by step.
    """
    return Explorer(scenario, model, variant, drop).run(executions)


def replay(
    scenario: Scenario,
    failure: Failure,
    *,
    model: str = "sc",
    variant: str | None = None,
    drop: Iterable[str] = (),
) -> Failure | None:
    """Run the execution of a failure again, by its choices; give what fails now, or None. Raises
    ReplayError if they do not fit.
    """
    explorer = Explorer(scenario, model, variant, drop)
    explorer.model.footprint.shared.update(failure.shared)
    end = explorer.execute(failure.choices, search=False)
    return None if end.kind is None else explorer.explained(end)
