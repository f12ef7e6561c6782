# SPDX-License-Identifier: Apache-2.0
"""One execution: its choices as text, its contexts, and how it ended. The engine runs it, the scenario judges it.

A choice is `name`: a context takes its next step; `name=2`: it takes it in another way (a choice of the scenario, a failing
allocation, a clock that moved on, an older store read; the newest is the plain name); `name~`: its oldest buffered store
reaches memory (`name~1`: a younger one overtakes); `name!`: it dies.
"""

from __future__ import annotations

import functools
import inspect
import re
import traceback
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Final

from pvbus.verify.explorer._engine import LimitError, UseAfterFree
from pvbus.verify.explorer.guard import RunsForEverError
from pvbus.verify.explorer.model import Model
from pvbus.verify.explorer.scenario import Scenario

# what native/engine.h numbers
FOLLOW, DEPTH_FIRST, RANDOM_WALK, PRIORITIES = range(4)
QUIET, PRUNED, FAILED, STOPPED, MISFIT, UNENDED = range(1, 7)
LIVELOCK: Final = "livelock"
ENDLESS: Final = "endless loop"  # the kind of failure whose every execution takes seconds
_BUFFER: Final = 16  # agents from here on are the store buffers
_WAIT: Final = 8
_ALONE_STEPS_MIN: Final = 200  # nobody else could go on for as long as this
_CHOICE: Final = re.compile(r"([^=~!]+)(?:([=~])([0-9]{0,4})|(!))?")

Choice = tuple[int, int, bool]  # agent, way, dies


def _said(error: BaseException) -> str:
    """Say what was raised, and where: whether the code under test or the scenario is wrong."""
    frames = traceback.extract_tb(error.__traceback__)
    where = f" ({Path(frames[-1].filename).name}, line {frames[-1].lineno})" if frames else ""
    return f"{type(error).__name__}: {error}{where}"


class DivergedError(ValueError):
    """The same choices have led somewhere else: a context, or the judgement, depends on more than what it has observed."""


class ReplayError(RuntimeError):
    """A list of choices does not fit: another scenario, other code, other parameters. `choices`: those that did."""

    def __init__(self, text: str, choices: Sequence[str] = ()) -> None:
        super().__init__(text)
        self.choices = tuple(choices)

    @property
    def fitted(self) -> int:
        """Give how many did."""
        return len(self.choices)


@dataclass
class End:
    """How one execution ended."""

    outcome: int
    kind: str | None = None  # of failure
    message: str = ""
    choices: list[str] = field(default_factory=list)


def _is_lazy(body: Callable[[], object]) -> bool:
    """Whether a context would only make something that has to be driven."""
    while isinstance(body, functools.partial):
        body = body.func
    return any(check(body) for check in (inspect.isgeneratorfunction, inspect.iscoroutinefunction, inspect.isasyncgenfunction))


def written(choices: Iterable[Choice], names: Sequence[str]) -> list[str]:
    """Write choices as text."""
    found = []
    for agent, way, dies in choices:
        name = names[agent % _BUFFER]
        mark = "!" if dies else "~" if agent >= _BUFFER else "="
        found.append(name + (mark if mark != "=" or way else "") + (str(way) if way else ""))
    return found


def read(choices: Iterable[str], names: Sequence[str]) -> list[Choice]:
    """Read choices back; ReplayError if a name is not that of a context."""
    found = []
    for text in choices:
        parts = _CHOICE.fullmatch(text)
        if parts is None:
            raise ReplayError(f"{text!r} is no choice")
        if parts[1] not in names:
            raise ReplayError(f"no context {parts[1]!r}")
        agent = names.index(parts[1]) + (_BUFFER if parts[2] == "~" else 0)
        found.append((agent, int(parts[3] or 0), parts[4] is not None))
    return found


