# SPDX-License-Identifier: Apache-2.0
"""How many requests of one user may wait in the supervisor at a time: what waits takes memory here, and asks others again."""

from __future__ import annotations

import errno
import weakref
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from pvbus.actors.runtime.process import Peer


class Quota:
    """At most `most` of one user; whoever hangs up is forgotten."""

    def __init__(self, most: int, what: str) -> None:
        self._most, self._what = most, what
        self._waiting: weakref.WeakKeyDictionary[Peer, int] = weakref.WeakKeyDictionary()

    def take(self, peer: Peer) -> None:
        """Count a request that is about to wait. EAGAIN."""
        waiting = self._waiting.get(peer, 0)
        if waiting >= self._most:
            raise OSError(errno.EAGAIN, f"{waiting} {self._what} of this user wait")
        self._waiting[peer] = waiting + 1

    def give(self, peer: Peer) -> None:
        """It has been answered."""
        left = self._waiting.pop(peer, 0) - 1
        if left > 0:
            self._waiting[peer] = left
