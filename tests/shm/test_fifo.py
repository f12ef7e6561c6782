# SPDX-License-Identifier: Apache-2.0
"""The FIFO ABI on a machine without processes: queues, priorities, masks, moves, and what has no word or no queue yet."""

from types import ModuleType

import pytest

from pvbus.actors.hypervisor import fifo, kernel
from pvbus.shm import _core_explored
from pvbus.shm.layout import PORTS_FIFO, Domain, Fifo, Irq, Port, Vcpu
from pvbus.tests.shm.rig import Rig

LAST = PORTS_FIFO - 1


def booted(rig: Rig, ports: int = 0) -> list[int]:
    """Take domain 0 to the FIFO ABI; give ports of file 0, unmasked and not pending."""
    rig.fifo()
    rig.open(0)
    return rig.virq_ports(0, ports)


def served(rig: Rig, vcpu: int = 0, budget: int = 256) -> list[int]:
    """Let one CPU serve once; give what came out of it."""
    rig.path.upcall(0, vcpu, budget)
    return rig.read(0)


def raised(rig: Rig, *ports: int) -> None:
    for port in ports:
        rig.path.set_pending(0, port)
        rig.check_links()


def tail(rig: Rig, vcpu: int, priority: int = Fifo.PRIORITY_DEFAULT) -> int:
    value: int = rig.domains[0].memory.load32(Domain.vcpu(vcpu, Vcpu.FIFO_TAIL) + 4 * priority)
    return value


# ------------------------------------------------------------------------------------------ order


@pytest.mark.checklist("X9", "A12.12")
def test_ports_of_one_priority_come_in_the_order_in_which_they_were_raised(rig: Rig) -> None:
    booted(rig, 5)
    raised(rig, 4, 1, 5, 2)

    assert rig.queues() == {(0, 7): [4, 1, 5, 2]}
    assert served(rig) == [4, 1, 5, 2]
    assert rig.queues() == {}


def test_the_most_urgent_priority_comes_first_and_each_of_the_sixteen_is_a_queue(rig: Rig) -> None:
    ports = booted(rig, 17)
    for port, priority in zip(ports, [*range(15, -1, -1), 0], strict=True):
        fifo.set_priority(rig.channels, 0, port, priority)
    raised(rig, *ports)

    assert {priority for _, priority in rig.queues()} == set(range(16))
    assert served(rig) == [16, 17, *range(15, 0, -1)]


def test_a_more_urgent_port_overtakes_a_queue_that_is_being_served(rig: Rig) -> None:
    booted(rig, 4)
    fifo.set_priority(rig.channels, 0, 4, 0)
    raised(rig, 1, 2, 3)

    assert served(rig, budget=1) == [1]
    raised(rig, 4)
    assert served(rig) == [4, 2, 3]


def test_a_budget_that_is_spent_leaves_queues_known_and_the_flag_set(rig: Rig) -> None:
    booted(rig, 6)
    fifo.set_priority(rig.channels, 0, 6, 15)
    raised(rig, 6, 1, 2, 3)

    for expected in ([1], [2], [3], [6]):
        assert rig.domains[0].memory.load8(Domain.vcpu_info(0, Domain.UPCALL_PENDING))
        assert served(rig, budget=1) == expected
        rig.check_links()
    assert rig.path.upcall(0, 0, 1) is None


def test_several_cpus_have_queues_of_their_own(rig: Rig) -> None:
    booted(rig, 4)
    for port in (2, 4):
        rig.channels.bind_vcpu(0, port, 1)
    raised(rig, 1, 2, 3, 4)

    assert rig.queues() == {(0, 7): [1, 3], (1, 7): [2, 4]}
    assert served(rig, vcpu=1) == [2, 4]
    assert served(rig, vcpu=0) == [1, 3]


# ------------------------------------------------------------------------------------------ linking


@pytest.mark.checklist("A11.3")
def test_raising_a_port_again_before_it_is_taken_out_links_it_once(rig: Rig) -> None:
    booted(rig, 2)
    raised(rig, 1, 1, 2, 1)

    assert rig.queues() == {(0, 7): [1, 2]}
    assert served(rig) == [1, 2]


