# SPDX-License-Identifier: Apache-2.0
"""Submission rings: what a user hands over is done once, in order, and what it scribbles hurts nobody else."""

import errno
import os
from typing import Any

import pytest

from pvbus.shm import _core
from pvbus.shm.layout import Domain, FilePage, Irq, Machine, PublicPage, Submission, SubmissionRing
from pvbus.tests.shm.rig import M32, Rig

NOTIFY, ENABLE, REARM = SubmissionRing.NOTIFY, SubmissionRing.ENABLE, SubmissionRing.REARM
ALL = 2**31


def two_files(rig: Rig) -> tuple[int, int]:
    """Open a sender (slot 0, ring 0) and a receiver (slot 1, ring 1); give their ports."""
    rig.open(0)
    rig.open(1)
    rig.attach(0, 0)
    rig.attach(1, 1)
    return rig.pair(0, 1)


def head(rig: Rig, index: int) -> int:
    value: int = rig.machine.load32(Machine.submission(index, Submission.HEAD))
    return value


@pytest.mark.checklist("A9.6", "A5.4", "X9")
@pytest.mark.parametrize("at", [0, 8191, 8192, M32 - 2, M32])
def test_notify_and_enable_go_their_way_at_every_position(rig: Rig, at: int) -> None:
    rig.open(0)
    rig.open(1)
    rig.attach(0, 0, at)
    rig.attach(1, 1, at)
    ours, theirs = rig.pair(0, 1)

    for _ in range(3):
        rig.submit(0, NOTIFY, ours)
        assert rig.path.drain(ALL) is not None
        rig.deliver()
        assert rig.read(1) == [theirs]
        rig.submit(1, ENABLE, theirs)
        rig.path.drain(ALL)

    assert head(rig, 0) == at + 3 & M32
    assert rig.rings[0][0].load32(SubmissionRing.HEAD) == at + 3 & M32
    assert rig.path.drain(ALL) is None


@pytest.mark.checklist("A11.3")
def test_many_notifies_of_a_masked_port_are_one_event_after_the_write(rig: Rig) -> None:
    ours, theirs = two_files(rig)
    for _ in range(5):
        rig.submit(0, NOTIFY, ours)
    rig.path.drain(ALL)
    rig.deliver()
    for _ in range(5):
        rig.submit(0, NOTIFY, ours)
    rig.path.drain(ALL)
    rig.deliver()
    assert rig.read(1) == [theirs]

    rig.submit(1, ENABLE, theirs)
    rig.path.drain(ALL)
    rig.deliver()

    assert rig.read(1) == [theirs]


@pytest.mark.checklist("A2.5", "A5.5")
@pytest.mark.parametrize("op", [NOTIFY, ENABLE, 3])
@pytest.mark.parametrize("whose", ["foreign", "unbound", "zero", "beyond", "huge"])
def test_entries_for_ports_that_are_not_this_files_do_nothing(rig: Rig, op: int, whose: str) -> None:
    ours, theirs = two_files(rig)
    rig.submit(1, NOTIFY, theirs)
    rig.path.drain(ALL)
    rig.deliver()
    assert rig.read(0) == [ours]
    port = {"foreign": ours, "unbound": 99, "zero": 0, "beyond": 4096, "huge": 2**30 - 1}[whose]
    before = rig.irq(ours), rig.irq(theirs)

    rig.submit(1, op, port)
    drained = rig.path.drain(ALL)

    assert drained is not None
    assert drained[0] == 1
    assert (rig.irq(ours), rig.irq(theirs)) == before
    assert rig.deliver() == 0


def test_a_rearm_names_the_slot(rig: Rig) -> None:
    two_files(rig)
    rig.submit(1, REARM, 0)

    assert rig.path.drain(ALL) == (1, [], [1], [])


def test_a_flood_of_rearms_does_not_hold_up_what_others_have_handed_over(rig: Rig) -> None:
    ours, theirs = two_files(rig)
    for _ in range(3000):
        rig.submit(0, REARM, 0)
    rig.submit(1, NOTIFY, theirs)

    drained = rig.path.drain(ALL)       # what a call does first: everything that was handed over before it

    assert drained is not None
    assert set(drained[2]) == {0}
    assert rig.pending(ours)
    assert head(rig, 0) == 3000


@pytest.mark.parametrize(("tail", "poisoned"), [
    (8192, False), (8193, True), (M32, True), (2**31, True), (100_000, True),
])
def test_an_impossible_tail_poisons_that_ring_and_no_other(rig: Rig, tail: int, poisoned: bool) -> None:
    _, theirs = two_files(rig)
    rig.rings[0][0].store32(SubmissionRing.TAIL, tail)
    rig.submit(1, NOTIFY, theirs)

    drained = rig.path.drain(ALL)

    assert drained is not None
    assert drained[3] == ([0] if poisoned else [])
    assert rig.machine.load32(Machine.submission(0, Submission.STATE)) == (2 if poisoned else 1)
    assert rig.machine.load32(Machine.submission(1, Submission.STATE)) == Submission.ATTACHED
    assert head(rig, 1) == 1
    if poisoned:
        rig.rings[0][0].store32(SubmissionRing.TAIL, 5)
        assert rig.path.drain(ALL) is None      # never looked at again


