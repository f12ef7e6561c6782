# SPDX-License-Identifier: Apache-2.0
"""The ioctls of an open event-channel file: A9's checks in their order, A7's undo, over the plain state machine."""

import errno
from collections.abc import Iterator
from typing import Any

import pytest

from pvbus.actors.file import evtchn
from pvbus.actors.file.evtchn import EvtchnFile
from pvbus.shm.layout import Domain, File, FilePage, Irq, Vcpu
from pvbus.shm.layout import Machine as MachinePage
from pvbus.tests.file.driver import SELF, Machine, u32

BINDS = {
    "BIND_VIRQ": (evtchn.BIND_VIRQ, u32(2)),
    "BIND_INTERDOMAIN": (evtchn.BIND_INTERDOMAIN, u32(1, 1)),
    "BIND_UNBOUND_PORT": (evtchn.BIND_UNBOUND_PORT, u32(1)),
}
HYPERCALL = {"BIND_VIRQ": "BindVirq", "BIND_INTERDOMAIN": "BindInterdomain", "BIND_UNBOUND_PORT": "AllocUnbound"}


@pytest.fixture
def machine() -> Iterator[Machine]:
    made = Machine()
    yield made
    made.rig.close()


def fails(machine: Machine, file: EvtchnFile, request: int, argument: bytes | None = None) -> str:
    with pytest.raises(OSError) as caught:
        machine.ioctl(file, request, argument)
    return errno.errorcode[caught.value.errno or 0]


def restrict(machine: Machine, file: EvtchnFile, domid: int) -> None:
    assert machine.ioctl(file, evtchn.RESTRICT_DOMID, domid.to_bytes(2, "little")) == 0


# ------------------------------------------------------------------------------------------ A9, row by row


@pytest.mark.checklist("A9.1", "A9.2", "A9.3", "A9.4", "A9.5", "A9.6", "A9.8")
@pytest.mark.parametrize(("request_", "size"), [
    (evtchn.BIND_VIRQ, 4), (evtchn.BIND_INTERDOMAIN, 8), (evtchn.BIND_UNBOUND_PORT, 4), (evtchn.UNBIND, 4),
    (evtchn.NOTIFY, 4), (evtchn.RESTRICT_DOMID, 2), (evtchn.BIND_STATIC, 4),
])
def test_a_bad_pointer_and_a_buffer_that_ends_too_early_fault_before_anything_happens(
    machine: Machine, request_: int, size: int
) -> None:
    file = machine.open(0)

    for argument in (None, b"", b"\1" * (size - 1)):
        assert fails(machine, file, request_, argument) == "EFAULT"

    assert machine.asked == []
    assert machine.sound(file)
    assert request_ >> 16 == size


@pytest.mark.checklist("A9.9")
@pytest.mark.parametrize("request_", [0, 0x5401, 0x00044508, 0x00084500, 0x80044500, 0x00004504, 0x00044505, 2**32 - 1])
def test_other_requests_are_unknown_whatever_their_argument(machine: Machine, request_: int) -> None:
    for argument in (None, b"\0" * 8):
        assert fails(machine, machine.open(0), request_, argument) == "ENOSYS"


@pytest.mark.checklist("A9.1", "A9.2", "A9.3")
@pytest.mark.parametrize("bind", BINDS)
def test_a_bind_gives_the_port_and_the_file_owns_it(machine: Machine, bind: str) -> None:
    machine.rig.channels.alloc_unbound(1, SELF, 0)
    file = machine.open(0)

    assert machine.ioctl(file, *BINDS[bind]) == 1

    assert machine.asked == [HYPERCALL[bind], "BindIrq"]
    assert file.ports == {1}
    assert machine.sound(file)
    assert machine.rig.machine.load32(MachinePage.file(0, File.SIZE)) == 64
    assert machine.rig.deliver() == (bind == "BIND_INTERDOMAIN")        # born pending


