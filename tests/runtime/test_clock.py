# SPDX-License-Identifier: Apache-2.0
"""Clocks and timers."""

from __future__ import annotations

import time

import pytest

from pvbus.actors.runtime.clock import ManualClock, MonotonicClock, SharedClock, Timers


class Word:
    value = 0

    def load64(self, offset: int, /) -> int:
        assert offset == 24
        return self.value


def test_a_shared_clock_is_the_kernels_plus_a_word() -> None:
    word = Word()
    clock = SharedClock(word, 24)
    before = time.monotonic_ns()
    assert before <= clock.now_ns() <= MonotonicClock().now_ns()
    word.value = 5_000_000_000
    assert clock.now_ns() >= before + 5_000_000_000


def test_a_manual_clock_moves_when_told_and_never_back() -> None:
    clock = ManualClock(10)
    clock.advance(1.5, ns=5)
    assert clock.now_ns() == 1_500_000_015
    with pytest.raises(ValueError, match="run back"):
        clock.advance(-1)


def test_timers_are_due_in_their_order_and_a_cancelled_one_never() -> None:
    timers = Timers()
    called: list[str] = []
    timers.add(20, lambda: called.append("late"))
    first = timers.add(10, lambda: called.append("never"))
    timers.add(10, lambda: called.append("a"))
    timers.add(10, lambda: called.append("b"))
    first.cancel()
    first.cancel()
    assert len(timers) == 3
    while callback := timers.pop_due(15):
        callback()
    assert called == ["a", "b"]
    assert timers.next_ns() == 20


def test_cancelled_timers_do_not_pile_up() -> None:
    timers = Timers()
    for _ in range(10_000):
        timers.add(10, lambda: None).cancel()
    assert len(timers) == 0
    assert len(timers._heap) < 200
    assert timers.next_ns() is None
