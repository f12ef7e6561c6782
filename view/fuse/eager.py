# SPDX-License-Identifier: Apache-2.0
"""How a server waits for its next request: awake for a moment, and then asleep.

A core that falls asleep takes 10 to 40 µs to come back, and in a round trip between two callers one does at every hand-over.
Staying awake pays only while callers come soon: who has found nothing lately sleeps at once, and tries again now and then.
"""

from __future__ import annotations

import os
import time
from typing import TYPE_CHECKING

from pvbus.view.fuse.session import GIVEN_WAY_S_MAX

if TYPE_CHECKING:
    import select

LOOKS = 40  # some 50 µs
SCORE_MAX = 16
PROBE = 16  # sleeps from one try to the next while it does not pay


class Eager:
    """Waits in an epoll."""

    def __init__(self, epoll: select.epoll, events_max: int) -> None:
        self._poll, self._events_max = epoll.poll, events_max
        self._score = self._probe = 0
        self.has_slept = False
        """Set before each sleep."""

    def wait(self, timeout_s: float | None) -> list[tuple[int, int]]:
        """Wait for events, for at most so long and a moment; None is for ever."""
        if not self._score:
            self._probe = (self._probe + 1) % PROBE
        if self._score or not self._probe:
            begin_s = time.monotonic()
            for _ in range(LOOKS):
                os.sched_yield()  # who is to ask us may wait for this very core
                if ready := self._poll(0, self._events_max):
                    self._score = min(self._score + 1, SCORE_MAX)
                    return ready
                if time.monotonic() - begin_s > GIVEN_WAY_S_MAX:  # others have a turn, each time: a sleeper is back sooner
                    self._score = 0
                    break
            self._score -= self._score > 0
        self.has_slept = True
        return self._poll(timeout_s, self._events_max)
