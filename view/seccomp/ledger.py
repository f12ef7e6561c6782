# SPDX-License-Identifier: Apache-2.0
"""Which calls have been taken up and not yet answered: for who comes after a front end that was killed in the middle of one.

The kernel numbers the calls of a listener one after the other, and hands each over once. The page is shared with the stand-in
(view/run/seccomp.py). It is written when a call has been taken up, and again when it has been answered: so at most one call is
unanswered that is not in it, the one after the last.
"""

from __future__ import annotations

import mmap
import struct

PAGE_BYTES = 4096
_ROW = struct.Struct("=QQQ")  # whose filter it is; the oldest unanswered call, or the next; the last
_NUMBERS = struct.Struct("=QQ")
ROWS = PAGE_BYTES // _ROW.size


class Ledger:
    """The unanswered calls of one listener, by their ids. `owner` is the process that has installed the filter."""

    def __init__(self, page: mmap.mmap, row: int, owner: int) -> None:
        self._page, self._at = page, row * _ROW.size + 8
        self._open: dict[int, None] = {}
        self._last = 0
        _ROW.pack_into(page, row * _ROW.size, owner, 0, 0)

    def taken(self, call: int) -> None:
        """Note that a call has been taken up."""
        self._last = call
        self._open[call] = None
        _NUMBERS.pack_into(self._page, self._at, next(iter(self._open)), call)

    def answered(self, call: int) -> None:
        """Note that it has been answered."""
        self._open.pop(call, None)
        _NUMBERS.pack_into(self._page, self._at, next(iter(self._open), self._last + 1), self._last)


def unanswered(page: mmap.mmap, owner: int) -> range | None:
    """Give ids among which those of all unanswered calls are; None if there may be one whose id nobody knows."""
    for at in range(0, ROWS * _ROW.size, _ROW.size):
        found, oldest, last = _ROW.unpack_from(page, at)
        if found == owner:
            return range(oldest, last + 2) if last else None
    return range(0)
