# SPDX-License-Identifier: Apache-2.0
"""The EVTCHNOP operations on the plain state machine: every error in its order, every transition, no process."""

import errno
from collections.abc import Callable, Iterator
from typing import Any

import pytest

from pvbus.actors.hypervisor import kernel
from pvbus.actors.hypervisor.errors import HypercallError
from pvbus.actors.hypervisor.ports import VIRQS_PER_DOMAIN, VIRQS_PER_VCPU, PortStatus
from pvbus.shm.layout import Domain, Port
from pvbus.tests.shm.rig import Rig

SELF, NOBODY = 0x7FF0, 7
PER_VCPU = [0, 1, 7, 13]
GLOBAL = [2, 3, 4, 6, 8, 9, 10, 12, *range(16, 24)]


@pytest.fixture
def rig() -> Iterator[Rig]:
    made = Rig(cpus=(2, 1, 1))
    yield made
    made.close()


def error(call: Callable[..., Any], *arguments: Any) -> str:
    with pytest.raises(HypercallError) as caught:
        call(*arguments)
    return errno.errorcode[caught.value.errno or 0]


def fill(rig: Rig, domid: int = 0) -> list[int]:
    """Take every port of a domain that is free."""
    ports = []
    try:
        while True:
            ports.append(rig.channels.alloc_unbound(domid, SELF, SELF))
    except HypercallError:
        return ports


def states(rig: Rig, domid: int) -> dict[int, int]:
    return {port: word & 7 for port, word in rig.channels.ports(domid)}


def connected(rig: Rig, local: int = 0, remote: int = 1) -> tuple[int, int]:
    theirs = rig.channels.alloc_unbound(remote, SELF, local)
    return rig.channels.bind_interdomain(local, remote, theirs), theirs


# ------------------------------------------------------------------------------------------ numbers


@pytest.mark.checklist("A12.14")
def test_the_lowest_free_number_is_handed_out_whatever_it_is_for(rig: Rig) -> None:
    op = rig.channels
    theirs = op.alloc_unbound(1, SELF, 0)

    assert [
        op.alloc_unbound(0, SELF, 1), op.bind_virq(0, 2, 0), op.bind_ipi(0, 1), op.bind_interdomain(0, 1, theirs),
    ] == [1, 2, 3, 4]
    op.close(0, 3)
    op.close(0, 1)
    assert [op.alloc_unbound(0, SELF, 1) for _ in range(3)] == [1, 3, 5]


@pytest.mark.checklist("A12.14", "X7")
def test_4095_ports_are_all_there_are_and_a_closed_one_is_there_at_once(rig: Rig) -> None:
    theirs = rig.channels.alloc_unbound(1, SELF, 0)
    assert fill(rig) == list(range(1, 4096))

    assert error(rig.channels.alloc_unbound, 0, SELF, 0) == "ENOSPC"
    assert error(rig.channels.bind_virq, 0, 2, 0) == "ENOSPC"
    assert error(rig.channels.bind_ipi, 0, 0) == "ENOSPC"
    assert error(rig.channels.bind_interdomain, 0, 1, theirs) == "ENOSPC"
    assert error(rig.channels.bind_interdomain, 0, 1, 9999) == "ENOSPC"     # the local port comes first
    rig.channels.close(0, 1234)
    assert rig.channels.alloc_unbound(0, SELF, 0) == 1234
    assert states(rig, 1) == {theirs: Port.UNBOUND}


def test_an_heir_goes_on_with_the_lowest_free_number(rig: Rig) -> None:
    for _ in range(3):
        rig.channels.alloc_unbound(0, SELF, 0)
    rig.channels.close(0, 2)

    rig.reborn()

    assert [rig.channels.alloc_unbound(0, SELF, 0) for _ in range(2)] == [2, 4]


# ------------------------------------------------------------------------------------------ errors in their order


@pytest.mark.checklist("X7")
@pytest.mark.parametrize(("caller", "dom", "answer"), [
    (0, NOBODY, "ESRCH"), (1, NOBODY, "ESRCH"), (1, 0, "EPERM"), (1, 2, "EPERM"), (0, 0x7FF1, "ESRCH"),
])
def test_alloc_unbound_refuses(rig: Rig, caller: int, dom: int, answer: str) -> None:
    assert error(rig.channels.alloc_unbound, caller, dom, 0) == answer


def test_the_hardware_domain_may_alloc_for_another_and_permission_comes_before_space(rig: Rig) -> None:
    fill(rig, 2)

    assert error(rig.channels.alloc_unbound, 1, 2, 0) == "EPERM"
    assert error(rig.channels.alloc_unbound, 0, 2, 0) == "ENOSPC"
    assert rig.channels.alloc_unbound(0, 1, 2) == 1
    assert Port.unpack(rig.channels.word(1, 1)) == (Port.UNBOUND, 2, 0, 0)


