# SPDX-License-Identifier: Apache-2.0
"""The upcall of a virtual CPU on the 2-level ABI: order, masks, budget, sleep; and the late end of interrupt."""

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from pvbus.actors.hypervisor import kernel
from pvbus.shm import _core
from pvbus.shm.layout import Domain, Irq, Port, Vcpu
from pvbus.tests.shm.rig import Rig

MINE = Domain.vcpu(0, Vcpu.EVTCHN_MASK)


def raise_unordered(rig: Rig, ports: list[int], vcpu: int = 0) -> None:
    """Set ports pending as a full log of arrivals leaves them: bits only."""
    memory = rig.domains[0].memory
    for port in ports:
        rig.set_bit(0, Domain.EVTCHN_PENDING, port)
        memory.fetch_or64(Domain.vcpu_info(vcpu, Domain.PENDING_SEL), 1 << port // 64)
    memory.store8(Domain.vcpu_info(vcpu, Domain.UPCALL_PENDING), 1)


def handled(rig: Rig, ports: list[int], slot: int = 0, vcpu: int = 0) -> None:
    """Give ports a handler without going through the hypervisor."""
    for port in ports:
        rig.set_irq(port, rig.irq(port) >> 32 << 32 | (slot + 1) | Irq.ENABLED)
        rig.set_bit(0, Domain.vcpu(vcpu, Vcpu.EVTCHN_MASK), port)
        rig.set_bit(0, Domain.EVTCHN_MASK, port, on=False)


# ------------------------------------------------------------------------------------------ order


@pytest.mark.checklist("A12.12")
def test_events_are_served_in_the_order_in_which_they_were_raised(rig: Rig) -> None:
    rig.open(0, size=256)
    order = [700, 3, 4095, 64, 63, 5, 2000, 1, 127, 128]
    handled(rig, order)

    for port in order:
        rig.path.set_pending(0, port)
    assert rig.deliver() == len(order)

    assert rig.unread(0) == order


@pytest.mark.parametrize(("word", "bit", "expected"), [
    (0, 0, [1, 5, 63, 64, 70, 4095]),
    (0, 5, [5, 63, 64, 70, 4095, 1]),
    (0, 6, [63, 64, 70, 4095, 1, 5]),
    (0, 64, [64, 70, 4095, 1, 5, 63]),      # the last bit of a word was served: go on with the next word
    (1, 1, [70, 4095, 1, 5, 63, 64]),
    (63, 64, [1, 5, 63, 64, 70, 4095]),
    (40, 3, [4095, 1, 5, 63, 64, 70]),
])
def test_the_scan_goes_round_from_behind_the_last_served_port(
    rig: Rig, word: int, bit: int, expected: list[int]
) -> None:
    rig.open(0)
    handled(rig, expected)
    memory = rig.domains[0].memory
    memory.store32(Domain.vcpu(0, Vcpu.LAST_WORD), word)
    memory.store32(Domain.vcpu(0, Vcpu.LAST_BIT), bit)
    raise_unordered(rig, expected)

    assert rig.deliver() == 6

    assert rig.unread(0) == expected


def test_a_port_that_is_always_pending_does_not_starve_the_others(rig: Rig) -> None:
    rig.open(0, size=256)
    ports = [2, 3, 65, 4000]
    handled(rig, ports)
    raise_unordered(rig, ports)

    for _ in range(4):
        rig.path.upcall(0, 0, 1)
        handled(rig, [2])
        raise_unordered(rig, [2])

    assert set(rig.unread(0)) == set(ports)


def test_the_timer_comes_before_everything_else(rig: Rig) -> None:
    rig.open(0)
    timer = rig.channels.bind_virq(0, 0, 0)
    first = rig.channels.alloc_unbound(0, 0, 0)
    handled(rig, [timer, first])

    rig.path.set_pending(0, first)
    rig.path.set_pending(0, timer)
    rig.path.upcall(0, 0, 1)
    rig.deliver()

    assert rig.unread(0) == [timer, first]


def test_a_log_of_arrivals_that_is_full_loses_the_order_and_no_event(rig: Rig) -> None:
    rig.open(0, size=4096)
    ports = list(range(4095, 0, -1))
    handled(rig, ports)
    memory = rig.domains[0].memory
    memory.store32(Domain.vcpu(0, Vcpu.ARRIVALS_TAIL), 4000)    # 4000 that nobody has looked at
    for port in ports:
        rig.path.set_pending(0, port)

    assert rig.deliver() == 4095

    assert sorted(rig.unread(0)) == sorted(ports)
    head = memory.load32(Domain.vcpu(0, Vcpu.ARRIVALS_HEAD))
    assert head == memory.load32(Domain.vcpu(0, Vcpu.ARRIVALS_TAIL))


@settings(derandomize=True, deadline=None, max_examples=60)
@given(
    ports=st.lists(st.integers(1, 4095), unique=True, max_size=80), budget=st.integers(1, 20),
    noted=st.integers(0, 80), at=st.tuples(st.integers(0, 63), st.integers(0, 64)),
)
def test_whatever_the_budget_each_event_is_served_once(
    ports: list[int], budget: int, noted: int, at: tuple[int, int]
) -> None:
    rig = Rig(_core, (1,))
    rig.open(0, size=128)
    handled(rig, ports)
    memory = rig.domains[0].memory
    memory.store32(Domain.vcpu(0, Vcpu.LAST_WORD), at[0])
    memory.store32(Domain.vcpu(0, Vcpu.LAST_BIT), at[1])
    for port in ports[:noted]:
        rig.path.set_pending(0, port)
    if ports[noted:]:
        raise_unordered(rig, ports[noted:])

    assert rig.deliver(budget=budget) == len(ports)

    assert sorted(rig.unread(0)) == sorted(ports)
    assert rig.unread(0)[:noted] == ports[:noted]
    assert memory.load8(Domain.vcpu_info(0, Domain.UPCALL_PENDING)) == 0


# ------------------------------------------------------------------------------------------ whose, and whether


def test_an_upcall_without_the_flag_does_nothing(rig: Rig) -> None:
    rig.open(0)
    handled(rig, [5])
    rig.set_bit(0, Domain.EVTCHN_PENDING, 5)

    assert rig.path.upcall(0, 0, 10) is None
    assert rig.pending(5)


def test_masked_ports_and_ports_of_another_cpu_stay_pending(rig: Rig) -> None:
    rig.open(0)
    handled(rig, [5, 6, 7])
    rig.set_bit(0, Domain.EVTCHN_MASK, 5)
    rig.set_bit(0, MINE, 6, on=False)
    raise_unordered(rig, [5, 6, 7])

    assert rig.path.upcall(0, 0, 10) == (1, [0])

    assert [rig.pending(port) for port in (5, 6, 7)] == [True, True, False]
    assert rig.path.upcall(0, 0, 10) is None
    assert rig.unread(0) == [7]


def test_a_port_without_a_handler_stays_pending_and_is_no_endless_loop(rig: Rig) -> None:
    rig.set_bit(0, MINE, 9)
    rig.set_bit(0, Domain.EVTCHN_MASK, 9, on=False)
    rig.path.set_pending(0, 9)

    rig.path.upcall(0, 0, 10)

    assert rig.pending(9)
    assert rig.path.upcall(0, 0, 10) is None


def test_a_port_of_the_kernel_is_handled_in_place(rig: Rig) -> None:
    kernel.boot(rig.channels, 0, kernel_ports=3, kernel_virqs=[0, 2])

    for port in (1, 2, 3):
        rig.path.set_pending(0, port)

    assert rig.path.upcall(0, 0, 10) == (3, [])
    assert not any(rig.pending(port) or rig.masked(port) for port in (1, 2, 3))


def test_a_port_that_another_cpu_has_in_service_is_come_back_to(rig: Rig) -> None:
    rig.open(0)
    handled(rig, [5])
    rig.set_irq(5, rig.irq(5) | Irq.IN_SERVICE | Irq.ACTIVE | 1 << 24)
    raise_unordered(rig, [5])

    assert rig.path.upcall(0, 0, 10) == (1, [])
    assert rig.pending(5)
    rig.set_irq(5, rig.irq(5) & ~(Irq.IN_SERVICE | Irq.ACTIVE))
    rig.deliver()

    assert rig.unread(0) == [5]


# ------------------------------------------------------------------------------------------ raising and unmasking


@pytest.mark.checklist("A11.3")
def test_a_second_raise_finds_the_first(rig: Rig) -> None:
    rig.open(0)
    handled(rig, [5])

    for _ in range(3):
        rig.path.set_pending(0, 5)

    assert rig.deliver() == 1
    assert rig.irq(5) >> 32 == 1


@pytest.mark.parametrize("sleeping", [False, True])
def test_a_cpu_is_rung_only_if_it_has_announced_sleep_and_only_once(rig: Rig, sleeping: bool) -> None:
    rig.open(0)
    handled(rig, [5, 70])
    if sleeping:
        assert rig.path.cpu_may_sleep(0, 0)

    rung = [rig.path.set_pending(0, 5), rig.path.set_pending(0, 70)]

    assert rung == [0 if sleeping else -1, -1]
    assert rig.domains[0].memory.load32(Domain.vcpu(0, Vcpu.SLEEPING)) == 0


def test_a_cpu_with_an_upcall_must_not_sleep(rig: Rig) -> None:
    rig.open(0)
    handled(rig, [5])
    rig.path.set_pending(0, 5)

    assert not rig.path.cpu_may_sleep(0, 0)
    assert rig.path.cpu_may_sleep(0, 1)
    assert rig.domains[0].memory.load32(Domain.vcpu(0, Vcpu.SLEEPING)) == 0


@pytest.mark.parametrize("vcpu", [0, 1])
def test_a_port_is_raised_on_its_notify_vcpu(rig: Rig, vcpu: int) -> None:
    port = rig.channels.alloc_unbound(0, 0, 0)
    rig.set_bit(0, Domain.EVTCHN_MASK, port, on=False)
    rig.channels.bind_vcpu(0, port, vcpu)
    for each in (0, 1):
        rig.path.cpu_may_sleep(0, each)

    assert rig.path.set_pending(0, port) == vcpu
    memory = rig.domains[0].memory
    assert [memory.load8(Domain.vcpu_info(each, Domain.UPCALL_PENDING)) for each in (0, 1)] == [
        vcpu == 0, vcpu == 1,
    ]


@pytest.mark.parametrize(("masked", "pending", "eoi", "raised"), [
    (True, True, 0, True), (True, False, 0, False), (False, True, 0, False), (False, False, 0, False),
    (True, True, 1, True), (True, False, 1, False), (False, True, 1, True),
])
def test_unmask_raises_again_what_was_masked_and_pending(
    rig: Rig, masked: bool, pending: bool, eoi: int, raised: bool
) -> None:
    rig.set_bit(0, Domain.EVTCHN_MASK, 5, on=masked)
    rig.set_bit(0, Domain.EVTCHN_PENDING, 5, on=pending)

    rig.path.unmask(0, 5, eoi)

    assert not rig.masked(5)
    assert rig.domains[0].memory.load8(Domain.vcpu_info(0, Domain.UPCALL_PENDING)) == raised


@pytest.mark.parametrize("call", ["set_pending", "unmask", "eoi"])
@pytest.mark.parametrize(("domid", "port", "error"), [
    (5, 1, LookupError), (0, 131072, IndexError), (0, 2**32 - 1, IndexError),
])
def test_ports_and_domains_that_are_not_there_are_refused(
    rig: Rig, call: str, domid: int, port: int, error: type[Exception]
) -> None:
    with pytest.raises(error):
        getattr(rig.path, call)(domid, port)


# ------------------------------------------------------------------------------------------ late EOI


@pytest.mark.checklist("X3a", "A3.2", "A3.7")
def test_a_served_port_is_active_masked_and_not_enabled(rig: Rig) -> None:
    rig.open(0)
    handled(rig, [5])
    rig.path.set_pending(0, 5)

    rig.deliver()

    assert rig.irq(5) == 1 << 32 | Irq.ACTIVE | Irq.EOI_PENDING | 1
    assert rig.masked(5)
    assert not rig.pending(5)


@pytest.mark.checklist("X3", "A5.4", "A11.1", "A11.3")
def test_writing_a_port_back_unmasks_it_and_fires_what_came_meanwhile(rig: Rig) -> None:
    rig.open(0)
    handled(rig, [5])
    rig.path.set_pending(0, 5)
    rig.deliver()
    rig.path.set_pending(0, 5)
    assert rig.deliver() == 0

    rig.path.eoi(0, 5, 0)

    assert rig.irq(5) == 1 << 32 | Irq.ENABLED | 1
    assert not rig.masked(5)
    assert rig.deliver() == 1
    assert rig.unread(0) == [5, 5]


@pytest.mark.checklist("A5.5")
@pytest.mark.parametrize("slot", [0, 1, 1023])
def test_writing_back_is_for_ones_own_ports_that_are_not_enabled(rig: Rig, slot: int) -> None:
    rig.open(0)
    handled(rig, [5, 6])
    rig.path.set_pending(0, 5)
    rig.deliver()
    before = rig.irq(5), rig.irq(6), rig.irq(7)

    if slot != 0:
        rig.path.eoi(0, 5, slot)        # another file's
    rig.path.eoi(0, 6, slot)            # enabled
    rig.path.eoi(0, 7, slot)            # bound to nobody

    assert (rig.irq(5), rig.irq(6), rig.irq(7)) == before
    assert rig.masked(5)


@pytest.mark.checklist("X3", "X3a", "X10a")
@pytest.mark.parametrize("reason", [Irq.EXPLICIT, Irq.TEMPORARY, Irq.EXPLICIT | Irq.TEMPORARY])
def test_another_reason_keeps_a_written_port_masked(rig: Rig, reason: int) -> None:
    rig.open(0)
    handled(rig, [5])
    rig.path.set_pending(0, 5)
    rig.deliver()
    rig.set_irq(5, rig.irq(5) | reason)
    rig.path.set_pending(0, 5)

    assert rig.path.eoi(0, 5, 0) == -1

    assert rig.irq(5) & (Irq.REASONS | Irq.ENABLED | Irq.ACTIVE) == reason | Irq.ENABLED
    assert rig.masked(5)
    assert rig.deliver() == 0


@pytest.mark.parametrize("mark", [Irq.ACTIVE, Irq.EXPLICIT])
def test_a_port_that_is_active_or_disabled_is_not_handled_again(rig: Rig, mark: int) -> None:
    rig.open(0)
    handled(rig, [5])
    rig.set_irq(5, rig.irq(5) | mark)
    rig.path.set_pending(0, 5)

    rig.deliver()

    assert rig.unread(0) == []
    assert rig.irq(5) >> 32 == 0


def not_enabled(rig: Rig, port: int) -> None:
    """Raise a port whose record says that it is not enabled, which no user can bring about."""
    handled(rig, [port])
    rig.set_irq(port, rig.irq(port) & ~Irq.ENABLED)
    rig.path.set_pending(0, port)


@pytest.mark.checklist("A3.1", "A10.9")
def test_an_event_of_a_port_that_is_not_enabled_warns_and_goes_on(capfd: pytest.CaptureFixture[str]) -> None:
    rig = Rig(_core)
    rig.open(0)
    not_enabled(rig, 5)

    rig.deliver()

    assert rig.unread(0) == [5]
    assert rig.domains[0].memory.load64(Domain.vcpu(0, Vcpu.WARNINGS)) == 1
    said = "xen:evtchn: event on port 5 of file/0.0, which is not enabled (warning 1 of cpu/0.0)\n"
    assert capfd.readouterr().err == said


@pytest.mark.checklist("A3.1")
def test_warnings_are_all_counted_and_said_ever_more_seldom(capfd: pytest.CaptureFixture[str]) -> None:
    rig = Rig(_core)
    rig.open(0)
    for _ in range(100):
        not_enabled(rig, 5)
        rig.deliver()

    said = [int(line.partition("(warning ")[2].split()[0]) for line in capfd.readouterr().err.splitlines()]

    assert said == [*range(1, 11), 16, 32, 64]
    assert rig.domains[0].memory.load64(Domain.vcpu(0, Vcpu.WARNINGS)) == 100


@pytest.mark.checklist("A8.2")
def test_events_of_a_file_that_has_gone_are_dropped_and_end_their_service(rig: Rig) -> None:
    rig.open(0)
    handled(rig, [5])
    rig.path.attach_file(0, None)
    rig.path.set_pending(0, 5)

    assert rig.deliver() == 1

    assert not rig.irq(5) & Irq.IN_SERVICE


@pytest.mark.checklist("A11.1")
@settings(derandomize=True, deadline=None, max_examples=40)
@given(steps=st.lists(st.tuples(st.sampled_from(["raise", "serve", "write", "read"]), st.integers(1, 6)), max_size=60))
def test_every_raise_after_the_last_unmask_is_seen(steps: list[tuple[str, int]]) -> None:
    rig = Rig(_core, (1,))
    rig.open(0)
    ports = rig.virq_ports(0, 6)
    owed: set[int] = set()
    unread: list[int] = []
    for what, port in steps:
        if what == "raise":
            rig.path.set_pending(0, port)
            owed.add(port)
        elif what == "serve":
            rig.deliver()
        elif what == "read":
            unread = rig.read(0)
            owed -= set(unread)
        else:
            rig.path.eoi(0, port, 0)

    for _ in range(2):
        rig.deliver()
        owed -= set(rig.read(0))
        for port in ports:
            rig.path.eoi(0, port, 0)

    assert owed == set()
    assert [Port.unpack(rig.channels.word(0, port))[0] for port in ports] == [Port.UNBOUND] * 6
