# SPDX-License-Identifier: Apache-2.0
"""The late end of an interrupt (X3): at once, or put off: a storm, a count of spurious ones. On a clock that the test moves."""

from types import ModuleType

import pytest

from pvbus.actors.hypervisor import recovery
from pvbus.shm import _core, _core_explored
from pvbus.shm.layout import TICK_NS, Domain, Irq, Machine, Vcpu
from pvbus.shm.memory import now_ns
from pvbus.tests.shm.rig import Rig
from pvbus.tests.shm.test_heirs import each_death

S = 1_000_000_000
ABIS = ["fifo", "2-level"]


@pytest.fixture(params=ABIS)
def rig(request: pytest.FixtureRequest) -> Rig:
    return made(request.param)


def made(abi: str, core: ModuleType = _core, ports: int = 4) -> Rig:
    """Return a machine with ports 1.. of one file, bound on vCPU 0."""
    rig = Rig(core, (2,))
    if abi == "fifo":
        rig.fifo()
    rig.open(0)
    rig.virq_ports(0, ports)
    return rig


def advance(rig: Rig, ns: int) -> None:
    rig.machine.store64(Machine.CLOCK_OFFSET_NS, rig.machine.load64(Machine.CLOCK_OFFSET_NS) + ns)


def clock(rig: Rig) -> int:
    offset: int = rig.machine.load64(Machine.CLOCK_OFFSET_NS)
    return now_ns() + offset


def delivered(rig: Rig, port: int) -> None:
    """Raise a port and read it: it waits for its write-back."""
    rig.path.set_pending(0, port)
    rig.deliver()
    assert rig.read(0) == [port]
    assert rig.path.upcall(0, 0, 256) is None       # the loop has ended


def waits(rig: Rig, port: int) -> bool:
    return bool(rig.irq(port) & Irq.DELAYED)


def due_in(rig: Rig, port: int) -> int:
    """Give how long a port's late EOI still waits."""
    at: int = rig.domains[0].memory.load64(Domain.table(Domain.EOI_AT, port))
    return at - clock(rig)


def spurious(rig: Rig, port: int) -> int:
    """Deliver a port, and write it back as spurious; give by how many ns its EOI was put off, 0 when it was not."""
    delivered(rig, port)
    before = clock(rig)
    rig.path.eoi(0, port, 0, 1)
    if not waits(rig, port):
        return 0
    at: int = rig.domains[0].memory.load64(Domain.table(Domain.EOI_AT, port))
    after = clock(rig)
    assert 0 < rig.domains[0].memory.load64(Domain.EOI_NEXT_NS) <= at
    ticks = [d for d in (*(TICK_NS << n for n in range(9)), S) if before + d <= at <= after + d]
    assert len(ticks) == 1, (before, at, after)
    return ticks[0]


def is_over(rig: Rig, port: int) -> bool:
    """Whether the port is enabled, unmasked, and waits for nothing."""
    return not rig.irq(port) & (Irq.ACTIVE | Irq.REASONS | Irq.DELAYED) and not rig.at(port).masked


# ------------------------------------------------------------------------------------------ spurious


@pytest.mark.checklist("X3")
def test_each_spurious_one_above_the_threshold_doubles_the_delay_up_to_a_second(rig: Rig) -> None:
    delays = []
    for _ in range(13):
        delays.append(spurious(rig, 1))
        advance(rig, 2 * S)
        assert rig.path.expire() == []
        assert is_over(rig, 1)

    assert delays == [0, *(TICK_NS << n for n in range(8)), S, S, S, S]


@pytest.mark.checklist("X3")
def test_one_that_is_not_spurious_begins_the_count_anew(rig: Rig) -> None:
    assert [spurious(rig, 1) for _ in range(2)] == [0, TICK_NS]
    advance(rig, S)
    rig.path.expire()
    delivered(rig, 1)
    rig.path.eoi(0, 1, 0)
    assert is_over(rig, 1)

    assert [spurious(rig, 1) for _ in range(2)] == [0, TICK_NS]


@pytest.mark.checklist("X3")
def test_each_port_counts_for_itself_and_a_new_handler_from_zero(rig: Rig) -> None:
    assert [spurious(rig, 1) for _ in range(2)] == [0, TICK_NS]
    assert spurious(rig, 2) == 0
    rig.irqs.disable(0, 1)
    rig.irqs.unbind(0, 1)
    assert rig.bind(0, rig.channels.alloc_unbound(0, 0, 0)) == 1

    assert [spurious(rig, 1) for _ in range(2)] == [0, TICK_NS]


