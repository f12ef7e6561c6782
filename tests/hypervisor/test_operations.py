# SPDX-License-Identifier: Apache-2.0
"""The fourteen EVTCHNOP operations as a domain's kernel makes them: bytes in, bytes out, every error in its order (X2)."""

import errno
import struct
from collections.abc import Iterator

import pytest

from pvbus.actors.hypervisor import kernel
from pvbus.actors.hypervisor.errors import HypercallError
from pvbus.actors.hypervisor.operations import (
    ALLOC_UNBOUND,
    BIND_INTERDOMAIN,
    BIND_IPI,
    BIND_PIRQ,
    BIND_VCPU,
    BIND_VIRQ,
    CLOSE,
    EXPAND_ARRAY,
    INIT_CONTROL,
    RESET,
    SEND,
    SET_PRIORITY,
    STATUS,
    UNMASK,
    event_channel_op,
)
from pvbus.shm.layout import PORTS_2L, PORTS_FIFO, Domain, Fifo, Port
from pvbus.tests.shm.rig import Rig

SELF, NOBODY = 0x7FF0, 7
# Sizes and offsets as in xen/include/public/event_channel.h: packed here by hand, not by what is under test.
SIZES = {
    BIND_INTERDOMAIN: 12, BIND_VIRQ: 12, BIND_PIRQ: 12, CLOSE: 4, SEND: 4, STATUS: 24, ALLOC_UNBOUND: 8, BIND_IPI: 8,
    BIND_VCPU: 8, UNMASK: 4, RESET: 2, INIT_CONTROL: 24, EXPAND_ARRAY: 8, SET_PRIORITY: 8,
}  # fmt: skip


@pytest.fixture
def rig() -> Iterator[Rig]:
    """Give three domains, 0 of them the hardware domain, on the 2-level ABI."""
    made = Rig(cpus=(2, 2, 1))
    yield made
    made.close()


def call(rig: Rig, caller: int, op: int, *fields: int) -> bytes:
    """Make a hypercall; `fields` are put where the structure has them."""
    return event_channel_op(rig.channels, caller, op, packed(op, *fields))


def packed(op: int, *fields: int) -> bytes:
    """Lay a structure out, what the hypervisor writes as zeros."""
    layouts = {
        BIND_INTERDOMAIN: "<HxxI", STATUS: "<HxxI", ALLOC_UNBOUND: "<HH", RESET: "<H", INIT_CONTROL: "<QII", EXPAND_ARRAY: "<Q",
    }
    return struct.pack(layouts.get(op, f"<{len(fields)}I"), *fields).ljust(SIZES[op], b"\0")


def u32(data: bytes, at: int) -> int:
    return int.from_bytes(data[at : at + 4], "little")


def error(rig: Rig, caller: int, op: int, *fields: int) -> str:
    with pytest.raises(HypercallError) as caught:
        call(rig, caller, op, *fields)
    return "EOPNOTSUPP" if caught.value.errno == errno.EOPNOTSUPP else errno.errorcode[caught.value.errno or 0]


def enter(rig: Rig, domid: int = 0, pages: int = 1) -> None:
    """Go to the FIFO ABI by hypercalls alone: control blocks in page `vcpu`, the array in pages from 40 on, all masked."""
    memory = rig.domains[domid].memory
    for vcpu in range(rig.domains[domid].vcpus):
        assert call(rig, domid, INIT_CONTROL, vcpu, 128, vcpu)[16] == 17
    for page in range(40, 40 + pages):
        for at in range(0, 4096, 8):
            memory.store64(Domain.guest_page(page) + at, Fifo.MASKED << 32 | Fifo.MASKED)
        call(rig, domid, EXPAND_ARRAY, page)


def alloc(rig: Rig, caller: int = 0, dom: int = SELF, remote: int = SELF) -> int:
    return u32(call(rig, caller, ALLOC_UNBOUND, dom, remote), 4)


def status(rig: Rig, caller: int, dom: int, port: int) -> tuple[int, int, bytes]:
    """Give (status, vCPU, union)."""
    data = call(rig, caller, STATUS, dom, port)
    return u32(data, 8), u32(data, 12), data[16:]


# ------------------------------------------------------------------------------------------ every operation


