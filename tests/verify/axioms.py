# SPDX-License-Identifier: Apache-2.0
"""The three memory models once more, as axioms: which outcomes a program of single accesses can have.

Shares nothing with the engine, which executes: here every way in which reads could get their values and stores could follow
each other is written down, and thrown away if it goes round in a circle (Alglave, Maranget, Tautschnig 2014; x86-TSO as there;
ARMv8 as in Pulte and others 2018). `arm` differs from ARMv8 as the engine does. It leaves out: a store that comes before what
its thread has read (load buffering), or before the store of a locked operation that stands in front of it. It allows more: an
acquire does not wait for a release before it (as LDAPR), and dependencies order no loads.

An operation is a letter and a location, as in test_litmus.py.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from dataclasses import dataclass

Outcome = tuple[tuple[int, ...], tuple[int, ...]]  # what was read, thread by thread; what is left in each location
WRITES = {"w": 1, "W": 1, "v": 2, "V": 2, "x": 1, "c": 1}  # the value
READS = "rRxc"
BARRIERS = "msl"


@dataclass(frozen=True)
class Event:
    """A read or a write; those of a locked operation have the same place."""

    thread: int
    place: int
    op: str
    at: str
    is_write: bool

    @property
    def acquires(self) -> bool:
        return not self.is_write and self.op in "Rxc"

    @property
    def releases(self) -> bool:
        return self.is_write and self.op in "WVxc"

    @property
    def is_locked(self) -> bool:
        return self.op in "xc"


def outcomes(text: str, model: str, locations: str) -> set[Outcome]:
    """Give every outcome that a program can have under a model."""
    threads = [thread.split() for thread in text.split("|")]
    tries = [(t, i) for t, thread in enumerate(threads) for i, op in enumerate(thread) if op[0] == "c"]
    found: set[Outcome] = set()
    for done in itertools.product((True, False), repeat=len(tries)):
        misses = {place for place, does in zip(tries, done, strict=True) if not does}
        found |= _of_events(threads, _events(threads, misses), misses, model, locations)
    return found


def _events(threads: list[list[str]], misses: set[tuple[int, int]]) -> list[Event]:
    events = []
    for t, thread in enumerate(threads):
        for i, op in enumerate(thread):
            if op[0] in READS:
                events.append(Event(t, i, op[0], op[1], False))
            if op[0] in WRITES and (t, i) not in misses:
                events.append(Event(t, i, op[0], op[1], True))
    return events


def _of_events(
    threads: list[list[str]], events: list[Event], misses: set[tuple[int, int]], model: str, locations: str
) -> set[Outcome]:
    reads = [event for event in events if not event.is_write]
    writes = {at: [event for event in events if event.is_write and event.at == at] for at in locations}
    kept = {(a, b) for a in events for b in events if _is_before(a, b) and _is_kept(threads, a, b, model)}
    along = {(a, b) for a in events for b in events if _is_before(a, b) and a.at == b.at}
    found: set[Outcome] = set()
    for orders in itertools.product(*(itertools.permutations(writes[at]) for at in locations)):
        order: dict[str, tuple[Event | None, ...]] = {at: (None, *o) for at, o in zip(locations, orders, strict=True)}
        ends = tuple(_value(order[at][-1]) for at in locations)
        for sources in itertools.product(*(order[read.at] for read in reads)):
            values = tuple(_value(source) for source in sources)
            if (values, ends) in found:
                continue
            source = dict(zip(reads, sources, strict=True))
            if all(_fits(source, order, read, misses) for read in reads) and _is_allowed(source, order, kept, along):
                found.add((values, ends))
    return found


def _value(write: Event | None) -> int:
    return 0 if write is None else WRITES[write.op]


def _fits(
    source: dict[Event, Event | None], order: dict[str, tuple[Event | None, ...]], read: Event, misses: set[tuple[int, int]]
) -> bool:
    """A compare-exchange of 0 saw what it needs to; a locked operation wrote directly behind what it read."""
    if read.op == "c" and (_value(source[read]) == 0) == ((read.thread, read.place) in misses):
        return False
    if not read.is_locked or (read.thread, read.place) in misses:
        return True
    own = Event(read.thread, read.place, read.op, read.at, True)
    return order[read.at].index(own) == order[read.at].index(source[read]) + 1


def _is_before(a: Event, b: Event) -> bool:
    """In the order of the program; of a locked operation the read first."""
    return a.thread == b.thread and (a.place, a.is_write) < (b.place, b.is_write)


def _is_kept(threads: list[list[str]], a: Event, b: Event, model: str) -> bool:
    """Whether memory keeps the order of two events of one thread, whatever they touch."""
    between = {op[0] for op in threads[a.thread][a.place + 1 : b.place] if op[0] in BARRIERS}
    if model == "sc" or "m" in between:
        return True
    if model == "tso":
        locked = any(op[0] in "xc" for op in threads[a.thread][a.place : b.place + 1])
        return not a.is_write or b.is_write or (locked and a.place != b.place)
    if not a.is_write:
        return b.is_write or a.acquires or "l" in between
    return b.releases or (b.is_write and (a.is_locked or a.at == b.at or "s" in between))


def _is_allowed(
    source: dict[Event, Event | None], order: dict[str, tuple[Event | None, ...]], kept: set[tuple[Event, Event]],
    along: set[tuple[Event, Event]],
) -> bool:  # fmt: skip
    """No location goes back in time for anybody, and what is kept, and seen from outside, goes round in no circle."""
    seen: set[tuple[Event, Event]] = set()
    for read, write in source.items():
        line = order[read.at]
        seen |= {(read, later) for later in line[line.index(write) + 1 :] if later is not None and later != _own(read)}
        if write is not None:
            seen.add((write, read))
    for line in order.values():
        seen |= {(a, b) for a, b in itertools.combinations(line, 2) if a is not None and b is not None}
    if _has_circle(along | seen):
        return False
    outside = {(a, b) for a, b in seen if a.thread != b.thread}
    forwarded = {(a, b) for a, b in seen if a.thread == b.thread and a.is_write and a.is_locked and b.acquires}
    return not _has_circle(kept | outside | forwarded)


def _own(read: Event) -> Event | None:
    return Event(read.thread, read.place, read.op, read.at, True) if read.is_locked else None


def _has_circle(edges: set[tuple[Event, Event]]) -> bool:
    after: dict[Event, set[Event]] = {}
    for a, b in edges:
        after.setdefault(a, set()).add(b)
    done: set[Event] = set()

    def walk(event: Event, path: set[Event]) -> bool:
        if event in path:
            return True
        if event in done:
            return False
        circle = any(walk(other, path | {event}) for other in after.get(event, ()))
        done.add(event)
        return circle

    return any(walk(event, set()) for event in after)


def programs(seed: int, threads: int, length: int, locations: str, number: int) -> Iterator[str]:
    """Draw programs."""
    import random

    draw = random.Random(seed)
    letters = "wwwvrrrrWVRRxcmsl"
    for _ in range(number):
        yield " | ".join(
            " ".join(
                letter + (draw.choice(locations) if letter not in BARRIERS else "") for letter in draw.choices(letters, k=length)
            )
            for _ in range(threads)
        )