@pytest.mark.checklist("A9.3", "X7")
@pytest.mark.parametrize("remote", [0, 1, NOBODY, 0x7FF1, 0xFFFF])
def test_alloc_unbound_takes_any_remote_domain(rig: Rig, remote: int) -> None:
    port = rig.channels.alloc_unbound(1, SELF, remote)

    assert rig.channels.status(1, SELF, port) == PortStatus(1, 0, remote, 0)


def test_alloc_unbound_for_self_is_a_loopback(rig: Rig) -> None:
    port = rig.channels.alloc_unbound(1, SELF, SELF)

    assert rig.channels.status(1, SELF, port).remote_domain == 1
    assert rig.channels.bind_interdomain(1, SELF, port) == 2
    assert rig.channels.status(1, 1, port) == PortStatus(2, 0, 1, 2)


@pytest.mark.checklist("X7")
def test_bind_interdomain_refuses_in_order(rig: Rig) -> None:
    op = rig.channels
    for_two = op.alloc_unbound(1, SELF, 2)
    virq = op.bind_virq(1, 0, 0)
    ours, theirs = connected(rig)

    assert error(op.bind_interdomain, 0, NOBODY, for_two) == "ESRCH"
    for port in (0, 4096, 2**32 - 1, 9, for_two, virq, theirs):
        assert error(op.bind_interdomain, 0, 1, port) == "EINVAL", port
    assert error(op.bind_interdomain, 0, 0, ours) == "EINVAL"
    assert error(op.bind_interdomain, 0, 0, 2) == "EINVAL"      # the very port that it would get
    assert states(rig, 0) == {ours: Port.INTERDOMAIN}
    fill(rig)
    assert error(op.bind_interdomain, 0, NOBODY, 1) == "ESRCH"


@pytest.mark.checklist("X7", "A9.1")
def test_bind_virq_refuses_in_order(rig: Rig) -> None:
    op = rig.channels

    for virq in (24, 25, 2**32 - 1):
        assert error(op.bind_virq, 1, virq, 99) == "EINVAL"
    for virq in [*GLOBAL, 11]:
        assert error(op.bind_virq, 1, virq, 99) == "EINVAL"     # not per vCPU, before the vCPU is looked for
        assert error(op.bind_virq, 0, virq, 1) == "EINVAL"
    for virq in PER_VCPU:
        assert error(op.bind_virq, 0, virq, 2) == "ENOENT"
        assert error(op.bind_virq, 1, virq, 1) == "ENOENT"
    for virq in GLOBAL:
        assert error(op.bind_virq, 1, virq, 0) == "EBUSY"
    taken = op.bind_virq(0, 2, 0)
    fill(rig)
    assert error(op.bind_virq, 0, 2, 0) == "EEXIST"             # before the space
    assert error(op.bind_virq, 0, 3, 0) == "ENOSPC"
    op.close(0, taken)
    assert op.bind_virq(0, 2, 0) == taken


def test_bind_ipi_and_bind_vcpu_refuse_in_order(rig: Rig) -> None:
    op = rig.channels
    ipi = op.bind_ipi(0, 1)
    timer = op.bind_virq(0, 0, 1)

    assert error(op.bind_ipi, 0, 2) == "ENOENT"
    assert error(op.bind_vcpu, 0, 9999, 2) == "ENOENT"
    for port in (0, 9, 4096, 2**32 - 1, ipi, timer):
        assert error(op.bind_vcpu, 0, port, 0) == "EINVAL", port
    assert op.status(0, SELF, ipi).vcpu == op.status(0, SELF, timer).vcpu == 1


@pytest.mark.parametrize("port", [0, 1, 4096, 2**32 - 1])
def test_close_and_send_refuse_what_is_not_bound(rig: Rig, port: int) -> None:
    assert error(rig.channels.close, 0, port) == "EINVAL"
    assert error(rig.channels.send, 0, port) == "EINVAL"


def test_a_port_is_closed_once(rig: Rig) -> None:
    port = rig.channels.bind_ipi(0, 0)

    rig.channels.close(0, port)

    assert error(rig.channels.close, 0, port) == "EINVAL"


def test_unmask_refuses_only_what_is_out_of_range(rig: Rig) -> None:
    for port in (0, 9, 4095):
        rig.channels.unmask(0, port)
    for port in (4096, 2**32 - 1):
        assert error(rig.channels.unmask, 0, port) == "EINVAL"


