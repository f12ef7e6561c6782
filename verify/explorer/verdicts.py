# SPDX-License-Identifier: Apache-2.0
"""Why a failure could happen: which barrier, restored or added, makes its trace impossible. Found by trying, not by thinking.

A barrier that was left out is put back, and the choices are walked once more. Otherwise the trace itself shows what may be
added: where a context has loaded a word while an older store of its own still waited, a full barrier between the two would
have held the load back, and this trace could not have been.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import TYPE_CHECKING

from pvbus.verify.explorer import ReplayError
from pvbus.verify.explorer.walk import LOADED, Walked, Walker

if TYPE_CHECKING:
    from pvbus.verify.explorer.recording import Recording
    from pvbus.verify.explorer.scenario import Scenario

OVERTAKERS_MAX = 6  # more than a reader takes in


def forbidden_by(make: Callable[[], Scenario], recording: Recording) -> list[str]:
    """Give a sentence for each thing that, by itself, makes the trace of a recording impossible."""
    found = []
    for site in recording.drop:
        rest = tuple(other for other in recording.drop if other != site)
        if not fails(make, dataclasses.replace(recording, drop=rest)):
            label, _, context = site.partition("@")
            of = f" of {context}" if context else ""
            found.append(f"SYNC({label}), which was left out{of}: with it this trace is impossible")
    if recording.variant is not None and not fails(make, dataclasses.replace(recording, variant=None)):
        found.append(f"the order of our own code: without the variant {recording.variant} this trace is impossible")
    ahead = overtaking(Walker.of(make, recording).along(recording.choices))
    found += [
        f"a full barrier in {context} between the store {' and '.join(sorted(stores))} and the load {load}"
        for (context, load), stores in list(ahead.items())[-OVERTAKERS_MAX:]
    ]
    if not ahead and recording.model in ("sc", "tso"):
        found.append("no barrier: each step is in program order, what has to change is the order in the code")
    return found


def fails(make: Callable[[], Scenario], recording: Recording) -> bool:
    """Whether the choices of a recording still lead to a failure."""
    try:
        return Walker.of(make, recording).along(recording.choices).kind is not None
    except ReplayError:
        return False


def overtaking(walked: Walked) -> dict[tuple[str, str], set[str]]:
    """Find the loads that went ahead of older stores of their own context to other words: (context, site) to those stores."""
    found: dict[tuple[str, str], set[str]] = {}
    waiting: dict[str, list[tuple[str, str]]] = {}
    for row, pending in zip(walked.rows, walked.pending(), strict=True):
        if (loaded := LOADED.match(row.text)) is not None:
            ahead = {site for site, where in waiting.get(row.context, []) if where != loaded[2]}
            if ahead:
                found.setdefault((row.context, loaded[1]), set()).update(ahead)
        waiting = {name: [(store.site, store.where) for store in stores] for name, stores in pending.items()}
    return found
