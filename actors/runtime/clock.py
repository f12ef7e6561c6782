# SPDX-License-Identifier: Apache-2.0
"""Time, asked for from one object, so that a five-second time-out costs a test nothing.

A machine's processes share one clock: the kernel's monotonic one plus a word in shared memory that tests
advance (and only they write). Nothing that sleeps may be added here; the inbox does the waiting.
"""

from __future__ import annotations

import heapq
import itertools
import time
from typing import TYPE_CHECKING, Protocol

if TYPE_CHECKING:
    from collections.abc import Callable

NS_PER_S = 1_000_000_000

SLEEP_MS_MAX = 20
"""How long an inbox with a timer sleeps before it asks a clock that can jump again: a jump rings nobody's
doorbell.
"""


class Clock(Protocol):
    """Tell the machine's time. A clock that can jump also has `sleep_ms_max`."""

    def now_ns(self) -> int:
        """Return nanoseconds since some fixed moment, never fewer than before."""


class MonotonicClock:
    """Tell the kernel's CLOCK_MONOTONIC."""

    def now_ns(self) -> int:
        """Return nanoseconds since boot."""
        return time.monotonic_ns()


class Loads64(Protocol):
    """Be what a shared clock reads its word from: `pvbus.shm.memory.Memory`, or a test's stand-in."""

    def load64(self, offset: int, /) -> int:
        """Return the 64-bit word at `offset`."""


class SharedClock:
    """Tell CLOCK_MONOTONIC plus the nanoseconds in a word of a machine page."""

    sleep_ms_max = SLEEP_MS_MAX

    def __init__(self, memory: Loads64, offset: int) -> None:
        self._memory = memory
        self._offset = offset

    def now_ns(self) -> int:
        """Return the machine's time in nanoseconds."""
        return time.monotonic_ns() + self._memory.load64(self._offset)


class ManualClock:
    """Stand still until `advance` is called: for tests inside one process."""

    sleep_ms_max = SLEEP_MS_MAX

    def __init__(self, now_ns: int = 0) -> None:
        self._now_ns = now_ns

    def now_ns(self) -> int:
        """Return what the test has set."""
        return self._now_ns

    def advance(self, seconds: float = 0.0, *, ns: int = 0) -> None:
        """Let that much time pass at once; ValueError for a step back."""
        step_ns = round(seconds * NS_PER_S) + ns
        if step_ns < 0:
            text = f"time does not run back: {step_ns} ns"
            raise ValueError(text)
        self._now_ns += step_ns


class Timer:
    """Stand for one callback in a `Timers`; `cancel` takes it out."""

    __slots__ = ("_owner", "callback", "time_ns")

    def __init__(self, owner: Timers, time_ns: int, callback: Callable[[], None]) -> None:
        self._owner = owner
        self.time_ns = time_ns
        self.callback: Callable[[], None] | None = callback

    def cancel(self) -> None:
        """Never call it; nothing happens if it was called or cancelled already."""
        if self.callback is not None:
            self.callback = None
            self._owner.cancelled()


class Timers:
    """Keep callbacks in the order of their times; equal times in the order of their adding. Pure: it asks no
    clock.
    """

    def __init__(self) -> None:
        self._heap: list[tuple[int, int, Timer]] = []
        self._order = itertools.count()
        self._dead = 0

    def __len__(self) -> int:
        return len(self._heap) - self._dead

    def add(self, time_ns: int, callback: Callable[[], None]) -> Timer:
        """Have `callback` be due from `time_ns` on."""
        timer = Timer(self, time_ns, callback)
        heapq.heappush(self._heap, (time_ns, next(self._order), timer))
        return timer

    def cancelled(self) -> None:
        """Count a cancelled timer; sweep when half of many are dead: each answered call leaves one."""
        self._dead += 1
        if self._dead > 64 and self._dead * 2 > len(self._heap):
            self._heap = [entry for entry in self._heap if entry[2].callback is not None]
            heapq.heapify(self._heap)
            self._dead = 0

    def next_ns(self) -> int | None:
        """Return when the next one is due, None if there is none."""
        while self._heap and self._heap[0][2].callback is None:
            heapq.heappop(self._heap)
            self._dead -= 1
        return self._heap[0][0] if self._heap else None

    def pop_due(self, now_ns: int) -> Callable[[], None] | None:
        """Take out and return the first callback that is due, None if there is none."""
        next_ns = self.next_ns()
        if next_ns is None or next_ns > now_ns:
            return None
        timer = heapq.heappop(self._heap)[2]
        callback, timer.callback = timer.callback, None
        return callback
