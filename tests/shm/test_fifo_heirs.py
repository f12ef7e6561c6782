# SPDX-License-Identifier: Apache-2.0
"""On the FIFO ABI: a cpu, or the hypervisor, dies before each of its writes; the queues are rebuilt, each event comes once."""

from collections.abc import Callable

import pytest

from pvbus.actors.hypervisor import fifo, recovery
from pvbus.shm import _core_explored
from pvbus.shm.layout import Domain, Fifo, Irq, Vcpu
from pvbus.tests.shm.rig import Rig
from pvbus.tests.shm.test_heirs import each_death

ORDERS = ["repair, then rebuild", "rebuild, then repair"]


def machine(*raised: int, ports: int = 5) -> Rig:
    """Return a machine with two CPUs, ports 1..5 of one file, port 5 urgent, 4 on CPU 1, and some of them raised."""
    rig = Rig(_core_explored, (2,))
    rig.fifo()
    rig.open(0)
    rig.virq_ports(0, ports)
    rig.channels.bind_vcpu(0, 4, 1)
    fifo.set_priority(rig.channels, 0, 5, 1)
    for port in raised:
        rig.path.set_pending(0, port)
    return rig


def heirs_of_all(rig: Rig, order: str = ORDERS[0]) -> None:
    """A cpu ends with the hypervisor; each CPU's queues are rebuilt before its heir runs."""
    rig.reborn()
    if order == ORDERS[0]:
        assert recovery.repair(rig.channels, rig.irqs) == 0
    for vcpu in range(2):
        rig.path.fifo_rebuild(0, vcpu)
    if order == ORDERS[1]:
        assert recovery.repair(rig.channels, rig.irqs) == 0
    for vcpu in range(2):
        rig.path.cpu_recover(0, vcpu)
    rig.check_links()
    rig.deliver()
    rig.check_links()
    assert rig.queues() == {}


def heir_of_the_cpu(rig: Rig, vcpu: int = 0) -> None:
    rig.path.fifo_rebuild(0, vcpu)
    rig.path.cpu_recover(0, vcpu)
    rig.deliver()
    rig.check_links()


def works_on(rig: Rig, where: str) -> None:
    """Write every port back, raise it once more: it comes once."""
    rig.read(0)
    for port in range(1, 6):
        rig.path.eoi(0, port, 0)
    rig.deliver()
    rig.read(0)
    for port in range(1, 6):
        rig.path.eoi(0, port, 0)
        assert not rig.at(port).masked, (where, port)
        rig.path.set_pending(0, port)
        rig.check_links()
    rig.deliver()
    assert sorted(rig.read(0)) == [1, 2, 3, 4, 5], where


# ------------------------------------------------------------------------------------------ a cpu


@pytest.mark.checklist("E12", "A11.1", "A11.3")
def test_a_cpu_dies_anywhere_in_an_upcall_and_each_event_comes_once() -> None:
    def then(rig: Rig, where: str) -> None:
        heir_of_the_cpu(rig)
        assert sorted(rig.unread(0)) == [1, 2, 3, 5], where
        for port in (1, 2, 3, 5):
            assert not rig.irq(port) & (Irq.IN_SERVICE | Irq.ENABLED), (where, port)
        works_on(rig, where)

    each_death(lambda: machine(1, 2, 5, 3), lambda rig: rig.path.upcall(0, 0, 256), then)


@pytest.mark.checklist("E12", "A11.3")
@pytest.mark.parametrize("between", ["raised again", "raised behind", "masked", "written back"])
def test_what_happens_between_the_death_and_the_heir_is_seen(between: str) -> None:
    def then(rig: Rig, where: str) -> None:
        before = rig.unread(0)
        if between == "raised again":
            rig.path.set_pending(0, 1)
        elif between == "raised behind":
            rig.path.set_pending(0, 3)
        elif between == "masked":
            rig.path.mask(0, 2)
        else:
            for port in (1, 2):
                rig.path.eoi(0, port, 0)
        heir_of_the_cpu(rig)
        got = rig.read(0)
        if between == "masked" and 2 not in got:
            assert rig.at(2).pending, where
            rig.channels.unmask(0, 2)
            rig.deliver()
            got += rig.read(0)
        rig.path.eoi(0, 1, 0)
        rig.deliver()
        got += rig.read(0)
        expected = {1, 2, 3} if between == "raised behind" else {1, 2}
        assert set(got) == expected, where
        assert got.count(2) == 1, where
        assert got.count(1) == (2 if between == "raised again" and 1 in before else got.count(1)), where
        works_on(rig, where)

    each_death(lambda: machine(1, 2), lambda rig: rig.path.upcall(0, 0, 256), then)


