# SPDX-License-Identifier: Apache-2.0
"""The event ring of an open file: room, order, wrap, growth, overflow, epochs, and what a hostile user can do to it."""

import errno
from collections.abc import Iterator
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from pvbus.shm import _core, _core_explored
from pvbus.shm.layout import Domain, File, FilePage, Irq, Machine
from pvbus.tests.shm.rig import M32, Rig

WRAPS = [0, 1, 63, 64, 100, 127, 128, M32 - 127, M32 - 63, M32 - 1, M32]


def errno_of(call: Any, *arguments: Any) -> str:
    with pytest.raises(OSError) as caught:
        call(*arguments)
    return errno.errorcode[caught.value.errno or 0]


def event(rig: Rig, port: int, slot: int = 0) -> None:
    """Let the interrupt handler run for a port."""
    rig.set_irq(port, rig.irq(port) & ~M32 | (slot + 1) | Irq.ENABLED)
    rig.set_bit(0, Domain.EVTCHN_MASK, port, on=False)
    rig.set_bit(0, Domain.vcpu(0, 0), port)
    rig.path.set_pending(0, port)
    rig.deliver()


def prod(rig: Rig, slot: int = 0) -> int:
    word: int = rig.machine.load64(Machine.file(slot, File.PROD))
    return word


def user(rig: Rig, slot: int = 0) -> Any:
    rig.attach(slot, slot)
    return rig.user(slot, slot)


@pytest.fixture(scope="module")
def shared() -> Iterator[Rig]:
    """Return a rig that examples of hypothesis share: each plants its whole state."""
    made = Rig(_core)
    made.open(0)
    yield made
    made.close()


# ------------------------------------------------------------------------------------------ room, order, wrap


@pytest.mark.checklist("A1.5", "A1.6", "A3.4", "A4.10")
@pytest.mark.parametrize("cons", WRAPS)
def test_all_slots_are_usable_at_every_position_and_come_out_in_order(rig: Rig, cons: int) -> None:
    rig.open(0)
    rig.place(0, cons, [])
    reader = user(rig)

    for port in range(1, 65):
        event(rig, port)

    assert prod(rig) & M32 == cons + 64 & M32
    assert reader.read_ports(1024) == list(range(1, 65))
    assert errno_of(reader.read, 4096) == "EAGAIN"


@pytest.mark.checklist("A3.3")
@pytest.mark.parametrize("unread", [0, 1, 64])
@pytest.mark.parametrize("door", [0, 1])
def test_the_handler_loads_each_index_once_under_the_lock(
    monkeypatch: pytest.MonkeyPatch, unread: int, door: int
) -> None:
    rig = Rig(_core_explored)
    page = rig.open(0)
    rig.place(0, 70, list(range(101, 101 + unread)))
    page.store32(FilePage.DOOR, door)
    made: list[tuple[str, bool]] = []
    monkeypatch.setattr(rig.world, "step", lambda site, *, writes=False: made.append((site, writes)))

    event(rig, 5)

    taken, given_back = (at for at, access in enumerate(made) if access == ("evr_lock", True))
    loads = [site for site, writes in made if not writes]
    under_the_lock = [site for site, writes in made[taken:given_back] if not writes]
    for site in ("evr.prod", "evr.seen"):
        assert loads.count(site) == under_the_lock.count(site) == 1
    # The users' own C, only when what was last seen of it says that there is no room, or that they have read everything.
    looks = 1 if unread == 64 or not door else 0
    assert loads.count("evr_room") == under_the_lock.count("evr_room") == looks


@pytest.mark.checklist("A4.9")
def test_a_read_that_has_nowhere_to_copy_to_takes_nothing(rig: Rig) -> None:
    page = rig.open(0)
    rig.place(0, 62, [1, 2, 3])
    reader = user(rig)
    cons = page.load64(FilePage.CONS)

    assert errno_of(reader.readinto, bytes(12)) == "EFAULT"

    assert page.load64(FilePage.CONS) == cons
    buffer = bytearray(9)
    assert reader.readinto(buffer) == 8
    assert bytes(buffer) == bytes([1, 0, 0, 0, 2, 0, 0, 0, 0])
    with pytest.raises(TypeError):
        reader.readinto(None)