@pytest.mark.checklist("X1")
@pytest.mark.parametrize("op", range(14))
def test_a_bad_pointer_and_a_structure_that_ends_too_early_are_efault(rig: Rig, op: int) -> None:
    for argument in (None, b"", bytes(SIZES[op] - 1)):
        with pytest.raises(HypercallError) as caught:
            event_channel_op(rig.channels, 0, op, argument)
        assert caught.value.errno == errno.EFAULT
    assert list(rig.channels.ports(0)) == []      # nothing was done


@pytest.mark.checklist("X1")
@pytest.mark.parametrize("op", [14, 15, 255, 2**31, -1])
@pytest.mark.parametrize("argument", [None, bytes(24)], ids=["bad pointer", "good pointer"])
def test_an_unknown_operation_is_enosys_before_its_pointer_is_looked_at(rig: Rig, op: int, argument: bytes | None) -> None:
    with pytest.raises(HypercallError) as caught:
        event_channel_op(rig.channels, 0, op, argument)
    assert caught.value.errno == errno.ENOSYS


@pytest.mark.checklist("X1", "X7")
def test_what_comes_back_is_the_structure_with_what_the_hypervisor_writes_and_the_rest_untouched(rig: Rig) -> None:
    theirs = alloc(rig, 1, SELF, 0)
    more = b"behind it"

    answer = event_channel_op(rig.channels, 0, BIND_INTERDOMAIN, struct.pack("<HxxII", 1, theirs, 99) + more)

    assert answer == struct.pack("<HxxII", 1, theirs, 1) + more
    assert call(rig, 0, BIND_VIRQ, 4, 0) == struct.pack("<III", 4, 0, 2)
    assert call(rig, 0, BIND_IPI, 1) == struct.pack("<II", 1, 3)
    assert call(rig, 0, ALLOC_UNBOUND, SELF, 1) == struct.pack("<HHI", SELF, 1, 4)
    for op, fields in ((SEND, (1,)), (UNMASK, (1,)), (BIND_VCPU, (1, 1)), (CLOSE, (1,)), (RESET, (SELF,))):
        assert call(rig, 0, op, *fields) == packed(op, *fields)


@pytest.mark.checklist("X7")
def test_status_tells_every_state_and_lays_its_union_out(rig: Rig) -> None:
    unbound, theirs = alloc(rig, 0, SELF, 2), alloc(rig, 1, SELF, 0)
    connected = u32(call(rig, 0, BIND_INTERDOMAIN, 1, theirs), 8)
    virq, ipi = u32(call(rig, 0, BIND_VIRQ, 7, 1), 8), u32(call(rig, 0, BIND_IPI, 1), 4)
    call(rig, 0, BIND_VCPU, unbound, 1)

    assert status(rig, 0, SELF, 0) == status(rig, 0, 0, 60) == (0, 0, bytes(8))
    assert status(rig, 0, SELF, unbound) == (1, 1, struct.pack("<HHI", 2, 0, 0))
    assert status(rig, 0, SELF, connected) == (2, 0, struct.pack("<HHI", 1, 0, theirs))
    assert status(rig, 0, 1, theirs) == (2, 0, struct.pack("<HHI", 0, 0, connected))
    assert status(rig, 0, SELF, virq) == (4, 1, struct.pack("<II", 7, 0))
    assert status(rig, 0, SELF, ipi) == (5, 1, bytes(8))


# ------------------------------------------------------------------------------------------ errors, in their order


