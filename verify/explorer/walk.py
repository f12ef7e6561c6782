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

from pvbus.verify.explorer import ReplayError, follow
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

    def stores(self, context: str) -> list[Store]:
        """Give the stores of a context that went into its buffer, in their order."""
        found = [(age, _STORED.match(row.text)) for age, row in enumerate(self.rows) if row.context == context]
        return [Store(stored[1], stored[2], stored[3], age) for age, stored in found if stored is not None]

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
        self.arguments: dict[str, Any] = {"model": model, "variant": variant, "drop": tuple(drop), "shared": tuple(shared)}
        self.arguments["deaths"] = (bounds or {}).get("deaths", 0)

    @classmethod
    def of(cls, make: Callable[[], Scenario], recording: Recording) -> Walker:
        """Make the walker of a recording."""
        return cls(
            make, model=recording.model, variant=recording.variant, drop=recording.drop, shared=recording.shared,
            bounds=recording.bounds,
        )  # fmt: skip

    def along(self, choices: Sequence[str], *, then: str = "stop", seed: int = 0) -> Walked:
        """Walk, and behind the last choice `stop`, go on with the `first` that can, or at `random`. Raises ReplayError."""
        run = follow(self.make(), tuple(choices), then=then, seed=seed, **self.arguments)
        rows, names = rows_of(run.trace)
        kind, message = (run.failure.kind, run.failure.message) if run.failure is not None else (None, "")
        walked = Walked(kind, message, tuple(run.choices), tuple(run.open_choices), tuple(rows), tuple(names))
        if kind is None and not walked.open and then == "stop":  # at its end: judge it
            return self.along(choices, then="first")
        return walked

    def fitted(self, wanted: Sequence[str]) -> tuple[str, ...]:
        """Leave out what does not fit: each choice in turn that cannot be made where it stands."""
        done: tuple[str, ...] = ()
        left = tuple(wanted)
        while left:
            fits = self._fits(done, left)
            done += left[:fits]
            left = left[fits + 1 :]
        return done

    def _fits(self, done: tuple[str, ...], left: tuple[str, ...]) -> int:
        """Give how many of `left` can be made behind `done`."""
        if self._can(done + left):
            return len(left)
        low, high = 0, len(left)  # low can be made, high cannot
        while high - low > 1:
            middle = (low + high) // 2
            low, high = (middle, high) if self._can(done + left[:middle]) else (low, middle)
        return low

    def _can(self, choices: tuple[str, ...]) -> bool:
        try:
            follow(self.make(), choices, then="stop", **self.arguments)
        except ReplayError:
            return False
        return True
