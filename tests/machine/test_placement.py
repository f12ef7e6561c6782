# SPDX-License-Identifier: Apache-2.0
"""Where the machine's processes run: on two cores, its CPUs are where the hypervisor is (shm/test_serve.py)."""

from __future__ import annotations

import os
import select
from collections.abc import Iterator
from contextlib import contextmanager

import pytest

from pvbus.actors.client import Machine, attach
from pvbus.verify.launch import launched

ONE_CPU = """\
name = "{name}"
[[domain]]
id = 0
"""


@pytest.fixture
def some_cores() -> set[int]:
    """Two cores of this computer."""
    cores = sorted(os.sched_getaffinity(0))
    if len(cores) < 2:
        pytest.skip("NOT TESTED: this computer has one core, and placement is about two")
    return set(cores[:2])


@contextmanager
def born_on(cores: set[int]) -> Iterator[None]:
    """Give what is started meanwhile these cores."""
    before = os.sched_getaffinity(0)
    os.sched_setaffinity(0, cores)
    try:
        yield
    finally:
        os.sched_setaffinity(0, before)


def cores_of(machine: Machine, name: str) -> set[int]:
    """Return the affinity of one of the machine's processes."""
    return os.sched_getaffinity(next(int(row["pid"]) for row in machine.status()["processes"] if row["name"] == name))


def test_where_there_are_two_cores_a_machine_s_cpu_keeps_to_one(some_cores: set[int]) -> None:
    with born_on(some_cores), launched("placement", ONE_CPU), attach(name="placement") as machine:
        file = machine.open_evtchn(domain=0)
        port = file.bind_unbound_port(0)
        peer = machine.open_evtchn(domain=0)
        peer.notify(peer.bind_interdomain(0, port))
        assert file.poll(select.POLLIN, timeout_ms=5000) & select.POLLIN
        assert cores_of(machine, "hypervisor") == some_cores
        assert len(cores_of(machine, "cpu/0.0") & some_cores) == len(cores_of(machine, "cpu/0.0")) == 1
