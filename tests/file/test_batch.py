# SPDX-License-Identifier: Apache-2.0
"""Many bindings in one call: what the ioctls one after the other would leave, wherever one of them fails."""

import errno

import pytest

from pvbus.actors.file import evtchn
from pvbus.actors.file.batch import TOGETHER_MAX
from pvbus.tests.file.driver import Machine, u32

MANY = 3 * TOGETHER_MAX + 5


def unbound(machine: Machine, file: evtchn.EvtchnFile, count: int = MANY) -> tuple[list[int], int]:
    given = machine.binds(file, evtchn.BIND_UNBOUND_PORT, [u32(1)] * count)
    return given.values, given.errno


@pytest.mark.checklist("A7.2", "A6.2")
def test_many_ports_are_bound_as_one_after_the_other_would_be() -> None:
    machine, single = Machine(), Machine()
    file, other = machine.open(1), single.open(1)

    assert unbound(machine, file) == ([single.alloc(other, 1) for _ in range(MANY)], 0)

    assert machine.sound(file)
    assert (file.nr_evtchns, file.ring_size) == (other.nr_evtchns, other.ring_size) == (MANY, 256)
    assert machine.asked[:2] == ["AllocUnbound"] * 2
    assert machine.asked[TOGETHER_MAX] == "BindIrq"


def test_many_interdomain_ports_are_bound_in_the_order_of_their_remote_ends() -> None:
    machine = Machine()
    near, far = machine.open(1, 0), machine.open(2, 1)
    remote, _ = unbound(machine, near)

    given = machine.binds(far, evtchn.BIND_INTERDOMAIN, [u32(0, port) for port in reversed(remote)])

    assert given.errno == 0
    assert [machine.rig.channels.status(1, 0x7FF0, port).remote_port for port in given.values] == remote[::-1]
    assert machine.sound(far)


def test_a_hypercall_that_fails_ends_it_and_what_was_bound_stays() -> None:
    machine = Machine()
    near, far = machine.open(1, 0), machine.open(2, 1)
    remote, _ = unbound(machine, near)
    wanted = [u32(0, port) for port in remote]
    wanted[TOGETHER_MAX + 7] = u32(0, 4000)

    given = machine.binds(far, evtchn.BIND_INTERDOMAIN, wanted)

    assert (len(given.values), given.errno) == (TOGETHER_MAX + 7, errno.EINVAL)
    assert machine.sound(far)
    assert len(list(machine.rig.channels.ports(1))) == TOGETHER_MAX + 7


def test_a_bad_pointer_and_a_restriction_end_it_where_they_come() -> None:
    machine = Machine()
    near, far = machine.open(1, 0), machine.open(2, 1)
    remote, _ = unbound(machine, near, 4)
    pairs = [u32(0, port) for port in remote]

    given = machine.binds(far, evtchn.BIND_INTERDOMAIN, [pairs[0], b"short", pairs[1]])
    assert (len(given.values), given.errno) == (1, errno.EFAULT)

    machine.ioctl(far, evtchn.RESTRICT_DOMID, b"\7\0")
    given = machine.binds(far, evtchn.BIND_INTERDOMAIN, pairs[1:])
    assert (given.values, given.errno) == ([], errno.EACCES)
    assert machine.sound(far)


def test_only_requests_that_bind_another_number_each_time_are_made_together() -> None:
    machine = Machine()

    with pytest.raises(OSError) as refused:
        machine.binds(machine.open(1), evtchn.BIND_STATIC, [u32(9)] * 2)

    assert refused.value.errno == errno.EINVAL


@pytest.mark.checklist("A7.3", "H3", "H4")
@pytest.mark.parametrize("failing", ["BindIrq", "grow"])
def test_what_gets_no_handler_or_no_room_is_closed_and_nothing_leaks(failing: str) -> None:
    machine = Machine()
    file = machine.open(1)
    first, _ = unbound(machine, file, 10)
    machine.faults[failing] = errno.ENOMEM

    ports, error = unbound(machine, file, TOGETHER_MAX)

    assert error == errno.ENOMEM
    assert machine.sound(file)
    assert len(list(machine.rig.channels.ports(0))) == len(first) + len(ports)
    assert unbound(machine, file, TOGETHER_MAX)[1] == 0
    assert machine.sound(file)


@pytest.mark.checklist("A7.1")
def test_an_injected_failure_hits_the_bind_that_it_would_hit() -> None:
    machine = Machine(inject={"record_allocation_failures": 1})
    file = machine.open(1)

    assert unbound(machine, file) == ([], errno.ENOMEM)
    assert not list(machine.rig.channels.ports(0))

    assert unbound(machine, file) == (list(range(1, MANY + 1)), 0)
    assert machine.sound(file)


@pytest.mark.checklist("A2.2", "H1")
def test_a_number_that_is_this_files_already_ends_it_and_what_came_behind_is_closed() -> None:
    machine = Machine()
    file = machine.open(1)
    machine.ioctl(file, evtchn.BIND_STATIC, u32(5))

    ports, error = unbound(machine, file)

    assert (ports, error) == ([1, 2, 3, 4], errno.EEXIST)
    assert file.ports == {1, 2, 3, 4, 5}
    assert machine.sound(file)


@pytest.mark.parametrize("kind", ["AllocUnbound", "BindIrq"])
@pytest.mark.parametrize("when", ["dies_before", "dies_after"])
def test_a_hypervisor_that_dies_under_it_leaves_nothing_twice_and_its_heir_goes_on(kind: str, when: str) -> None:
    machine = Machine()
    file = machine.open(1)
    first, _ = unbound(machine, file, TOGETHER_MAX)
    getattr(machine, when).add(kind)

    ports, error = unbound(machine, file)

    assert error == 0
    assert len(set(first + ports)) == TOGETHER_MAX + MANY == file.nr_evtchns
    assert {port for port, _ in machine.rig.channels.ports(0)} == set(first + ports)
    assert machine.sound(file)
