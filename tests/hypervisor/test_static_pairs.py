# SPDX-License-Identifier: Apache-2.0
"""Ports that the configuration has connected: their words, what other operations leave of the mark, and heirs."""

import errno
from collections.abc import Iterator
from typing import Any

import pytest

from pvbus.actors.hypervisor import calls, recovery
from pvbus.actors.hypervisor.errors import HypercallError
from pvbus.shm import _core_explored
from pvbus.shm.layout import Irq, Port
from pvbus.tests.shm.rig import Rig

SELF = 0x7FF0
STEPS_MAX = 200


@pytest.fixture
def rig() -> Iterator[Rig]:
    made = Rig(spread=True)
    made.channels.bind_static_pair(0, 20, 1, 21)
    yield made
    made.close()


def is_static(rig: Rig, domid: int, port: int) -> bool:
    return bool(rig.channels.word(domid, port) & Port.STATIC)


def reborn(rig: Rig) -> int:
    rig.reborn()
    return recovery.repair(rig.channels, rig.irqs)


def drive(steps: Any) -> None:
    for _ in steps:
        pass


@pytest.mark.checklist("A9.5", "X7")
def test_both_ends_are_interdomain_with_these_numbers_and_not_pending(rig: Rig) -> None:
    assert rig.channels.status(0, SELF, 20)[:4] == (2, 0, 1, 21)
    assert rig.channels.status(1, SELF, 21)[:4] == (2, 0, 0, 20)
    assert not rig.pending(20)
    assert not rig.pending(21, 1)


@pytest.mark.checklist("A12.14")
def test_numbers_are_handed_out_around_static_ones(rig: Rig) -> None:
    handed_out = [rig.channels.alloc_unbound(0, SELF, 1) for _ in range(20)]

    assert handed_out == [*range(1, 20), 21]


@pytest.mark.parametrize("ends", [(0, 20, 1, 30), (1, 30, 0, 20), (0, 5, 0, 6), (0, 0, 1, 30)])
def test_a_number_that_is_taken_is_refused_and_nothing_is_connected(rig: Rig, ends: tuple[int, int, int, int]) -> None:
    for _ in range(6):
        rig.channels.alloc_unbound(0, SELF, 0)

    with pytest.raises(HypercallError) as refused:
        rig.channels.bind_static_pair(*ends)

    assert refused.value.errno == errno.EBUSY
    assert rig.channels.word(1, 30) == 0


@pytest.mark.checklist("A9.5", "E12")
def test_heirs_leave_static_ports_with_and_without_a_handler(rig: Rig) -> None:
    rig.open(0)
    rig.bind(0, 20, static=True)

    assert reborn(rig) == 0
    drive(calls.unbind_irq(rig.irqs, 0, 0, 20))
    assert reborn(rig) == 0

    assert (rig.channels.status(0, SELF, 20).status, rig.channels.status(1, SELF, 21).status) == (2, 2)
    rig.bind(0, 20, static=True)
    rig.channels.send(1, 21)
    assert rig.deliver() == 1
    assert rig.unread(0) == [20]


@pytest.mark.checklist("A9.5", "X7")
def test_moving_a_static_port_to_another_cpu_keeps_it_static(rig: Rig) -> None:
    rig.open(0)
    rig.bind(0, rig.channels.alloc_unbound(0, SELF, 0))    # on vCPU 0: the next one is served by vCPU 1

    rig.bind(0, 20, static=True)

    assert Port.unpack(rig.channels.word(0, 20)) == (Port.INTERDOMAIN, 1, 21, 1)
    assert is_static(rig, 0, 20)


@pytest.mark.checklist("X7")
def test_a_kernel_may_close_a_static_port_and_its_peer_stays_static(rig: Rig) -> None:
    rig.channels.close(0, 20)

    assert rig.channels.word(0, 20) == 0
    assert rig.channels.word(1, 21) & 7 == Port.UNBOUND
    assert reborn(rig) == 0
    port = rig.channels.bind_interdomain(0, 1, 21)      # connected anew, by whom it is for
    assert is_static(rig, 1, 21)
    assert not is_static(rig, 0, port)


@pytest.mark.checklist("E12", "A9.5")
@pytest.mark.parametrize("what", ["bind", "unbind", "release"])
def test_a_hypervisor_dies_anywhere_in_a_call_on_a_static_port_and_both_ends_stay(what: str) -> None:
    for step in range(1, STEPS_MAX):
        rig = Rig(_core_explored, (2, 1), spread=True)
        rig.channels.bind_static_pair(0, 20, 1, 21)
        rig.open(0)
        rig.bind(0, rig.channels.alloc_unbound(0, SELF, 0))
        if what != "bind":
            rig.bind(0, 20, static=True)
        with rig.world.dying_at(step):
            if what == "bind":
                rig.irqs.bind(0, 20, 0, static=True)
            elif what == "unbind":
                drive(calls.unbind_irq(rig.irqs, 0, 0, 20))
            else:
                drive(calls.release(rig.irqs, 0, 0))
        died = rig.world.steps == step

        reborn(rig)

        assert Port.unpack(rig.channels.word(0, 20))[:3] == (Port.INTERDOMAIN, 1, 21)
        assert Port.unpack(rig.channels.word(1, 21))[:3] == (Port.INTERDOMAIN, 0, 20)
        assert is_static(rig, 0, 20)
        assert is_static(rig, 1, 21)
        if not died:
            assert bool(rig.irq(20) & Irq.SLOT) == (what == "bind")
            return
    raise AssertionError(f"more than {STEPS_MAX} writes")
