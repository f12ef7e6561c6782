# SPDX-License-Identifier: Apache-2.0
"""Status codes of the SynIC's calls, each in its place in the order of checks, and the connections of the guest."""

import struct

import pytest

from pvbus.actors.hypervisor import synic_msrs as msr
from pvbus.actors.hypervisor.synic import ConnectionKind, HvFault, HvStatus, Privilege, Synic
from pvbus.shm.hyperv import SINT_VMBUS, Frame
from pvbus.tests.hypervisor.synic_rig import ANY, EVENTS, PORT, SynicRig

POST, SIGNAL, FAST = 0x5C, 0x5D, 1 << 16
S = HvStatus


@pytest.fixture
def rig() -> SynicRig:
    made = SynicRig(vcpus=2, on=(0,))
    made.synic.write_msr(0, msr.GUEST_OS_ID, 1)
    made.synic.write_msr(0, msr.HYPERCALL, Frame.SPARE << 12 | 1)
    return made


def post_input(connection: int = 1, message_type: int = 1, payload: bytes = b"hi", *, size: int | None = None) -> bytes:
    head = struct.pack("<IIII", connection, 0, message_type, len(payload) if size is None else size)
    return (head + payload).ljust(256, b"\0")


def signal_input(connection: int = 2, flag: int = 0, reserved: int = 0) -> bytes:
    return struct.pack("<IHH", connection, flag, reserved)


# ---- host to guest: each line has the fault of the lines below it, too


def test_posting_checks_in_order(rig: SynicRig) -> None:
    synic = rig.synic
    synic.create_message_port(30, SINT_VMBUS, 1)  # its SynIC is off
    synic.create_message_port(31, SINT_VMBUS, 7)  # there is no such VP
    for _ in range(17):
        synic.post(PORT, 1, b"")

    assert synic.post(99, 0, b"") == S.INVALID_PARAMETER
    assert synic.post(99, 1, bytes(241)) == S.INVALID_PARAMETER
    assert synic.post(99, 1, b"") == S.INVALID_PORT_ID
    assert synic.post(EVENTS, 1, b"") == S.INVALID_PORT_ID
    assert synic.post(31, 1, b"") == S.INVALID_VP_INDEX
    assert synic.post(30, 1, b"") == S.INVALID_SYNIC_STATE
    assert synic.post(PORT, 1, b"") == S.INSUFFICIENT_BUFFERS
    synic.write_msr(0, msr.SCONTROL, 0)
    assert synic.post(PORT, 1, b"") == S.INVALID_SYNIC_STATE
    assert synic.post(ANY, 1, b"") == S.INVALID_VP_INDEX
    assert synic.post(ANY, 1, b"", vp=1) == S.INVALID_SYNIC_STATE
    assert synic.post(ANY, 1, b"", vp=-1) == S.INVALID_VP_INDEX


@pytest.mark.parametrize("register", [msr.SIMP, msr.SIEFP, msr.SCONTROL])
def test_messages_need_their_page_and_events_theirs(rig: SynicRig, register: int) -> None:
    rig.synic.write_msr(0, register, 0)

    off = {msr.SIMP: {"post"}, msr.SIEFP: {"signal"}, msr.SCONTROL: {"post", "signal"}}[register]
    assert rig.synic.post(PORT, 1, b"") == (S.INVALID_SYNIC_STATE if "post" in off else S.SUCCESS)
    assert rig.synic.signal(EVENTS, 0) == (S.INVALID_SYNIC_STATE if "signal" in off else S.SUCCESS)


def test_signalling_checks_in_order(rig: SynicRig) -> None:
    rig.synic.create_event_port(40, SINT_VMBUS, None, flags=1)
    rig.synic.create_event_port(41, SINT_VMBUS, 5)
    rig.synic.write_msr(0, msr.SIEFP, 0)

    assert rig.synic.signal(PORT, 5000) == S.INVALID_PORT_ID
    assert rig.synic.signal(40, 1) == S.INVALID_PARAMETER
    assert rig.synic.signal(40, 0) == S.INVALID_VP_INDEX
    assert rig.synic.signal(41, 0) == S.INVALID_VP_INDEX
    assert rig.synic.signal(EVENTS, 0) == S.INVALID_SYNIC_STATE


# ---- guest to host


@pytest.mark.checklist("X17")
def test_the_guest_s_posts_are_checked_in_order(rig: SynicRig) -> None:
    call = rig.synic.hv_post_message

    for message_type, size in ((0, 0), (1 << 31, 0), (1, 241), (2**32, 0)):
        assert call(99, message_type, bytes(size)) == S.INVALID_PARAMETER
    assert call(99, 1, b"") == S.INVALID_CONNECTION_ID
    assert call(2, 1, b"") == S.INVALID_PORT_ID
    assert [call(1, 1, bytes([n])) for n in range(17)] == [S.SUCCESS] * 16 + [S.INSUFFICIENT_BUFFERS]
    rig.synic.retire(1)
    assert call(1, 1, b"") == S.INVALID_PORT_ID
    rig.synic.disconnect(1)
    assert call(1, 1, b"") == S.INVALID_CONNECTION_ID


def test_the_guest_s_signals_are_checked_in_order(rig: SynicRig) -> None:
    call = rig.synic.hv_signal_event

    assert call(99, 9999) == S.INVALID_CONNECTION_ID
    assert call(1, 9999) == S.INVALID_PORT_ID
    assert call(2, 4) == S.INVALID_PARAMETER
    assert call(2, 3) == S.SUCCESS
    assert rig.host == [(2, 3)]
    rig.synic.retire(2)
    assert call(2, 9999) == S.INVALID_PORT_ID


