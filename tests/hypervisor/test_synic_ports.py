# SPDX-License-Identifier: Apache-2.0
"""Ports of the SynIC: delivery, the queues and what looks at them again, lost interrupts, event flags."""

import os

import pytest

from pvbus.actors.hypervisor import synic_msrs as msr
from pvbus.actors.hypervisor.synic import HvStatus
from pvbus.shm import hyperv
from pvbus.shm.hyperv import SINT_VMBUS, Frame, Header, Sint, Slot, Vp, flag_word
from pvbus.shm.memory import Memory
from pvbus.tests.hypervisor.synic_rig import ANY, EVENTS, PORT, VECTOR, SynicRig

FULL = 16


@pytest.fixture
def rig() -> SynicRig:
    return SynicRig()


def post(rig: SynicRig, *payloads: bytes, port: int = PORT) -> list[HvStatus]:
    return [rig.synic.post(port, 1, payload) for payload in payloads]


def bodies(count: int, first: int = 0) -> list[bytes]:
    return [bytes([number, 0x55]) for number in range(first, first + count)]


# ---- delivery


def test_a_message_in_an_empty_slot_is_copied_and_interrupts_once(rig: SynicRig) -> None:
    assert post(rig, b"hello, guest") == [HvStatus.SUCCESS]

    assert rig.type_in_slot() == 1
    assert rig.memory.load32(rig.slot(field=Slot.META)) == 12
    assert rig.memory.load64(rig.slot(field=Slot.SENDER)) == PORT
    assert rig.payload() == b"hello, guest"
    assert rig.interrupts == [(0, VECTOR)]
    assert rig.memory.load64(Vp.at(0, Vp.IRR)) == 1 << VECTOR
    assert (rig.count(Header.POSTED), rig.count(Header.DELIVERED), rig.count(Header.INTERRUPTS)) == (1, 1, 1)


@pytest.mark.parametrize("size", [0, 1, 7, 8, 9, 12, 196, 239, 240])
def test_only_the_payload_s_bytes_are_written(rig: SynicRig, size: int) -> None:
    for at in range(0, 240, 8):
        rig.memory.store64(rig.slot(field=Slot.PAYLOAD + at), 2**64 - 1)

    rig.synic.post(PORT, 1, bytes(size))

    assert rig.payload(size=240) == bytes(size) + b"\xff" * (240 - size)
    assert rig.consume() == bytes(size)


@pytest.mark.checklist("B4.2")
def test_the_slot_is_that_of_the_port_s_sint_on_the_port_s_processor() -> None:
    rig = SynicRig(vcpus=2, on=(0, 1))
    rig.synic.create_message_port(9, 15, 1)
    rig.synic.write_msr(1, msr.SINT0 + 15, 0x99)

    rig.synic.post(9, 0x80000010, b"tick")

    assert rig.memory.load32(Slot.at(Frame.of_vp(1, Frame.MESSAGES), 15, 0)) == 0x80000010
    assert rig.interrupts == [(1, 0x99)]
    assert (rig.type_in_slot(0), rig.type_in_slot(1)) == (0, 0)


@pytest.mark.checklist("B4.7", "B4.8")
def test_what_follows_waits_behind_msg_pending_and_comes_with_each_eom(rig: SynicRig) -> None:
    post(rig, *bodies(1))
    assert not rig.pending()
    post(rig, *bodies(2, 1))
    assert rig.pending()

    assert rig.consume_all() == bodies(3)

    assert rig.count(Header.EOMS) == 2  # the last message was alone
    assert rig.interrupts == [(0, VECTOR)] * 3


@pytest.mark.checklist("B4.6")
def test_a_guest_that_owes_an_eom_and_does_not_give_it_gets_nothing_more(rig: SynicRig) -> None:
    post(rig, *bodies(2))

    assert rig.consume(eom=False) == bodies(2)[0]

    assert rig.type_in_slot() == 0
    assert rig.consume_all() == []
    rig.synic.write_msr(0, msr.EOM, 0)
    assert rig.consume_all() == bodies(1, 1)


def test_another_message_makes_the_queue_be_looked_at_again(rig: SynicRig) -> None:
    post(rig, *bodies(2))
    rig.consume(eom=False)

    post(rig, *bodies(1, 2))

    assert rig.payload() == bodies(2)[1]
    assert rig.pending()
    assert rig.consume_all() == bodies(2, 1)


def test_an_eoi_makes_the_queue_be_looked_at_again_but_not_of_a_sint_that_ends_by_itself(rig: SynicRig) -> None:
    post(rig, *bodies(2))
    rig.consume(eom=False)
    rig.synic.write_msr(0, msr.SINT0 + SINT_VMBUS, VECTOR | Sint.AUTO_EOI)
    rig.synic.write_msr(0, msr.EOI, 0)
    assert rig.type_in_slot() == 0

    rig.synic.write_msr(0, msr.SINT0 + SINT_VMBUS, VECTOR)
    rig.synic.write_msr(0, msr.EOI, 0)

    assert rig.payload() == bodies(2)[1]


