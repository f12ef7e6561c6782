# SPDX-License-Identifier: Apache-2.0
"""The idle loops (serve.c), called here without their processes: what ends them, and on which core a CPU runs."""

from __future__ import annotations

import os
import select
import time
from collections.abc import Iterator

import pytest

from pvbus.shm.layout import Domain, Machine, PublicPage
from pvbus.shm.memory import EventPath, Memory

MINUTE_NS = 60_000_000_000
NO_DOORBELLS = bytes(8)


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
