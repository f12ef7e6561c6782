# SPDX-License-Identifier: Apache-2.0
"""Defects of the driver as variants, over the plain state machine: each is seen when it is on, and absent when it is off."""

import errno
from collections.abc import Callable, Iterator

import pytest

from pvbus.actors.file import evtchn
from pvbus.actors.hypervisor import recovery
from pvbus.actors.runtime.inbox import InvariantError
from pvbus.shm.layout import FilePage, Irq
from pvbus.shm.layout import Machine as MachinePage
from pvbus.tests.file.driver import SELF, Machine, u32

OFF = 0
DROPS = MachinePage.VARIANT_DUPLICATE_DROPS
LEAKS = MachinePage.VARIANT_LEAK_ON_ENOMEM
TWICE = MachinePage.VARIANT_DOUBLE_CLOSE
STRICT = MachinePage.VARIANT_STRICT_STATIC
VIRQ = 3
BINDS = {
    "BIND_VIRQ": (evtchn.BIND_VIRQ, u32(VIRQ)),
    "BIND_INTERDOMAIN": (evtchn.BIND_INTERDOMAIN, u32(1, 1)),
    "BIND_UNBOUND_PORT": (evtchn.BIND_UNBOUND_PORT, u32(1)),
}
Make = Callable[..., Machine]


@pytest.fixture
def make() -> Iterator[Make]:
    made: list[Machine] = []

    def machine(variants: int = OFF, **inject: int) -> Machine:
        made.append(Machine(variants=variants, inject=inject))
        return made[-1]

    yield machine
    for one in made:
        one.rig.close()


def fails(machine: Machine, file: evtchn.EvtchnFile, request: int, argument: bytes | None = None) -> str:
    with pytest.raises(OSError) as caught:
        machine.ioctl(file, request, argument)
    return errno.errorcode[caught.value.errno or 0]


def reborn(machine: Machine) -> None:
    machine.rig.reborn()
    recovery.repair(machine.rig.channels, machine.rig.irqs)


# ------------------------------------------------------------------------------------------ H1


def duplicate(machine: Machine) -> evtchn.EvtchnFile:
    """Let a file with a VIRQ on port 1 run into EEXIST: it holds number 2 as static when Xen hands 2 out."""
    file = machine.open(0)
    assert machine.ioctl(file, evtchn.BIND_VIRQ, u32(VIRQ)) == 1
    assert machine.ioctl(file, evtchn.BIND_STATIC, u32(2)) == 0
    assert fails(machine, file, evtchn.BIND_UNBOUND_PORT, u32(0)) == "EEXIST"
    return file


@pytest.mark.checklist("H1", "A2.2", "A7.3")
def test_without_the_variant_a_duplicate_touches_no_other_record(make: Make) -> None:
    machine = make(TWICE | LEAKS | STRICT)

    file = duplicate(machine)

    assert file.ports == {1, 2}
    assert machine.sound(file)
    assert machine.release(file) == 2
    assert [machine.status(port) for port in (1, 2)] == [0, 0]


@pytest.mark.checklist("H1", "A2.2", "A7.3")
def test_a_duplicate_drops_every_record_of_its_file_and_of_no_other(make: Make) -> None:
    machine = make(DROPS)
    other = machine.open(1, 1)
    theirs = machine.alloc(other, 0)
    file = duplicate(machine)

    assert file.ports == machine.in_bitmap(file) == set()
    assert file.nr_evtchns == 2        # the driver goes on counting them
    for port in (1, 2):
        assert fails(machine, file, evtchn.UNBIND, u32(port)) == "ENOTCONN"
        assert fails(machine, file, evtchn.NOTIFY, u32(port)) == "ENOTCONN"
    machine.rig.path.set_pending(0, 1)
    assert machine.rig.deliver() == 1      # the handler is still there
    assert machine.rig.unread(0) == [1]
    machine.rig.path.set_pending(0, 1)
    assert machine.rig.deliver() == 0      # and nobody can write the port back
    machine.rig.path.set_pending(1, theirs)
    assert machine.rig.deliver(1) == 1
    assert machine.sound(other)