def test_nothing_else_makes_the_queue_be_looked_at(rig: SynicRig) -> None:
    post(rig, *bodies(2))
    rig.consume(eom=False)

    rig.mask()
    rig.enable(0)
    rig.synic.signal(EVENTS, 0)
    rig.synic.write_msr(1, msr.EOM, 0)
    rig.synic.attend_eoms()

    assert rig.type_in_slot() == 0


@pytest.mark.checklist("E12")
def test_a_cpu_that_is_born_again_gets_what_its_forerunner_died_over_before_it_wrote_eom(rig: SynicRig) -> None:
    post(rig, *bodies(2))
    rig.consume(eom=False)

    rig.synic.cpu_reborn(1)
    assert rig.type_in_slot() == 0
    rig.synic.cpu_reborn(0)

    assert rig.payload() == bodies(2)[1]


def test_eoms_that_a_cpu_counts_in_its_page_are_answered_once(rig: SynicRig) -> None:
    post(rig, *bodies(2))
    rig.consume(eom=False)
    rig.memory.store64(Vp.at(0, Vp.EOM), 3)

    rig.synic.attend_eoms()
    assert rig.payload() == bodies(2)[1]
    assert rig.count(Header.EOMS) == 3
    rig.consume(eom=False)
    post(rig, *bodies(2, 2))
    rig.consume(eom=False)
    rig.synic.attend_eoms()

    assert rig.type_in_slot() == 0
    assert rig.count(Header.EOMS) == 3


def test_a_message_page_turned_off_keeps_the_queue_until_it_is_on_and_asked_for(rig: SynicRig) -> None:
    post(rig, *bodies(3))
    rig.synic.write_msr(0, msr.SIMP, 0)
    rig.memory.store32(rig.slot(), 0)
    rig.synic.write_msr(0, msr.EOM, 0)
    assert rig.type_in_slot() == 0

    rig.enable(0)
    assert rig.type_in_slot() == 0
    rig.synic.write_msr(0, msr.EOM, 0)

    assert rig.consume_all() == bodies(2, 1)


# ---- buffers


def test_a_port_has_16_buffers_and_the_slot_is_none_of_them(rig: SynicRig) -> None:
    assert set(post(rig, *bodies(1 + FULL))) == {HvStatus.SUCCESS}
    assert post(rig, b"one too many") == [HvStatus.INSUFFICIENT_BUFFERS]

    rig.consume()
    assert post(rig, *bodies(1, 1 + FULL)) == [HvStatus.SUCCESS]

    assert rig.consume_all() == bodies(1 + FULL, 1)


def test_ports_do_not_take_each_other_s_buffers(rig: SynicRig) -> None:
    rig.synic.create_message_port(7, SINT_VMBUS, 0)
    post(rig, *bodies(1 + FULL))

    assert post(rig, b"seven", port=7) == [HvStatus.SUCCESS]

    assert rig.consume_all() == [*bodies(1 + FULL), b"seven"]


def test_the_domain_has_16_message_ports_and_one_that_is_deleted_makes_room(rig: SynicRig) -> None:
    for port in range(100, 113):  # the rig has two, and a connection
        rig.synic.create_message_port(port, 3, 0)
    with pytest.raises(LookupError, match="16"):
        rig.synic.create_message_port(200, 3, 0)
    assert rig.synic.post(200, 1, b"") == HvStatus.INVALID_PORT_ID

    rig.synic.delete_port(112)
    rig.synic.create_message_port(200, SINT_VMBUS, 0)

    assert post(rig, b"in", port=200) == [HvStatus.SUCCESS]
    assert rig.consume() == b"in"


def test_a_deleted_port_takes_its_queue_with_it(rig: SynicRig) -> None:
    post(rig, *bodies(3))

    rig.synic.delete_port(PORT)

    assert post(rig, b"late") == [HvStatus.INVALID_PORT_ID]
    assert rig.consume_all() == bodies(1)


def test_the_order_holds_when_numbers_wrap(rig: SynicRig) -> None:
    rig.memory.store32(Header.MESSAGE_SEQ, 2**32 - 4)
    post(rig, *bodies(8))

    rig.reborn()
    rig.synic.recover()

    assert rig.consume_all() == bodies(8)


def test_no_message_has_the_number_of_a_slot_that_was_never_filled(rig: SynicRig) -> None:
    rig.memory.store32(Header.MESSAGE_SEQ, 2**32 - 1)

    post(rig, b"first after the wrap")

    assert rig.consume_all() == [b"first after the wrap"]