@pytest.mark.checklist("X7")
def test_errors_come_in_the_order_in_which_xen_tests(rig: Rig) -> None:
    call(rig, 0, BIND_VIRQ, 2, 0)
    ipi, virq = u32(call(rig, 0, BIND_IPI, 0), 4), u32(call(rig, 0, BIND_VIRQ, 0, 0), 8)
    expected: list[tuple[int, int, tuple[int, ...], str]] = [
        (0, BIND_INTERDOMAIN, (NOBODY, 1), "ESRCH"), (0, BIND_INTERDOMAIN, (1, 0), "EINVAL"),
        (0, BIND_INTERDOMAIN, (1, 4096), "EINVAL"), (0, BIND_INTERDOMAIN, (0, ipi), "EINVAL"),
        (0, BIND_VIRQ, (24, 9), "EINVAL"), (0, BIND_VIRQ, (2, 9), "EINVAL"), (0, BIND_VIRQ, (0, 9), "ENOENT"),
        (1, BIND_VIRQ, (2, 0), "EBUSY"), (0, BIND_VIRQ, (2, 0), "EEXIST"), (0, BIND_VIRQ, (0, 0), "EEXIST"),
        (0, BIND_PIRQ, (256, 0), "EINVAL"), (0, BIND_PIRQ, (5, 1), "EPERM"),
        (0, CLOSE, (0,), "EINVAL"), (0, CLOSE, (9,), "EINVAL"), (0, CLOSE, (4096,), "EINVAL"),
        (0, SEND, (0,), "EINVAL"), (0, SEND, (9,), "EINVAL"), (0, SEND, (virq,), "EINVAL"), (0, SEND, (4096,), "EINVAL"),
        (1, STATUS, (NOBODY, 4096), "ESRCH"), (1, STATUS, (0, 4096), "EINVAL"), (1, STATUS, (0, 1), "EPERM"),
        (1, ALLOC_UNBOUND, (NOBODY, 0), "ESRCH"), (1, ALLOC_UNBOUND, (0, 1), "EPERM"),
        (0, BIND_IPI, (2,), "ENOENT"),
        (0, BIND_VCPU, (9, 2), "ENOENT"), (0, BIND_VCPU, (9, 0), "EINVAL"), (0, BIND_VCPU, (4096, 0), "EINVAL"),
        (0, BIND_VCPU, (ipi, 0), "EINVAL"), (0, BIND_VCPU, (virq, 0), "EINVAL"),
        (0, UNMASK, (4096,), "EINVAL"),
        (1, RESET, (NOBODY,), "ESRCH"), (1, RESET, (0,), "EPERM"), (0, RESET, (1,), "EINVAL"),
        (0, INIT_CONTROL, (999, 4025, 2), "ENOENT"), (0, INIT_CONTROL, (999, 4032, 0), "EINVAL"),
        (0, INIT_CONTROL, (0, 4, 0), "EINVAL"), (0, INIT_CONTROL, (999, 0, 0), "EINVAL"),
        (0, EXPAND_ARRAY, (999,), "EOPNOTSUPP"),
        (0, SET_PRIORITY, (4096, 0), "EINVAL"), (0, SET_PRIORITY, (ipi, 16), "EINVAL"), (0, SET_PRIORITY, (ipi, 3), "ENOSYS"),
    ]  # fmt: skip
    before = list(rig.channels.ports(0)), list(rig.channels.ports(1))

    got = [(caller, op, fields, error(rig, caller, op, *fields)) for caller, op, fields, _ in expected]

    assert got == expected
    assert (list(rig.channels.ports(0)), list(rig.channels.ports(1))) == before


@pytest.mark.checklist("X7", "X8")
def test_errors_on_the_fifo_abi(rig: Rig) -> None:
    enter(rig)
    ipi = u32(call(rig, 0, BIND_IPI, 0), 4)

    assert error(rig, 0, INIT_CONTROL, 5, 128, 0) == "EINVAL"       # set already
    assert error(rig, 0, EXPAND_ARRAY, Domain.GUEST_PAGES) == "EINVAL"
    assert error(rig, 0, EXPAND_ARRAY, 2**64 - 1) == "EINVAL"
    assert error(rig, 0, SET_PRIORITY, PORTS_FIFO, 0) == "EINVAL"
    assert error(rig, 0, SET_PRIORITY, ipi, 16) == "EINVAL"
    assert error(rig, 0, SET_PRIORITY, 9, 3) == error(rig, 0, SET_PRIORITY, 0, 3) == "EACCES"
    call(rig, 0, SET_PRIORITY, ipi, 3)
    assert Fifo.queue(rig.domains[0].memory.load64(Domain.table(Domain.QUEUE_WORDS, ipi)))[0] == 3
    assert call(rig, 0, UNMASK, PORTS_FIFO - 1) == packed(UNMASK, PORTS_FIFO - 1)
    assert error(rig, 0, UNMASK, PORTS_FIFO) == "EINVAL"


