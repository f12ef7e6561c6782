# SPDX-License-Identifier: Apache-2.0
"""A cpu, or the hypervisor, dies before each of its writes; its heir goes on. Nothing is lost, nothing comes twice."""

from collections.abc import Callable

import pytest

from pvbus.actors.hypervisor import recovery
from pvbus.shm import _core_explored
from pvbus.shm.layout import Domain, File, FilePage, Irq, Machine, Submission, SubmissionRing, Vcpu
from pvbus.tests.shm.rig import M32, Rig

STEPS_MAX = 400
NOTIFY, ENABLE = SubmissionRing.NOTIFY, SubmissionRing.ENABLE
ALL = 2**31


def each_death(prepare: Callable[[], Rig], act: Callable[[Rig], object], then: Callable[[Rig, str], None]) -> None:
    """Let `act` die before each of its writes, and after the last one."""
    for step in range(1, STEPS_MAX):
        rig = prepare()
        with rig.world.dying_at(step):
            act(rig)
        died = rig.world.steps == step
        then(rig, f"step {step}, {rig.world.sites[-1] if died else 'the end'}")
        if not died:
            return
    raise AssertionError(f"more than {STEPS_MAX} writes")


def receiver(cons: int = 0, size: int = 64, *, raised: int = 3) -> Rig:
    """Return a machine with ports 1..4 of one file, the first `raised` of them pending."""
    rig = Rig(_core_explored, (2,))
    rig.open(0, size=size)
    rig.virq_ports(0, 4)
    rig.place(0, cons, [])
    for port in range(1, raised + 1):
        rig.path.set_pending(0, port)
    return rig


def heir_of_the_cpu(rig: Rig) -> None:
    rig.reborn()
    rig.path.cpu_recover(0, 0)
    rig.deliver()


def settled(rig: Rig, ports: list[int], where: str) -> None:
    """Whether each of these ports stands where a served port stands, and nobody holds anything."""
    assert rig.machine.load32(Machine.file(0, File.LOCK)) == 0, where
    assert rig.machine.load64(Machine.file(0, File.CLAIM)) == 0, where
    assert rig.pages[0].load64(FilePage.PROD) == rig.machine.load64(Machine.file(0, File.PROD)), where
    for port in ports:
        assert not rig.irq(port) & Irq.IN_SERVICE, (where, port)
        assert not rig.irq(port) & Irq.ENABLED, (where, port)
        assert rig.masked(port), (where, port)
        assert not rig.pending(port), (where, port)


def still_works(rig: Rig, ports: list[int], where: str) -> None:
    """Write every port back, raise it once more: it comes once."""
    rig.read(0)
    for port in ports:
        rig.path.eoi(0, port, 0)
    rig.deliver()
    rig.read(0)
    for port in ports:
        rig.path.eoi(0, port, 0)
        rig.path.set_pending(0, port)
    rig.deliver()
    assert sorted(rig.read(0)) == ports, where


def test_the_loop_of_a_dead_cpu_has_ended_and_its_heirs_does_not_count_as_long() -> None:
    rig = Rig()
    memory = rig.domains[0].memory
    memory.store64(Domain.vcpu(0, Vcpu.LOOP_STARTED_NS), 1)
    memory.store32(Domain.vcpu(0, Vcpu.LOOP_EVENTS), 1000)
    epoch = memory.load32(Domain.vcpu(0, Vcpu.IRQ_EPOCH))

    rig.path.cpu_recover(0, 0)

    assert memory.load64(Domain.vcpu(0, Vcpu.LOOP_STARTED_NS)) == memory.load32(Domain.vcpu(0, Vcpu.LOOP_EVENTS)) == 0
    assert memory.load32(Domain.vcpu(0, Vcpu.IRQ_EPOCH)) == epoch + 1