@pytest.mark.checklist("X3")
def test_what_is_raised_while_the_eoi_waits_comes_when_it_takes_place(rig: Rig) -> None:
    assert [spurious(rig, 1) for _ in range(2)] == [0, TICK_NS]
    rig.path.set_pending(0, 1)
    assert rig.path.upcall(0, 0, 256) is None
    assert rig.path.expire() == []
    assert waits(rig, 1)
    assert rig.path.cpu_may_sleep(0, 0)

    advance(rig, TICK_NS)

    assert rig.path.expire() == [0]     # its CPU sleeps: domain 0, vCPU 0
    assert is_over(rig, 1)
    rig.deliver()
    assert rig.read(0) == [1]


# ------------------------------------------------------------------------------------------ no-ops


@pytest.mark.checklist("X3", "A5.5")
def test_one_that_waits_already_and_one_that_is_nobody_s_are_left_alone(rig: Rig) -> None:
    assert [spurious(rig, 1) for _ in range(2)] == [0, TICK_NS]
    irq, at = rig.irq(1), due_in(rig, 1)

    for spurious_too in (0, 1):
        assert rig.path.eoi(0, 1, 0, spurious_too) == -1      # on the delayed list
        assert rig.path.eoi(0, 9, 0, spurious_too) == -1      # no handler
        assert rig.path.eoi(0, 2, 1, spurious_too) == -1      # another file's
        assert rig.path.eoi(0, 2, 0, spurious_too) == -1      # enabled
    assert rig.irq(1) == irq
    assert due_in(rig, 1) <= at
    advance(rig, TICK_NS)
    rig.path.expire()
    assert spurious(rig, 1) == 2 * TICK_NS      # nothing of the above was counted


# ------------------------------------------------------------------------------------------ storms


def storm(rig: Rig, port: int, ticks: float) -> None:
    """Have an upcall loop that has served 256 events for `ticks` go on with `port`."""
    vcpu = rig.domains[0].memory
    vcpu.store64(Domain.vcpu(0, Vcpu.LOOP_STARTED_NS), clock(rig))
    vcpu.store32(Domain.vcpu(0, Vcpu.LOOP_EVENTS), 256)
    advance(rig, int(ticks * TICK_NS))
    rig.path.set_pending(0, port)
    served = rig.path.upcall(0, 0, 256)
    assert served is not None
    assert served[0] == 1
    assert rig.read(0) == [port]


@pytest.mark.checklist("X3")
def test_a_loop_is_counted_from_its_first_upcall_to_the_one_that_finds_nothing(rig: Rig) -> None:
    memory = rig.domains[0].memory
    epoch = memory.load32(Domain.vcpu(0, Vcpu.IRQ_EPOCH))
    for port in (1, 2):
        rig.path.set_pending(0, port)
        rig.path.upcall(0, 0, 256)
    assert memory.load32(Domain.vcpu(0, Vcpu.LOOP_EVENTS)) == 2
    assert memory.load64(Domain.vcpu(0, Vcpu.LOOP_STARTED_NS)) != 0

    assert rig.path.upcall(0, 0, 256) is None

    assert memory.load32(Domain.vcpu(0, Vcpu.IRQ_EPOCH)) == epoch + 1
    assert memory.load32(Domain.vcpu(0, Vcpu.LOOP_EVENTS)) == 0
    assert memory.load64(Domain.vcpu(0, Vcpu.LOOP_STARTED_NS)) == 0


@pytest.mark.checklist("X3")
def test_what_a_loop_that_runs_too_long_delivers_is_put_off_by_ten_ticks(rig: Rig) -> None:
    storm(rig, 1, 3)
    rig.path.eoi(0, 1, 0)

    assert waits(rig, 1)
    assert 9 * TICK_NS < due_in(rig, 1) <= 10 * TICK_NS
    assert rig.path.expire() == []
    assert waits(rig, 1)
    advance(rig, 10 * TICK_NS)
    rig.path.expire()
    assert is_over(rig, 1)


