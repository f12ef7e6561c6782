# SPDX-License-Identifier: Apache-2.0
"""Why a failure could happen: which barrier, restored or added, makes its trace impossible. Found by trying, not by thinking.

Under a model with store buffers a trace may need that a load overtakes an older store of its own context. A full barrier
between the two would have held the load back until the store had left: walk.py walks the trace with that rule, and if it
cannot be walked any more, the barrier forbids it. What is tried first are the barriers that were left out.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import TYPE_CHECKING

from pvbus.verify.explorer.contexts import LOAD
from pvbus.verify.explorer.search import ReplayError
from pvbus.verify.explorer.walk import Forbids, Walker

if TYPE_CHECKING:
    from pvbus.verify.explorer.contexts import Context
    from pvbus.verify.explorer.recording import Recording
    from pvbus.verify.explorer.scenario import Scenario


def forbidden_by(make: Callable[[], Scenario], recording: Recording) -> list[str]:
    """Give a sentence for each thing that, by itself, makes the trace of a recording impossible."""
    found = []
    for site in recording.drop:
        rest = [other for other in recording.drop if other != site]
        if not _fails(Walker.of(make(), recording, drop=rest), recording):
            found.append(f"the barrier SYNC({site.partition('@')[0]}){_at(site)}, which was left out: with it the trace is impossible")
    walker = Walker.of(make(), recording)
    overtaking = _overtaking(walker, recording)
    for context, load in sorted(overtaking):
        if not _fails(walker, recording, forbids=_barrier_before(context, load)):
            stores = ", ".join(sorted(overtaking[context, load]))
            found.append(f"a full barrier in {context} between {stores} (store) and {load} (load)")
    if not found and not overtaking and recording.model != "arm":
        found.append("no barrier: each step is in program order; what has to change is the order in the code")
    if recording.variant is not None and not _fails_without_variant(make, recording):
        found.append(f"the order of our own code: without the variant {recording.variant} the choices do not fit or do not fail")
    return found


def _at(site: str) -> str:
    context = site.partition("@")[2]
    return f" of {context}" if context else ""


def _fails(walker: Walker, recording: Recording, forbids: Forbids | None = None) -> bool:
    try:
        return walker.along(recording.choices, forbids=forbids).kind is not None
    except ReplayError:
        return False


def _fails_without_variant(make: Callable[[], Scenario], recording: Recording) -> bool:
    return _fails(Walker.of(make(), dataclasses.replace(recording, variant=None)), recording)


def _overtaking(walker: Walker, recording: Recording) -> dict[tuple[str, str], set[str]]:
    """Find the loads that went ahead of older stores of their own context to other words: (context, site) to those stores."""
    found: dict[tuple[str, str], set[str]] = {}

    def look(context: Context, _choice: str) -> bool:
        if context.operation is not None and context.operation[0] == LOAD:
            _kind, key, site = context.operation
            if ahead := {entry[2] for entry in context.buffer if entry[0] != key}:
                found.setdefault((context.name, site), set()).update(ahead)
        return False

    walker.along(recording.choices, forbids=look)
    return found


def _barrier_before(name: str, load: str) -> Forbids:
    """The rule of a full barrier in one context in front of one load: no store of its own may wait when it is reached."""

    def forbids(context: Context, _choice: str) -> bool:
        return context.name == name and bool(context.buffer) and context.operation is not None and context.operation[2] == load

    return forbids