def test_what_a_user_writes_into_its_head_is_not_read_back(rig: Rig) -> None:
    ours, _ = two_files(rig)
    rig.rings[0][0].store32(SubmissionRing.HEAD, 777)
    rig.submit(0, NOTIFY, ours)

    rig.path.drain(ALL)

    assert head(rig, 0) == 1
    assert rig.rings[0][0].load32(SubmissionRing.HEAD) == 1


def test_the_budget_is_for_each_ring_so_that_a_flood_does_not_starve_the_others(rig: Rig) -> None:
    ours, theirs = two_files(rig)
    for _ in range(1000):
        rig.submit(0, NOTIFY, ours)
    rig.submit(1, NOTIFY, theirs)

    drained = rig.path.drain(16)

    assert drained is not None
    assert drained[0] == 17
    assert (head(rig, 0), head(rig, 1)) == (16, 1)
    assert rig.path.drain(16, 1) is None
    assert rig.path.drain(16, 0) == (16, [], [], [])


def test_a_slot_index_out_of_range_is_refused(rig: Rig) -> None:
    with pytest.raises(IndexError):
        rig.path.drain(1, 2048)
    with pytest.raises(IndexError):
        rig.path.attach_submission(2048, None)
    with pytest.raises(TypeError):
        rig.path.attach_submission(0, 5)
    with pytest.raises(ValueError, match="bytes"):
        rig.path.attach_submission(0, rig.memory(4096))


# ------------------------------------------------------------------------------------------ the user's side


@pytest.mark.checklist("A9.6", "A5.1", "A5.2", "A5.3", "A5.6")
def test_a_user_hands_over_what_is_its_own(rig: Rig) -> None:
    ours, theirs = two_files(rig)
    sender = rig.user(0, 0)

    sender.notify(ours)
    with pytest.raises(OSError) as caught:
        sender.notify(theirs)
    assert caught.value.errno == errno.ENOTCONN
    with pytest.raises(OSError) as caught:
        sender.notify_many([ours, theirs])
    assert caught.value.errno == errno.ENOTCONN
    assert sender.notify_many([ours, ours]) == 2
    assert sender.enable([ours, theirs, 4096, M32]) == 4
    words = b"".join(port.to_bytes(4, "little") for port in (theirs, ours))
    assert [sender.write(data) for data in (b"", b"abc", words + b"xyz", words * 1000)] == [0, 0, 8, 4096]
    with pytest.raises(OSError) as caught:
        sender.write(None)
    assert caught.value.errno == errno.EFAULT

    drained = rig.path.drain(ALL)
    assert drained is not None
    assert drained[0] == 3 + 1 + 1 + 512


def test_a_full_ring_pushes_back_and_loses_nothing(rig: Rig) -> None:
    ours, _ = two_files(rig)
    ring = rig.rings[0][0]
    sender = rig.user(0, 0)
    sender.notify_many([ours] * 8192)
    assert ring.load32(SubmissionRing.TAIL) - head(rig, 0) == 8192

    if rig.core is _core:
        rig.path.drain(1)
    else:
        rig.world.before["sub.full"] = lambda: rig.path.drain(1)
    sender.notify(ours)

    assert ring.load32(SubmissionRing.TAIL) == 8193
    assert head(rig, 0) == 1


@pytest.mark.parametrize("asleep", [False, True])
def test_the_doorbell_is_rung_only_for_a_hypervisor_that_may_sleep(rig: Rig, asleep: bool) -> None:
    ours, _ = two_files(rig)
    sender = rig.user(0, 0)
    if asleep:
        assert rig.path.hypervisor_may_sleep(rig.public)

    sender.notify(ours)

    if rig.core is _core:
        assert _rung(rig.descriptors[-1]) is asleep
    else:
        assert rig.world.kicks == asleep


def _rung(eventfd: Any) -> bool:
    try:
        return os.eventfd_read(eventfd.fileno()) > 0
    except BlockingIOError:
        return False


def test_a_hypervisor_with_work_must_not_sleep(rig: Rig) -> None:
    ours, _ = two_files(rig)
    rig.submit(0, NOTIFY, ours)

    assert not rig.path.hypervisor_may_sleep(rig.public)
    assert rig.public.load32(PublicPage.HYPERVISOR_SLEEPING) % 2 == 0
    rig.path.drain(ALL)
    assert rig.path.hypervisor_may_sleep(rig.public)
    assert rig.public.load32(PublicPage.HYPERVISOR_SLEEPING) % 2 == 1     # odd: announced


def test_a_sleeping_hypervisor_is_rung_once_for_each_sleep_that_it_announces(rig: Rig) -> None:
    ours, _ = two_files(rig)
    sender = rig.user(0, 0)
    rung = []
    for _ in range(3):
        assert rig.path.hypervisor_may_sleep(rig.public)
        for _ in range(2):
            sender.notify(ours)
            rung.append(_rung(rig.descriptors[-1]) if rig.core is _core else rig.world.kicks)
        word = rig.public.load32(PublicPage.HYPERVISOR_SLEEPING)
        rig.public.store32(PublicPage.HYPERVISOR_SLEEPING, word + 1)     # awake
        rig.path.drain(ALL)

    assert rung == ([True, False] * 3 if rig.core is _core else [1, 1, 2, 2, 3, 3])