def test_all_of_it_runs_over_the_machine_s_memory() -> None:
    fd = os.memfd_create("pvbus-test", os.MFD_CLOEXEC)
    try:
        os.ftruncate(fd, hyperv.BYTES)
        memory = Memory(fd, hyperv.BYTES)
    finally:
        os.close(fd)
    rig = SynicRig(vcpus=32, on=(0, 31), memory=memory)

    assert set(post(rig, *bodies(17))) == {HvStatus.SUCCESS}
    assert rig.synic.post(ANY, 1, bytes(240), vp=31) == HvStatus.SUCCESS
    assert rig.synic.signal(EVENTS, 2047) == HvStatus.SUCCESS
    rig.reborn()
    rig.synic.recover()

    assert rig.consume_all() == bodies(17)
    assert rig.consume_all(31) == [bytes(240)]
    assert rig.flag(2047)
    memory.close()


# ---- ports that are bound to any VP


def test_a_port_bound_to_any_vp_prefers_the_one_with_the_least_to_do() -> None:
    rig = SynicRig(vcpus=3, on=(1, 2))

    assert post(rig, *bodies(6), port=ANY) == [HvStatus.SUCCESS] * 6

    assert [rig.type_in_slot(vp) for vp in range(3)] == [0, 1, 1]
    found = rig.consume_all(1) + rig.consume_all(2)
    assert sorted(found) == bodies(6)


def test_the_caller_may_choose_among_any() -> None:
    rig = SynicRig(vcpus=2, on=(0, 1))

    assert rig.synic.post(ANY, 1, b"x", vp=1) == HvStatus.SUCCESS
    assert rig.synic.post(PORT, 1, b"y", vp=1) == HvStatus.SUCCESS  # bound: stays with its own

    assert (rig.consume(1), rig.consume(0)) == (b"x", b"y")


# ---- interrupts that are lost


def test_a_masked_sint_gets_its_message_and_loses_the_interrupt(rig: SynicRig) -> None:
    rig.mask()

    assert post(rig, b"silent") == [HvStatus.SUCCESS]
    rig.mask(bits=0)

    assert rig.payload() == b"silent"
    assert rig.interrupts == []
    assert (rig.count(Header.INTERRUPTS_LOST), rig.count(Header.DELIVERED)) == (1, 1)


def test_a_polled_sint_wants_no_interrupt_and_loses_none(rig: SynicRig) -> None:
    rig.mask(bits=Sint.POLLING)

    post(rig, b"polled")
    rig.synic.signal(EVENTS, 1)

    assert rig.payload() == b"polled"
    assert rig.flag(1)
    assert (rig.interrupts, rig.count(Header.INTERRUPTS_LOST)) == ([], 0)


# ---- event flags


@pytest.mark.checklist("B5.2")
def test_a_flag_interrupts_only_when_it_was_clear(rig: SynicRig) -> None:
    assert [rig.synic.signal(EVENTS, flag) for flag in (0, 0, 2047)] == [HvStatus.SUCCESS] * 3

    assert [rig.flag(flag) for flag in (0, 1, 2046, 2047)] == [True, False, False, True]
    assert rig.interrupts == [(0, VECTOR)] * 2
    word = flag_word(Frame.of_vp(0, Frame.EVENT_FLAGS), SINT_VMBUS, 0)
    assert rig.memory.test_and_clear_bit(word, 0) == 1
    rig.synic.signal(EVENTS, 0)
    assert rig.interrupts == [(0, VECTOR)] * 3
    assert rig.count(Header.SIGNALS) == 4


def test_flags_of_a_port_begin_at_its_base_and_end_with_its_count(rig: SynicRig) -> None:
    rig.synic.create_event_port(8, SINT_VMBUS, 0, base_flag=100, flags=3)

    assert [rig.synic.signal(8, flag) for flag in (-1, 2, 3)] == [
        HvStatus.INVALID_PARAMETER, HvStatus.SUCCESS, HvStatus.INVALID_PARAMETER,
    ]  # fmt: skip
    assert rig.synic.signal(EVENTS, 2048) == HvStatus.INVALID_PARAMETER
    assert [rig.flag(flag) for flag in (101, 102, 103)] == [False, True, False]
    with pytest.raises(ValueError, match="2 flags from 2047"):
        rig.synic.create_event_port(9, SINT_VMBUS, 0, base_flag=2047, flags=2)


def test_a_masked_sint_gets_its_flag_and_loses_the_interrupt_for_good(rig: SynicRig) -> None:
    rig.mask()
    rig.synic.signal(EVENTS, 3)
    rig.mask(bits=0)
    rig.synic.signal(EVENTS, 3)  # set already: no edge

    assert rig.flag(3)
    assert rig.interrupts == []
    assert rig.count(Header.INTERRUPTS_LOST) == 1


def test_a_port_is_made_once_and_on_a_sint_that_exists(rig: SynicRig) -> None:
    with pytest.raises(ValueError, match="port 1 exists"):
        rig.synic.create_event_port(PORT, 2, 0)
    with pytest.raises(ValueError, match="no SINT16"):
        rig.synic.create_message_port(50, 16, 0)
    with pytest.raises(KeyError):
        rig.synic.delete_port(50)