@pytest.mark.checklist("H1", "A10.4")
def test_ports_of_dropped_records_outlive_their_file_and_heirs_and_reach_nobody(make: Make) -> None:
    machine = make(DROPS)
    file = duplicate(machine)

    assert machine.release(file) == 2
    reborn(machine)

    assert machine.status(1) == 4       # a VIRQ, for good
    assert machine.status(2) == 0       # a number without a channel is nobody's any more
    assert machine.rig.irq(1) & (Irq.SLOT | Irq.LOST | Irq.KERNEL) == Irq.LOST | Irq.KERNEL
    heir = machine.open(0)      # the slot's next file
    machine.rig.path.set_pending(0, 1)
    assert machine.rig.deliver() == 0
    assert machine.rig.unread(0) == []
    assert fails(machine, heir, evtchn.BIND_VIRQ, u32(VIRQ)) == "EEXIST"
    assert fails(machine, heir, evtchn.BIND_STATIC, u32(1)) == "EBUSY"
    assert machine.alloc(heir) == 2
    assert machine.sound(heir)


@pytest.mark.checklist("H1", "E12")
@pytest.mark.parametrize("when", ["before", "after"])
def test_records_are_dropped_once_when_the_hypervisor_dies_under_it(make: Make, when: str) -> None:
    machine = make(DROPS)
    getattr(machine, f"dies_{when}").add("ForgetPorts")

    file = duplicate(machine)

    assert file.ports == machine.in_bitmap(file) == set()
    assert all(machine.rig.irq(port) & Irq.LOST for port in (1, 2))
    assert machine.release(file) == 2
    assert machine.status(1) == 4


# ------------------------------------------------------------------------------------------ H3


@pytest.mark.checklist("H3", "A7.1", "A7.3")
@pytest.mark.parametrize("bind", BINDS)
def test_without_the_variant_a_port_without_a_record_is_closed_once(make: Make, bind: str) -> None:
    machine = make(DROPS | TWICE | STRICT, record_allocation_failures=1)
    machine.rig.channels.alloc_unbound(1, SELF, 0)
    file = machine.open(0)

    assert fails(machine, file, *BINDS[bind]) == "ENOMEM"

    assert machine.asked.count("ClosePort") == 1
    assert machine.status(1) == 0
    assert machine.sound(file)
    if bind == "BIND_INTERDOMAIN":      # its peer has an unbound port again
        assert machine.status(1, domid=0) == 0
        assert machine.rig.channels.status(1, SELF, 1).status == 1
    assert machine.ioctl(file, *BINDS[bind]) == 1       # only the first failed


@pytest.mark.checklist("H3", "A7.1")
@pytest.mark.parametrize("bind", BINDS)
def test_a_port_without_a_record_leaks_for_ever(make: Make, bind: str) -> None:
    machine = make(LEAKS)
    machine.alloc(machine.open(1, 1), 0)
    machine.inject["record_allocation_failures"] = 1
    file = machine.open(0)

    assert fails(machine, file, *BINDS[bind]) == "ENOMEM"

    leaked = machine.status(1)
    assert leaked != 0
    assert "ClosePort" not in machine.asked
    assert machine.sound(file)
    assert machine.alloc(file) == 2
    machine.release(file)
    reborn(machine)
    assert machine.status(1) == leaked
    assert machine.status(2) == 0


@pytest.mark.checklist("H3", "E12")
@pytest.mark.parametrize(("when", "port"), [("before", 1), ("after", 2)])
def test_a_leak_under_which_the_hypervisor_dies_leaves_at_most_one_port(make: Make, when: str, port: int) -> None:
    machine = make(LEAKS, record_allocation_failures=1)
    file = machine.open(0)
    getattr(machine, f"dies_{when}").add("ForgetPorts")

    assert machine.alloc(file) == port      # made again by the heir, and with memory

    assert machine.sound(file)
    assert [number for number, _ in machine.rig.channels.ports(0)] == list(range(1, port + 1))


@pytest.mark.checklist("A7.1", "A9.5")
@pytest.mark.parametrize("variants", [OFF, LEAKS])
def test_a_static_bind_without_a_record_touches_nothing(make: Make, variants: int) -> None:
    machine = make(variants, record_allocation_failures=1)
    file = machine.open(0)
    port = machine.rig.channels.alloc_unbound(0, SELF, 1)

    assert fails(machine, file, evtchn.BIND_STATIC, u32(port)) == "ENOMEM"

    assert machine.asked == []
    assert machine.ioctl(file, evtchn.BIND_STATIC, u32(port)) == 0
    assert machine.sound(file)


