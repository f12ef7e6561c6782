# SPDX-License-Identifier: Apache-2.0
"""The memory models that answer the call-outs of pvbus.shm._core_explored: `sc` and `tso`.

Memory is a dictionary from location to value. `sc` executes each access where it stands. `tso` keeps a FIFO
store buffer for each context: a store goes into it, the flush of its oldest entry is a choice of the
search, loads forward from the own buffer, locked operations and full barriers wait until it is empty.
System calls on a doorbell do not drain it here, which allows more than x86 does. Stores need no scheduling
point under `tso`: their flush is one.

A location that only one context has ever touched, or that none has ever written, is no scheduling point.
That is not declared but found out: the model notes who touches what, and when a location turns out to be
shared, the search starts anew knowing it (`Footprint`). So a search that ends has never passed over a
location that two contexts could quarrel about.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, Final

from pvbus.verify.explorer.contexts import (
    BURY,
    FENCE,
    KINDS,
    LOAD,
    LOCK,
    PLACELESS,
    RECEIVE,
    RING,
    RMW,
    SPIN,
    STORE,
    TAKE,
    WAIT,
    Context,
    ContextDied,
)
from pvbus.verify.explorer.primitives import Primitives, UseAfterFree

if TYPE_CHECKING:
    from collections.abc import Iterable

MODELS: Final = ("sc", "tso")
FULL_BARRIER: Final = 0
OR, AND, EXCHANGE, ADD = range(4)
_ROOTS: Final = 64  # identities of the empty lists: a context's number
_BELL: Final = -1  # doorbells lie below zero, memory above
# observed at a step that gives no value: a context's list of observations is its whole state
_PASSED: Final = -1
_DOOR_BYTES_MAX: Final = 64  # what one door_take swallows, as in user_file.c


class WidthError(AssertionError):
    """Two accesses of different width to the same eight bytes: a mixed-size race, which no model here
    covers.
    """


class Footprint:
    """Who touches which location, gathered over all executions of a search."""

    def __init__(self) -> None:
        self.touched: dict[int, int] = {}
        self.written: set[int] = set()
        self.widths: dict[int, int] = {}
        self.shared: set[int] = set()
        self.shadowed: set[int] = set()  # memories that are allocated and freed: each access is a scheduling point
        self.grown = False  # a location became shared during this execution: its result does not count

    def note(self, key: int, bit: int, *, writes: bool) -> None:
        """Note an access; make the location shared once two contexts touch it and one of them writes."""
        granule, width = key >> 7, key & 15
        if self.widths.setdefault(granule, width) != width:
            at = key >> 4 & 0xFFFFFFFFF
            raise WidthError(f"{self.widths[granule]} and {width} bytes wide, around offset {at:#x}")
        mask = self.touched[key] = self.touched.get(key, 0) | bit
        if writes:
            self.written.add(key)
        quarrel = (mask & (mask - 1) and key in self.written) or key >> 40 in self.shadowed
        if quarrel and key not in self.shared:
            self.shared.add(key)
            self.grown = True


class Model(Primitives):
    """Answers every access of the explored core. Without a running context (preparation, checks) it
    executes at once.
    """

    def __init__(self, kind: str, dropped: Iterable[str] = ()) -> None:
        if kind not in MODELS:
            raise ValueError(f"no memory model {kind!r}: {', '.join(MODELS)}")
        self.tso = kind == "tso"
        self.dropped = frozenset(dropped)
        self.footprint = Footprint()
        self.running: Context | None = None
        self.contexts: list[Context] = []
        self.way = 0  # which of the ways of its step the running context was told to take
        self.local: dict[int, int] = {}  # locations that nobody quarrels about
        self.cells: dict[int, int] = {}  # shared locations and doorbells, in a fixed order
        self.version = 0  # grows with each change of a cell
        self.steps = 0
        # (context, what it did), when somebody wants to read it
        self.trace: list[tuple[str, str]] | None = None
        self.dropped_seen: set[str] = set()
        self._numbers: dict[Any, int] = {}
        self._names: list[str] = []
        self._bells: list[str] = []
        self._initial: dict[int, int] | None = None
        self._tree: dict[tuple[int, int], int] = {}
        self._heap: dict[int, bool] = {}  # memories of the shadow heap as preparation left them
        self._live: dict[int, bool] = {}
        super().__init__()

    # ---- preparation

    def name(self, memory: Any, name: str) -> None:
        """Give a Memory its place in locations and its name in traces."""
        self._numbers[memory] = len(self._names)
        self._names.append(name)

    def bell(self, name: str) -> int:
        """Make a doorbell: a counter of bytes; give its location."""
        self._bells.append(name)
        return _BELL - len(self._bells) + 1

    def freeze(self) -> None:
        """Keep what preparation has written as the state in which each execution begins."""
        self._initial = dict(self.local)

    def reset(self) -> None:
        """Begin an execution."""
        if self._initial is None:
            raise RuntimeError("freeze() first")
        self.local = dict(self._initial)
        self.cells = {key: self._initial.get(key, 0) for key in sorted(self.footprint.shared)}
        self.cells.update({_BELL - i: 0 for i in range(len(self._bells))})
        self.version = self.dead = self._now = self._ticked = 0
        self._live = dict(self._heap)
        for box in self._boxes.values():
            box.clear()
        self.footprint.grown = False

    # ---- what the search asks

    def enabled(self, context: Context) -> bool:
        """Whether the context can take its next step."""
        operation = context.operation
        if operation is None:
            return False
        kind = operation[0]
        if kind in (RMW, FENCE):
            return not context.buffer
        if kind in (WAIT, RECEIVE):
            return self.cells[operation[1]] > 0
        if kind == LOCK:
            return self.cells[operation[1]] == 0
        if kind == BURY:
            return bool(self.dead >> operation[1] & 1)
        return kind != SPIN or context.mark != self.version

    def state(self, contexts: list[Context]) -> tuple[Any, ...]:
        """Everything that the future depends on: what each context has observed, memory, buffers,
        doorbells.
        """
        return (
            *self.cells.values(),
            *[context.seen for context in contexts],
            *([tuple(context.buffer) for context in contexts] if self.tso else ()),
            *[context.mark is not None and context.mark != self.version for context in contexts],
            *self._live.values(),
            *[identity for box in self._boxes.values() for identity, _ in box],
            self.dead,
            self._now,
            self._ticked,
        )

    def flush(self, context: Context) -> None:
        """Let the oldest store of a context's buffer reach memory."""
        key, value, site = context.buffer.pop(0)
        self._set(key, value)
        self.steps += 1
        if self.trace is not None:
            self.trace.append((context.name, f"~ {site} {self.where(key)} := {value:#x}"))

    def where(self, key: int) -> str:
        """Name a location for a reader."""
        if key < 0:
            return self._bells[_BELL - key]
        return f"{self._names[key >> 40]}+{key >> 4 & 0xFFFFFFFFF:#x}"

    def describe(self, context: Context) -> str:
        """Say what a context is about to do."""
        if context.operation is None:
            return "finished" if context.finished else "running"
        kind, key, site = context.operation
        return f"{KINDS[kind]} {site}" + (f" ({self.where(key)})" if kind not in PLACELESS else "")

    # ---- call-outs of the C core

    def load(self, memory: Any, offset: int, width: int, order: int, site: str) -> int:
        """Answer a load."""
        key = self._numbers[memory] << 40 | offset << 4 | width
        context = self.running
        if context is None:
            return self.cells[key] if key in self.cells else self.local.get(key, 0)
        if key not in self.cells:
            return self._local(context, key, writes=False)
        self._stop(context, LOAD, key, site)
        self._check(context, key, site)
        value = self.cells[key]
        if context.buffer:
            for held, stored, _ in context.buffer:
                if held == key:
                    value = stored
        self._observe(context, value)
        if self.trace is not None:
            self.trace.append((context.name, f"{site} {self.where(key)} = {value:#x}"))
        return value

    def store(self, memory: Any, offset: int, width: int, value: int, order: int, site: str) -> None:
        """Answer a store."""
        key = self._numbers[memory] << 40 | offset << 4 | width
        context = self.running
        if context is None:
            (self.cells if key in self.cells else self.local)[key] = value
            return
        if key not in self.cells:
            self._local(context, key, writes=True)
            self.local[key] = value
            return
        if self.tso:
            self._alive(context)
            if key >> 40 in self.footprint.shadowed:
                self._stop(context, STORE, key, site)
                self._observe(context, _PASSED)
            self._check(context, key, site)
            context.buffer.append((key, value, site))
        else:
            self._stop(context, STORE, key, site)
            self._check(context, key, site)
            self._observe(context, _PASSED)
            self._set(key, value)
        if self.trace is not None:
            arrow = "<-" if self.tso else ":="
            self.trace.append((context.name, f"{site} {self.where(key)} {arrow} {value:#x}"))

    def rmw(self, memory: Any, offset: int, width: int, op: int, value: int, site: str) -> int:
        """Answer a locked read-modify-write; give the old value."""
        old = self._locked(memory, offset, width, site)
        if op == OR:
            new = old | value
        elif op == AND:
            new = old & value
        else:
            new = value if op == EXCHANGE else old + value
        self._put(memory, offset, width, new & ((1 << 8 * width) - 1), old, site)
        return old

    def cas(self, memory: Any, offset: int, width: int, expected: int, desired: int, site: str) -> int:
        """Answer a compare-exchange; give the old value."""
        old = self._locked(memory, offset, width, site)
        self._put(memory, offset, width, desired if old == expected else old, old, site)
        return old

    def fence(self, kind: int, site: str) -> None:
        """Answer a barrier; under TSO only the full one does anything."""
        context = self.running
        if context is None:
            return
        if site in self.dropped or f"{site}@{context.name}" in self.dropped:
            self.dropped_seen.update({site, f"{site}@{context.name}"} & self.dropped)
            return
        if kind == FULL_BARRIER and context.buffer:
            self._stop(context, FENCE, 0, site)
            self._observe(context, _PASSED)
        if self.trace is not None:
            self.trace.append((context.name, f"-- {('mb', 'rmb', 'wmb')[kind]} {site}"))

    def spin(self, site: str) -> None:
        """Answer a turn of a spin loop: whoever has seen nothing new since the last turn waits for a
        change.
        """
        context = self.running
        if context is None:
            raise RuntimeError(f"{site}: spinning with nobody else to run")
        self._stop(context, SPIN, 0, site)
        self._observe(context, _PASSED)
        context.mark = self.version

    # ---- doorbells

    def ring(self, bell: int, site: str) -> None:
        """Put a byte into a doorbell."""
        context = self.running
        if context is not None:
            self._stop(context, RING, bell, site)
            self._observe(context, _PASSED)
        self._set(bell, self.cells[bell] + 1)
        if context is not None and self.trace is not None:
            self.trace.append((context.name, f"* ring {self.where(bell)}"))

    def take(self, bell: int, site: str) -> int:
        """Take what lies in a doorbell, without waiting; give the number of bytes."""
        context = self.running
        if context is not None:
            self._stop(context, TAKE, bell, site)
        taken = min(self.cells[bell], _DOOR_BYTES_MAX)
        if taken:
            self._set(bell, self.cells[bell] - taken)
        if context is not None:
            self._observe(context, taken)
            if self.trace is not None:
                self.trace.append((context.name, f"* take {self.where(bell)} = {taken}"))
        return taken

    def wait(self, bell: int, site: str) -> int:
        """Wait until a byte lies in a doorbell, and leave it there."""
        context = self.running
        if context is None:
            raise RuntimeError(f"{site}: waiting with nobody else to run")
        self._stop(context, WAIT, bell, site)
        self._observe(context, _PASSED)
        if self.trace is not None:
            self.trace.append((context.name, f"* woken by {self.where(bell)}"))
        return 1

    # ---- inside

    def _alive(self, context: Context) -> None:
        if self.running is not context:
            raise ContextDied

    def _stop(self, context: Context, kind: int, key: int, site: str, ways: int = 1) -> None:
        """A scheduling point: come back when the search has chosen this context."""
        context.ways = ways
        context.pause((kind, key, site))
        if self.running is not context:
            raise ContextDied
        self.steps += 1

    def _observe(self, context: Context, value: int) -> None:
        step = (context.seen, value)
        seen = self._tree.get(step)
        if seen is None:
            seen = self._tree[step] = len(self._tree) + _ROOTS  # exact, so no two lists share an identity
        context.seen = seen

    def _shadow(self, number: int) -> None:
        """Begin to watch a memory: all of it is shared from now on."""
        if number not in self.footprint.shadowed:
            self.footprint.shadowed.add(number)
            self.footprint.shared.update(key for key in self.footprint.touched if key >> 40 == number)
            self.footprint.grown = True

    def _set_heap(self, number: int, *, live: bool) -> bool:
        was = self._live.get(number, False)
        self._live[number] = live
        self.version += 1
        return was

    def _check(self, context: Context, key: int, site: str) -> None:
        if (number := key >> 40) in self.footprint.shadowed and not self._live.get(number, False):
            raise UseAfterFree(f"{context.name} accesses {self.where(key)} ({site}), which is not allocated")

    def _local(self, context: Context, key: int, *, writes: bool) -> int:
        footprint = self.footprint
        if not footprint.touched.get(key, 0) & context.bit or (writes and key not in footprint.written):
            self._alive(context)
            footprint.note(key, context.bit, writes=writes)
        return self.local.get(key, 0)

    def _set(self, key: int, value: int) -> None:
        if self.cells[key] != value:
            self.version += 1
            self.cells[key] = value

    def _locked(self, memory: Any, offset: int, width: int, site: str) -> int:
        key = self._numbers[memory] << 40 | offset << 4 | width
        context = self.running
        if context is None:
            return self.cells[key] if key in self.cells else self.local.get(key, 0)
        if key in self.cells:
            self._stop(context, RMW, key, site)
            self._check(context, key, site)
            value = self.cells[key]
            self._observe(context, value)
            return value
        if context.buffer:
            # nobody else sees the location, but the buffer has to be empty
            self._stop(context, FENCE, 0, site)
            self._observe(context, _PASSED)
        return self._local(context, key, writes=True)

    def _put(self, memory: Any, offset: int, width: int, value: int, old: int, site: str) -> None:
        key = self._numbers[memory] << 40 | offset << 4 | width
        if key not in self.cells:
            self.local[key] = value
            return
        self._set(key, value)
        context = self.running
        if context is not None and self.trace is not None:
            self.trace.append((context.name, f"{site} {self.where(key)} {old:#x} => {value:#x}"))


class FilePort:
    """The model as an open file's page sees it: the same memory, and the two doorbells that user_file.c
    touches.
    """

    def __init__(self, model: Model, door: int, kick: int) -> None:
        self.load, self.store, self.rmw, self.cas = model.load, model.store, model.rmw, model.cas
        self.fence, self.spin = model.fence, model.spin
        self._model, self._door, self._kick = model, door, kick

    def door_take(self) -> int:
        """Take the bytes out of the file's doorbell."""
        return self._model.take(self._door, "door.take")

    def door_wait(self) -> int:
        """Block until a byte lies in the file's doorbell."""
        return self._model.wait(self._door, "door.wait")

    def kick(self) -> int:
        """Ring the hypervisor's doorbell."""
        self._model.ring(self._kick, "kick")
        return 0
