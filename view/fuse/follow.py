# SPDX-License-Identifier: Apache-2.0
"""Stay near who asks: a request and its answer are two wake-ups, which cost several times as much from one processor to another.

A server that also wakes others is not moved by the scheduler to the one caller that keeps it busy. So it moves itself, when the
same thread has asked many times in a row, slowly and without a sleep between, and stays free to be moved on. Slowly: a server
that is awake and has a processor for itself is as fast from afar, and would only move to where somebody else is.
"""

from __future__ import annotations

import ctypes
import os
import time
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Callable

IN_A_ROW = 5  # requests; twice, since one of them may have met something else
COLD, SOON = 8, 3  # behind a sleep these are not counted, and then these are, once
IN_VAIN_MAX = 8  # a caller that is moved away each time: looks from the third on that come after 8, 16 … 256 requests
FAR_S = 28e-6  # a request with what its caller does until the next: some 18 µs from near, and 35 to 80 from afar

_all = os.sched_getaffinity(0)
our_processor = ctypes.CDLL(None).sched_getcpu


class Follower:
    """Follows the thread that asks a server all the time."""

    def __init__(self, now_s: Callable[[], float] = time.monotonic) -> None:
        self._now_s = now_s
        self._thread, self._stat = 0, -1
        self._begin_s = 0.0  # of those that are being counted; 0 = the first is still to come
        self._count = IN_A_ROW
        self._suspects = False
        self._in_vain = 0

    # Each gives how many requests there are until `counted` is to be called.

    def starts(self) -> int:
        """Somebody else asks."""
        self._begin_s, self._count, self._suspects = 0.0, IN_A_ROW, False
        return 1

    def slept(self) -> int:
        """Nobody has asked for a while, behind which the scheduler may have put us elsewhere."""
        self._begin_s, self._count, self._suspects = 0.0, SOON, True
        return COLD + 1

    def counted(self, thread: int) -> int:
        """So many have come from this thread: go there, if they were slow."""
        now_s = self._now_s()
        if not self._begin_s:
            self._begin_s = now_s
            return self._count
        slow = now_s - self._begin_s > FAR_S * self._count
        if slow and self._suspects:
            self.look(thread)
            self._begin_s, self._count, self._in_vain = 0.0, SOON, min(self._in_vain + 1, IN_VAIN_MAX)
            return 1 if self._in_vain <= 2 else 1 << self._in_vain
        self._begin_s, self._count, self._suspects, self._in_vain = now_s, IN_A_ROW, slow, self._in_vain - (self._in_vain > 0)
        return IN_A_ROW

    def look(self, thread: int) -> None:
        """Go to the processor of a thread, if we may and are not there."""
        try:
            if thread != self._thread:
                self.leave()
                self._stat = os.open(f"/proc/{thread}/stat", os.O_RDONLY | os.O_CLOEXEC)
                self._thread = thread
            theirs = int(os.pread(self._stat, 1024, 0).rpartition(b")")[2].split(maxsplit=37)[36])
            if theirs != our_processor() and theirs in _all:
                os.sched_setaffinity(0, {theirs})
                os.sched_setaffinity(0, _all)
        except OSError:  # it has ended, or may not be looked at
            self.leave()

    def leave(self) -> None:
        """Follow nobody."""
        if self._stat >= 0:
            os.close(self._stat)
        self._thread, self._stat = 0, -1