# ------------------------------------------------------------------------------------------ heirs, by hand


@pytest.mark.checklist("E12")
@pytest.mark.parametrize("served", [False, True])
def test_an_heir_repeats_a_claimed_notify_unless_it_has_been_served(rig: Rig, served: bool) -> None:
    ours, theirs = two_files(rig)
    rig.submit(0, NOTIFY, ours)
    noted = rig.irq(theirs) >> 32
    rig.machine.store64(Machine.submission(0, Submission.CLAIM), 1 << 63 | 0 << 32 | noted)
    if served:
        rig.path.set_pending(0, theirs)
        rig.deliver()

    rig.reborn()
    rig.path.drain(ALL)
    rig.deliver()

    assert rig.read(1) == [theirs]
    assert not rig.pending(theirs)
    assert head(rig, 0) == 1


@pytest.mark.checklist("E12")
def test_an_heir_does_not_repeat_a_notify_that_still_is_pending_when_it_looks(rig: Rig) -> None:
    ours, theirs = two_files(rig)
    rig.submit(0, NOTIFY, ours)
    rig.machine.store64(Machine.submission(0, Submission.CLAIM), 1 << 63 | rig.irq(theirs) >> 32)
    rig.path.set_pending(0, theirs)     # the forerunner did it, and died before it moved on

    rig.reborn()
    rig.deliver()                       # a CPU serves it between the heir's look and its first drain
    rig.path.drain(ALL)
    rig.deliver()

    assert rig.read(1) == [theirs]
    assert not rig.pending(theirs)
    assert head(rig, 0) == 1


@pytest.mark.checklist("E12")
def test_an_heir_does_not_repeat_an_enable_that_it_finds_done(rig: Rig) -> None:
    ours, theirs = two_files(rig)
    rig.submit(0, NOTIFY, ours)
    rig.path.drain(ALL)
    rig.deliver()
    rig.submit(1, ENABLE, theirs)
    rig.machine.store64(Machine.submission(1, Submission.CLAIM), 1 << 63 | rig.irq(theirs) >> 32)
    rig.path.eoi(0, theirs, 1)          # the forerunner did it, and died before it moved on

    rig.reborn()
    rig.path.set_pending(0, theirs)     # the next event comes between the heir's look and its first drain
    rig.deliver()
    rig.path.drain(ALL)

    assert not rig.irq(theirs) & Irq.ENABLED, "written back, and its user has not read it"


def test_an_heir_does_not_repeat_an_enable_whose_event_has_come(rig: Rig) -> None:
    ours, theirs = two_files(rig)
    rig.submit(0, NOTIFY, ours)
    rig.path.drain(ALL)
    rig.deliver()
    rig.submit(1, ENABLE, theirs)
    rig.machine.store64(Machine.submission(1, Submission.CLAIM), 1 << 63 | rig.irq(theirs) >> 32)
    rig.path.eoi(0, theirs, 1)          # the forerunner did it, and died before it moved on
    rig.path.set_pending(0, theirs)
    rig.deliver()

    rig.reborn()
    rig.path.drain(ALL)

    assert rig.irq(theirs) & (Irq.ENABLED | Irq.ACTIVE) == Irq.ACTIVE
    assert rig.masked(theirs)


def test_an_heir_gives_room_back_that_its_forerunner_took_but_did_not_publish(rig: Rig) -> None:
    ours, _ = two_files(rig)
    rig.user(0, 0).notify_many([ours] * 8192)
    rig.machine.store32(Machine.submission(0, Submission.HEAD), 8192)     # all done; then it died

    rig.reborn()
    rig.path.drain(ALL)

    assert rig.rings[0][0].load32(SubmissionRing.HEAD) == 8192


def test_an_old_claim_means_nothing_for_a_later_entry(rig: Rig) -> None:
    ours, theirs = two_files(rig)
    rig.submit(0, NOTIFY, ours)
    rig.path.drain(ALL)
    rig.deliver()
    rig.read(1)
    rig.path.eoi(0, theirs, 1)
    rig.submit(0, NOTIFY, ours)

    rig.reborn()
    rig.path.drain(ALL)
    rig.deliver()

    assert rig.read(1) == [theirs]


def test_the_bitmap_is_only_the_users_own_view(rig: Rig) -> None:
    """A user that sets every bit of its bitmap still reaches nobody else's port."""
    ours, theirs = two_files(rig)
    page = rig.pages[1]
    for at in range(FilePage.BITMAP, FilePage.BITMAP + 512, 8):
        page.store64(at, 2**64 - 1)

    rig.user(1, 1).notify(ours)
    rig.path.drain(ALL)

    assert not rig.pending(theirs)
    assert rig.bit(0, Domain.EVTCHN_MASK, 99)