def test_the_last_word_taken_out_is_linked_anew_as_the_head_even_while_it_is_the_tail(rig: Rig) -> None:
    booted(rig, 2)
    raised(rig, 1)
    assert served(rig) == [1]
    assert tail(rig, 0) == 1      # the hypervisor still takes it for the tail, which is not LINKED
    rig.path.eoi(0, 1, 0)
    raised(rig, 1)

    assert rig.queues() == {(0, 7): [1]}
    raised(rig, 2)
    assert rig.queues() == {(0, 7): [1, 2]}
    assert rig.word(2) & Fifo.LINK == 0
    assert served(rig) == [1, 2]


def test_a_tail_that_has_moved_to_another_queue_is_no_tail_any_more(rig: Rig) -> None:
    """What was linked behind a word that lies in another queue would come out on another CPU."""
    booted(rig, 3)
    raised(rig, 1)
    assert served(rig) == [1]
    rig.channels.bind_vcpu(0, 1, 1)
    rig.path.eoi(0, 1, 0)
    raised(rig, 1)
    assert tail(rig, 0) == 0
    raised(rig, 2, 3)

    assert rig.queues() == {(0, 7): [2, 3], (1, 7): [1]}


def test_a_linked_port_that_is_bound_to_another_cpu_stays_where_it_is_until_it_is_taken_out(rig: Rig) -> None:
    booted(rig, 3)
    raised(rig, 1, 2)
    rig.channels.bind_vcpu(0, 2, 1)
    raised(rig, 2, 3)

    assert rig.queues() == {(0, 7): [1, 2, 3]}
    assert served(rig) == [1, 2, 3]
    rig.path.eoi(0, 2, 0)
    raised(rig, 2)
    assert rig.queues() == {(1, 7): [2]}
    assert (served(rig, vcpu=0), served(rig, vcpu=1)) == ([], [2])


def test_a_linked_port_with_another_priority_stays_where_it_is_until_it_is_taken_out(rig: Rig) -> None:
    booted(rig, 3)
    raised(rig, 1, 2)
    fifo.set_priority(rig.channels, 0, 2, 0)
    raised(rig, 2, 3)

    assert rig.queues() == {(0, 7): [1, 2, 3]}
    assert served(rig) == [1, 2, 3]
    for port in (1, 2):
        rig.path.eoi(0, port, 0)
    raised(rig, 1, 2)
    assert rig.queues() == {(0, 7): [1], (0, 0): [2]}


def test_a_stale_head_ends_a_queue_and_the_next_raise_starts_it_anew(rig: Rig) -> None:
    booted(rig, 3)
    rig.domains[0].memory.store32(Domain.vcpu(0, Vcpu.FIFO_HEAD) + 4 * 7, 3)
    rig.domains[0].memory.store32(Domain.vcpu(0, Vcpu.FIFO_READY), 1 << 7)
    rig.domains[0].memory.store8(Domain.vcpu_info(0, Domain.UPCALL_PENDING), 1)

    assert served(rig) == []
    raised(rig, 1, 2)
    assert served(rig) == [1, 2]


# ------------------------------------------------------------------------------------------ masks


@pytest.mark.checklist("A11.3")
def test_a_masked_port_is_pending_and_not_linked_until_it_is_unmasked(rig: Rig) -> None:
    booted(rig, 1)
    rig.path.mask(0, 1)
    raised(rig, 1)

    assert rig.word(1) == Fifo.PENDING | Fifo.MASKED
    assert rig.path.upcall(0, 0, 256) is None
    rig.channels.unmask(0, 1)
    assert rig.queues() == {(0, 7): [1]}
    assert served(rig) == [1]


def test_a_port_masked_while_it_is_linked_is_taken_out_and_comes_after_the_unmask(rig: Rig) -> None:
    booted(rig, 2)
    raised(rig, 1, 2)
    rig.path.mask(0, 1)

    assert served(rig) == [2]
    assert rig.word(1) == Fifo.PENDING | Fifo.MASKED
    rig.channels.unmask(0, 1)
    assert served(rig) == [1]