@pytest.mark.checklist("E12")
def test_a_cpu_dies_and_what_has_moved_from_its_queue_rings_the_cpu_that_sleeps() -> None:
    """What no queue of the dead reaches is raised where it is bound now: on a CPU that runs, and sleeps."""
    rung = []

    def act(rig: Rig) -> None:
        rig.path.upcall(0, 0, 256)

    def prepare() -> Rig:
        rig = machine(1, 2)
        rig.channels.bind_vcpu(0, 2, 1)      # linked behind 1 in CPU 0's queue
        assert rig.path.cpu_may_sleep(0, 1)
        return rig

    def then(rig: Rig, where: str) -> None:
        served = 2 in rig.unread(0) or rig.irq(2) & Irq.IN_SERVICE
        rings = rig.path.fifo_rebuild(0, 0)
        if rig.queues().get((1, 7)) and not served:
            assert rings == [1], where
            assert rig.domains[0].memory.load32(Domain.vcpu(1, Vcpu.SLEEPING)) == 0, where
            rung.append(where)
        rig.path.cpu_recover(0, 0)
        rig.check_links()
        rig.deliver()
        assert sorted(rig.unread(0)) == [1, 2], where

    each_death(prepare, act, then)
    assert rung      # it did happen: 1 taken out, its successor not yet noted


@pytest.mark.checklist("E12")
def test_a_heir_dies_too_and_each_event_comes_once() -> None:
    def then(rig: Rig, where: str) -> None:
        for step in (1, 2, 3, 5, 8, 13, 0):
            with rig.world.dying_at(step):
                rig.path.fifo_rebuild(0, 0)
                rig.path.cpu_recover(0, 0)
        rig.deliver()
        rig.check_links()
        assert sorted(rig.unread(0)) == [1, 2, 3], where

    each_death(lambda: machine(1, 2, 3), lambda rig: rig.path.upcall(0, 0, 256), then)


# ------------------------------------------------------------------------------------------ the hypervisor


@pytest.mark.checklist("E12", "A11.3")
@pytest.mark.parametrize("order", ORDERS)
@pytest.mark.parametrize("raised", [(), (1,), (1, 2), (4,), (5,)], ids=str)
def test_a_hypervisor_dies_anywhere_while_it_raises(order: str, raised: tuple[int, ...]) -> None:
    def then(rig: Rig, where: str) -> None:
        pending = rig.at(3).pending
        heirs_of_all(rig, order)
        assert sorted(rig.read(0)) == sorted([*raised, *([3] if pending else [])]), where
        works_on(rig, where)

    each_death(lambda: machine(*raised), lambda rig: rig.path.set_pending(0, 3), then)


@pytest.mark.checklist("E12", "A11.3")
@pytest.mark.parametrize("moved", ["to another cpu", "to another priority", "nowhere, and it is the tail"])
def test_a_hypervisor_dies_anywhere_while_it_raises_a_port_that_was_linked_elsewhere(moved: str) -> None:
    def prepare() -> Rig:
        rig = machine(1)
        rig.deliver()
        assert rig.read(0) == [1]
        rig.path.eoi(0, 1, 0)
        if moved == "to another cpu":
            rig.channels.bind_vcpu(0, 1, 1)
        elif moved == "to another priority":
            fifo.set_priority(rig.channels, 0, 1, 0)
        return rig

    def act(rig: Rig) -> None:
        for port in (1, 2, 4):
            rig.path.set_pending(0, port)

    def then(rig: Rig, where: str) -> None:
        pending = [port for port in (1, 2, 4) if rig.at(port).pending]
        heirs_of_all(rig)
        assert sorted(rig.read(0)) == pending, where
        works_on(rig, where)

    each_death(prepare, act, then)


