# SPDX-License-Identifier: Apache-2.0
"""Supervision as pure logic: orders of start and stop, restarts and their bound."""

from __future__ import annotations

import pytest

from pvbus.actors.runtime.supervision import (
    ChildSpec,
    ChildTable,
    State,
    Verdict,
    plan_start,
    plan_stop,
    restart_allowed,
)

S = 1_000_000_000


def spec(name: str, **more: object) -> ChildSpec:
    return ChildSpec(name, "room:Actor", **more)  # type: ignore[arg-type]


def test_restarts_are_counted_within_the_period_only() -> None:
    assert restart_allowed([], 0, 1, 5.0)
    assert not restart_allowed([], 0, 0, 5.0)
    assert not restart_allowed([6 * S, 7 * S], 10 * S, 2, 5.0)
    assert restart_allowed([5 * S, 7 * S], 10 * S, 2, 5.0)
    assert restart_allowed([1 * S] * 100, 10 * S, 1, 5.0)


def test_children_start_left_to_right_and_stop_right_to_left() -> None:
    specs = [spec("a"), spec("b"), spec("c")]
    assert [child.name for child in plan_start(specs)] == ["a", "b", "c"]
    assert plan_stop(["a", "b", "c"]) == ("c", "b", "a")
    with pytest.raises(ValueError, match="two children are named a"):
        plan_start([*specs, spec("a")])


def test_the_next_child_starts_when_the_one_left_of_it_is_up() -> None:
    table = ChildTable([spec("a"), spec("b")])
    first = table.next_to_start()
    assert first is table["a"]
    table.starting("a")
    table.forked("a", 11)
    assert table.next_to_start() is None
    table.started("a")
    assert table.next_to_start() is table["b"]
    table.starting("b")
    table.forked("b", 12)
    table.started("b")
    assert table.next_to_start() is None
    assert table.by_pid(12) is table["b"]
    assert table.by_pid(0) is None


def test_the_next_child_stops_when_the_one_right_of_it_is_down() -> None:
    table = ChildTable([spec("a"), spec("b")])
    for name in ("a", "b"):
        table.starting(name)
        table.started(name)
    assert table.next_to_stop() is table["b"]
    table.stopping("b")
    assert table.next_to_stop() is None
    assert table.exited("b", 0) is Verdict.FORGET
    assert table.next_to_stop() is table["a"]
    table.stopping("a")
    table.exited("a", 0)
    assert table.next_to_stop() is None


def test_a_dead_child_comes_back_until_it_dies_too_often() -> None:
    table = ChildTable([spec("a")], intensity=2, period_s=5.0)
    for now_s in (1, 2, 9):
        assert table.exited("a", now_s * S) is Verdict.RESTART
        assert table["a"].state is State.DOWN
    assert table["a"].restarts == 3
    assert table.exited("a", 10 * S) is Verdict.RESTART
    assert table.exited("a", 11 * S) is Verdict.GIVE_UP


def test_a_temporary_child_is_forgotten() -> None:
    table = ChildTable([spec("a")])
    table.add(spec("file/0.1", restart="temporary"))
    with pytest.raises(ValueError, match=r"file/0\.1"):
        table.add(spec("file/0.1"))
    assert table.exited("file/0.1", 0) is Verdict.FORGET
    assert "file/0.1" not in table


def test_a_child_that_was_never_forked_is_down_and_a_temporary_one_forgotten() -> None:
    table = ChildTable([spec("a")])
    table.add(spec("file/0.1", restart="temporary"))
    for name in ("a", "file/0.1"):
        table.starting(name)
        table.not_forked(name)
    assert [(child.spec.name, child.state) for child in table] == [("a", State.DOWN)]
    assert table.next_to_stop() is None


def test_a_spare_child_becomes_another_one_and_holds_nobody_up() -> None:
    table = ChildTable([spec("a")])
    table.add(spec("file/spare.0", restart="temporary"))
    table.starting("file/spare.0")
    table.forked("file/spare.0", 7)
    table.spare("file/spare.0")
    assert table.next_to_start() is table["a"]
    table.add(spec("b"))
    child = table.adopt("file/spare.0", spec("file/0.1", restart="temporary"))
    assert "file/spare.0" not in table
    assert table.by_pid(7) is child
    assert child.state is State.STARTING
    assert [one.spec.name for one in table] == ["a", "b", "file/0.1"]
    assert table.next_to_stop() is child


def test_a_child_that_is_being_stopped_stays_so_whatever_is_heard_of_its_start() -> None:
    table = ChildTable()
    table.add(spec("file/spare.0", restart="temporary"))
    table.starting("file/spare.0")
    table.stopping("file/spare.0")
    table.forked("file/spare.0", 7)
    table.spare("file/spare.0")
    assert table["file/spare.0"].state is State.STOPPING
    table.started("file/spare.0")
    assert table["file/spare.0"].state is State.STOPPING
    assert table.exited("file/spare.0", 0) is Verdict.FORGET