@pytest.mark.checklist("A9.1")
def test_a_restricted_file_binds_no_virq_and_no_unbound_port_before_the_argument_is_looked_at(
    machine: Machine
) -> None:
    file = machine.open(0)
    restrict(machine, file, 1)

    for request in (evtchn.BIND_VIRQ, evtchn.BIND_UNBOUND_PORT):
        for argument in (None, u32(1)):
            assert fails(machine, file, request, argument) == "EACCES"
    assert machine.asked == []


@pytest.mark.checklist("A9.2")
def test_a_restricted_file_binds_to_its_domain_only_compared_with_32_bits(machine: Machine) -> None:
    theirs = [machine.rig.channels.alloc_unbound(1, SELF, 0) for _ in range(2)]
    file = machine.open(0)
    restrict(machine, file, 1)

    assert fails(machine, file, evtchn.BIND_INTERDOMAIN, None) == "EFAULT"      # first
    for domid in (0, 2, 0x10001, 0x7FF0, 2**32 - 1):
        assert fails(machine, file, evtchn.BIND_INTERDOMAIN, u32(domid, theirs[0])) == "EACCES"
    assert machine.connect(file, 1, theirs[0]) == 1
    other = machine.open(1)
    assert machine.connect(other, 0x10001, theirs[1]) == 2      # passed on with 16 bits


@pytest.mark.checklist("A9.3")
def test_a_remote_domain_is_cut_to_16_bits_and_any_is_accepted(machine: Machine) -> None:
    file = machine.open(0)

    for domid in (1, 0x10001, 0xFFFF1234, 0x7FF3, 2**32 - 1):
        port = machine.alloc(file, domid)
        assert machine.rig.channels.status(0, SELF, port).remote_domain == domid & 0xFFFF


@pytest.mark.checklist("A9.4", "A12.13")
def test_unbind_tests_the_range_before_the_owner(machine: Machine) -> None:
    file, other = machine.open(0), machine.open(1)
    theirs = machine.alloc(other)

    for port in (4096, 131072, 2**32 - 1):
        assert fails(machine, file, evtchn.UNBIND, u32(port)) == "EINVAL"
    for port in (0, theirs, 9, 4095):
        assert fails(machine, file, evtchn.UNBIND, u32(port)) == "ENOTCONN"
    assert machine.status(theirs) == 1


@pytest.mark.checklist("A9.4", "A8.2", "A2.4", "A12.14", "A6.7")
def test_unbind_frees_the_port_and_the_ring_does_not_shrink(machine: Machine) -> None:
    file = machine.open(0)
    ports = [machine.alloc(file) for _ in range(65)]
    assert machine.rig.machine.load32(MachinePage.file(0, File.SIZE)) == 128

    for port in ports[1:]:
        assert machine.ioctl(file, evtchn.UNBIND, u32(port)) == 0

    assert file.ports == {1}
    assert machine.sound(file)
    assert machine.alloc(file) == 2
    assert machine.rig.machine.load32(MachinePage.file(0, File.SIZE)) == 128
    assert fails(machine, file, evtchn.UNBIND, u32(ports[-1])) == "ENOTCONN"


@pytest.mark.checklist("A9.6")
def test_notify_is_for_ones_own_ports_and_succeeds_whatever_xen_says(machine: Machine) -> None:
    file, other = machine.open(0), machine.open(1)
    virq = machine.ioctl(file, evtchn.BIND_VIRQ, u32(2))
    unbound, theirs = machine.alloc(file), machine.alloc(other)

    for port in (virq, unbound):        # Xen: EINVAL, dropped
        assert machine.ioctl(file, evtchn.NOTIFY, u32(port)) == 0
    for port in (0, theirs, 4096, 2**32 - 1):
        assert fails(machine, file, evtchn.NOTIFY, u32(port)) == "ENOTCONN"


