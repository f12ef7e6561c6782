# SPDX-License-Identifier: Apache-2.0
"""The hypervisor dies before each write of each call; its heir repairs what it finds, and the tables agree again."""

from collections.abc import Callable, Iterator
from typing import Any

import pytest

from pvbus.actors.hypervisor import calls, kernel, recovery
from pvbus.shm import _core_explored
from pvbus.shm.layout import NR_VIRQS, Domain, Irq, Port, Vcpu
from pvbus.tests.shm.rig import Rig

SELF = 0x7FF0
STEPS_MAX = 300
BOUND = (Port.UNBOUND, Port.INTERDOMAIN, Port.VIRQ, Port.IPI)


def machine() -> Rig:
    """Return a machine with a kernel, two connected files, an unbound port of each, and a VIRQ."""
    rig = Rig(_core_explored, (2, 1))
    kernel.boot(rig.channels, 0, kernel_ports=2, kernel_virqs=[0])
    rig.open(0)
    rig.open(1)
    rig.pair(0, 1)
    for slot in (0, 1):
        rig.bind(slot, rig.channels.alloc_unbound(0, SELF, 0))
    rig.bind(0, rig.channels.bind_virq(0, 2, 0))
    return rig


def words(rig: Rig) -> Iterator[tuple[int, int, tuple[int, int, int, int], int]]:
    for domid in rig.domains:
        for port, word in rig.channels.ports(domid):
            yield domid, port, Port.unpack(word), rig.irq(port, domid)


def disagreements(rig: Rig) -> list[str]:
    """Return what no sound machine has: half connections, ports of nobody, a VIRQ that leads elsewhere, a stuck port."""
    found, virqs = [], set()
    for domid, port, (state, remote_domain, remote, vcpu), irq in words(rig):
        where = f"{domid}:{port}"
        if state == Port.INTERDOMAIN:
            back = Port.unpack(rig.channels.word(remote_domain, remote))
            if back[:3] != (Port.INTERDOMAIN, domid, port):
                found.append(f"{where} is connected to one who is not connected to it")
        if state == Port.VIRQ:
            virqs.add((domid, remote, port))
        if state in BOUND and not irq & (Irq.SLOT | Irq.KERNEL):
            found.append(f"{where} is nobody's")
        if irq & Irq.SLOT and not irq & (Irq.REASONS | Irq.IN_SERVICE):
            served_by = [v for v in range(rig.domains[domid].vcpus)
                         if rig.bit(domid, Domain.vcpu(v, Vcpu.EVTCHN_MASK), port)]
            if rig.masked(port, domid) or served_by != [vcpu]:
                found.append(f"{where} is masked without a reason, or served by {served_by}")
    in_map = {
        (domid, virq, port) for domid, state in rig.domains.items() for virq in range(NR_VIRQS)
        for vcpu in range(state.vcpus) if (port := state.memory.load32(Domain.virq(vcpu, virq)))
    }
    return found + [f"VIRQ {entry}" for entry in in_map ^ virqs]


def drive(steps: Any) -> int:
    try:
        while True:
            next(steps)
    except StopIteration as stop:
        value: int = stop.value
        return value


def take_apart(rig: Rig, port: int) -> None:
    rig.irqs.disable(0, port)
    rig.irqs.unbind(0, port)


CALLS: dict[str, Callable[[Rig], object]] = {
    "alloc_unbound": lambda rig: rig.channels.alloc_unbound(0, SELF, 1),
    "bind_interdomain": lambda rig: rig.channels.bind_interdomain(0, 0, 5),
    "bind_virq": lambda rig: rig.channels.bind_virq(0, 3, 0),
    "bind_ipi": lambda rig: rig.channels.bind_ipi(0, 1),
    "bind_vcpu": lambda rig: rig.irqs.assign(0, 5, 1),
    "close, connected": lambda rig: take_apart(rig, 3),
    "close, VIRQ": lambda rig: take_apart(rig, 7),
    "unbind": lambda rig: drive(calls.unbind_irq(rig.irqs, 0, 1, 3)),
    "release": lambda rig: drive(calls.release(rig.irqs, 0, 0)),
    "bind": lambda rig: rig.irqs.bind(0, rig.channels.alloc_unbound(0, SELF, 0), 1, static=False),
    "bind, born pending": lambda rig: rig.irqs.bind(0, rig.channels.bind_interdomain(0, 0, 5), 1, static=False),
}