@pytest.mark.checklist("E12", "A11.3")
@pytest.mark.parametrize("order", ORDERS)
@pytest.mark.parametrize("call", ["eoi", "unmask"])
def test_a_hypervisor_dies_anywhere_while_it_unmasks_a_pending_port(order: str, call: str) -> None:
    def prepare() -> Rig:
        rig = machine(1, 2)
        if call == "unmask":
            rig.path.mask(0, 3)
        else:
            rig.path.set_pending(0, 3)
            rig.deliver()
            rig.read(0)
        rig.path.set_pending(0, 3)
        return rig

    def act(rig: Rig) -> None:
        if call == "eoi":
            rig.path.eoi(0, 3, 0)
        else:
            rig.channels.unmask(0, 3)

    def then(rig: Rig, where: str) -> None:
        heirs_of_all(rig, order)
        got = rig.read(0)
        rig.path.eoi(0, 3, 0)      # the write-back is made again (the submission ring's claim): no harm if it was done
        rig.deliver()
        got += rig.read(0)
        assert got.count(3) == 1, where
        works_on(rig, where)

    each_death(prepare, act, then)


@pytest.mark.checklist("E12", "A11.3")
def test_a_word_left_busy_by_a_dead_hypervisor_does_not_hold_up_its_end_of_interrupt() -> None:
    """The tail changes under the link, the hypervisor holds it BUSY, and dies; the write-back may come before any CPU is up."""
    busy = []

    def prepare() -> Rig:
        rig = machine(1)
        rig.world.before["fifo_link"] = lambda: mask_as_a_handler_does(rig)
        return rig

    def then(rig: Rig, where: str) -> None:
        rig.world.before.clear()
        busy.append(bool(rig.word(1) & Fifo.BUSY))
        rig.reborn()
        recovery.repair(rig.channels, rig.irqs)
        rig.world.before["fifo.unmask.busy"] = lambda: pytest.fail(f"{where}: it waits for the dead")
        rig.path.eoi(0, 1, 0)
        assert not rig.at(1).masked, where
        heirs_of_all(rig)
        works_on(rig, where)

    each_death(prepare, lambda rig: rig.path.set_pending(0, 2), then)
    assert any(busy)


def mask_as_a_handler_does(rig: Rig) -> None:
    rig.path.mask(0, 1)
    rig.set_irq(1, rig.irq(1) & ~Irq.ENABLED | Irq.ACTIVE | Irq.EOI_PENDING)


@pytest.mark.checklist("E12", "A11.3")
def test_a_hypervisor_and_a_cpu_die_together() -> None:
    def act(rig: Rig) -> None:
        for port in (3, 4):
            rig.path.set_pending(0, port)
        rig.deliver()

    def then(rig: Rig, where: str) -> None:
        done = set(rig.unread(0))
        owed = {port for port in range(1, 6) if rig.at(port).pending or rig.irq(port) & Irq.IN_SERVICE}
        heirs_of_all(rig)
        got = rig.read(0)
        assert sorted(got) == sorted(done | owed | {1, 2}), where
        works_on(rig, where)

    each_death(lambda: machine(1, 2), act, then)


@pytest.mark.checklist("E12")
def test_a_rebuild_that_dies_anywhere_is_begun_anew() -> None:
    damage: list[Callable[[Rig], None]] = [
        lambda rig: rig.set_event_word(1, rig.word(1) & ~(Fifo.LINKED | Fifo.LINK)),     # taken out, not noted
        lambda rig: rig.set_event_word(2, rig.word(2) & ~Fifo.LINK),                     # 3 is reached by nobody
        lambda rig: rig.set_event_word(3, rig.word(3) & ~Fifo.LINKED),                   # pending, linked by nobody
    ]
    for spoil in damage:
        def prepare(spoil: Callable[[Rig], None] = spoil) -> Rig:
            rig = machine(1, 2, 3)
            spoil(rig)
            return rig

        def then(rig: Rig, where: str) -> None:
            heirs_of_all(rig)
            assert sorted(rig.unread(0)) == [1, 2, 3], where

        each_death(prepare, lambda rig: rig.path.fifo_rebuild(0, 0), then)
