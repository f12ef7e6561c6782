# SPDX-License-Identifier: Apache-2.0
"""What the stand-in of a seccomp front end finds in the page that the front end has left."""

from __future__ import annotations

import mmap

from pvbus.view.seccomp.ledger import PAGE_BYTES, ROWS, Ledger, unanswered

FIRST = 2**40  # the kernel begins anywhere


def test_of_the_calls_taken_up_the_oldest_unanswered_and_all_behind_it_are_found() -> None:
    with mmap.mmap(-1, PAGE_BYTES) as page:
        Ledger(page, ROWS - 1, 17).taken(5)
        ledger = Ledger(page, 1, 16)
        for call in range(FIRST, FIRST + 5):
            ledger.taken(call)
        for call in (FIRST + 3, FIRST, FIRST + 1):
            ledger.answered(call)
        under_way = unanswered(page, 16)
        for call in (FIRST + 2, FIRST + 4):
            ledger.answered(call)

        assert under_way == range(FIRST + 2, FIRST + 6)  # and the one that may have been taken up and not noted
        assert unanswered(page, 16) == range(FIRST + 5, FIRST + 6)
        assert unanswered(page, 17) == range(5, 7)


def test_a_listener_that_was_never_served_has_no_call_and_one_that_was_may_have_one_that_nobody_knows() -> None:
    with mmap.mmap(-1, PAGE_BYTES) as page:
        Ledger(page, 0, 16)

        assert unanswered(page, 16) is None
        assert unanswered(page, 17) == range(0)
