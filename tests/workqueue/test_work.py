# SPDX-License-Identifier: Apache-2.0
"""The work ring, its native producer against its consumer: order, laps, repeats, voids, and heirs of either side."""

import random
import struct
from collections.abc import Callable

import pytest

from pvbus.actors.runtime.inbox import InvariantError
from pvbus.actors.workqueue.work import WorkRing
from pvbus.actors.workqueue.work_per_cpu import PerCpuWorkRing
from pvbus.shm import _core_explored
from pvbus.shm.hyperv import BYTES, MESSAGE_VMBUS, SINT_VMBUS, Frame, Header, Slot, Vp, Work
from pvbus.shm.layout import Domain, Machine
from pvbus.shm.memory import EventPath, Memory
from pvbus.tests.shm.rig import Rig
from pvbus.tests.workqueue.rig import anonymous

TAIL = Header.WORK_TAIL


class Cpus:
    """Message slots of two virtual CPUs, filled as the host does, and the tasklets that empty them."""

    def __init__(self, rig: Rig | None = None) -> None:
        make, path = (rig.memory, rig.core.EventPath) if rig is not None else (anonymous, EventPath)
        self.memory, self.machine = make(BYTES), make(Machine.BYTES)
        self.path = path(self.machine, {0: make(Domain.BYTES)})
        self.path.set_hyperv(0, self.memory, -1)
        self.number = 0
        for vp in range(2):
            self.memory.store64(Vp.at(vp, Vp.SIMP), Frame.of_vp(vp, Frame.MESSAGES) << 12 | 1)
            self.memory.store32(Vp.at(vp, Vp.VECTOR), 0x37)

    def message(self, vp: int, payload: bytes, *, number: int | None = None, kind: int = MESSAGE_VMBUS) -> None:
        """Put a message into the slot, and have the CPU's tasklet take it."""
        self.fill(vp, payload, number=number, kind=kind)
        self.run(vp)

    def fill(self, vp: int, payload: bytes, *, number: int | None = None, kind: int = MESSAGE_VMBUS) -> None:
        """Put a message into the slot."""
        self.number = self.number + 1 if number is None else number
        frame, memory = Frame.of_vp(vp, Frame.MESSAGES), self.memory
        for at, (word,) in enumerate(struct.iter_unpack("<Q", payload.ljust(-(-len(payload) // 8) * 8, b"\0"))):
            memory.store64(Slot.at(frame, SINT_VMBUS, Slot.PAYLOAD + 8 * at), word)
        memory.store32(Slot.at(frame, SINT_VMBUS, Slot.META), len(payload))
        memory.store32(Vp.at(vp, Vp.OFFERED) + 4 * SINT_VMBUS, self.number)
        memory.store32(Slot.at(frame, SINT_VMBUS, Slot.TYPE), kind)

    def run(self, vp: int) -> None:
        """Interrupt the CPU."""
        self.memory.fetch_or64(Vp.at(vp, Vp.IRR), 1 << 0x37)
        self.path.hv_run(0, vp)


def drain(ring: WorkRing) -> list[bytes]:
    found = []
    while (payload := ring.take()) is not None:
        found.append(payload)
        ring.done()
    return found


@pytest.mark.checklist("B4.9", "X19a")
def test_messages_of_two_cpus_come_in_the_order_of_their_claims_over_many_laps() -> None:
    cpus = Cpus()
    ring = WorkRing(cpus.memory)
    sent, got = [], []

    for i in range(5 * Work.ENTRIES):
        payload = struct.pack("<Q", i) + bytes([i % 251]) * (i % 233)
        cpus.message(i % 2, payload)
        sent.append(payload)
        if i % 300 == 299:
            got += drain(ring)
    got += drain(ring)

    assert got == sent
    assert cpus.memory.load32(Header.WORK_HEAD) == cpus.memory.load32(TAIL) == 5 * Work.ENTRIES


@pytest.mark.checklist("B4.9", "X19a")
def test_a_workqueue_of_2012_keeps_the_order_of_each_cpu_and_none_between_them() -> None:
    cpus = Cpus()
    ring = PerCpuWorkRing(cpus.memory)
    for vp, name in ((1, b"offer.."), (1, b"second."), (0, b"rescind"), (1, b"third..")):
        cpus.message(vp, name)

    assert drain(ring) == [b"rescind", b"offer..", b"second.", b"third.."]      # the offer was there first
    assert ring.voids == 2      # what was done before its time: the head came by later
    assert cpus.memory.load32(Header.WORK_HEAD) == cpus.memory.load32(TAIL) == 4


@pytest.mark.checklist("B4.9", "X19a")
def test_nothing_is_lost_or_doubled_where_cpus_take_turns_over_many_laps() -> None:
    cpus, dice = Cpus(), random.Random(7)
    ring = PerCpuWorkRing(cpus.memory)
    sent: dict[int, list[bytes]] = {0: [], 1: []}
    got: list[bytes] = []

    for i in range(4 * Work.ENTRIES):
        vp = dice.randrange(2)
        sent[vp].append(struct.pack("<II", vp, i))
        cpus.message(vp, sent[vp][-1])
        if dice.random() < 0.02:
            got += drain(ring)
    got += drain(ring)

    for vp, payloads in sent.items():
        assert [payload for payload in got if payload[0] == vp] == payloads


@pytest.mark.parametrize("ring_type", [WorkRing, PerCpuWorkRing])
def test_an_heir_repeats_the_item_that_its_forerunner_was_at_and_no_other(ring_type: type[WorkRing]) -> None:
    cpus = Cpus()
    for vp, name in ((1, b"1st"), (0, b"2nd"), (1, b"3rd")):
        cpus.message(vp, name)
    ring = ring_type(cpus.memory)
    ring.take()
    ring.done()
    begun = ring.take()

    heirs = drain(ring_type(cpus.memory))

    assert begun in heirs
    assert len(heirs) == 2


@pytest.mark.checklist("H5", "B4.4")
def test_a_full_ring_leaves_the_message_in_its_slot_until_there_is_room() -> None:
    cpus = Cpus()
    ring = WorkRing(cpus.memory)
    for i in range(Work.ENTRIES + 1):
        cpus.message(0, struct.pack("<Q", i))

    slot = Slot.at(Frame.of_vp(0, Frame.MESSAGES), SINT_VMBUS, Slot.TYPE)
    assert cpus.memory.load32(slot) == MESSAGE_VMBUS
    first = ring.take()
    ring.done()
    cpus.run(0)

    assert cpus.memory.load32(slot) == 0
    assert [first, *drain(ring)] == [struct.pack("<Q", i) for i in range(Work.ENTRIES + 1)]


@pytest.mark.checklist("H5", "B4.4")
@pytest.mark.parametrize(("variants", "least", "most"), [(0, 1, 4), (Machine.VARIANT_WORK_ALLOCATION_RETRIES, 10_000, 30_000)])
def test_without_room_the_2012_tasklet_tries_again_at_once_and_ours_stays_scheduled(variants: int, least: int, most: int) -> None:
    rig = Rig(_core_explored)
    cpus = Cpus(rig)
    cpus.machine.store32(Machine.VARIANTS, variants)
    ring = WorkRing(cpus.memory)
    for i in range(Work.ENTRIES):
        cpus.memory.store32(Work.at(i, Work.STATE), Work.FILLED)

    with rig.world.dying_at(0):
        cpus.message(0, b"no room.")

    assert least <= rig.world.sites.count("work_room") <= most
    assert cpus.memory.load32(Slot.at(Frame.of_vp(0, Frame.MESSAGES), SINT_VMBUS, Slot.TYPE)) == MESSAGE_VMBUS
    assert cpus.memory.load32(Vp.at(0, Vp.TASKLETS)) == 1
    cpus.memory.store32(Work.at(0, Work.STATE), Work.FREE)
    cpus.path.hv_run(0, 0)  # no interrupt: it was still scheduled
    assert ring.take() == b"no room."


@pytest.mark.checklist("H10")
@pytest.mark.parametrize("variants", [0, Machine.VARIANT_ONE_TASKLET_PAIR])
def test_with_one_pair_of_tasklets_a_second_cpus_message_waits_for_its_next_interrupt(variants: int) -> None:
    cpus = Cpus()
    cpus.machine.store32(Machine.VARIANTS, variants)
    cpus.memory.store32(Header.GLOBAL_TASKLETS, 1)  # CPU 0 is between its interrupt and its tasklet
    cpus.memory.store32(Vp.at(0, Vp.TASKLETS), 1)
    slot = Slot.at(Frame.of_vp(1, Frame.MESSAGES), SINT_VMBUS, Slot.TYPE)

    cpus.message(1, b"of CPU 1")
    cpus.message(0, b"of CPU 0")

    assert cpus.memory.load32(slot) == (MESSAGE_VMBUS if variants else 0)
    before = drain(WorkRing(cpus.memory))
    cpus.run(1)
    assert sorted(before + drain(WorkRing(cpus.memory))) == [b"of CPU 0", b"of CPU 1"]
    assert cpus.memory.load32(slot) == 0


@pytest.mark.checklist("B4.3", "B4.8")
def test_a_slot_that_is_filled_again_during_the_run_is_emptied_in_the_same_run() -> None:
    rig = Rig(_core_explored)
    cpus = Cpus(rig)
    slot = Slot.at(Frame.of_vp(0, Frame.MESSAGES), SINT_VMBUS, Slot.TYPE)

    def again() -> None:
        """Fill the slot that has just been emptied, as the host does; nobody interrupts the CPU for it."""
        assert cpus.memory.load32(slot) == 0
        cpus.fill(0, b"second..")
        rig.world.before["hv.slot.pending"] = lambda: cpus.fill(0, b"third...")

    rig.world.before["hv.slot.pending"] = again
    cpus.message(0, b"first...")

    assert cpus.memory.load32(slot) == 0
    assert cpus.memory.load32(Vp.at(0, Vp.TASKLETS)) == 0
    assert drain(WorkRing(cpus.memory)) == [b"first...", b"second..", b"third..."]


def test_who_read_the_tail_a_lap_ago_cannot_claim_behind_the_head() -> None:
    """A producer stopped between reading the tail and claiming finds the entry free again, but not for its lap."""
    cpus = Cpus()
    ring = WorkRing(cpus.memory)
    stale_tail = cpus.memory.load32(TAIL)
    expected = cpus.memory.load32(Work.at(stale_tail, Work.STATE))
    cpus.message(0, b"first...")
    drain(ring)

    seen = cpus.memory.compare_exchange32(Work.at(stale_tail, Work.STATE), expected, Work.CLAIMED | 1 << 8)

    assert seen != expected
    cpus.message(1, b"second..")
    assert drain(ring) == [b"second.."]


def test_a_message_that_comes_twice_is_handled_once() -> None:
    cpus = Cpus()
    ring = WorkRing(cpus.memory)
    cpus.message(0, b"once", number=7)
    cpus.message(0, b"once", number=7)
    cpus.message(1, b"other cpu", number=7)

    assert drain(ring) == [b"once", b"other cpu"]
    assert ring.repeats == 1
    assert [cpus.memory.load32(Vp.at(vp, Vp.HANDLED)) for vp in range(2)] == [7, 7]


def test_an_heir_repeats_the_item_that_its_forerunner_held() -> None:
    cpus = Cpus()
    cpus.message(0, b"half done")
    cpus.message(1, b"next")
    WorkRing(cpus.memory).take()

    assert drain(WorkRing(cpus.memory)) == [b"half done", b"next"]


@pytest.mark.checklist("H14", "B4.5")
def test_a_foreign_type_and_an_impossible_size_are_dropped() -> None:
    cpus = Cpus()
    ring = WorkRing(cpus.memory)
    cpus.message(0, b"timer", kind=0x80000010)
    cpus.message(0, b"big")
    cpus.memory.store32(Work.at(1, Work.MESSAGE + Slot.META), 241)
    cpus.message(0, b"good")

    assert drain(ring) == [b"good"]
    assert ring.foreign == 2


@pytest.mark.parametrize("tail_moved", [True, False])
def test_a_claim_of_a_dead_cpu_becomes_a_void_and_holds_up_nobody(tail_moved: bool) -> None:
    cpus = Cpus()
    ring = WorkRing(cpus.memory)
    cpus.message(1, b"before")
    cpus.memory.store32(Work.at(1, Work.STATE), Work.CLAIMED | 0 << 8)
    if tail_moved:
        cpus.memory.store32(TAIL, 2)
        cpus.message(1, b"after")
    assert drain(ring) == [b"before"]

    cpus.path.hv_recover(0, 0)
    cpus.path.hv_run(0, 0)
    if not tail_moved:
        cpus.message(1, b"after")

    assert drain(ring) == [b"after"]
    assert ring.voids == 1


class Dies(Exception):
    """The process was killed here."""


class Fragile:
    """A memory that lets its process die before the n-th store."""

    def __init__(self, memory: Memory, stores: int) -> None:
        self._memory, self._left = memory, stores

    def _store(self, store: Callable[..., int], *arguments: int | str) -> int:
        if self._left == 0:
            raise Dies
        self._left -= 1
        return store(*arguments)

    def store32(self, *arguments: int | str) -> int:
        return self._store(self._memory.store32, *arguments)

    def store32_release(self, *arguments: int | str) -> int:
        return self._store(self._memory.store32_release, *arguments)

    def __getattr__(self, name: str) -> object:
        return getattr(self._memory, name)


@pytest.mark.parametrize("stores", range(40))
@pytest.mark.parametrize("laps", [0, 1])
def test_a_workqueue_that_dies_before_any_of_its_stores_loses_nothing_and_only_repeats_what_it_held(
    stores: int, laps: int
) -> None:
    cpus = Cpus()
    for i in range(laps * Work.ENTRIES):
        cpus.message(0, struct.pack("<Q", i))
        drain(WorkRing(cpus.memory))
    sent = [b"a", b"b", b"c"]
    numbers = [1001, 1002, 1002, 1003]
    for payload, number in zip([b"a", b"b", b"b", b"c"], numbers, strict=True):
        cpus.message(0, payload, number=number)
    cpus.memory.store32(Work.at(laps * Work.ENTRIES + 3, Work.STATE), Work.CLAIMED | 1 << 8)
    cpus.path.hv_recover(0, 1)     # CPU 1's heir makes the last one, which is c, void
    cpus.message(0, b"c", number=1003)
    handled: list[bytes] = []
    fragile = Fragile(cpus.memory, stores)

    with pytest.raises(Dies):
        ring = WorkRing(fragile)  # type: ignore[arg-type]
        while (payload_or_none := ring.take()) is not None:
            handled.append(payload_or_none)
            ring.done()
        raise Dies
    rest = drain(WorkRing(cpus.memory))

    assert handled + rest in (sent, [*handled, *handled[-1:], *sent[len(handled):]])
    cpus.message(1, b"later")
    assert drain(WorkRing(cpus.memory)) == [b"later"]
    states = {cpus.memory.load32(Work.at(i, Work.STATE)) & 0xFF for i in range(Work.ENTRIES)}
    assert states == {Work.FREE}


@pytest.mark.checklist("X19a")
def test_the_order_of_take_and_done_is_held() -> None:
    cpus = Cpus()
    ring = WorkRing(cpus.memory)
    cpus.message(0, b"x")

    with pytest.raises(InvariantError):
        ring.done()
    ring.take()
    with pytest.raises(InvariantError):
        ring.take()