@pytest.mark.checklist("E12", "A11.1", "A11.3")
@pytest.mark.parametrize("cons", [0, 62, M32 - 1])
def test_a_cpu_dies_anywhere_in_an_upcall_and_each_event_comes_once(cons: int) -> None:
    def then(rig: Rig, where: str) -> None:
        heir_of_the_cpu(rig)
        settled(rig, [1, 2, 3], where)
        assert sorted(rig.unread(0)) == [1, 2, 3], where
        still_works(rig, [1, 2, 3, 4], where)

    each_death(lambda: receiver(cons), lambda rig: rig.path.upcall(0, 0, 256), then)


@pytest.mark.checklist("E12")
def test_a_cpu_and_then_its_heir_die_and_each_event_comes_once() -> None:
    def then(rig: Rig, where: str) -> None:
        first, steps = where, 0
        while True:     # the heir dies, too, now here, now there: bounded by its 4,096 looks at irq words
            steps += 1
            rig.reborn()
            with rig.world.dying_at(7 * steps if steps < 6 else 0):
                rig.path.cpu_recover(0, 0)
            if steps == 6:
                break
        rig.deliver()
        settled(rig, [1, 2], first)
        assert sorted(rig.unread(0)) == [1, 2], first

    each_death(lambda: receiver(raised=2), lambda rig: rig.path.upcall(0, 0, 256), then)


@pytest.mark.checklist("E12", "A11.3")
def test_an_event_between_the_death_and_the_heir_is_seen() -> None:
    def then(rig: Rig, where: str) -> None:
        before = rig.unread(0).count(1)
        rig.path.set_pending(0, 1)
        heir_of_the_cpu(rig)
        came = rig.read(0)
        rig.path.eoi(0, 1, 0)
        rig.deliver()
        came += rig.read(0)
        assert before < came.count(1) <= 2, where
        assert came.count(2) == came.count(3) == 1, where
        still_works(rig, [1, 2, 3, 4], where)

    each_death(receiver, lambda rig: rig.path.upcall(0, 0, 256), then)


@pytest.mark.checklist("E12", "A5.4", "A11.1")
def test_a_port_written_back_between_the_death_and_the_heir_is_not_stuck() -> None:
    def then(rig: Rig, where: str) -> None:
        for port in (1, 2, 3):
            rig.path.eoi(0, port, 0)
        heir_of_the_cpu(rig)
        came = rig.unread(0)
        assert {1, 2, 3} <= set(came), where
        assert max(came.count(port) for port in (1, 2, 3)) == 1, where
        still_works(rig, [1, 2, 3, 4], where)

    each_death(receiver, lambda rig: rig.path.upcall(0, 0, 256), then)


@pytest.mark.checklist("E12", "A3.6")
def test_a_cpu_dies_while_the_ring_overflows() -> None:
    def prepare() -> Rig:
        rig = receiver(raised=1)
        rig.place(0, 3, [9] * 64)
        return rig

    def then(rig: Rig, where: str) -> None:
        heir_of_the_cpu(rig)
        settled(rig, [1], where)
        assert rig.pages[0].load64(FilePage.PROD) & FilePage.OVERFLOW, where
        assert rig.unread(0) == [9] * 64, where

    each_death(prepare, lambda rig: rig.path.upcall(0, 0, 256), then)


@pytest.mark.checklist("E12")
def test_an_heir_recovers_what_is_its_own_and_leaves_the_other_cpus_lock() -> None:
    rig = receiver(raised=1)
    rig.machine.store32(Machine.file(0, File.LOCK), 1 + 1)      # the other CPU holds it, alive
    rig.set_irq(2, rig.irq(2) | Irq.IN_SERVICE | Irq.ACTIVE | 1 << 24)

    def give_back() -> None:
        rig.machine.store32(Machine.file(0, File.LOCK), 0)

    rig.world.before["evr.lock.spin"] = give_back
    rig.reborn()
    rig.path.cpu_recover(0, 0)
    rig.path.upcall(0, 0, 256)

    assert rig.irq(2) & Irq.IN_SERVICE
    assert rig.unread(0) == [1]


# ------------------------------------------------------------------------------------------ the hypervisor


