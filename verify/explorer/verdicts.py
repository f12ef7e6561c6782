# SPDX-License-Identifier: Apache-2.0
"""Why a failure could happen: which barrier, restored or added, makes its trace impossible. Found by trying, not by thinking.

A barrier that was left out is put back, and the choices are walked once more. Otherwise the trace itself shows what may be
added: where a context has loaded a word while an older store of its own still waited, a full barrier between the two would
have held the load back, and this trace could not have been.
"""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Callable
from typing import TYPE_CHECKING

from pvbus.verify.explorer import ReplayError
from pvbus.verify.explorer.execution import ENDLESS
from pvbus.verify.explorer.walk import FLUSHED, LOADED, Store, Walked, Walker

if TYPE_CHECKING:
    from pvbus.verify.explorer.recording import Recording
    from pvbus.verify.explorer.scenario import Scenario

_WRITTEN = re.compile(r"(?:~ )?\S+ (\S+) := (\S+)$")
_EXCHANGED = re.compile(r"\S+ (\S+) \S+ => (\S+)")
SENTENCES_MAX = 6  # more than a reader takes in


def forbidden_by(make: Callable[[], Scenario], recording: Recording, walked: Walked | None = None) -> list[str]:
    """Give a sentence for each thing that, by itself, makes the trace of a recording impossible. `walked`: along it, if that was
    done before.
    """
    if recording.kind == ENDLESS:
        return ["no barrier: a context goes round for ever without an access that others could see"]
    found = []
    for site in recording.drop:
        rest = tuple(other for other in recording.drop if other != site)
        if not fails(make, dataclasses.replace(recording, drop=rest)):
            label, _, context = site.partition("@")
            of = f" of {context}" if context else ""
            found.append(f"SYNC({label}), which was left out{of}: with it this trace is impossible")
    if recording.variant is not None and not fails(make, dataclasses.replace(recording, variant=None)):
        found.append(f"the order of our own code: without the variant {recording.variant} this trace is impossible")
    walked = walked or Walker.of(make, recording).to_the_end(recording.choices)
    missing = [
        *(f"a full barrier in {context} between the store {' and '.join(sorted(stores))} and the load {load}"
          for (context, load), stores in overtaking(walked).items()),
        *(f"a store barrier in {context} between {older} and {younger}" for context, older, younger in passing(walked)),
        *(f"a load barrier in {context} in front of {load}, which reads what is no longer there"
          for context, load in stale(walked)),
    ]  # fmt: skip
    found += missing[-SENTENCES_MAX:]
    if not missing:
        found.append("no barrier: each step is in program order, what has to change is the order in the code")
    return found


def fails(make: Callable[[], Scenario], recording: Recording) -> bool:
    """Whether the choices of a recording still lead to a failure."""
    try:
        return Walker.of(make, recording).to_the_end(recording.choices).kind is not None
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


def passing(walked: Walked) -> list[tuple[str, str, str]]:
    """Find the stores that reached memory ahead of older ones of their own context (arm): context, older, younger."""
    found: dict[tuple[str, str, str], None] = {}
    waiting: dict[str, list[Store]] = {}
    for row, pending in zip(walked.rows, walked.pending(), strict=True):
        if (flushed := FLUSHED.match(row.text)) is not None:
            for store in waiting.get(row.context, []):  # oldest first
                if (store.site, store.where, store.value) == flushed.groups():
                    break
                found[row.context, store.site, flushed[1]] = None
        waiting = pending
    return list(found)


def stale(walked: Walked) -> list[tuple[str, str]]:
    """Find the loads that read what had been overwritten when they were done (arm): context and site."""
    memory: dict[str, str] = {}
    found: dict[tuple[str, str], None] = {}
    for row, pending in zip(walked.rows, walked.pending(), strict=True):
        if (written := _WRITTEN.match(row.text)) is not None:
            memory[written[1]] = written[2]
        elif (exchanged := _EXCHANGED.match(row.text)) is not None:
            memory[exchanged[1]] = exchanged[2]
        elif (loaded := LOADED.match(row.text)) is not None:
            own = any(store.where == loaded[2] for store in pending.get(row.context, []))
            if not own and memory.get(loaded[2], loaded[3]) != loaded[3]:
                found[row.context, loaded[1]] = None
    return list(found)