def test_who_lacks_the_privilege_learns_nothing_else(rig: SynicRig) -> None:
    synic = Synic(rig.memory, 2, lambda vp, vector: None, privileges=Privilege.SIGNAL_EVENTS)
    other = Synic(rig.memory, 2, lambda vp, vector: None, privileges=Privilege.POST_MESSAGES)

    assert synic.hv_post_message(99, 0, b"") == S.ACCESS_DENIED
    assert synic.hypercall(POST, post_input(size=241)) == S.ACCESS_DENIED
    assert synic.hv_signal_event(99, 0) == S.INVALID_CONNECTION_ID
    assert other.hv_signal_event(99, 0) == S.ACCESS_DENIED
    assert other.hv_post_message(99, 1, b"") == S.INVALID_CONNECTION_ID


@pytest.mark.checklist("X17")
def test_the_host_takes_messages_in_order_and_a_buffer_is_free_when_it_is_done(rig: SynicRig) -> None:
    synic = rig.synic
    for number in range(16):
        synic.hv_post_message(1, 1 + number, bytes([number]) * number)

    taken = [synic.take(1) for _ in range(2)]

    assert [(one.type, one.payload) for one in taken if one] == [(1, b""), (2, b"\1")]
    assert rig.host == [(1, -1)] * 16
    assert synic.hv_post_message(1, 1, b"") == S.INSUFFICIENT_BUFFERS
    assert taken[1] is not None
    synic.done(taken[1])
    assert synic.hv_post_message(1, 1, b"last") == S.SUCCESS
    rest = []
    while (message := synic.take(1)) is not None:
        rest.append(message.payload)
        synic.done(message)
    assert rest == [*(bytes([number]) * number for number in range(2, 16)), b"last"]


def test_a_connection_keeps_its_kind(rig: SynicRig) -> None:
    with pytest.raises(ValueError, match="connection 1 is one for messages"):
        rig.synic.connect(1, ConnectionKind.EVENT, lambda flag: None)


def test_a_retired_connection_can_be_served_again(rig: SynicRig) -> None:
    rig.synic.hv_post_message(1, 1, b"lost with its port")
    rig.synic.retire(1)
    rig.synic.connect(1, ConnectionKind.MESSAGE, lambda connection: None)

    assert rig.synic.hv_post_message(1, 1, b"new") == S.SUCCESS

    message = rig.synic.take(1)
    assert message is not None
    assert message.payload == b"new"
    assert rig.synic.take(1) is None


# ---- the form of a hypercall


def test_a_hypercall_needs_a_hypercall_page(rig: SynicRig) -> None:
    rig.synic.write_msr(0, msr.HYPERCALL, 0)

    with pytest.raises(HvFault, match="#UD"):
        rig.synic.hypercall(POST, post_input())


@pytest.mark.parametrize(
    ("control", "data", "address", "status"),
    [
        (0x5B, b"", 1, S.INVALID_HYPERCALL_CODE),
        (POST | FAST, b"", 1, S.INVALID_HYPERCALL_CODE),
        (POST | 1 << 32, post_input(), 1, S.INVALID_HYPERCALL_INPUT),
        (SIGNAL | 1 << 17, signal_input(), 0, S.INVALID_HYPERCALL_INPUT),
        (POST, post_input()[:-1], 1, S.INVALID_HYPERCALL_INPUT),
        (SIGNAL, signal_input() + b"\0", 0, S.INVALID_HYPERCALL_INPUT),
        (POST, post_input(size=241), 4, S.INVALID_ALIGNMENT),
        (POST, post_input(), 4096 - 248, S.INVALID_ALIGNMENT),
        (SIGNAL, signal_input(99), 4, S.INVALID_ALIGNMENT),
        (SIGNAL | FAST, signal_input(99), 4, S.INVALID_CONNECTION_ID),
        (POST, post_input(size=241), 8, S.INVALID_PARAMETER),
        (POST, post_input(size=2**32 - 1), 8, S.INVALID_PARAMETER),
        (POST, post_input(99), 4096 - 256, S.INVALID_CONNECTION_ID),
        (SIGNAL, signal_input(flag=4), 0, S.INVALID_PARAMETER),
        (SIGNAL, signal_input(reserved=1), 0, S.INVALID_PARAMETER),
    ],
)
def test_the_form_is_checked_before_the_contents(
    rig: SynicRig, control: int, data: bytes, address: int, status: HvStatus
) -> None:
    assert rig.synic.hypercall(control, data, address=address) == status
    assert rig.host == []


def test_well_formed_calls_reach_the_host(rig: SynicRig) -> None:
    call = rig.synic.hypercall

    assert call(POST, post_input(payload=bytes(range(240))), address=8) == S.SUCCESS
    assert call(POST, post_input(size=4)) == S.SUCCESS  # two bytes of "hi", and two behind it
    assert call(SIGNAL, signal_input(flag=1), fast=True, address=3) == S.SUCCESS
    assert call(SIGNAL | FAST, signal_input(flag=2)) == S.SUCCESS
    assert call(SIGNAL, signal_input(flag=3), address=16) == S.SUCCESS

    assert rig.host == [(1, -1), (1, -1), (2, 1), (2, 2), (2, 3)]
    taken = [rig.synic.take(1), rig.synic.take(1)]
    assert [message.payload for message in taken if message] == [bytes(range(240)), b"hi\0\0"]
