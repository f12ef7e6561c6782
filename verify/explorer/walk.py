# SPDX-License-Identifier: Apache-2.0
"""One execution of a scenario along given choices: for replaying, shortening and explaining a failure.

A search decides by itself; a walk does what it is told, and notes what came of it. What lay in store buffers at each step is
worked out from the trace itself: who stored and what has been flushed since.
"""

from __future__ import annotations

import itertools
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Final

from pvbus.verify.explorer import ReplayError
from pvbus.verify.explorer.search import Bounds, Explorer, Run
from pvbus.verify.explorer.trace import Row, rows_of

if TYPE_CHECKING:
    from pvbus.verify.explorer.recording import Recording
    from pvbus.verify.explorer.scenario import Scenario

FLUSH, DEATH = "~", "!"
_NAME: Final = re.compile("[^~!=]*")
_STORED: Final = re.compile(r"(\S+) (\S+) <- (\S+)$")
FLUSHED: Final = re.compile(r"~ (\S+) (\S+) := (\S+)$")
LOADED: Final = re.compile(r"([^-*~?\[\]+<>† ]\S*) (\S+) = (\S+)")


def context_of(choice: str) -> str:
    """Give the name of the context that a choice moves."""
    found = _NAME.match(choice)
    return found[0] if found else ""


@dataclass(frozen=True)
class Store:
    """A store that waits in the buffer of its context."""

    site: str
    where: str
    value: str
    age: int  # the row in which it was stored


@dataclass(frozen=True)
class Walked:
    """What came of a walk. `kind` is None when nothing failed; `open` are the choices where it stopped."""

    kind: str | None
    message: str
    choices: tuple[str, ...]
    open: tuple[str, ...]
    rows: tuple[Row, ...]
    names: tuple[str, ...]

    @property
    def cost(self) -> tuple[int, int]:
        """What a shorter trace has less of: switches from one context to another, then choices."""
        runs = [context_of(choice) for choice in self.choices]
        return sum(one != other for one, other in itertools.pairwise(runs)), len(runs)

    def pending(self) -> list[dict[str, list[Store]]]:
        """Give, for each row, the stores that wait behind it, by context."""
        waiting: dict[str, list[Store]] = {}
        found = []
        for age, row in enumerate(self.rows):
            if (stored := _STORED.match(row.text)) is not None:
                waiting.setdefault(row.context, []).append(Store(stored[1], stored[2], stored[3], age))
            elif (flushed := FLUSHED.match(row.text)) is not None:
                own = waiting.get(row.context, [])
                for store in own:
                    if (store.where, store.value) == flushed.groups()[1:]:
                        own.remove(store)
                        break
            found.append({name: list(stores) for name, stores in waiting.items() if stores})
        return found


class Walker:
    """A scenario that is walked through again and again, under one model, with the same switches."""

    def __init__(
        self, make: Callable[[], Scenario], *, model: str, variant: str | None = None, drop: Sequence[str] = (),
        shared: Sequence[int] = (), bounds: Mapping[str, Any] | None = None,
    ) -> None:  # fmt: skip
        self.make = make
        self.walks = 0  # executions so far
        self._arguments: dict[str, Any] = {
            "model": model, "variant": variant, "drop": tuple(drop), "bounds": Bounds((bounds or {}).get("deaths", 0)),
        }  # fmt: skip
        self._shared = tuple(shared)
        self._known: set[int] = set()
        self._explorer: Explorer | None = None

    @classmethod
    def of(cls, make: Callable[[], Scenario], recording: Recording) -> Walker:
        """Make the walker of a recording."""
        return cls(
            make, model=recording.model, variant=recording.variant, drop=recording.drop, shared=recording.shared,
            bounds=recording.bounds,
        )  # fmt: skip

    def along(self, choices: Sequence[str], *, then: str = "stop", seed: int = 0) -> Walked:
        """Walk, and behind the last choice `stop`, go on with the `first` that can, or at `random`. Raises ReplayError."""
        run = self._follow(tuple(choices), then, seed)
        rows, names = rows_of(run.trace)
        kind, message = (run.failure.kind, run.failure.message) if run.failure is not None else (None, "")
        walked = Walked(kind, message, tuple(run.choices), tuple(run.open_choices), tuple(rows), tuple(names))
        if kind is None and not walked.open and then == "stop":  # at its end: judge it
            return self.along(choices, then="first")
        return walked

    def to_the_end(self, choices: Sequence[str]) -> Walked:
        """Walk along a recorded failure. A livelock is recorded as far as somebody chose: its end is beyond that."""
        return self.along(choices, then="first")

    def fitted(self, wanted: Sequence[str]) -> tuple[str, ...]:
        """Leave out what does not fit: each choice in turn that cannot be made where it stands."""
        done: tuple[str, ...] = ()
        left = tuple(wanted)
        while left:
            try:
                self._follow(done + left, "stop")
            except ReplayError as error:
                fits = error.fitted - len(done)
                done += left[:fits]
                possible = set(self._follow(done, "stop").open_choices)
                left = next((left[i:] for i in range(fits + 1, len(left)) if left[i] in possible), ())
            else:
                return done + left
        return done

    def _follow(self, choices: Sequence[str], then: str, seed: int = 0) -> Run:
        """Run along choices, over pages that are prepared once."""
        self.walks += 1
        if self._explorer is None:
            self._explorer = Explorer(self.make(), **self._arguments)
            for location in self._shared:
                self._explorer.model.share(location)
            self._known = set(self._explorer.model.shared)
        explorer = self._explorer
        try:
            return explorer.follow(choices, then, seed)[1]
        finally:
            if set(explorer.model.shared) != self._known:  # it has learned of a location: the next walk must not know of it
                self._explorer = None