def test_the_machine_of_these_tests_is_sound() -> None:
    assert disagreements(machine()) == []


@pytest.mark.parametrize("plant", ["peer", "nobody's", "virq", "masked"])
def test_a_planted_disagreement_is_seen(plant: str) -> None:
    rig = machine()
    if plant == "peer":
        rig.channels._set_word(0, 4, Port.pack(Port.UNBOUND))
    elif plant == "nobody's":
        rig.channels.alloc_unbound(0, SELF, 0)
    elif plant == "virq":
        rig.domains[0].memory.store32(Domain.virq(0, 2), 0)
    else:
        rig.set_bit(0, Domain.EVTCHN_MASK, 5)

    assert len(disagreements(rig)) == 1


@pytest.mark.checklist("E12")
@pytest.mark.parametrize("name", CALLS)
def test_a_hypervisor_dies_anywhere_in_a_call_and_the_tables_agree_again(name: str) -> None:
    for step in range(1, STEPS_MAX):
        rig = machine()
        before = {(domid, port): word for domid, port, word, _ in words(rig)}
        with rig.world.dying_at(step):
            CALLS[name](rig)
        died = rig.world.steps == step
        where = f"step {step}, {rig.world.sites[-1:]}"

        rig.reborn()
        recovery.repair(rig.channels, rig.irqs)

        if name in ("release", "unbind") or name.startswith("close"):
            CALLS[name](rig)        # the file's process, or the hang-up of its door, asks again
        after = {(domid, port): word for domid, port, word, _ in words(rig)}
        assert disagreements(rig) == [], where
        touched = set(before.items()) ^ set(after.items())
        assert {port for (_, port), _ in touched} <= {3, 4, 5, 7, 8}, where
        if not died:
            return
    raise AssertionError(f"more than {STEPS_MAX} writes")


@pytest.mark.checklist("E12")
def test_an_heir_repeats_what_it_finds_and_leaves_what_is_in_order() -> None:
    rig = machine()
    before = list(words(rig))

    for _ in range(2):
        rig.reborn()
        assert recovery.repair(rig.channels, rig.irqs) == 0

    assert list(words(rig)) == before


def test_a_port_that_was_handed_out_and_never_bound_is_closed() -> None:
    rig = machine()
    port = rig.channels.alloc_unbound(0, SELF, 0)
    half = rig.channels.bind_interdomain(0, 0, port)

    rig.reborn()

    assert recovery.repair(rig.channels, rig.irqs) == 2
    assert [rig.channels.status(0, SELF, each).status for each in (port, half)] == [0, 0]


@pytest.mark.parametrize("reason", [Irq.EXPLICIT, Irq.TEMPORARY, Irq.EOI_PENDING])
def test_a_port_with_a_reason_stays_masked(reason: int) -> None:
    rig = machine()
    rig.set_irq(5, rig.irq(5) | reason)
    rig.set_bit(0, Domain.EVTCHN_MASK, 5)

    rig.reborn()
    recovery.repair(rig.channels, rig.irqs)

    assert rig.masked(5)


@pytest.mark.checklist("E12", "A11.3")
def test_an_unmask_that_was_half_done_raises_the_port_and_rings_its_cpu() -> None:
    rig = machine()
    rig.deliver()
    rig.read(0)
    rig.set_bit(0, Domain.EVTCHN_MASK, 5)
    rig.path.set_pending(0, 5)
    rig.path.cpu_may_sleep(0, 0)

    rig.reborn()
    recovery.repair(rig.channels, rig.irqs)

    assert rig.kicks == [(0, 0)]
    rig.deliver()
    assert rig.unread(0) == [5]


def test_a_dead_rig_executes_nothing_further() -> None:
    rig = machine()
    ran = []
    with rig.world.dying_at(1):
        ran.append("before")
        rig.channels.alloc_unbound(0, SELF, 0)
        ran.append("behind")

    assert ran == ["before"]
    assert disagreements(rig) == []