@pytest.mark.checklist("A7.1")
def test_each_file_has_so_many_failures_of_its_own(make: Make) -> None:
    machine = make(record_allocation_failures=2)

    for slot in (0, 1):
        file = machine.open(slot)
        assert [fails(machine, file, evtchn.BIND_UNBOUND_PORT, u32(0)) for _ in range(2)] == ["ENOMEM"] * 2
        assert machine.alloc(file) == slot + 1


@pytest.mark.checklist("A6.3", "A6.5")
def test_a_ring_that_cannot_grow_stays_with_everything_in_it(make: Make) -> None:
    machine = make(ring_growth_failures=2)
    file = machine.open(0)
    ports = [machine.alloc(file) for _ in range(64)]       # the first 64 entries are not growth
    machine.rig.path.set_pending(0, ports[0])
    machine.rig.deliver()

    for _ in range(2):
        assert fails(machine, file, evtchn.BIND_UNBOUND_PORT, u32(0)) == "ENOMEM"
        assert machine.sound(file)
        assert file.page.load32(FilePage.SIZE) == 64
        assert machine.rig.unread(0) == [ports[0]]
        assert machine.status(65) == 0

    assert machine.alloc(file) == 65
    assert file.page.load32(FilePage.SIZE) == 128
    assert machine.rig.unread(0) == [ports[0]]


# ------------------------------------------------------------------------------------------ H4


@pytest.mark.checklist("H4", "A7.3", "X6")
def test_without_the_variant_a_handler_that_is_refused_closes_once(make: Make) -> None:
    machine = make(DROPS | LEAKS | STRICT)
    owner, file = machine.open(0), machine.open(1)
    machine.ioctl(owner, evtchn.BIND_STATIC, u32(1))       # free: Xen hands it out, and it has a handler

    assert fails(machine, file, evtchn.BIND_UNBOUND_PORT, u32(0)) == "EBUSY"

    assert machine.asked.count("ClosePort") == 1
    assert machine.sound(owner)
    assert machine.sound(file)


@pytest.mark.checklist("H4", "A7.3", "X6")
def test_a_handler_that_is_refused_is_a_broken_invariant_of_its_file_alone(make: Make) -> None:
    machine = make(TWICE)
    owner, file = machine.open(0), machine.open(1)
    machine.ioctl(owner, evtchn.BIND_STATIC, u32(2))
    assert machine.alloc(file) == 1

    with pytest.raises(InvariantError, match="port 2 is closed twice"):
        machine.ioctl(file, evtchn.BIND_UNBOUND_PORT, u32(0))

    assert machine.release(file) == 1       # its process has died
    assert [machine.status(port) for port in (1, 2)] == [0, 0]
    assert machine.sound(owner)
    assert machine.alloc(owner) == 1


@pytest.mark.checklist("H4", "A9.5")
def test_a_static_bind_and_a_ring_without_memory_are_not_closed_twice(make: Make) -> None:
    machine = make(TWICE)
    file, other = machine.open(0), machine.open(1)
    port = machine.alloc(other)

    machine.faults["grow"] = errno.ENOMEM
    assert fails(machine, file, evtchn.BIND_UNBOUND_PORT, u32(0)) == "ENOMEM"
    assert fails(machine, file, evtchn.BIND_STATIC, u32(port)) == "EBUSY"

    assert machine.sound(file)
    assert machine.sound(other)


# ------------------------------------------------------------------------------------------ H2


@pytest.mark.checklist("H2", "A9.5", "A9.8")
def test_a_strict_machine_refuses_a_restricted_file_before_it_looks_at_the_argument(make: Make) -> None:
    machine = make(STRICT)
    file = machine.open(0)
    port = machine.rig.channels.alloc_unbound(0, SELF, 1)
    assert machine.ioctl(file, evtchn.BIND_STATIC, u32(port)) == 0      # not restricted yet
    assert machine.ioctl(file, evtchn.RESTRICT_DOMID, (1).to_bytes(2, "little")) == 0

    for argument in (None, u32(port), u32(77)):
        assert fails(machine, file, evtchn.BIND_STATIC, argument) == "EACCES"

    assert machine.ioctl(file, evtchn.NOTIFY, u32(port)) == 0       # what it has goes on
    assert machine.ioctl(file, evtchn.UNBIND, u32(port)) == 0
