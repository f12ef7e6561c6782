# SPDX-License-Identifier: Apache-2.0
"""The idle loops (serve.c), called here without their processes: what ends them, and on which core a CPU runs."""

from __future__ import annotations

import ctypes
import os
import select
import time
from collections.abc import Callable, Iterator

import pytest

from pvbus.shm.layout import SUBMISSION_ENTRIES, Domain, Machine, PublicPage, Submission, SubmissionRing
from pvbus.shm.memory import EventPath, Memory

MINUTE_NS = 60_000_000_000
NO_DOORBELLS = bytes(8)
our_core = ctypes.CDLL(None).sched_getcpu


def memory(size: int) -> Memory:
    fd = os.memfd_create("pvbus-test")
    try:
        os.ftruncate(fd, size)
        return Memory(fd, size)
    finally:
        os.close(fd)


class Rig:
    """A machine's pages, one domain, and an epoll set with a pipe in it."""

    def __init__(self) -> None:
        self.machine, self.domain, self.public = memory(Machine.BYTES), memory(Domain.BYTES), memory(PublicPage.BYTES)
        self.path = EventPath(self.machine, {0: self.domain})
        self.reader, self.writer = os.pipe()
        self.epoll = select.epoll()
        self.epoll.register(self.reader, select.EPOLLIN)

    def close(self) -> None:
        self.epoll.close()
        os.close(self.reader)
        os.close(self.writer)

    def hypervisor(self, timeout_ms: int) -> None:
        self.path.serve_hypervisor(self.public, self.epoll.fileno(), timeout_ms, NO_DOORBELLS)

    def cpu(self, path: EventPath | None = None) -> set[int]:
        """Serve once; give the cores on which we may run then."""
        (path or self.path).serve_cpu(0, 0, self.epoll.fileno(), 0, NO_DOORBELLS)
        return os.sched_getaffinity(0)


@pytest.fixture
def rig() -> Iterator[Rig]:
    built = Rig()
    yield built
    built.close()


@pytest.fixture
def two_cores() -> Iterator[list[int]]:
    """Run this thread on two cores of the computer."""
    before = os.sched_getaffinity(0)
    if len(before) < 2:
        pytest.skip("NOT TESTED: this computer has one core, and where a CPU runs is about two")
    cores = sorted(before)[:2]
    os.sched_setaffinity(0, cores)
    yield cores
    os.sched_setaffinity(0, before)


def test_a_socket_ends_the_loop_while_a_late_eoi_waits_for_its_time(rig: Rig) -> None:
    due = time.monotonic_ns() + MINUTE_NS
    rig.domain.store64(Domain.EOI_NEXT_NS, due)
    os.write(rig.writer, b"x")

    rig.hypervisor(timeout_ms=-1)

    assert time.monotonic_ns() < due


def test_the_caller_s_time_ends_the_loop_and_a_late_eoi_s_does_not(rig: Rig) -> None:
    begin = time.monotonic_ns()
    rig.domain.store64(Domain.EOI_NEXT_NS, begin + 5_000_000)

    rig.hypervisor(timeout_ms=20)

    assert time.monotonic_ns() - begin >= 20_000_000
    assert rig.domain.load64(Domain.EOI_NEXT_NS) == 0


def test_a_cpu_goes_where_the_hypervisor_says_that_it_is(rig: Rig, two_cores: list[int]) -> None:
    assert rig.cpu() == set(two_cores)
    for core in (two_cores[0], two_cores[1], two_cores[1], two_cores[0]):
        rig.machine.store64(Machine.HYPERVISOR_CORE, 1 + core)
        assert rig.cpu() == {core}

    rig.machine.store64(Machine.HYPERVISOR_CORE, 0)
    assert rig.cpu() == set(two_cores)


def test_a_cpu_whose_affinity_somebody_has_set_stays_there(rig: Rig, two_cores: list[int]) -> None:
    rig.machine.store64(Machine.HYPERVISOR_CORE, 1 + two_cores[0])
    assert rig.cpu() == {two_cores[0]}
    os.sched_setaffinity(0, {two_cores[1]})

    rig.machine.store64(Machine.HYPERVISOR_CORE, 1 + two_cores[1])
    assert rig.cpu() == {two_cores[1]}
    rig.machine.store64(Machine.HYPERVISOR_CORE, 1 + two_cores[0])
    assert rig.cpu() == {two_cores[1]}


def test_a_cpu_does_not_go_to_a_core_that_it_was_not_born_to(rig: Rig, two_cores: list[int]) -> None:
    os.sched_setaffinity(0, {two_cores[0]})
    rig.machine.store64(Machine.HYPERVISOR_CORE, 1 + two_cores[1])

    assert rig.cpu() == {two_cores[0]}


def test_a_hypervisor_says_where_it_is_if_it_has_two_cores(rig: Rig, two_cores: list[int]) -> None:
    rig.hypervisor(timeout_ms=0)
    assert rig.machine.load64(Machine.HYPERVISOR_CORE) - 1 in two_cores

    alone = Rig()
    os.sched_setaffinity(0, {two_cores[0]})
    alone.hypervisor(timeout_ms=0)
    assert alone.machine.load64(Machine.HYPERVISOR_CORE) == 0
    alone.close()


def moves(rig: Rig, where: Callable[[int], int], at_most: int, within_ns: int) -> int:
    """Submit as a user that says it is at `where`; how often the hypervisor, we, was somewhere else behind a batch."""
    ring = memory(SubmissionRing.BYTES)
    rig.machine.store32(Machine.submission(0, Submission.STATE), Submission.ATTACHED)
    rig.path.attach_submission(0, ring, 0)
    for at in range(SUBMISSION_ENTRIES):
        ring.store32(SubmissionRing.DATA + at * 4, SubmissionRing.REARM << 30)
    ours, count, end_ns, tail = our_core(), 0, time.monotonic_ns() + within_ns, 0
    while count < at_most and time.monotonic_ns() < end_ns:
        ring.store32(SubmissionRing.CORE, 1 + where(ours))
        tail += 5 * 256  # batches without a sleep between
        ring.store32(SubmissionRing.TAIL, tail)
        rig.hypervisor(timeout_ms=0)
        before, ours = ours, our_core()
        count += ours != before
    rig.machine.store32(Machine.submission(0, Submission.HEAD), 0)
    return count


def test_a_hypervisor_leaves_its_core_to_its_users(rig: Rig, two_cores: list[int]) -> None:
    assert moves(rig, lambda ours: ours, at_most=200, within_ns=MINUTE_NS) == 200
    assert os.sched_getaffinity(0) == set(two_cores)


def test_a_hypervisor_whose_users_are_on_the_other_core_stays(rig: Rig, two_cores: list[int]) -> None:
    assert moves(rig, lambda ours: sum(two_cores) - ours, at_most=200, within_ns=220_000_000) < 100  # but the scheduler may


def test_a_hypervisor_with_one_core_stays_with_its_users(rig: Rig, two_cores: list[int]) -> None:
    os.sched_setaffinity(0, {two_cores[1]})

    assert moves(rig, lambda ours: ours, at_most=200, within_ns=20_000_000) == 0
    assert os.sched_getaffinity(0) == {two_cores[1]}