class Executions:
    """A prepared scenario and its model, ready to be run again and again."""

    def __init__(self, scenario: Scenario, model: Model) -> None:
        self.scenario = scenario
        self.model = model
        self.names: list[str] = []
        self.running = False  # an execution, so that Python code that runs now is a context's
        self.mortal = set(scenario.mortal)

    def contexts(self) -> list[str]:
        """Give the names of the contexts."""
        if not self.names:
            self.model.reset()
            starts = list(self.scenario.start(self.model))
            self.names = [name for name, _, _ in starts]
            if idle := [name for name, body, _ in starts if _is_lazy(body)]:
                raise ValueError(f"{idle[0]} is a generator or a coroutine: calling it would run nothing of it")
            if len(set(self.names)) != len(self.names) or any(set(name) & set("=~! ") for name in self.names):
                raise ValueError(f"names of contexts are different, and without =, ~, ! and spaces: {self.names}")
            if len(self.names) > _BUFFER:
                raise ValueError(f"{len(self.names)} contexts: at most {_BUFFER} fit")
            if unknown := self.mortal - set(self.names):
                raise ValueError(f"mortal, but no context: {', '.join(sorted(unknown))}")
            bits = [1 << i for i, name in enumerate(self.names) if not self.mortal or name in self.mortal]
            self.model.set_mortal(sum(bits))
        return self.names

    def run(self, *, keep: bool = False) -> End:
        """Run one execution as the engine is configured, and judge it; unless `keep`, its contexts are gone afterwards."""
        model = self.model
        model.reset()
        starts = list(self.scenario.start(model))
        self.running = True
        try:
            outcome = model.execute(starts)
        finally:
            self.running = False
        try:
            end = End(outcome)
            if not model.grown and outcome in (QUIET, FAILED, UNENDED):
                self._judge(end)
            if outcome in (FAILED, MISFIT) or end.kind is not None:
                end.choices = written(model.taken(), self.contexts())
            if outcome == MISFIT:
                raise ReplayError(self._misfit(end), end.choices)
            return end
        finally:
            if not keep:
                model.clear()

    def _misfit(self, end: End) -> str:
        last = end.choices[-1] if end.choices else "the first choice"
        standing = {name: said for name, said, *_ in self.model.standing()}
        return f"after {len(end.choices)} choice(s), the last of them {last}, the next does not fit: {standing}"

    def _judge(self, end: End) -> None:
        model = self.model
        standing = model.standing()
        for name, _, _, _, _, _, error in standing:
            if isinstance(error, LimitError):
                raise error
            if isinstance(error, UseAfterFree):
                end.kind, end.message = "use after free", str(error)
            elif isinstance(error, RunsForEverError):
                end.kind, end.message = ENDLESS, f"{name}: {error}"
            elif error is not None:
                end.kind, end.message = "exception", f"{name}: {_said(error)}"
            if error is not None:
                return
        if end.outcome == UNENDED:
            end.kind, end.message = LIVELOCK, self._livelock()
            return
        for lock, called in model.locks.items():
            owner = model.value(lock) - 1
            if owner >= 0 and standing[owner][5]:
                end.kind = "lock left by the dead"
                end.message = f"{standing[owner][0]} died with {called}, and nobody took it over"
                return
        stuck = [row for row in standing if not (row[3] or row[4] or row[5])]
        message = self.scenario.broken(model, [row[0] for row in stuck])
        if not isinstance(message, str | None):
            raise TypeError(f"broken() gives a sentence, or None when all holds, and not {message!r}")
        if message is not None:
            waits = any(row[2] == _WAIT for row in stuck)
            end.kind, end.message = "lost wake-up" if waits else "property", message
        elif stuck:
            end.kind = "deadlock"
            end.message = "nobody can go on: " + ", ".join(f"{row[0]} at {row[1]}" for row in stuck)

    def _livelock(self) -> str:
        last = self.contexts()[self.model.taken()[-1][0] % _BUFFER]
        if self.model.alone >= _ALONE_STEPS_MIN:
            return f"{last} runs for ever, and nobody else can: no end within {len(self.model.taken()):,} steps"
        recent = dict.fromkeys(written(self.model.taken()[-64:], self.contexts()))
        steps = f"{len(self.model.taken()):,} steps"
        return f"everybody has had a turn again and again, and there is no end within {steps}: {', '.join(recent)}"

    def where_they_stand(self) -> list[tuple[str, str]]:
        """Say what each context that has not ended is about to do."""
        return [(row[0], f"[{row[1]}]") for row in self.model.standing() if not row[3]]