@pytest.mark.checklist("A4.8", "A4.10")
@settings(derandomize=True, deadline=None, max_examples=150)
@given(cons=st.integers(0, M32), count=st.integers(0, 64), lengths=st.lists(st.integers(0, 300), max_size=6))
def test_partial_reads_take_the_oldest_and_leave_the_rest(
    shared: Rig, cons: int, count: int, lengths: list[int]
) -> None:
    shared.place(0, cons, list(range(1, count + 1)))
    shared.rings.setdefault(0, (shared.attach(0, 0), 0))
    reader = shared.user(0, 0)
    left = list(range(1, count + 1))

    for length in lengths:
        if length // 4 and not left:
            assert errno_of(reader.read, length) == "EAGAIN"
        else:
            data = reader.read(length)
            got = [int.from_bytes(data[i:i + 4], "little") for i in range(0, len(data), 4)]
            assert got == left[:length // 4]
            left = left[length // 4:]

    assert shared.unread(0) == left
    shared.close()
    shared.descriptors.clear()


@pytest.mark.checklist("A6.2", "A6.5", "A6.6")
def test_growth_keeps_what_is_unread_at_every_offset_and_fill(core: Any) -> None:
    step, fills = (1, range(65)) if core is _core else (13, range(0, 65, 16))
    rig = Rig(core, (1,))
    page = rig.open(0)
    for cons in [*range(0, 64, step), *(M32 - i for i in range(0, 64, step))]:
        for count in fills:
            entries = [1000 + i for i in range(count)]
            rig.machine.store32(Machine.file(0, File.SIZE), 64)
            page.store32(FilePage.SIZE, 64)
            rig.place(0, cons, entries)

            assert rig.path.grow(0) == 128

            assert rig.unread(0) == entries, (cons, count)
            assert page.load32(FilePage.SIZE) == rig.machine.load32(Machine.file(0, File.SIZE)) == 128


@pytest.mark.checklist("A6.5", "A6.6")
@pytest.mark.parametrize("cons", WRAPS)
def test_events_go_on_behind_what_was_there_before_the_growth(rig: Rig, cons: int) -> None:
    rig.open(0)
    reader = user(rig)
    rig.place(0, cons, list(range(1, 65)))

    rig.path.grow(0)
    for port in range(101, 165):
        event(rig, port)

    assert reader.read_ports(1024) == [*range(1, 65), *range(101, 165)]


@pytest.mark.checklist("A6.2", "A6.3")
def test_the_ring_grows_by_doubling_up_to_the_ports_of_the_abi_and_then_refuses(rig: Rig) -> None:
    rig.open(0, size=0)

    assert [rig.path.grow(0) for _ in range(12)] == [64 << doublings for doublings in range(12)]
    assert errno_of(rig.path.grow, 0) == "ENOMEM"
    assert rig.machine.load32(Machine.file(0, File.LOCK)) == 0
    assert rig.machine.load32(Machine.file(0, File.SIZE)) == 131072


# ------------------------------------------------------------------------------------------ overflow and RESET


@pytest.mark.checklist("A3.6", "A4.1", "A4.4", "A9.7", "A10.1", "A12.6")
def test_an_overflow_sticks_until_reset(rig: Rig) -> None:
    rig.open(0)
    reader = user(rig)
    rig.place(0, 7, list(range(1, 65)))

    event(rig, 200)

    assert prod(rig) == FilePage.OVERFLOW | 71
    for _ in range(2):
        assert errno_of(reader.read, 4096) == "EFBIG"
        assert reader.read(3) == b""
        assert reader.poll(0x1F) == 8       # POLLERR, and nothing else
    rig.path.reset(0)
    assert errno_of(reader.read, 4096) == "EAGAIN"
    assert reader.poll(0x105) == 0x104      # OUT and WRNORM
    event(rig, 201)
    assert reader.read_ports(8) == [201]


@pytest.mark.checklist("A3.6")
def test_an_overflow_wakes_nobody_and_counts_what_it_drops(rig: Rig) -> None:
    page = rig.open(0)
    rig.place(0, 0, list(range(1, 65)))
    rig.set_irq(200, 1 | Irq.ENABLED)
    rig.set_bit(0, Domain.EVTCHN_MASK, 200, on=False)
    rig.set_bit(0, Domain.vcpu(0, 0), 200)
    rig.path.set_pending(0, 200)

    assert rig.path.upcall(0, 0, 10) == (1, [])
    assert page.load32(FilePage.DOOR) == 0
    assert page.load32(FilePage.RING) == 1      # nothing was overwritten
    assert rig.irq(200) & (Irq.ACTIVE | Irq.IN_SERVICE | Irq.ENABLED) == Irq.ACTIVE
    if rig.core is _core:
        assert rig.machine.load64(Machine.file(0, File.DROPPED)) == 1


@pytest.mark.checklist("A6.6", "A3.6")
def test_growth_does_not_take_an_overflow_away(rig: Rig) -> None:
    rig.open(0)
    rig.place(0, 0, list(range(1, 65)))
    event(rig, 200)

    rig.path.grow(0)

    assert errno_of(user(rig).read, 4) == "EFBIG"


@pytest.mark.checklist("A9.7")
@pytest.mark.parametrize("cons", [0, 5, M32])
@pytest.mark.parametrize("epoch", [0, 1, 2**30 - 2, 2**30 - 1])
def test_reset_empties_the_ring_and_begins_a_new_epoch(rig: Rig, cons: int, epoch: int) -> None:
    page = rig.open(0)
    rig.place(0, cons, [1, 2, 3], epoch)

    rig.path.reset(0)

    expected = (epoch + 1) % 2**30 << 34
    assert page.load64(FilePage.PROD) == page.load64(FilePage.CONS) == prod(rig) == expected
    event(rig, 9)
    assert rig.unread(0) == [9]


# ------------------------------------------------------------------------------------------ wake-ups


@pytest.mark.checklist("A3.5", "A12.11")
def test_only_the_first_entry_asks_for_a_byte_in_the_doorbell(rig: Rig) -> None:
    page = rig.open(0)
    ports = rig.virq_ports(0, 3)
    wakes = []
    for port in ports:
        rig.path.set_pending(0, port)
        served = rig.path.upcall(0, 0, 10)
        assert served is not None
        wakes.append(served[1])

    assert wakes == [[0], [], []]
    assert page.load32(FilePage.DOOR) == 1


@pytest.mark.checklist("A3.5")
def test_the_drivers_own_order_is_a_variant(rig: Rig) -> None:
    rig.open(0)
    rig.machine.store32(Machine.VARIANTS, Machine.VARIANT_DRIVER_WAKEUP)
    ports = rig.virq_ports(0, 2)
    for port in ports:
        rig.path.set_pending(0, port)

    assert rig.path.upcall(0, 0, 10) == (2, [0])
    assert rig.unread(0) == ports


# ------------------------------------------------------------------------------------------ hostile and impossible


@pytest.mark.parametrize(("cons", "what"), [
    (1000, "ahead of the producer"), (M32, "65 behind"), (1 << 34, "another epoch"), (5 << 34 | 3, "both"),
    (2**64 - 1, "all bits"),
])
def test_an_impossible_consumer_index_poisons_this_file_and_no_other(rig: Rig, cons: int, what: str) -> None:
    page, _other = rig.open(0), rig.open(1)
    rig.place(0, 0, list(range(1, 65)) if what == "65 behind" else [])
    page.store64(FilePage.CONS, cons)

    # Looked at when the ring seems full by what was last seen of it: no later than at the 65th event.
    for port in range(100, 165):
        event(rig, port)
    event(rig, 8, slot=1)

    assert prod(rig) & FilePage.POISONED
    assert not prod(rig, 1) & FilePage.POISONED
    assert rig.unread(1) == [8]
    assert rig.machine.load32(Machine.file(0, File.LOCK)) == 0
    page.store64(FilePage.CONS, 0)      # too late
    assert errno_of(user(rig).read, 4) == "EIO"
    assert rig.user(0, 0).poll(5) == 8
    event(rig, 9)
    assert prod(rig) & FilePage.POISONED


@pytest.mark.parametrize("size", [0, 63, 65, 96, 262144, M32])
def test_a_user_that_scribbles_over_the_size_reads_an_error(rig: Rig, size: int) -> None:
    page = rig.open(0)
    rig.place(0, 0, [1, 2, 3])
    page.store32(FilePage.SIZE, size)

    assert errno_of(user(rig).read, 4) == "EIO"


def test_what_users_write_into_the_producers_words_is_never_read_back(rig: Rig) -> None:
    page = rig.open(0)
    event(rig, 3)
    for at in (FilePage.PROD, FilePage.SIZE & ~7, FilePage.BITMAP_AT, FilePage.RING_AT & ~7):
        page.store64(at, 2**64 - 1)

    event(rig, 4)

    assert prod(rig) == 2
    assert page.load64(FilePage.PROD) == 2
    assert page.load32(FilePage.RING + 4) == 4


def test_a_poisoned_file_stays_poisoned_behind_a_reset(rig: Rig) -> None:
    rig.open(0)
    rig.path.poison(0)

    rig.path.reset(0)

    assert errno_of(user(rig).read, 4) == "EIO"


def test_poison_asks_for_a_byte_once(rig: Rig) -> None:
    rig.open(0)

    assert [rig.path.poison(0), rig.path.poison(0)] == [1, 0]


@pytest.mark.parametrize("call", ["grow", "reset", "poison"])
def test_calls_on_a_slot_that_is_not_there_are_refused(rig: Rig, call: str) -> None:
    with pytest.raises(LookupError):
        getattr(rig.path, call)(5)
    with pytest.raises(IndexError):
        getattr(rig.path, call)(1024)
    with pytest.raises(OverflowError):
        getattr(rig.path, call)(-1)
