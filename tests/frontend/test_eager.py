# SPDX-License-Identifier: Apache-2.0
"""How a server waits for its next request: it stays awake while that pays, and only then."""

import os
import select

from pvbus.view.fuse.eager import LOOKS, PROBE, SCORE_MAX, Eager


class Counted:
    """An epoll that counts who looks, and who sleeps."""

    def __init__(self, finds_at: int = -1) -> None:
        self.finds_at, self.looks, self.sleeps = finds_at, 0, 0

    def poll(self, timeout_s: float | None, _events_max: int) -> list[tuple[int, int]]:
        if timeout_s == 0:
            self.looks += 1
            return [(7, select.EPOLLIN)] if self.looks == self.finds_at else []
        self.sleeps += 1
        return [(7, select.EPOLLIN)]


def has_slept(eager: Eager) -> bool:
    """Say whether it has, and forget it."""
    said, eager.has_slept = eager.has_slept, False
    return said


def test_who_finds_nothing_sleeps_at_once_and_tries_again_now_and_then() -> None:
    epoll = Counted()
    eager = Eager(epoll, 2)  # type: ignore[arg-type]

    for _ in range(PROBE * 4):
        assert eager.wait(None) == [(7, select.EPOLLIN)]

    assert epoll.sleeps == PROBE * 4
    assert 0 < epoll.looks <= 4 * LOOKS


def test_who_has_found_something_stays_awake_until_that_has_not_paid_for_a_while() -> None:
    epoll = Counted()
    eager = Eager(epoll, 2)  # type: ignore[arg-type]
    for _ in range(PROBE * SCORE_MAX * 2):  # each look of it that is a try finds something
        epoll.finds_at = epoll.looks + 1
        eager.wait(None)
    slept = epoll.sleeps
    has_slept(eager)
    epoll.finds_at = epoll.looks + 2
    assert eager.wait(None)
    assert epoll.sleeps == slept  # it did not come at once, and was waited for
    assert not has_slept(eager)

    epoll.finds_at = -1
    looks = epoll.looks
    for _ in range(SCORE_MAX * 2):
        eager.wait(0.5)
    assert epoll.sleeps == slept + SCORE_MAX * 2
    assert has_slept(eager)
    assert epoll.looks - looks <= (SCORE_MAX + 2) * LOOKS


def test_it_waits_in_a_real_epoll_for_no_longer_than_it_is_told() -> None:
    read_end, write_end = os.pipe()
    try:
        with select.epoll() as epoll:
            epoll.register(read_end, select.EPOLLIN)
            eager = Eager(epoll, 2)
            assert eager.wait(0.001) == []
            os.write(write_end, b"1")
            assert eager.wait(None) == [(read_end, select.EPOLLIN)]
    finally:
        os.close(read_end)
        os.close(write_end)