@pytest.mark.checklist("X8", "A12.13")
def test_the_event_array_has_128_pages_and_then_no_frame_is_looked_at(rig: Rig) -> None:
    enter(rig, pages=1)
    for _ in range(127):
        call(rig, 0, EXPAND_ARRAY, 41)

    assert error(rig, 0, EXPAND_ARRAY, 999) == "ENOSPC"


@pytest.mark.checklist("X8")
def test_a_control_block_may_lie_at_the_end_of_a_page(rig: Rig) -> None:
    assert call(rig, 0, INIT_CONTROL, 3, 4024, 0) == struct.pack("<QIIB7x", 3, 4024, 0, 17)
    assert rig.channels.ports_max(0) == PORTS_FIFO
    assert rig.channels.ports_max(1) == PORTS_2L


# ------------------------------------------------------------------------------------------ space


@pytest.mark.checklist("X7", "A12.14")
@pytest.mark.parametrize(("abi", "limit", "last"), [
    ("2-level", None, 4095), ("2-level", 5, 5), ("2-level", 4096, 4095), ("fifo", None, 131071), ("fifo", 4097, 4097),
    ("fifo", 131071, 131071),
])
def test_the_last_port_is_the_abi_s_or_the_toolstack_s(rig: Rig, abi: str, limit: int | None, last: int) -> None:
    if abi == "fifo":
        enter(rig)
    rig.channels.limits = {} if limit is None else {0: limit}
    memory = rig.domains[0].memory
    for port in range(1, last - 1):     # taken: filling them by hypercalls says no more, and takes seconds
        memory.store64(Domain.table(Domain.PORT_WORDS, port), Port.pack(Port.IPI))
    memory.store32(Domain.VALID_EVTCHNS, last + 1)

    assert [alloc(rig), u32(call(rig, 0, BIND_IPI, 0), 4)] == [last - 1, last]
    theirs = alloc(rig, 1, SELF, 0)
    assert error(rig, 0, ALLOC_UNBOUND, SELF, 0) == error(rig, 0, BIND_IPI, 0) == error(rig, 0, BIND_VIRQ, 2, 0) == "ENOSPC"
    assert error(rig, 0, BIND_INTERDOMAIN, 1, theirs) == error(rig, 0, BIND_INTERDOMAIN, 1, 0) == "ENOSPC"
    call(rig, 0, CLOSE, 2)
    assert alloc(rig) == 2


@pytest.mark.checklist("A12.14")
def test_ports_that_are_linked_are_passed_over_until_they_have_left_their_queue(rig: Rig) -> None:
    enter(rig)
    ipis = [u32(call(rig, 0, BIND_IPI, 0), 4) for _ in range(3)]
    for port in ipis:
        call(rig, 0, UNMASK, port)
        call(rig, 0, SEND, port)
        call(rig, 0, CLOSE, port)
    assert rig.queues() == {(0, 7): [1, 2, 3]}

    assert alloc(rig) == 4
    rig.path.upcall(0, 0, 2)
    assert not rig.at(1).pending
    rig.deliver()
    assert [alloc(rig) for _ in range(4)] == [1, 2, 3, 5]


# ------------------------------------------------------------------------------------------ reset


@pytest.mark.checklist("X7", "X8")
def test_a_reset_closes_everything_and_takes_the_domain_back_to_2_level(rig: Rig) -> None:
    enter(rig)
    theirs = alloc(rig, 1, SELF, 0)
    ours = u32(call(rig, 0, BIND_INTERDOMAIN, 1, theirs), 8)
    ipi, far = u32(call(rig, 0, BIND_IPI, 1), 4), [alloc(rig) for _ in range(1100)][-1]
    call(rig, 0, BIND_VIRQ, 0, 1)
    call(rig, 0, SET_PRIORITY, ipi, 2)
    for port in (ours, ipi):
        call(rig, 0, UNMASK, port)
    call(rig, 0, SEND, ipi)
    call(rig, 0, SEND, far)     # no word yet: unbound, dropped
    memory = rig.domains[0].memory

    call(rig, 0, RESET, SELF)

    assert list(rig.channels.ports(0)) == []
    assert status(rig, 1, SELF, theirs) == (1, 0, struct.pack("<HHI", 0, 0, 0))
    assert rig.channels.ports_max(0) == PORTS_2L
    assert (memory.load32(Domain.ABI), memory.load32(Domain.ARRAY_PAGES), memory.load32(Domain.virq(1, 0))) == (0, 0, 0)
    assert error(rig, 0, EXPAND_ARRAY, 40) == "EOPNOTSUPP"
    assert [memory.load64(Domain.table(Domain.QUEUE_WORDS, port)) for port in (ours, ipi, far)] == [0, 0, 0]