def test_unmasking_a_linked_port_does_not_link_it_twice(rig: Rig) -> None:
    booted(rig, 2)
    raised(rig, 1, 2)
    rig.path.mask(0, 1)
    rig.channels.unmask(0, 1)
    rig.check_links()

    assert served(rig) == [1, 2]


@pytest.mark.checklist("A11.3", "X3")
def test_what_is_raised_from_delivery_to_write_back_comes_once_more(rig: Rig) -> None:
    booted(rig, 1)
    raised(rig, 1)
    assert served(rig) == [1]
    raised(rig, 1, 1, 1)
    assert served(rig) == []
    rig.path.eoi(0, 1, 0)
    assert served(rig) == [1]
    rig.path.eoi(0, 1, 0)
    assert served(rig) == []


def test_an_unmask_waits_while_a_word_is_busy() -> None:
    rig = Rig(_core_explored, (2,))
    booted(rig, 1)
    rig.path.mask(0, 1)
    raised(rig, 1)
    rig.set_event_word(1, rig.word(1) | Fifo.BUSY)
    rig.world.before["fifo.unmask.busy"] = lambda: rig.set_event_word(1, rig.word(1) & ~Fifo.BUSY)

    rig.channels.unmask(0, 1)

    assert "fifo.unmask.busy" not in rig.world.before     # it did spin
    assert served(rig) == [1]


def test_an_unmask_raises_nothing_that_a_cpu_has_served_since() -> None:
    rig = Rig(_core_explored, (2,))
    booted(rig, 1)
    raised(rig, 1)
    rig.path.mask(0, 1)
    came: list[int] = []
    rig.world.before["fifo.pending"] = lambda: came.extend(served(rig))  # unmasked by now, and still linked

    rig.channels.unmask(0, 1)

    assert came == [1]
    assert not rig.word(1) & Fifo.PENDING


# ------------------------------------------------------------------------------------------ a link and the CPU


@pytest.mark.checklist("E12")
@pytest.mark.parametrize("meanwhile", ["masked", "masked twice over", "taken out"])
def test_a_tail_that_changes_while_it_is_linked_to_is_held_still_or_left(meanwhile: str) -> None:
    rig = Rig(_core_explored, (2,))
    booted(rig, 3)
    raised(rig, 1)

    def act() -> None:
        if meanwhile == "taken out":
            assert served(rig) == [1]
            return
        rig.path.mask(0, 1)
        if meanwhile == "masked twice over":
            rig.world.before["fifo_link"] = lambda: rig.path.clear_pending(0, 1)

    rig.world.before["fifo_link"] = act
    raised(rig, 2)

    assert rig.queues() == {(0, 7): [2] if meanwhile == "taken out" else [1, 2]}
    assert served(rig) == [2]


def test_a_cpu_that_takes_out_the_last_word_sees_what_is_linked_behind_it_before_its_exchange() -> None:
    rig = Rig(_core_explored, (2,))
    booted(rig, 3)
    raised(rig, 1)

    def link_behind_it() -> None:
        rig.path.set_pending(0, 2)

    rig.world.before["fifo_link"] = link_behind_it
    assert served(rig) == [1, 2]
    rig.check_links()


# ------------------------------------------------------------------------------------------ without a word, or a control block


@pytest.mark.checklist("X8")
def test_a_port_raised_before_it_has_a_word_comes_when_the_array_is_expanded(rig: Rig) -> None:
    booted(rig)
    far = [rig.channels.bind_ipi(0, 0) for _ in range(1025)][-1]
    assert far == 1025
    assert rig.at(far).word is None
    rig.channels.send(0, far)

    assert rig.at(far).pending
    assert rig.queues() == {}
    rig.bind(0, far)       # gives it a word, then unmasks it
    assert served(rig) == [far]