@pytest.mark.checklist("A9.7", "A9.10")
@pytest.mark.parametrize("argument", [None, b"", b"x" * 100])
def test_reset_throws_away_what_was_notified_before_and_leaves_ports_masked(
    machine: Machine, argument: bytes | None
) -> None:
    file = machine.open(0)
    theirs = machine.alloc(file)
    ours = machine.connect(file, 0, theirs)
    machine.ioctl(file, evtchn.NOTIFY, u32(ours))

    assert machine.ioctl(file, evtchn.RESET, argument) == 0

    rig = machine.rig
    assert rig.unread(0) == []
    assert rig.deliver() == 0
    for port in (ours, theirs):
        assert rig.irq(port) & (Irq.ENABLED | Irq.EOI_PENDING) == Irq.EOI_PENDING
        assert rig.masked(port)
        rig.path.set_pending(0, port)
    assert rig.deliver() == 0
    rig.path.eoi(0, ours, 0)
    assert rig.deliver() == 1
    assert machine.sound(file)


@pytest.mark.checklist("A9.8", "A1.2")
def test_restriction_is_tested_before_the_argument_and_goes_one_way(machine: Machine) -> None:
    file = machine.open(0)
    assert file.restrict_domid == 0xFFFF

    for domid in (0, 0x7FF0, 0x7FFF, 0x8000, 0xFFFF):
        assert fails(machine, file, evtchn.RESTRICT_DOMID, domid.to_bytes(2, "little")) == "EINVAL"
    restrict(machine, file, 0x7FEF)
    for argument in (None, b"\1\0", (0x7FEF).to_bytes(2, "little"), b"\0\0"):
        assert fails(machine, file, evtchn.RESTRICT_DOMID, argument) == "EACCES"


@pytest.mark.checklist("A9.8")
def test_what_was_bound_before_a_restriction_goes_on_and_may_be_let_go(machine: Machine) -> None:
    file = machine.open(0)
    port = machine.alloc(file)
    restrict(machine, file, 1)

    assert machine.ioctl(file, evtchn.NOTIFY, u32(port)) == 0
    assert machine.ioctl(file, evtchn.RESET) == 0
    assert machine.ioctl(file, evtchn.UNBIND, u32(port)) == 0


# ------------------------------------------------------------------------------------------ BIND_STATIC


@pytest.mark.checklist("A9.5", "H2")
def test_bind_static_gives_0_and_is_not_subject_to_the_restriction(machine: Machine) -> None:
    file = machine.open(0)
    port = machine.rig.channels.alloc_unbound(0, SELF, 1)
    restrict(machine, file, 1)

    assert machine.ioctl(file, evtchn.BIND_STATIC, u32(port)) == 0

    assert machine.sound(file)
    assert fails(machine, file, evtchn.BIND_STATIC, u32(port)) == "EISCONN"
    assert machine.ioctl(file, evtchn.UNBIND, u32(port)) == 0
    assert machine.status(port) == 1        # never closed
    assert machine.ioctl(file, evtchn.BIND_STATIC, u32(port)) == 0


@pytest.mark.checklist("A9.5", "A12.15")
def test_bind_static_of_what_cannot_be_bound_closes_nothing(machine: Machine) -> None:
    file, other = machine.open(0), machine.open(1)
    theirs = machine.alloc(other)

    assert fails(machine, file, evtchn.BIND_STATIC, u32(theirs)) == "EBUSY"
    for port in (4096, 131072, 2**31 - 1, 2**32 - 1):
        assert fails(machine, file, evtchn.BIND_STATIC, u32(port)) == "ENOMEM"

    assert "ClosePort" not in machine.asked
    assert machine.status(theirs) == 1
    assert machine.sound(file)
    assert machine.sound(other)
    assert machine.ioctl(file, evtchn.BIND_STATIC, u32(77)) == 0        # a free number
    assert machine.sound(file)


@pytest.mark.checklist("A7.3", "A2.2", "H1")
def test_a_number_that_is_this_files_already_is_refused_and_its_first_binding_lives(machine: Machine) -> None:
    file, other = machine.open(0), machine.open(1)
    assert machine.ioctl(file, evtchn.BIND_STATIC, u32(1)) == 0     # free: Xen will hand it out

    assert fails(machine, file, evtchn.BIND_UNBOUND_PORT, u32(0)) == "EEXIST"

    assert machine.status(1) == 0           # closed again
    assert machine.sound(file)
    assert file.ports == {1}
    machine.rig.path.set_pending(0, 1)
    assert machine.rig.deliver() == 1
    assert machine.rig.unread(0) == [1]
    assert fails(machine, other, evtchn.BIND_UNBOUND_PORT, u32(0)) == "EBUSY"
    assert machine.sound(other)