@pytest.mark.checklist("X7", "X8")
def test_after_a_reset_the_fifo_abi_can_be_entered_again_and_raises_as_ever(rig: Rig) -> None:
    rig.open(0)
    for round_ in range(3):
        kernel.boot(rig.channels, 0, abi="fifo")
        ports = [rig.bind(0, alloc(rig)) for _ in range(3)]
        assert ports == [1, 2, 3]
        for port in ports[round_:]:
            rig.path.set_pending(0, port)
        rig.check_links()
        rig.path.upcall(0, 0, 1)     # and the rest is linked when the domain goes down
        assert rig.read(0) == ports[round_ : round_ + 1]
        rig.irqs.forget(0)
        call(rig, 0, RESET, SELF)


# ------------------------------------------------------------------------------------------ permissions, handlers of VIRQs


@pytest.mark.checklist("X7")
def test_only_the_hardware_domain_acts_on_another_one(rig: Rig) -> None:
    port = alloc(rig, 1)
    for caller in (1, 2):
        other = 3 - caller
        assert error(rig, caller, ALLOC_UNBOUND, other, caller) == "EPERM"
        assert error(rig, caller, STATUS, other, 1) == "EPERM"
        assert error(rig, caller, RESET, other) == "EPERM"

    assert alloc(rig, 0, 1, 2) == port + 1
    assert status(rig, 0, 1, port + 1) == (1, 0, struct.pack("<HHI", 2, 0, 0))
    assert error(rig, 0, RESET, 1) == "EINVAL"      # it is not paused


@pytest.mark.checklist("X7")
def test_a_global_virq_is_bound_by_its_handler_domain_and_delivered_there(rig: Rig) -> None:
    in_zero = u32(call(rig, 0, BIND_VIRQ, 4, 0), 8)
    rig.channels.set_virq_handler(4, 1)

    assert error(rig, 0, BIND_VIRQ, 4, 0) == error(rig, 2, BIND_VIRQ, 4, 0) == "EBUSY"
    with pytest.raises(HypercallError) as caught:
        rig.channels.raise_virq(0, 4, 0)
    assert caught.value.errno == errno.ENOENT       # nobody has bound it there
    in_one = u32(call(rig, 1, BIND_VIRQ, 4, 0), 8)
    assert rig.channels.raise_virq(2, 4, 0) == in_one
    assert rig.at(in_one, 1).pending
    assert not rig.at(in_zero, 0).pending
    rig.reborn()
    assert rig.channels.virq_handler(4) == 1        # an heir finds it
    assert rig.channels.virq_handler(3) == 0


@pytest.mark.checklist("X7")
@pytest.mark.parametrize(("virq", "domid", "answer"), [
    (0, 1, "EINVAL"), (11, 1, "EINVAL"), (24, 1, "EINVAL"), (-1, 1, "EINVAL"), (4, NOBODY, "ESRCH"), (0, NOBODY, "EINVAL"),
])
def test_a_handler_domain_is_refused(rig: Rig, virq: int, domid: int, answer: str) -> None:
    with pytest.raises(HypercallError) as caught:
        rig.channels.set_virq_handler(virq, domid)
    assert errno.errorcode[caught.value.errno or 0] == answer


@pytest.mark.checklist("X7")
def test_a_virq_that_is_not_global_stays_with_its_domain(rig: Rig) -> None:
    for domid in (0, 1):
        call(rig, domid, BIND_VIRQ, 11, 0)
        call(rig, domid, BIND_VIRQ, 0, 1)
    rig.channels.raise_virq(1, 0, 1)

    assert rig.at(2, 1).pending
    assert not rig.at(2, 0).pending