def sender() -> Rig:
    """Return a machine with handed-over work: two notifies, and a write-back of a port that has come again."""
    rig = Rig(_core_explored, (2,))
    rig.open(0)
    rig.open(1)
    rig.attach(0, 0, M32)
    rig.attach(1, 1)
    pairs = [rig.pair(1, 0) for _ in range(3)]      # file 1 sends, file 0 receives
    assert pairs == [(2, 1), (4, 3), (6, 5)]
    rig.path.set_pending(0, 5)
    rig.deliver()
    assert rig.read(0) == [5]
    rig.path.set_pending(0, 5)
    rig.submit(1, NOTIFY, 2)
    rig.submit(1, NOTIFY, 4)
    rig.submit(0, ENABLE, 5)
    return rig


def heir_of_the_hypervisor(rig: Rig) -> None:
    """A cpu ends with the hypervisor: a death between selector and upcall flag leaves a word that nobody raises again."""
    rig.reborn()
    assert recovery.repair(rig.channels, rig.irqs) == 0
    rig.path.drain(ALL)
    for vcpu in range(2):
        rig.path.cpu_recover(0, vcpu)
    rig.deliver()


@pytest.mark.checklist("E12", "A11.3")
@pytest.mark.parametrize("between", ["nothing", "served", "served and written back"])
def test_a_hypervisor_dies_anywhere_in_a_drain_and_each_notify_comes_once(between: str) -> None:
    def then(rig: Rig, where: str) -> None:
        got: list[int] = []
        if between != "nothing":
            rig.deliver()
            got = rig.read(0)
        if between == "served and written back":
            for port in set(got) & {1, 3}:
                rig.submit(0, ENABLE, port)
        heir_of_the_hypervisor(rig)
        got += rig.read(0)
        assert sorted(got) == [1, 3, 5], where
        for index, slot in ((0, 0), (1, 1)):
            head = rig.machine.load32(Machine.submission(index, Submission.HEAD))
            assert head == rig.rings[slot][0].load32(SubmissionRing.TAIL), where
            assert head == rig.rings[slot][0].load32(SubmissionRing.HEAD), where
        still_works(rig, [1, 3, 5], where)

    each_death(sender, lambda rig: rig.path.drain(ALL), then)


@pytest.mark.checklist("E12")
def test_a_hypervisor_and_a_cpu_die_together() -> None:
    def act(rig: Rig) -> None:
        rig.path.drain(ALL)
        rig.path.upcall(0, 0, 256)

    def then(rig: Rig, where: str) -> None:
        rig.reborn()
        recovery.repair(rig.channels, rig.irqs)
        rig.path.drain(ALL)
        rig.path.cpu_recover(0, 0)
        rig.deliver()
        assert sorted(rig.read(0)) == [1, 3, 5], where
        still_works(rig, [1, 3, 5], where)

    each_death(sender, act, then)


@pytest.mark.checklist("E12")
def test_a_hypervisor_dies_while_it_raises_and_the_cpu_finds_it() -> None:
    """A death between pending and the upcall flag: the CPU's heir, which starts with the hypervisor's, looks everywhere."""
    def then(rig: Rig, where: str) -> None:
        pending = rig.pending(4)
        rig.reborn()
        recovery.repair(rig.channels, rig.irqs)
        rig.path.cpu_recover(0, 0)
        rig.deliver()
        assert rig.unread(0) == ([4] if pending else []), where

    each_death(receiver_of_nothing, lambda rig: rig.path.set_pending(0, 4), then)


def receiver_of_nothing() -> Rig:
    return receiver(raised=0)


# ------------------------------------------------------------------------------------------ the file's process


@pytest.mark.checklist("A11.5", "E12")
def test_a_lock_that_a_dead_file_process_held_holds_up_nobody_once_the_file_is_dead() -> None:
    rig = receiver(raised=1)
    rig.machine.store32(Machine.file(0, File.LOCK), File.LOCK_FILE)
    rig.machine.store32(Machine.file(0, File.STATE), File.DEAD)

    assert rig.path.upcall(0, 0, 256) == (1, [])

    assert not rig.irq(1) & Irq.IN_SERVICE
    assert rig.bit(0, Domain.EVTCHN_MASK, 1)
