# SPDX-License-Identifier: Apache-2.0
"""When a server moves to its caller: after requests in a row that are slow, not after one that is, and not while it sleeps."""

from __future__ import annotations

from itertools import pairwise

import pytest

from pvbus.view.fuse.follow import COLD, FAR_S, IN_A_ROW, IN_VAIN_MAX, SOON, Follower

NEAR_S, AWAY_S, STALL_S = FAR_S * 0.6, FAR_S * 2.5, FAR_S * 4


class Counting(Follower):
    """A follower that notes at which request it looks where its caller is, and a session that counts for it."""

    def __init__(self) -> None:
        super().__init__(lambda: self.clock_s)
        self.clock_s = 1.0
        self.looks: list[int] = []
        self.asked = 0
        self.left = self.starts()

    def look(self, thread: int) -> None:
        self.looks.append(self.asked)

    def request(self, takes_s: float) -> None:
        """Serve one, and have so much time until the next."""
        self.asked += 1
        self.left -= 1
        if not self.left:
            self.left = self.counted(7)
        self.clock_s += takes_s

    def wakes(self) -> None:
        """Sleep before the next request."""
        self.clock_s += 1
        self.left = self.slept()


@pytest.fixture
def server() -> Counting:
    """Somebody has begun to ask."""
    return Counting()


def test_a_caller_that_is_served_quickly_is_not_looked_for(server: Counting) -> None:
    for _ in range(1000):
        server.request(NEAR_S)

    assert server.looks == []


def test_a_caller_from_afar_is_looked_for_after_two_rows_and_soon_again_if_that_has_not_helped(server: Counting) -> None:
    first = 2 * IN_A_ROW + 1
    for _ in range(first + SOON + 1):
        server.request(AWAY_S)

    assert server.looks == [first, first + SOON + 1]


def test_a_caller_that_stays_afar_is_looked_for_less_and_less(server: Counting) -> None:
    for _ in range(10_000):
        server.request(AWAY_S)

    between = [after - before for before, after in pairwise(server.looks)]
    assert between == sorted(between)
    assert between[-1] == (1 << IN_VAIN_MAX) + SOON


def test_who_was_near_for_a_while_is_followed_as_soon_as_ever(server: Counting) -> None:
    for _ in range(10_000):
        server.request(AWAY_S)
    for _ in range((1 << IN_VAIN_MAX) + IN_A_ROW * (IN_VAIN_MAX + 1)):
        server.request(NEAR_S)
    looks, asked = len(server.looks), server.asked
    for _ in range(3 * IN_A_ROW + SOON + 1):
        server.request(AWAY_S)

    first, second = server.looks[looks : looks + 2]
    assert first <= asked + 3 * IN_A_ROW
    assert second == first + SOON + 1


def test_one_request_that_met_something_else_moves_nobody(server: Counting) -> None:
    for _ in range(100):
        for _ in range(3 * IN_A_ROW):
            server.request(NEAR_S)
        server.request(STALL_S)

    assert server.looks == []


def test_behind_a_sleep_the_first_requests_are_cold_and_the_next_decide(server: Counting) -> None:
    for takes_s in (NEAR_S, AWAY_S):
        server.wakes()
        for _ in range(COLD):
            server.request(STALL_S)
        for _ in range(SOON):
            server.request(takes_s)

    server.request(NEAR_S)
    assert len(server.looks) == 1


def test_who_sleeps_between_requests_follows_nobody(server: Counting) -> None:
    for _ in range(1000):
        server.wakes()
        for _ in range(COLD + SOON - 1):
            server.request(AWAY_S)

    assert server.looks == []


def test_callers_that_take_turns_are_not_followed(server: Counting) -> None:
    for _ in range(1000):
        server.left = server.starts()
        for _ in range(IN_A_ROW):
            server.request(AWAY_S)

    assert server.looks == []
