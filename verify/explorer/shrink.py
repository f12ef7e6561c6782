# SPDX-License-Identifier: Apache-2.0
"""Make a failing execution shorter: fewer switches from one context to another first, then fewer choices.

Each attempt is an execution of the production code (walk.py): a list of choices with some left out, or with a context's
turns moved together, is walked as far as it fits and then finished. It counts if the same kind of failure comes of it.
Attempts are bounded, so the result is short, not shortest.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Final

from pvbus.verify.explorer import ReplayError
from pvbus.verify.explorer.execution import ENDLESS, LIVELOCK
from pvbus.verify.explorer.walk import DEATH, FLUSH, Walked, Walker, context_of

WALKS_MAX: Final = 2_000  # executions: a number and no time, so that a failure is shortened to the same trace everywhere
WALKS_OF_A_LIVELOCK_MAX: Final = 60  # which are a hundred times as long
BEGINNINGS_MAX: Final = 64


def shrink(walker: Walker, choices: Sequence[str], kind: str, *, walks_max: int = WALKS_MAX) -> Walked:
    """Give the shortest walk found that fails in the same way; at worst that of `choices` itself."""
    best = walker.to_the_end(choices)
    if kind == ENDLESS:  # bounded by executions, and each of them would take its seconds
        return best
    if kind == LIVELOCK:
        walks_max = min(walks_max, WALKS_OF_A_LIVELOCK_MAX)
    tried: set[tuple[str, ...]] = set()
    better = True
    while better:
        better = False
        for candidate in _shorter(best.choices):
            if candidate in tried:
                continue
            tried.add(candidate)
            if walker.walks > walks_max:
                return best
            walked = _finished(walker, candidate)
            if walked is not None and walked.kind == kind and walked.cost < best.cost:
                best, better = walked, True
                break
    return best


def _finished(walker: Walker, candidate: tuple[str, ...]) -> Walked | None:
    try:
        return walker.along(walker.fitted(candidate), then="first")
    except ReplayError:  # it had come to its end before
        return None


def _shorter(choices: tuple[str, ...]) -> Iterator[tuple[str, ...]]:
    """Give candidates: beginnings, then with a run of one context left out or moved, then with one choice left out."""
    for length in range(0, len(choices), max(1, len(choices) // BEGINNINGS_MAX)):
        yield choices[:length]
    runs = _runs(choices)
    for i in range(len(runs)):
        yield _joined(runs[:i] + runs[i + 1 :])
    for i in range(1, len(runs) - 1):  # A B A: B before or behind both
        if context_of(runs[i - 1][0]) == context_of(runs[i + 1][0]):
            yield _joined([*runs[: i - 1], runs[i], runs[i - 1], *runs[i + 1 :]])
            yield _joined([*runs[:i], runs[i + 1], runs[i], *runs[i + 2 :]])
    for i, choice in enumerate(choices):
        if FLUSH in choice or DEATH in choice:  # a store that reaches memory later, a death that is not needed
            yield (*choices[:i], *choices[i + 1 :])


def _runs(choices: Sequence[str]) -> list[tuple[str, ...]]:
    runs: list[list[str]] = []
    for choice in choices:
        if runs and context_of(runs[-1][-1]) == context_of(choice):
            runs[-1].append(choice)
        else:
            runs.append([choice])
    return [tuple(run) for run in runs]


def _joined(runs: Sequence[tuple[str, ...]]) -> tuple[str, ...]:
    return tuple(choice for run in runs for choice in run)