# ------------------------------------------------------------------------------------------ A7: record, undo


@pytest.mark.checklist("A7.1", "A1.3", "A8.1", "H3")
@pytest.mark.parametrize("bind", [*BINDS, "BIND_STATIC"])
def test_a_bound_port_has_a_record_of_its_file_that_is_enabled_before_the_first_event(
    machine: Machine, bind: str
) -> None:
    machine.rig.channels.alloc_unbound(1, SELF, 0)
    machine.alloc(machine.open(0))
    file = machine.open(1)

    machine.ioctl(file, *BINDS.get(bind, (evtchn.BIND_STATIC, u32(2))))

    rig = machine.rig
    assert file.ports == {2}
    assert machine.sound(file)
    assert rig.irq(2) & (Irq.SLOT | Irq.ENABLED) == 2 | Irq.ENABLED
    assert rig.irqs.irq_from_evtchn(0, 2) == 2
    rig.path.eoi(0, 2, 1)       # written back before it was read: enabled already, so nothing happens
    rig.path.set_pending(0, 2)
    rig.deliver()
    assert rig.unread(1) == [2]
    assert rig.domains[0].memory.load64(Domain.vcpu(0, Vcpu.WARNINGS)) == 0


@pytest.mark.checklist("A7.1", "A7.4", "H3")
@pytest.mark.parametrize("bind", BINDS)
def test_no_step_of_a_bind_comes_after_its_record(machine: Machine, bind: str) -> None:
    """The driver's last step can fail, and leaves the record. Ours is one message, behind which nothing is left to do."""
    machine.rig.channels.alloc_unbound(1, SELF, 0)
    file = machine.open(0)

    assert machine.ioctl(file, *BINDS[bind]) == 1

    assert machine.asked[-1] == "BindIrq"
    assert machine.sound(file)


# ------------------------------------------------------------------------------------------ A7: half way


@pytest.mark.checklist("A7.3", "A6.3", "H3", "H4")
@pytest.mark.parametrize("bind", BINDS)
@pytest.mark.parametrize(("fault", "number"), [
    ("grow", errno.ENOMEM), ("BindIrq", errno.EBUSY), ("BindIrq", errno.ENOMEM), ("BindIrq", errno.ENOSPC),
])
def test_a_bind_that_fails_half_way_leaves_nothing_and_closes_once(
    machine: Machine, bind: str, fault: str, number: int
) -> None:
    machine.rig.channels.alloc_unbound(1, SELF, 0)
    file = machine.open(0)
    machine.faults[fault] = number

    assert fails(machine, file, *BINDS[bind]) == errno.errorcode[number]

    assert machine.asked.count("ClosePort") == 1
    assert file.ports == set()
    assert machine.sound(file)
    assert machine.status(1) == 0
    assert machine.ioctl(file, *BINDS[bind]) == 1       # the number is free at once


@pytest.mark.checklist("A9.5", "A7.3")
@pytest.mark.parametrize("fault", ["grow", "BindIrq"])
def test_a_static_bind_that_fails_does_not_close(machine: Machine, fault: str) -> None:
    file = machine.open(0)
    port = machine.rig.channels.alloc_unbound(0, SELF, 1)
    machine.faults[fault] = errno.ENOMEM

    assert fails(machine, file, evtchn.BIND_STATIC, u32(port)) == "ENOMEM"

    assert "ClosePort" not in machine.asked
    assert machine.status(port) == 1
    assert machine.sound(file)


@pytest.mark.checklist("A9.1", "A9.2", "A9.3", "X7")
@pytest.mark.parametrize(("bind", "number"), [
    ("BIND_VIRQ", errno.EEXIST), ("BIND_INTERDOMAIN", errno.ESRCH), ("BIND_UNBOUND_PORT", errno.ENOSPC),
])
def test_a_hypercalls_error_is_given_back_as_it_is(machine: Machine, bind: str, number: int) -> None:
    file = machine.open(0)
    machine.faults[HYPERCALL[bind]] = number

    assert fails(machine, file, *BINDS[bind]) == errno.errorcode[number]

    assert machine.asked == [HYPERCALL[bind]]
    assert machine.sound(file)
    assert file.ring_size == 0


