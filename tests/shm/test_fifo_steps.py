# SPDX-License-Identifier: Apache-2.0
"""The FIFO ABI step by step: what a raise does to the event word and its queue, and what heirs make of half a step."""

from types import ModuleType

import pytest

from pvbus.actors.hypervisor import kernel
from pvbus.shm import _core_explored, channel
from pvbus.shm.layout import Domain, Fifo, File, Irq, Machine, Vcpu
from pvbus.tests.shm.rig import CORES, Rig
from pvbus.tests.shm.test_heirs import each_death

PORTS = [1, 2, 3]


def receiver(core: ModuleType = _core_explored, *, cpus: int = 2, raised: int = 0) -> Rig:
    """Return a FIFO machine with ports 1..3 of one file on vCPU 0, the first `raised` of them pending."""
    rig = Rig(core, (cpus,))
    kernel.boot(rig.channels, 0, abi="fifo")
    rig.open(0)
    rig.virq_ports(0, len(PORTS))
    for port in PORTS[:raised]:
        rig.path.set_pending(0, port)
    return rig


def tail(rig: Rig, vcpu: int) -> int:
    at = Domain.vcpu(vcpu, Vcpu.FIFO_TAIL) + 4 * Fifo.PRIORITY_DEFAULT
    return int(rig.domains[0].memory.load32(at))


def heirs(rig: Rig) -> None:
    """Let the hypervisor's heir rebuild the queues of CPUs that do not run, and theirs look."""
    rig.reborn()
    for vcpu in range(2):
        rig.path.fifo_rebuild(0, vcpu)
        rig.path.cpu_recover(0, vcpu)


@pytest.mark.parametrize("core", CORES)
def test_a_raise_links_at_once_what_is_not_masked(core: ModuleType) -> None:
    rig = receiver(core, raised=2)
    memory = rig.domains[0].memory
    assert channel.state(memory, 1) == (True, False, True, Fifo.PENDING | Fifo.LINKED | 2)
    assert channel.state(memory, 2) == (True, False, True, Fifo.PENDING | Fifo.LINKED)
    assert tail(rig, 0) == 2


@pytest.mark.parametrize("core", CORES)
def test_a_masked_port_is_linked_when_it_is_unmasked(core: ModuleType) -> None:
    rig = receiver(core)
    memory = rig.domains[0].memory
    rig.path.mask(0, 1)
    rig.path.set_pending(0, 1)
    assert channel.state(memory, 1) == (True, True, False, Fifo.PENDING | Fifo.MASKED)
    rig.path.unmask(0, 1)
    assert channel.state(memory, 1) == (True, False, True, Fifo.PENDING | Fifo.LINKED)
    rig.deliver()
    assert rig.read(0) == [1]


@pytest.mark.parametrize("core", CORES)
def test_the_handler_masks_and_clears_in_one_step(core: ModuleType) -> None:
    rig = receiver(core, raised=1)
    rig.deliver()
    assert channel.state(rig.domains[0].memory, 1) == (False, True, False, Fifo.MASKED)
    rig.path.set_pending(0, 1)
    rig.deliver()
    assert rig.read(0) == [1]
    rig.path.eoi(0, 1, 0)
    rig.deliver()
    assert rig.read(0) == [1]


@pytest.mark.parametrize("core", CORES)
def test_a_raise_without_a_control_block_is_dropped_and_counted(core: ModuleType) -> None:
    rig = receiver(core)
    memory = rig.domains[0].memory
    memory.store32(Domain.vcpu(0, Vcpu.CONTROL), 0)
    rig.path.set_pending(0, 1)
    assert channel.state(memory, 1) == (True, False, False, Fifo.PENDING)
    if core is not _core_explored:  # counters are no accesses there
        assert memory.load64(Domain.vcpu(0, Vcpu.FIFO_DROPPED)) == 1