@pytest.mark.checklist("X3")
def test_an_eoi_of_a_loop_that_has_ended_takes_place_at_once(rig: Rig) -> None:
    storm(rig, 1, 3)
    assert rig.path.upcall(0, 0, 256) is None
    rig.path.eoi(0, 1, 0)

    assert is_over(rig, 1)


@pytest.mark.checklist("X3")
def test_an_eoi_that_comes_when_the_ten_ticks_are_over_takes_place_at_once(rig: Rig) -> None:
    storm(rig, 1, 3)
    advance(rig, 10 * TICK_NS)
    rig.path.eoi(0, 1, 0)

    assert is_over(rig, 1)


@pytest.mark.checklist("X3")
@pytest.mark.parametrize("short", ["in time", "in events"])
def test_a_short_loop_puts_nothing_off(rig: Rig, short: str) -> None:
    memory = rig.domains[0].memory
    memory.store64(Domain.vcpu(0, Vcpu.LOOP_STARTED_NS), clock(rig))
    memory.store32(Domain.vcpu(0, Vcpu.LOOP_EVENTS), 256 if short == "in time" else 255)
    advance(rig, 0 if short == "in time" else 100 * TICK_NS)
    rig.path.set_pending(0, 1)
    rig.path.upcall(0, 0, 256)
    rig.path.eoi(0, 1, 0)

    assert is_over(rig, 1)


@pytest.mark.checklist("X3")
def test_a_spurious_one_of_a_long_loop_waits_for_its_own_delay(rig: Rig) -> None:
    for _ in range(9):
        spurious(rig, 1)
        advance(rig, 2 * S)
        rig.path.expire()
    storm(rig, 1, 3)
    rig.path.eoi(0, 1, 0, 1)

    assert waits(rig, 1)
    assert 0.9 * S < due_in(rig, 1) <= S


# ------------------------------------------------------------------------------------------ waiting


@pytest.mark.checklist("X3", "X5")
def test_a_port_unbound_while_it_waits_is_forgotten_and_its_next_handler_is_not_touched(rig: Rig) -> None:
    assert [spurious(rig, 1) for _ in range(2)] == [0, TICK_NS]
    rig.irqs.disable(0, 1)
    rig.irqs.unbind(0, 1)
    assert rig.bind(0, rig.channels.alloc_unbound(0, 0, 0)) == 1
    delivered(rig, 1)
    irq = rig.irq(1)
    assert irq & (Irq.ACTIVE | Irq.EOI_PENDING)

    advance(rig, S)

    assert rig.path.expire() == []
    assert rig.irq(1) == irq
    assert rig.at(1).masked
    assert rig.domains[0].memory.load64(Domain.EOI_NEXT_NS) == 0


@pytest.mark.checklist("X3")
def test_only_what_is_due_takes_place_and_the_rest_is_looked_for_when_it_is(rig: Rig) -> None:
    for port, times in ((1, 4), (2, 2), (3, 3)):
        for _ in range(times - 1):
            spurious(rig, port)
            advance(rig, 2 * S)
            rig.path.expire()
    for port, delay in ((1, 4 * TICK_NS), (2, TICK_NS), (3, 2 * TICK_NS)):
        delivered(rig, port)
        rig.path.eoi(0, port, 0, 1)
        assert waits(rig, port)
        assert delay - TICK_NS / 2 < due_in(rig, port) <= delay
    for port in (1, 2, 3):
        rig.path.set_pending(0, port)

    came = []
    while rig.domains[0].memory.load64(Domain.EOI_NEXT_NS):
        advance(rig, max(0, rig.domains[0].memory.load64(Domain.EOI_NEXT_NS) - clock(rig)))
        rig.path.expire()
        rig.deliver()
        came += rig.read(0)

    assert came == [2, 3, 1]


@pytest.mark.checklist("X3")
def test_each_sleeping_cpu_is_rung_once_and_one_that_is_awake_is_not() -> None:
    rig = made("fifo")
    rig.channels.bind_vcpu(0, 3, 1)
    for port in (1, 2, 3):
        assert spurious(rig, port) == 0
        assert spurious(rig, port) == TICK_NS
        rig.path.set_pending(0, port)
    assert rig.path.cpu_may_sleep(0, 0)
    advance(rig, S)

    assert rig.path.expire() == [0]

    rig.deliver()
    assert sorted(rig.read(0)) == [1, 2, 3]


