# SPDX-License-Identifier: Apache-2.0
"""Readers of one ring against rivals, growth and RESET: the other acts between any two of the reader's accesses."""

from collections.abc import Callable, Iterator

import pytest

from pvbus.shm import _core_explored
from pvbus.shm.layout import Domain, FilePage, Irq
from pvbus.tests.shm.rig import M32, Rig

SITES = [
    "evr.take.cons", "evr.take.prod", "evr_publish", "evr_grow", "evr.take.entry", "evr_room", "evr.door.look",
    "evr.door.lower", "evr_wake", "evr.state.cons", "evr.state.prod",
]


@pytest.fixture
def rig() -> Iterator[Rig]:
    made = Rig(_core_explored)
    made.open(0)
    made.attach(0, 0)
    yield made
    made.close()


def event(rig: Rig, port: int) -> None:
    rig.set_irq(port, rig.irq(port) & ~M32 | 1 | Irq.ENABLED)
    rig.set_bit(0, Domain.EVTCHN_MASK, port, on=False)
    rig.set_bit(0, Domain.vcpu(0, 0), port)
    rig.path.set_pending(0, port)
    for slot in (rig.path.upcall(0, 0, 256) or (0, []))[1]:
        assert slot == 0
        rig.world.bytes_in_the_door += 1


def read_all(rig: Rig) -> list[int]:
    """Read until there is nothing left."""
    reader, got = rig.user(0, 0), []
    for _ in range(300):
        try:
            got += reader.read_ports(16)
        except BlockingIOError:     # EAGAIN; any other error fails the test
            return got
    raise AssertionError("the ring never empties")


def first_read(rig: Rig, count: int) -> list[int]:
    try:
        ports: list[int] = rig.user(0, 0).read_ports(count)
    except BlockingIOError:
        return []
    return ports


@pytest.mark.checklist("A12.9", "A4.3", "A4.5", "A4.7")
@pytest.mark.parametrize("site", SITES)
@pytest.mark.parametrize("cons", [0, 60, M32 - 3])
def test_two_readers_share_every_entry_and_no_entry_twice(rig: Rig, site: str, cons: int) -> None:
    rig.place(0, cons, list(range(1, 65)))
    theirs: list[int] = []
    came: list[int] = []

    def rival() -> None:
        came.extend(range(101, 111))
        theirs.extend(rig.read(0))
        for port in range(101, 111):
            event(rig, port)

    rig.world.before[site] = rival
    mine = first_read(rig, 1024)
    mine += read_all(rig)

    assert sorted(mine + theirs) == [*range(1, 65), *came]


@pytest.mark.checklist("A6.4", "A6.5", "A6.6", "E3")
@pytest.mark.parametrize("site", SITES)
@pytest.mark.parametrize("cons", [0, 36, 64, 100, 127, M32 - 20])
def test_a_reader_beside_a_growth_gets_every_entry_once_and_in_order(rig: Rig, site: str, cons: int) -> None:
    rig.place(0, cons, list(range(1, 65)))
    grown: list[int] = []

    def grow_and_go_on() -> None:
        grown.append(rig.path.grow(0))
        for port in range(101, 165):
            event(rig, port)

    rig.world.before[site] = grow_and_go_on
    got = first_read(rig, 1024)
    got += read_all(rig)

    assert got == [*range(1, 65), *(range(101, 165) if grown else [])]


@pytest.mark.checklist("A9.7", "E4")
@pytest.mark.parametrize("site", SITES)
@pytest.mark.parametrize("after", [[], [200, 201]])
def test_a_reader_from_before_a_reset_takes_nothing_of_the_new_epoch_twice(
    rig: Rig, site: str, after: list[int]
) -> None:
    rig.place(0, 5, [1, 2, 3])
    done: list[bool] = []

    def reset() -> None:
        done.append(True)
        rig.path.reset(0)
        for port in after:
            event(rig, port)

    rig.world.before[site] = reset
    got = first_read(rig, 1024)
    got += read_all(rig)

    assert got in ([1, 2, 3, *(after if done else [])], after if done else [1, 2, 3])


@pytest.mark.checklist("A3.5", "E1")
@pytest.mark.parametrize("site", SITES)
@pytest.mark.parametrize("before", [[], [1], [1, 2]])
def test_a_reader_that_goes_to_sleep_is_woken_by_an_event_at_any_time(
    rig: Rig, site: str, before: list[int]
) -> None:
    for port in before:
        event(rig, port)
    rig.world.before[site] = lambda: event(rig, 50)
    first_read(rig, 1024)
    rig.world.before.clear()

    # What is unread has a byte in the doorbell, or the machine was asked to send one.
    if rig.unread(0):
        rearmed = rig.path.drain(64)
        assert rig.world.bytes_in_the_door or (rearmed is not None and rearmed[2] == [0])


def overtaken(rig: Rig, act: Callable[[], None], turns: int) -> None:
    """Act before each of the reader's next claims."""
    def again() -> None:
        nonlocal turns
        turns -= 1
        act()
        if turns:
            rig.world.before["evr_room"] = again

    rig.world.before["evr_room"] = again


def test_a_reader_that_is_overtaken_many_times_gets_something_in_the_end(rig: Rig) -> None:
    rig.place(0, 0, [1])

    def rival() -> None:
        rig.read(0)
        event(rig, 7)

    overtaken(rig, rival, 20)

    assert rig.user(0, 0).read_ports(8) == [7]


def test_a_user_alone_with_a_foreign_epoch_hears_an_error_and_not_silence(rig: Rig) -> None:
    rig.place(0, 0, [1])
    rig.pages[0].store64(FilePage.CONS, 3 << 34)
    spins = 0

    def count() -> None:
        nonlocal spins
        spins += 1
        if spins < 50:
            rig.world.before["evr.take.reset"] = count
        else:       # the reset that it waits for ends after all
            rig.pages[0].store64(FilePage.CONS, 0)

    rig.world.before["evr.take.reset"] = count

    assert rig.user(0, 0).read_ports(8) == [1]