@pytest.mark.parametrize("core", CORES)
def test_nothing_is_linked_behind_a_port_that_has_moved_to_another_queue(core: ModuleType) -> None:
    rig = receiver(core, raised=1)
    rig.deliver()
    rig.path.eoi(0, 1, 0)
    assert tail(rig, 0) == 1  # it has left the queue, and the hypervisor has not looked since
    rig.irqs.set_affinity(0, 1, 1)
    rig.path.set_pending(0, 1)
    assert (tail(rig, 0), tail(rig, 1)) == (0, 1)
    rig.path.set_pending(0, 2)
    assert (tail(rig, 0), tail(rig, 1)) == (2, 1)
    rig.deliver()
    assert sorted(rig.read(0)) == [1, 1, 2]


@pytest.mark.parametrize("core", CORES)
def test_a_port_that_is_its_queues_old_tail_begins_it_anew(core: ModuleType) -> None:
    rig = receiver(core)
    for _ in range(3):
        rig.path.set_pending(0, 1)
        rig.deliver()
        assert rig.read(0) == [1]
        rig.path.eoi(0, 1, 0)
        assert tail(rig, 0) == 1


def _each_comes_once(rig: Rig, where: str) -> None:
    assert rig.machine.load32(Machine.file(0, File.LOCK)) == 0, where
    assert sorted(rig.read(0)) == PORTS, where
    for turn in range(2):
        for port in PORTS:
            assert not rig.irq(port) & (Irq.IN_SERVICE | Irq.ENABLED), (where, turn, port)
            rig.path.eoi(0, port, 0)
            rig.path.set_pending(0, port)
        rig.deliver()
        assert sorted(rig.read(0)) == PORTS, (where, turn)


@pytest.mark.checklist("E12", "A11.3")
def test_a_hypervisor_that_dies_within_a_raise_leaves_its_heir_a_queue_to_go_on_with() -> None:
    def raise_all(rig: Rig) -> None:
        for port in PORTS:
            rig.path.set_pending(0, port)

    def then(rig: Rig, where: str) -> None:
        heirs(rig)
        raise_all(rig)  # the heir repeats the entry that its forerunner had claimed
        rig.deliver()
        _each_comes_once(rig, where)

    each_death(receiver, raise_all, then)


@pytest.mark.checklist("E12", "A11.3")
def test_a_hypervisor_that_dies_within_a_raise_of_a_moved_port_loses_nothing() -> None:
    def prepare() -> Rig:
        rig = receiver(raised=1)
        rig.deliver()
        rig.read(0)
        rig.path.eoi(0, 1, 0)
        rig.irqs.set_affinity(0, 1, 1)
        return rig

    def raise_all(rig: Rig) -> None:
        for port in PORTS:
            rig.path.set_pending(0, port)

    def then(rig: Rig, where: str) -> None:
        heirs(rig)
        raise_all(rig)
        rig.deliver()
        _each_comes_once(rig, where)

    each_death(prepare, raise_all, then)


@pytest.mark.checklist("E12", "A11.1")
def test_a_cpu_that_dies_within_an_upcall_leaves_nothing_behind_that_does_not_come() -> None:
    def then(rig: Rig, where: str) -> None:
        heirs(rig)
        rig.deliver()
        _each_comes_once(rig, where)

    each_death(lambda: receiver(raised=3), lambda rig: rig.path.upcall(0, 0, 256), then)


@pytest.mark.checklist("E12", "A11.3")
def test_an_end_of_interrupt_that_dies_half_way_is_ended_by_the_heir() -> None:
    def prepare() -> Rig:
        rig = receiver(raised=3)
        rig.deliver()
        rig.read(0)
        for port in PORTS:
            rig.path.set_pending(0, port)  # while it is masked
        return rig

    def end_all(rig: Rig) -> None:
        for port in PORTS:
            rig.path.eoi(0, port, 0)

    def then(rig: Rig, where: str) -> None:
        heirs(rig)
        for port in PORTS:
            if rig.irq(port) & Irq.ENABLED:  # ended, and perhaps not yet unmasked: so the hypervisor's heir does (recovery.py)
                rig.path.unmask(0, port, 1)
            rig.path.eoi(0, port, 0)
        rig.deliver()
        _each_comes_once(rig, where)

    each_death(prepare, end_all, then)
