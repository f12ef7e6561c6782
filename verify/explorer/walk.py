# SPDX-License-Identifier: Apache-2.0
"""One execution of a scenario along given choices: for replaying, shortening, stepping through and explaining a failure.

A search (search.py) decides by itself; a walk does what it is told, as far as that can be done, and notes what came of it.
`lenient` passes over choices that do not fit, `then` says who goes on behind the last one.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Final, NamedTuple

from pvbus.verify.explorer.search import STEPS_MAX, Explorer, ReplayError
from pvbus.verify.explorer.trace import Row

if TYPE_CHECKING:
    from pvbus.verify.explorer.contexts import Context
    from pvbus.verify.explorer.recording import Recording
    from pvbus.verify.explorer.scenario import Scenario

Chooser = Callable[[list[str], str], str | None]  # what can be chosen, what was chosen last; None ends the walk there
Forbids = Callable[["Context", str], bool]  # whether a context may not take its next step now, in a stronger model
FLUSH, DEATH = "~", "!"
_NAME: Final = re.compile("[^~!=]*")


def context_of(choice: str) -> str:
    """Give the name of the context that a choice moves."""
    found = _NAME.match(choice)
    return found[0] if found else ""


def is_step(choice: str) -> bool:
    """Whether a choice lets its context go on: no flush, no death."""
    return FLUSH not in choice and DEATH not in choice


def keep_going(choices: list[str], last: str) -> str | None:
    """Stay with the context that runs; flush only when nobody else can go on, let nobody die. The fewest preemptions."""
    runs = [choice for choice in choices if is_step(choice)]
    same = [choice for choice in runs if context_of(choice) == context_of(last)]
    flushes = [choice for choice in choices if FLUSH in choice]
    found = same or runs or flushes
    return found[0] if found else None


def stop_there(choices: list[str], last: str) -> str | None:
    """End the walk behind the choices that were given."""
    return None


class Step(NamedTuple):
    """An access or doorbell step as a real process would make it: the memory by its size (0 for a doorbell)."""

    context: str
    site: str
    size: int
    offset: int


@dataclass
class Walked:
    """What came of a walk. `kind` is None when nothing failed; `ended` says whether it came to its end at all."""

    kind: str | None
    message: str
    choices: tuple[str, ...]
    preemptions: int
    ended: bool
    rows: list[Row] = field(default_factory=list)
    names: tuple[str, ...] = ()
    steps: list[Step] = field(default_factory=list)  # of the contexts; the flushes are not theirs

    @property
    def cost(self) -> tuple[int, int]:
        """What a shorter trace has less of."""
        return self.preemptions, len(self.choices)


class Walker:
    """A scenario that has been prepared, and can be walked through again and again."""

    def __init__(
        self, scenario: Scenario, *, model: str, variant: str | None = None, drop: Sequence[str] = (), shared: Sequence[int] = (),
        deaths: int = 0,
    ) -> None:  # fmt: skip
        self.explorer = Explorer(scenario, model, variant, drop, deaths)
        self.model = self.explorer.model
        self.model.footprint.shared.update(shared)

    @classmethod
    def of(cls, scenario: Scenario, recording: Recording, *, drop: Sequence[str] | None = None) -> Walker:
        """Make the walker of a recording; with another list of dropped sites, if wanted."""
        return cls(
            scenario, model=recording.model, variant=recording.variant, shared=recording.shared,
            drop=recording.drop if drop is None else drop, deaths=recording.bounds.get("deaths", 0),
        )  # fmt: skip

    def along(
        self, wanted: Sequence[str], *, lenient: bool = False, then: Chooser = stop_there, forbids: Forbids | None = None,
        traced: bool = False,
    ) -> Walked:  # fmt: skip
        """Walk. Raises ReplayError when a choice does not fit and `lenient` is not asked for."""
        explorer, model = self.explorer, self.model
        model.trace = [] if traced else None
        contexts = explorer._begin()
        by_name = {context.name: context for context in contexts}
        done: list[str] = []
        rows: list[Row] = []
        steps: list[Step] = []
        preemptions, last, ended = 0, "", False
        left = list(reversed(wanted))
        try:
            self._note(rows, contexts)
            while len(done) < STEPS_MAX:
                choices = explorer._choices(contexts)
                if not choices or any(context.error is not None for context in contexts):
                    ended = True
                    break
                if not left:
                    choice = then(choices, last)
                    if choice is None:
                        break
                else:
                    choice = left.pop()
                    if choice not in choices:
                        if lenient:
                            continue
                        raise ReplayError(self._unfit(by_name, choice))
                context = by_name[context_of(choice)]
                if forbids is not None and is_step(choice) and forbids(context, choice):
                    raise ReplayError(f"{choice} may not go on: {model.describe(context)}")
                could = any(is_step(other) and context_of(other) == context_of(last) for other in choices)
                preemptions += is_step(choice) and context_of(last) != context_of(choice) and could
                if is_step(choice) and context.operation is not None:
                    steps.append(self._step(context))
                explorer._take(by_name, choice)
                done.append(choice)
                last = choice if is_step(choice) else last
                self._note(rows, contexts)
            end = explorer._end(contexts) if ended else None
            if traced:
                rows += [Row(c.name, f"[{model.describe(c)}]", "") for c in contexts if not c.finished]
        finally:
            model.trace = None
            for context in contexts:
                context.abandon()
        kind, message = (end.kind, end.message) if end is not None else (None, "")
        return Walked(kind, message, tuple(done), preemptions, ended, rows, tuple(by_name), steps)

    def _step(self, context: Context) -> Step:
        if context.operation is None:
            raise RuntimeError(f"{context.name} is about to do nothing")
        _kind, key, site = context.operation
        if key < 0:
            return Step(context.name, site, 0, 0)
        memory = next(memory for memory, number in self.model._numbers.items() if number == key >> 40)
        return Step(context.name, site, memory.size, key >> 4 & 0xFFFFFFFFF)

    def _unfit(self, by_name: dict[str, Context], choice: str) -> str:
        context = by_name.get(context_of(choice))
        if context is None:
            return f"there is no context {context_of(choice)!r}: {', '.join(by_name)}"
        if FLUSH in choice and not context.buffer:
            return f"{choice}: {context.name} has no store that waits"
        return f"{choice} cannot go on: {self.model.describe(context)}"

    def _note(self, rows: list[Row], contexts: Sequence[Context]) -> None:
        """Take over what the model has written down since the last step, and the stores that wait now."""
        if not self.model.trace:
            return
        pending = [f"{c.name}: " + ", ".join(self._store(entry) for entry in c.buffer) for c in contexts if c.buffer]
        rows += [Row(who, text, "; ".join(pending)) for who, text in self.model.trace]
        self.model.trace.clear()

    def _store(self, entry: Any) -> str:
        key, value, _site = entry[:3]
        return f"{self.model.where(key)} := {value:#x}"