# ------------------------------------------------------------------------------------------ A6: growth


@pytest.mark.checklist("A6.1", "A6.2", "A1.5", "A7.2", "A11.1")
def test_the_ring_has_room_for_every_port_before_its_first_event(machine: Machine) -> None:
    file = machine.open(0)
    sizes = []
    for count in range(1, 4096):
        machine.alloc(file)
        size = file.page.load32(FilePage.SIZE)
        assert size >= count
        sizes.append(size)

    assert sorted(set(sizes)) == [64, 128, 256, 512, 1024, 2048, 4096]
    assert sizes.index(128) == 64
    assert fails(machine, file, evtchn.BIND_UNBOUND_PORT, u32(0)) == "ENOSPC"


@pytest.mark.checklist("A11.2", "H13")
def test_stale_entries_make_a_new_port_overflow(machine: Machine) -> None:
    file = machine.open(0)
    peers = machine.open(1)
    for _ in range(64):
        machine.connect(file, 0, machine.alloc(peers))
    machine.rig.deliver()
    assert len(machine.rig.unread(0)) == 64
    machine.ioctl(file, evtchn.UNBIND, u32(2))

    machine.connect(file, 0, machine.alloc(peers))
    machine.rig.deliver()

    assert file.page.load32(FilePage.SIZE) == 64
    assert file.page.load64(FilePage.PROD) & FilePage.OVERFLOW


# ------------------------------------------------------------------------------------------ the hypervisor dies


@pytest.mark.checklist("E12")
@pytest.mark.parametrize("bind", [*BINDS, "BIND_STATIC"])
@pytest.mark.parametrize("when", ["before", "after"])
@pytest.mark.parametrize("which", ["hypercall", "BindIrq"])
def test_a_bind_is_made_again_by_the_heir_and_once(machine: Machine, bind: str, when: str, which: str) -> None:
    machine.open(2, 1)
    assert machine.alloc(machine.files[2], 0) == 1
    file = machine.open(0)
    kind = which if which == "BindIrq" else HYPERCALL.get(bind, "BindIrq")
    getattr(machine, f"dies_{when}").add(kind)
    request, argument = BINDS.get(bind, (evtchn.BIND_STATIC, u32(1)))

    assert machine.ioctl(file, request, argument) == (0 if bind == "BIND_STATIC" else 1)

    assert file.ports == {1}
    assert machine.sound(file)
    assert [port for port, _ in machine.rig.channels.ports(0)] == ([] if bind == "BIND_STATIC" else [1])


@pytest.mark.checklist("E12")
@pytest.mark.parametrize("bound", [False, True])
def test_the_undo_of_one_file_leaves_what_the_heir_gave_to_another(
    machine: Machine, monkeypatch: pytest.MonkeyPatch, bound: bool
) -> None:
    """The heir has closed the half-bound port, and given its number to somebody else, before its first owner undoes it."""
    file, other = machine.open(0), machine.open(1)
    machine.dies_before.add("BindIrq")
    got: list[Any] = []

    def others() -> None:
        got.append(machine.alloc(other) if bound else machine.rig.channels.alloc_unbound(0, SELF, 0))

    monkeypatch.setattr(machine, "on_rebirth", others)
    mine = machine.alloc(file)

    assert (got, mine) == ([1], 2)
    assert machine.status(1) == machine.status(2) == 1
    assert machine.sound(file)
    assert machine.sound(other)


@pytest.mark.checklist("E12", "A9.4")
@pytest.mark.parametrize("when", ["before", "after"])
def test_an_unbind_is_made_again_by_the_heir(machine: Machine, when: str) -> None:
    file = machine.open(0)
    port = machine.alloc(file)
    getattr(machine, f"dies_{when}").add("UnbindIrq")

    assert machine.ioctl(file, evtchn.UNBIND, u32(port)) == 0

    assert machine.sound(file)
    assert machine.status(port) == 0
