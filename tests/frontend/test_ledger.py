# SPDX-License-Identifier: Apache-2.0
"""What the stand-in of a seccomp front end finds in the page that the front end has left."""

from __future__ import annotations

import pytest

from pvbus.view.seccomp.ledger import GAP_MAX, ROWS, Ledger, new_page, unanswered

FIRST = 2**40  # the kernel begins anywhere


class Killed(Exception):
    """The front end has got no further."""


class Page(list[int]):
    """Words after so many stores of which the front end is killed."""

    def __init__(self) -> None:
        super().__init__([0] * ROWS * 3)
        self.stores_left = 1 << 30

    def __setitem__(self, index: int, word: int) -> None:  # type: ignore[override]
        if not self.stores_left:
            raise Killed
        self.stores_left -= 1
        super().__setitem__(index, word)


def test_of_the_calls_taken_up_the_oldest_unanswered_and_all_behind_it_are_found() -> None:
    page = new_page()
    Ledger(page, ROWS - 1, 17).taken(5)
    ledger = Ledger(page, 1, 16)
    for call in range(FIRST, FIRST + 5):
        ledger.taken(call)
    for call in (FIRST + 3, FIRST, FIRST + 1):
        ledger.answered(call)
    under_way = unanswered(page, 16)
    for call in (FIRST + 2, FIRST + 4):
        ledger.answered(call)

    assert under_way == range(FIRST + 2, FIRST + 5 + GAP_MAX)  # and the one that may have been taken up and not noted
    assert unanswered(page, 16) == range(FIRST + 5, FIRST + 5 + GAP_MAX)
    assert unanswered(page, 17) == range(5, 6 + GAP_MAX)


def test_a_listener_that_was_never_served_has_no_call_and_one_that_was_may_have_one_that_nobody_knows() -> None:
    page = new_page()
    Ledger(page, 0, 16)

    assert unanswered(page, 16) is None
    assert unanswered(page, 17) == range(0)


def test_wherever_the_front_end_is_killed_each_call_that_it_has_noted_is_found() -> None:
    steps = [("taken", 1), ("taken", 4), ("answered", 1), ("answered", 4), ("taken", 20), ("taken", 21), ("answered", 20)]
    deaths = 0
    for stores in range(1, 20):
        page = Page()
        ledger = Ledger(page, 1, 16)
        page.stores_left = stores
        noted: set[int] = set()
        try:
            for step, number in steps:
                call = FIRST + number
                noted.discard(call)  # whose answer has been given: it may be found, or not
                getattr(ledger, step)(call)
                noted |= {call} if step == "taken" else set()
        except Killed:
            deaths += 1
        found = unanswered(page, 16)

        assert found is not None
        assert noted <= set(found)
        assert len(found) <= GAP_MAX + 21

    assert deaths == 10


def test_a_row_that_is_given_to_another_is_nobody_s_until_it_is_empty() -> None:
    for stores in range(4):
        page = Page()
        Ledger(page, 0, 16).taken(FIRST)
        page.stores_left = stores
        with pytest.raises(Killed):
            Ledger(page, 0, 17)

        assert unanswered(page, 17) == range(0)