@pytest.mark.checklist("A11.4")
def test_a_port_that_was_raised_early_and_closed_is_not_pending_when_it_is_handed_out_again(rig: Rig) -> None:
    booted(rig)
    port = [rig.channels.bind_ipi(0, 0) for _ in range(1025)][-1]
    rig.channels.send(0, port)
    rig.channels.close(0, port)
    kernel.give_word(rig.channels, 0, port)

    assert not rig.at(port).pending
    assert rig.channels.alloc_unbound(0, 0, 0) == port
    rig.bind(0, port)
    assert served(rig) == []


def test_a_port_whose_cpu_has_no_control_block_is_dropped_and_counted(core: ModuleType) -> None:
    rig = Rig(core, (2,))
    memory = rig.domains[0].memory
    fifo.init_control(rig.channels, 0, 0, 0, 0)
    kernel.give_word(rig.channels, 0, 1)
    rig.open(0)
    rig.virq_ports(0, 1)
    rig.channels.bind_vcpu(0, 1, 1)

    assert rig.path.set_pending(0, 1) == -1

    assert not rig.word(1) & Fifo.LINKED
    if core is not _core_explored:     # statistics are no accesses of the explored core
        assert memory.load64(Domain.vcpu(1, Vcpu.FIFO_DROPPED)) == 1
    rig.channels.bind_vcpu(0, 1, 0)
    rig.path.set_pending(0, 1)
    assert served(rig) == [1]
    rig.close()


@pytest.mark.checklist("X8", "A12.13")
def test_the_highest_port_is_raised_linked_and_served_as_any(rig: Rig) -> None:
    booted(rig, 2)
    memory = rig.domains[0].memory
    memory.store64(Domain.table(Domain.PORT_WORDS, LAST), Port.pack(Port.IPI, vcpu=1))
    memory.store32(Domain.VALID_EVTCHNS, PORTS_FIFO)
    memory.store32(Domain.ARRAY + 4 * 127, memory.load32(Domain.ARRAY) + 1)   # the last page, without the 126 before it
    memory.store32(Domain.ARRAY_PAGES, 128)
    rig.bind(0, LAST)
    rig.channels.bind_vcpu(0, 1, 1)
    rig.channels.bind_vcpu(0, 2, 1)
    for port in (1, LAST, 2):
        rig.path.set_pending(0, port)

    assert rig.queues() == {(1, 7): [1, LAST, 2]}
    assert served(rig, vcpu=1) == [1, LAST, 2]


# ------------------------------------------------------------------------------------------ the switch


@pytest.mark.checklist("X8")
def test_what_was_pending_on_the_2_level_abi_is_pending_on_the_fifo_abi(rig: Rig) -> None:
    rig.open(0)
    ports = [rig.channels.alloc_unbound(0, 0, 0) for _ in range(3)]
    rig.path.set_pending(0, 2)
    kernel.boot(rig.channels, 0, abi="fifo")
    assert [rig.at(port).pending for port in ports] == [False, True, False]

    for port in ports:
        rig.bind(0, port)

    assert served(rig) == [2]


def test_a_linked_number_is_not_handed_out_again_until_a_cpu_has_taken_it_out(rig: Rig) -> None:
    """Zoo 29: a port used anew while it is linked carries its old place in a queue into its new life."""
    booted(rig, 3)
    raised(rig, 1, 2)
    rig.irqs.disable(0, 1)
    rig.irqs.unbind(0, 1)

    assert rig.irqs.is_linked(0, 1)
    assert rig.channels.alloc_unbound(0, 0, 0) == 4
    assert served(rig) == [2]
    assert rig.channels.alloc_unbound(0, 0, 0) == 1
    assert rig.word(1) == Fifo.MASKED
    assert not rig.irq(1) & Irq.SLOT


def test_a_number_handed_out_again_has_the_default_priority(rig: Rig) -> None:
    booted(rig, 2)
    fifo.set_priority(rig.channels, 0, 1, 0)
    rig.irqs.disable(0, 1)
    rig.irqs.unbind(0, 1)

    assert rig.bind(0, rig.channels.alloc_unbound(0, 0, 0)) == 1
    raised(rig, 2, 1)
    assert rig.queues() == {(0, 7): [2, 1]}
