# SPDX-License-Identifier: Apache-2.0
"""Make a failing execution shorter: fewer preemptions first, then fewer choices.

Each attempt is an execution of the production code (walk.py): a list of choices with some left out, or with a context's
turns moved together, is walked as far as it fits and then finished without preemptions. It counts if the same kind of
failure comes of it. Attempts are bounded, so the result is short, not shortest.
"""

from __future__ import annotations

import time
from collections.abc import Iterator, Sequence
from typing import Final

from pvbus.verify.explorer.walk import FLUSH, Walked, Walker, context_of, keep_going

ATTEMPTS_MAX: Final = 2_000
SECONDS_MAX: Final = 10.0


def shrink(walker: Walker, choices: Sequence[str], kind: str) -> Walked:
    """Give the shortest walk found that fails in the same way; at worst that of `choices` itself."""
    best = walker.along(choices, lenient=True, then=keep_going)
    if best.kind != kind:  # finishing it changed it: it is what it is
        return walker.along(choices, lenient=True)
    attempts, until = 0, time.monotonic() + SECONDS_MAX
    tried: set[tuple[str, ...]] = set()
    better = True
    while better:
        better = False
        for candidate in _shorter(best.choices):
            if candidate in tried:
                continue
            tried.add(candidate)
            attempts += 1
            if attempts > ATTEMPTS_MAX or time.monotonic() > until:
                return best
            walked = walker.along(candidate, lenient=True, then=keep_going)
            if walked.kind == kind and walked.cost < best.cost:
                best, better = walked, True
                break
    return best


def _shorter(choices: tuple[str, ...]) -> Iterator[tuple[str, ...]]:
    """Give candidates: beginnings, then with a run of one context left out or moved, then with one choice left out."""
    step = max(1, len(choices) // 64)
    for length in range(0, len(choices), step):
        yield choices[:length]
    runs = _runs(choices)
    for i in range(len(runs)):
        yield _joined(runs[:i] + runs[i + 1 :])
    for i in range(1, len(runs) - 1):  # B A B: A before or behind both
        if context_of(runs[i - 1][0]) == context_of(runs[i + 1][0]):
            yield _joined([*runs[: i - 1], runs[i], runs[i - 1], *runs[i + 1 :]])
            yield _joined([*runs[:i], runs[i + 1], runs[i], *runs[i + 2 :]])
    for i, choice in enumerate(choices):
        if FLUSH in choice:  # a store that reaches memory later
            yield (*choices[:i], *choices[i + 1 :])
    for i in range(len(choices)):
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