def test_status_refuses_in_order_and_tells_every_state(rig: Rig) -> None:
    op = rig.channels
    ours, theirs = connected(rig)
    unbound, ipi, virq = op.alloc_unbound(0, SELF, 1), op.bind_ipi(0, 1), op.bind_virq(0, 1, 1)

    assert error(op.status, 1, NOBODY, 9999) == "ESRCH"
    assert error(op.status, 1, 0, 9999) == "EINVAL"
    assert error(op.status, 1, 0, ours) == "EPERM"
    assert op.status(0, 1, theirs) == PortStatus(2, 0, 0, ours)
    assert [op.status(0, SELF, port) for port in (0, ours, unbound, ipi, virq, 63)] == [
        PortStatus(0, 0, 0, 0), PortStatus(2, 0, 1, theirs), PortStatus(1, 0, 1, 0), PortStatus(5, 1, 0, 0),
        PortStatus(4, 1, 0, 1), PortStatus(0, 0, 0, 0),
    ]
    assert error(op.status, 0, SELF, 64) == "EINVAL"  # the table has one bucket so far


def test_reset_refuses_in_order_and_closes_everything_of_oneself(rig: Rig) -> None:
    op = rig.channels
    _, theirs = connected(rig)
    op.bind_virq(0, 2, 0)
    op.bind_ipi(0, 1)
    pair = op.alloc_unbound(0, SELF, 0)
    op.bind_interdomain(0, 0, pair)

    assert error(op.reset, 1, NOBODY) == "ESRCH"
    assert error(op.reset, 1, 0) == "EPERM"
    assert error(op.reset, 0, 1) == "EINVAL"
    op.reset(0, SELF)

    assert states(rig, 0) == {}
    assert op.status(1, SELF, theirs) == PortStatus(1, 0, 0, 0)
    assert op.bind_virq(0, 2, 0) == 1


# ------------------------------------------------------------------------------------------ transitions


def test_binding_connects_both_ends_and_only_the_new_one_is_born_pending(rig: Rig) -> None:
    ours, theirs = connected(rig)

    assert rig.channels.status(0, SELF, ours) == PortStatus(2, 0, 1, theirs)
    assert rig.channels.status(0, 1, theirs) == PortStatus(2, 0, 0, ours)
    assert (rig.pending(ours, 0), rig.pending(theirs, 1)) == (True, False)


def test_closing_one_end_unbinds_the_other_without_an_event(rig: Rig) -> None:
    rig.channels.alloc_unbound(0, SELF, 0)
    ours, theirs = connected(rig)
    rig.channels.send(1, theirs)

    rig.channels.close(0, ours)

    assert rig.channels.status(0, SELF, ours).status == 0
    assert rig.channels.status(0, 1, theirs) == PortStatus(1, 0, 0, 0)     # reserved for the closer's domain
    assert (rig.pending(ours, 0), rig.pending(theirs, 1)) == (False, False)
    assert error(rig.channels.bind_interdomain, 2, 1, theirs) == "EINVAL"
    assert rig.channels.bind_interdomain(0, 1, theirs) == ours
    assert rig.pending(ours, 0)


def test_the_peer_of_a_closed_port_keeps_its_cpu_and_what_it_had_pending(rig: Rig) -> None:
    ours, theirs = connected(rig, 1, 0)
    rig.channels.bind_vcpu(0, theirs, 1)
    rig.channels.send(1, ours)

    rig.channels.close(1, ours)

    assert rig.channels.status(0, SELF, theirs) == PortStatus(1, 1, 1, 0)
    assert rig.pending(theirs, 0)


@pytest.mark.checklist("X9")
def test_send_reaches_the_peer_or_oneself_or_nobody(rig: Rig) -> None:
    op = rig.channels
    ours, theirs = connected(rig)
    unbound, ipi, virq = op.alloc_unbound(0, SELF, 1), op.bind_ipi(0, 0), op.bind_virq(0, 2, 0)

    op.send(0, ours)
    op.send(0, ipi)
    op.send(0, unbound)

    assert (rig.pending(theirs, 1), rig.pending(ipi, 0), rig.pending(unbound, 0)) == (True, True, False)
    assert error(op.send, 0, virq) == "EINVAL"


def test_a_closed_port_is_fresh_when_it_is_handed_out_again(rig: Rig) -> None:
    port = rig.channels.alloc_unbound(0, SELF, 0)
    rig.channels.bind_vcpu(0, port, 1)
    rig.path.set_pending(0, port)
    rig.channels.close(0, port)

    assert rig.channels.alloc_unbound(0, SELF, 2) == port
    assert rig.channels.status(0, SELF, port) == PortStatus(1, 0, 2, 0)
    assert not rig.pending(port)


