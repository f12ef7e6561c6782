# SPDX-License-Identifier: Apache-2.0
"""The guest kernel's irq layer and the calls of several steps: bind, disable, unbind, close, release."""

import errno
from collections.abc import Generator, Iterator
from typing import Any

import pytest

from pvbus.actors.hypervisor import calls, kernel
from pvbus.actors.hypervisor.errors import HypercallError
from pvbus.shm import _core_explored
from pvbus.shm.layout import Domain, Irq, Port, Vcpu
from pvbus.tests.shm.rig import Rig

SELF = 0x7FF0


@pytest.fixture
def rig() -> Iterator[Rig]:
    made = Rig(cpus=(2, 1))
    made.open(0)
    made.open(1)
    yield made
    made.close()


@pytest.fixture
def closed(rig: Rig, monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Return the ports that were closed, in their order."""
    ports: list[int] = []
    close = rig.channels.close

    def noting(caller: int, port: int) -> None:
        close(caller, port)
        ports.append(port)

    monkeypatch.setattr(rig.channels, "close", noting)
    return ports


def run(rig: Rig, steps: Generator[calls.Wait, None, int]) -> int:
    """Run a call as the process does: a flush lets every CPU deliver."""
    while True:
        try:
            wait = next(steps)
        except StopIteration as stop:
            value: int = stop.value
            return value
        if isinstance(wait, calls.Flush):
            rig.deliver(wait.domid)


def mine(rig: Rig, port: int, domid: int = 0) -> list[bool]:
    return [rig.bit(domid, Domain.vcpu(v, Vcpu.EVTCHN_MASK), port) for v in range(rig.domains[domid].vcpus)]


@pytest.mark.checklist("X2", "A12.15")
@pytest.mark.parametrize("port", [0, 4096, 131072, 2**32 - 1])
def test_a_port_that_the_abi_does_not_have_gets_no_handler(rig: Rig, port: int) -> None:
    with pytest.raises(HypercallError) as caught:
        rig.irqs.bind(0, port, 0, static=False)

    assert caught.value.errno == errno.ENOMEM


@pytest.mark.checklist("X2")
@pytest.mark.parametrize("static", [False, True])
@pytest.mark.parametrize("holder", ["another file", "the kernel"])
def test_a_port_has_one_handler(rig: Rig, holder: str, static: bool) -> None:
    if holder == "the kernel":
        kernel.boot(rig.channels, 0, kernel_ports=1, kernel_virqs=[])
    else:
        rig.bind(1, rig.channels.alloc_unbound(0, SELF, 0))
    before = rig.irq(1)

    with pytest.raises(HypercallError) as caught:
        rig.irqs.bind(0, 1, 0, static=static)

    assert caught.value.errno == errno.EBUSY
    assert rig.irq(1) == before


@pytest.mark.checklist("X2", "A7.2")
def test_binding_unmasks_so_that_what_is_pending_fires_now(rig: Rig) -> None:
    theirs = rig.channels.alloc_unbound(0, SELF, 0)
    ours = rig.channels.bind_interdomain(0, 0, theirs)
    assert rig.deliver() == 0

    rig.irqs.bind(0, ours, 1, static=False)

    assert rig.deliver() == 1
    assert rig.unread(1) == [ours]


@pytest.mark.checklist("X2")
def test_new_bindings_go_to_the_first_cpu_or_to_the_one_with_the_fewest(rig: Rig) -> None:
    spread = Rig(cpus=(2,), spread=True)
    spread.open(0)

    assert [mine(rig, port) for port in rig.virq_ports(0, 3)] == [[True, False]] * 3
    assert [mine(spread, port) for port in spread.virq_ports(0, 4)] == [[True, False], [False, True]] * 2
    assert [Port.unpack(spread.channels.word(0, port))[3] for port in (1, 2, 3, 4)] == [0, 1, 0, 1]
    for port in (1, 2, 3, 4):
        spread.path.set_pending(0, port)
    assert [spread.path.upcall(0, vcpu, 9) for vcpu in (0, 1)] == [(2, [0]), (2, [])]


@pytest.mark.parametrize("virq", [0, 2])
def test_a_virq_that_is_spread_is_served_by_the_cpu_that_it_is_raised_on(virq: int) -> None:
    """A per-vCPU VIRQ cannot move: whoever serves it must be the CPU that Xen raises it on."""
    rig = Rig(cpus=(2,), spread=True)
    rig.open(0)
    rig.virq_ports(0, 1)
    port = rig.bind(0, rig.channels.bind_virq(0, virq, 0))

    rig.channels.raise_virq(0, virq, 0)
    rig.deliver()

    assert rig.unread(0) == [port]


@pytest.mark.parametrize("spread", [False, True])
def test_a_static_number_that_xen_has_not_given_out_is_served_once_it_is(spread: bool) -> None:
    """BIND_STATIC before the port exists in Xen: what is raised later reaches its handler, wherever that went."""
    rig = Rig(cpus=(2,), spread=spread)
    rig.open(0)
    rig.bind(0, rig.channels.alloc_unbound(0, SELF, 0))
    rig.bind(0, 2, static=True)
    theirs = rig.channels.alloc_unbound(0, SELF, 0)
    assert theirs == 2      # the lowest free one: it is the toolstack's now

    rig.path.set_pending(0, 2)
    rig.deliver()

    assert rig.unread(0) == [2]


@pytest.mark.checklist("X10", "A8.1")
def test_a_port_has_an_irq_from_its_binding_to_its_unbinding_and_no_other_has(rig: Rig) -> None:
    kernel.boot(rig.channels, 0, kernel_ports=1, kernel_virqs=[])
    others = rig.channels.alloc_unbound(0, SELF, 1)     # handed out, and nobody's
    ours = rig.bind(0, rig.channels.alloc_unbound(0, SELF, 0))

    irqs = {port: rig.irqs.irq_from_evtchn(0, port) for port in (*range(4096), 4096, 2**32 - 1)}
    assert {port for port, irq in irqs.items() if irq != -1} == {1, ours}
    assert (irqs[1], irqs[others], irqs[ours]) == (1, -1, ours)
    assert rig.irqs.irq_from_evtchn(1, ours) == -1      # of another domain

    run(rig, calls.unbind_irq(rig.irqs, 0, 0, ours))

    assert rig.irqs.irq_from_evtchn(0, ours) == -1


@pytest.mark.checklist("A1.3")
def test_a_record_is_a_port_its_owner_and_whether_it_is_enabled(rig: Rig) -> None:
    first, second = rig.virq_ports(0, 1)[0], rig.virq_ports(1, 1)[0]

    def record(port: int) -> tuple[int, bool]:
        return rig.irq(port) & Irq.SLOT, bool(rig.irq(port) & Irq.ENABLED)

    assert [record(first), record(second)] == [(1, True), (2, True)]
    rig.path.set_pending(0, first)
    rig.deliver()
    assert [record(first), record(second)] == [(1, False), (2, True)]
    rig.path.eoi(0, first, 1)       # written back by who does not own it
    assert record(first) == (1, False)
    rig.path.eoi(0, first, 0)
    assert record(first) == (1, True)


@pytest.mark.checklist("X4", "A7.4", "X2")
@pytest.mark.parametrize("static", [False, True])
def test_a_binding_comes_with_its_reference_or_not_at_all_wherever_it_is_cut_off(static: bool) -> None:
    """Handler, record and `static` are one store, so no failure and no death can part them."""
    whole = Irq.ENABLED | 1 | (Irq.STATIC if static else 0)
    seen = []
    for step in range(1, 100):
        rig = Rig(_core_explored)
        rig.open(0)
        port = rig.channels.alloc_unbound(0, SELF, 0)
        with rig.world.dying_at(step):
            rig.irqs.bind(0, port, 0, static=static)
        seen.append(rig.irq(port))
        if rig.world.steps < step:
            break

    assert seen[0] == 0
    assert set(seen) == {0, whole}


@pytest.mark.checklist("X4", "X5", "X6", "A8.2")
@pytest.mark.parametrize("static", [False, True])
def test_a_port_has_one_reference_and_its_end_closes_the_port_unless_it_is_static(
    rig: Rig, closed: list[int], static: bool
) -> None:
    port = rig.channels.alloc_unbound(0, SELF, 1)
    rig.bind(0, port, static=static)
    with pytest.raises(HypercallError):
        rig.irqs.bind(0, port, 0, static=static)        # no second one

    run(rig, calls.unbind_irq(rig.irqs, 0, 0, port))

    assert closed == ([] if static else [port])
    assert rig.irqs.irq_from_evtchn(0, port) == -1
    assert rig.channels.status(0, SELF, port).status == (1 if static else 0)


@pytest.mark.checklist("X6", "A8.1", "H4")
def test_a_port_is_closed_once_whoever_asks_again(rig: Rig, closed: list[int]) -> None:
    port = rig.bind(0, rig.channels.alloc_unbound(0, SELF, 1))
    run(rig, calls.unbind_irq(rig.irqs, 0, 0, port))
    assert rig.bind(1, rig.channels.alloc_unbound(0, SELF, 1)) == port      # the number is somebody else's now

    run(rig, calls.unbind_irq(rig.irqs, 0, 0, port))
    run(rig, calls.release(rig.irqs, 0, 0))

    assert closed == [port]
    assert rig.channels.status(0, SELF, port).status == 1
    rig.channels.close(0, port)         # the guest, behind the irq layer's back
    with pytest.raises(HypercallError) as refused:
        rig.channels.close(0, port)
    assert refused.value.errno == errno.EINVAL
    assert run(rig, calls.unbind_irq(rig.irqs, 0, 1, port)) == 0
    assert closed == [port, port]


@pytest.mark.checklist("X10a", "A9.4", "A11.4")
def test_a_disabled_port_is_not_claimed_any_more(rig: Rig) -> None:
    _, theirs = rig.pair(1, 0)
    rig.path.set_pending(0, theirs)

    assert rig.irqs.disable(0, theirs) is False

    assert rig.deliver() == 0
    assert rig.pending(theirs)
    assert rig.masked(theirs)


@pytest.mark.checklist("X5", "A8.2", "A9.4", "A11.4")
def test_unbind_delivers_what_came_before_and_frees_the_number(rig: Rig) -> None:
    ours, theirs = rig.pair(1, 0)
    rig.channels.send(0, ours)

    assert run(rig, calls.unbind_irq(rig.irqs, 0, 0, theirs)) == 0

    assert rig.unread(0) == [theirs]        # a stale entry stays readable
    assert rig.channels.status(0, SELF, theirs).status == 0
    assert rig.channels.status(0, SELF, ours).status == 1
    assert mine(rig, theirs) == [False, False]
    assert rig.irq(theirs) & 0xFFFFFFFF == 0
    assert rig.masked(theirs)
    rig.channels.send(0, ours)
    assert rig.deliver() == 0


@pytest.mark.checklist("A9.4", "X10a")
def test_unbind_waits_for_a_handler_that_runs(rig: Rig) -> None:
    _, theirs = rig.pair(1, 0)
    rig.set_irq(theirs, rig.irq(theirs) | Irq.IN_SERVICE | Irq.ACTIVE)
    steps = calls.unbind_irq(rig.irqs, 0, 0, theirs)

    assert [next(steps) for _ in range(3)] == [calls.Flush(0), calls.Again(), calls.Again()]
    assert rig.channels.status(0, SELF, theirs).status == 2
    rig.set_irq(theirs, rig.irq(theirs) & ~Irq.IN_SERVICE)

    assert run(rig, steps) == 0
    assert rig.channels.status(0, SELF, theirs).status == 0


def test_a_handler_that_never_ends_is_an_error_and_not_for_ever(
    rig: Rig, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(calls, "HANDLER_ROUNDS_MAX", 5)
    _, theirs = rig.pair(1, 0)
    rig.set_irq(theirs, rig.irq(theirs) | Irq.IN_SERVICE)

    with pytest.raises(HypercallError) as caught:
        run(rig, calls.unbind_irq(rig.irqs, 0, 0, theirs))

    assert caught.value.errno == errno.EIO


@pytest.mark.checklist("A8.1")
@pytest.mark.parametrize("slot", [1, 5])
def test_unbind_of_what_is_another_files_does_nothing(rig: Rig, slot: int) -> None:
    _, theirs = rig.pair(1, 0)

    assert run(rig, calls.unbind_irq(rig.irqs, 0, slot, theirs)) == 0

    assert rig.channels.status(0, SELF, theirs).status == 2


@pytest.mark.checklist("A9.5", "X5")
def test_a_static_port_is_not_closed_when_it_is_unbound(rig: Rig) -> None:
    port = rig.channels.alloc_unbound(0, SELF, 1)
    rig.bind(0, port, static=True)

    run(rig, calls.unbind_irq(rig.irqs, 0, 0, port))

    assert rig.channels.status(0, SELF, port).status == 1
    rig.bind(1, port, static=True)


@pytest.mark.checklist("A7.3", "H4")
def test_closing_a_port_that_was_never_bound_frees_it(rig: Rig) -> None:
    port = rig.channels.alloc_unbound(0, SELF, 0)

    run(rig, calls.close_port(rig.irqs, 0, 0, port))

    assert rig.channels.alloc_unbound(0, SELF, 0) == port


@pytest.mark.checklist("A10.4", "A11.5")
def test_release_closes_every_port_of_the_file_and_of_no_other(rig: Rig) -> None:
    pairs = [rig.pair(0, 1) for _ in range(3)]
    static = rig.channels.alloc_unbound(0, SELF, 1)
    rig.bind(0, static, static=True)
    rig.deliver()
    rig.read(1)

    assert run(rig, calls.release(rig.irqs, 0, 0)) == 4

    for ours, theirs in pairs:
        assert rig.channels.status(0, SELF, ours).status == 0
        assert rig.channels.status(0, SELF, theirs).status == 1
        assert rig.irq(theirs) & Irq.SLOT == 2
    assert rig.channels.status(0, SELF, static).status == 1
    assert rig.unread(1) == []          # no event for the peers
    assert run(rig, calls.release(rig.irqs, 0, 0)) == 0


@pytest.mark.checklist("A2.3", "A10.4")
def test_release_goes_from_the_largest_port_to_the_smallest(rig: Rig, closed: list[int]) -> None:
    ports = rig.virq_ports(0, 70)
    theirs = rig.virq_ports(1, 3)
    for port in (ports[40], ports[3], ports[69]):       # bound anew, in another order than that of their numbers
        run(rig, calls.unbind_irq(rig.irqs, 0, 0, port))
    rig.virq_ports(0, 3)
    closed.clear()

    run(rig, calls.release(rig.irqs, 0, 0))

    assert closed == sorted(ports, reverse=True)
    assert not set(closed) & set(theirs)


def test_the_count_of_services_outlives_a_binding(rig: Rig) -> None:
    port = rig.virq_ports(0, 1)[0]
    rig.path.set_pending(0, port)
    rig.deliver()

    run(rig, calls.unbind_irq(rig.irqs, 0, 0, port))
    rig.virq_ports(1, 1)

    assert rig.irq(port) == 1 << 32 | Irq.ENABLED | 2


@pytest.mark.parametrize("count", [1, 64, 200])
def test_a_number_that_is_bound_again_and_again_works_each_time(rig: Rig, count: int) -> None:
    for _ in range(count):
        port: Any = rig.virq_ports(0, 1)[0]
        assert port == 1
        rig.path.set_pending(0, port)
        rig.deliver()
        assert rig.read(0) == [port]
        run(rig, calls.unbind_irq(rig.irqs, 0, 0, port))
