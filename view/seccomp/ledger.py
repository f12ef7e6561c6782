# SPDX-License-Identifier: Apache-2.0
"""Which calls have been taken up and not yet answered: for who comes after a front end that was killed in the middle of one.

The kernel numbers the calls of a listener one after the other, and hands each over once; a caller that is killed or interrupted
before that leaves a gap. The page is shared with the stand-in (view/run/seccomp.py). It is written when a call has been taken up,
and again when it has been answered: so at most one call is unanswered that is not in it, one of the next after the last. Each
word is written by one store, and between any two of them the page holds: the front end may be killed there. No barrier is needed:
the stand-in reads once, when the kernel has told it of the front end's end.
"""

from __future__ import annotations

import mmap
from typing import Protocol

GAP_MAX = 64  # calls that may have ended by themselves between one that was taken up and the next
_WORDS = 3  # of a row: whose filter it is; the oldest unanswered call, or the next; the last
ROWS = mmap.PAGESIZE // 8 // _WORDS


class Page(Protocol):
    """Words that are stored whole."""

    def __getitem__(self, index: int, /) -> int: ...
    def __setitem__(self, index: int, word: int, /) -> None: ...


def new_page() -> Page:
    """Make a page that is shared with children."""
    return memoryview(mmap.mmap(-1, mmap.PAGESIZE)).cast("Q")


class Ledger:
    """The unanswered calls of one listener, by their ids. `owner` is the process that has installed the filter."""

    def __init__(self, page: Page, row: int, owner: int) -> None:
        self._page = page
        at = row * _WORDS
        self._oldest_at, self._last_at = at + 1, at + 2
        self._open: dict[int, None] = {}
        self._last = 0
        page[at] = 0  # it may have been another's
        page[self._last_at] = page[self._oldest_at] = 0
        page[at] = owner

    def taken(self, call: int) -> None:
        """Note that a call has been taken up."""
        self._last = call
        self._open[call] = None
        self._page[self._last_at] = call  # first: what is between the oldest and the last is looked at
        self._page[self._oldest_at] = next(iter(self._open))

    def answered(self, call: int) -> None:
        """Note that it has been answered."""
        self._open.pop(call, None)
        self._page[self._oldest_at] = next(iter(self._open), self._last + 1)


def unanswered(page: Page, owner: int) -> range | None:
    """Give ids among which those of all unanswered calls are; None if there may be one whose id nobody knows."""
    for at in range(0, ROWS * _WORDS, _WORDS):
        if page[at] == owner:
            oldest, last = page[at + 1], page[at + 2]
            return range(oldest or last, last + 1 + GAP_MAX) if last else None
    return range(0)