def test_bind_leaves_the_mask_as_it_is(rig: Rig) -> None:
    rig.channels.unmask(0, 1)

    assert [rig.channels.alloc_unbound(0, SELF, 0) for _ in range(2)] == [1, 2]
    assert (rig.masked(1), rig.masked(2)) == (False, True)


@pytest.mark.parametrize("kind", ["unbound", "interdomain", "global virq"])
def test_bind_vcpu_moves_what_may_move_and_does_not_raise_it(rig: Rig, kind: str) -> None:
    op = rig.channels
    port = {
        "unbound": lambda: op.alloc_unbound(0, SELF, 1), "interdomain": lambda: connected(rig)[0],
        "global virq": lambda: op.bind_virq(0, 2, 0),
    }[kind]()
    before = op.status(0, SELF, port)
    rig.set_bit(0, Domain.EVTCHN_MASK, port, on=False)
    rig.set_bit(0, Domain.EVTCHN_PENDING, port)

    op.bind_vcpu(0, port, 1)

    assert op.status(0, SELF, port) == before._replace(vcpu=1)
    assert rig.domains[0].memory.load8(Domain.vcpu_info(1, Domain.UPCALL_PENDING)) == 0
    op.close(0, port)
    assert op.status(0, SELF, port).status == 0


# ------------------------------------------------------------------------------------------ VIRQs


def test_the_classes_of_virqs_are_xens() -> None:
    assert set(PER_VCPU) == VIRQS_PER_VCPU
    assert {11} == VIRQS_PER_DOMAIN


@pytest.mark.checklist("X7")
@pytest.mark.parametrize("virq", PER_VCPU)
def test_a_per_vcpu_virq_is_bound_once_a_vcpu_and_goes_there(rig: Rig, virq: int) -> None:
    op = rig.channels
    ports = [op.bind_virq(0, virq, 0), op.bind_virq(0, virq, 1), op.bind_virq(1, virq, 0)]

    assert error(op.bind_virq, 0, virq, 1) == "EEXIST"
    assert op.raise_virq(0, virq, 1) == ports[1]
    assert [rig.pending(ports[0]), rig.pending(ports[1]), rig.pending(ports[2], 1)] == [False, True, False]
    op.close(0, ports[1])
    assert error(op.raise_virq, 0, virq, 1) == "ENOENT"
    assert op.raise_virq(0, virq, 0) == ports[0]


def test_a_per_domain_virq_is_bound_once_a_domain(rig: Rig) -> None:
    port = rig.channels.bind_virq(1, 11, 0)

    assert error(rig.channels.bind_virq, 1, 11, 0) == "EEXIST"
    assert rig.channels.bind_virq(0, 11, 0) == 1
    assert rig.channels.raise_virq(1, 11, 0) == port
    assert rig.pending(port, 1)
    assert not rig.pending(1, 0)


@pytest.mark.parametrize("virq", GLOBAL)
def test_a_global_virq_goes_to_the_hardware_domain_whoever_is_named(rig: Rig, virq: int) -> None:
    port = rig.channels.bind_virq(0, virq, 0)
    rig.channels.bind_vcpu(0, port, 1)

    assert rig.channels.raise_virq(1, virq, 0) == port
    assert rig.pending(port, 0)
    rig.channels.close(0, port)
    assert error(rig.channels.raise_virq, 0, virq, 0) == "ENOENT"


@pytest.mark.parametrize(("domid", "virq", "vcpu", "answer"), [
    (0, 24, 0, "EINVAL"), (0, -1, 0, "EINVAL"), (NOBODY, 0, 0, "ESRCH"), (0, 0, 2, "ENOENT"), (0, 0, 0, "ENOENT"),
])
def test_raising_a_virq_that_cannot_be_raised_says_so(
    rig: Rig, domid: int, virq: int, vcpu: int, answer: str
) -> None:
    assert error(rig.channels.raise_virq, domid, virq, vcpu) == answer


@pytest.mark.parametrize("ports", [0, 3, 13, 4095])
def test_the_kernel_gets_its_virqs_and_as_many_ports_as_it_was_promised(rig: Rig, ports: int) -> None:
    kernel.boot(rig.channels, 0, kernel_ports=ports, kernel_virqs=[0, 2])

    assert set(states(rig, 0)) == set(range(1, max(2, ports) + 1))
    assert error(rig.channels.bind_virq, 0, 2, 0) == "EEXIST"


def test_a_sleeping_cpu_is_rung_once_for_what_a_call_raises(rig: Rig) -> None:
    ours, theirs = connected(rig)
    rig.channels.unmask(1, theirs)
    rig.path.cpu_may_sleep(1, 0)

    rig.channels.send(0, ours)
    rig.channels.send(0, ours)

    assert rig.kicks == [(1, 0)]