@pytest.mark.checklist("X3")
def test_a_disabled_port_stays_masked_when_its_eoi_takes_place(rig: Rig) -> None:
    assert [spurious(rig, 1) for _ in range(2)] == [0, TICK_NS]
    rig.irqs.disable(0, 1)
    advance(rig, S)
    rig.path.expire()

    assert not rig.irq(1) & (Irq.DELAYED | Irq.ACTIVE | Irq.EOI_PENDING)
    assert rig.at(1).masked


# ------------------------------------------------------------------------------------------ deaths


def deferred(abi: str) -> Rig:
    """Return a machine whose port 1 was delivered by a loop that ran too long, and was raised again. The clock stands still."""
    rig = made(abi, _core_explored)
    rig.path.set_pending(0, 1)
    rig.deliver()
    assert rig.read(0) == [1]
    rig.path.set_pending(0, 1)
    memory = rig.domains[0].memory
    rig.set_irq(1, rig.irq(1) | Irq.DEFER)
    memory.store64(Domain.table(Domain.EOI_AT, 1), 10 * TICK_NS)
    memory.store64(Domain.table(Domain.EOI_WORDS, 1), memory.load32(Domain.vcpu(0, Vcpu.IRQ_EPOCH)) << 32)
    return rig


def heir(rig: Rig) -> None:
    rig.reborn()
    recovery.repair(rig.channels, rig.irqs)
    for vcpu in range(2):
        rig.path.fifo_rebuild(0, vcpu)
        rig.path.cpu_recover(0, vcpu)


@pytest.mark.checklist("X3", "E12")
@pytest.mark.parametrize("abi", ABIS)
def test_a_hypervisor_dies_anywhere_while_it_puts_an_eoi_off(abi: str) -> None:
    def then(rig: Rig, where: str) -> None:
        heir(rig)
        rig.path.eoi(0, 1, 0)       # the entry of the submission ring is executed again
        assert waits(rig, 1), where
        rig.deliver()
        assert rig.read(0) == [], where
        assert rig.domains[0].memory.load64(Domain.EOI_NEXT_NS) in (1, 10 * TICK_NS), where

    each_death(lambda: deferred(abi), lambda rig: rig.path.eoi(0, 1, 0), then)


@pytest.mark.checklist("X3", "E12")
def test_a_port_on_the_list_whose_irq_word_says_nothing_of_it_is_only_a_look_too_many(rig: Rig) -> None:
    """A death between the list and the irq word; the entry is executed again, here by nobody."""
    delivered(rig, 1)
    memory = rig.domains[0].memory
    memory.test_and_set_bit(Domain.EOI_WAITING, 1)
    memory.store64(Domain.table(Domain.EOI_AT, 1), clock(rig))
    memory.store64(Domain.EOI_NEXT_NS, 1)
    irq = rig.irq(1)

    assert rig.path.expire() == []

    assert rig.irq(1) == irq
    assert memory.load64(Domain.EOI_WAITING) == memory.load64(Domain.EOI_NEXT_NS) == 0
    rig.path.eoi(0, 1, 0)
    assert is_over(rig, 1)


@pytest.mark.checklist("X3", "E12")
@pytest.mark.parametrize("died", ["before the irq word", "before the unmask", "before it left the list"])
def test_what_a_hypervisor_that_died_while_eois_took_place_has_left_its_heir_finishes(rig: Rig, died: str) -> None:
    for port in (1, 2):
        assert [spurious(rig, port) for _ in range(2)] == [0, TICK_NS]
        rig.path.set_pending(0, port)
    memory = rig.domains[0].memory
    advance(rig, S)
    memory.store64(Domain.EOI_NEXT_NS, 1)       # the first thing that it does; then port 1, half
    if died != "before the irq word":
        rig.set_irq(1, rig.irq(1) & ~(Irq.ACTIVE | Irq.EOI_PENDING | Irq.DELAYED | Irq.DEFER))
    if died == "before it left the list":
        rig.channels.unmask_and_raise(0, 1)
    heir(rig)

    rig.path.expire()
    rig.deliver()

    assert sorted(rig.read(0)) == [1, 2]
    assert memory.load64(Domain.EOI_NEXT_NS) == memory.load64(Domain.EOI_WAITING) == 0
