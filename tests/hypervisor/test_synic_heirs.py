# SPDX-License-Identifier: Apache-2.0
"""The hypervisor dies before each of its writes, and an heir goes on: each message that was posted comes out once."""

from collections.abc import Callable

import pytest

from pvbus.actors.hypervisor import synic_msrs as msr
from pvbus.actors.hypervisor.synic import HvStatus
from pvbus.shm.hyperv import Buffer, Header, Vp
from pvbus.tests.hypervisor.synic_rig import EVENTS, PORT, SynicRig

STEPS_MAX = 200


def each_death(prepare: Callable[[], SynicRig], act: Callable[[SynicRig], object], then: Callable[[SynicRig, str], None]) -> int:
    """Let `act` die before each of its writes, and after the last one; give how many there were."""
    for step in range(1, STEPS_MAX):
        rig = prepare()
        with rig.world.dying_at(step):
            act(rig)
        died = rig.world.steps == step
        then(rig, f"step {step}, {rig.world.sites[-1] if died else 'the end'}")
        if not died:
            return rig.world.steps
    raise AssertionError(f"more than {STEPS_MAX} writes")


def busy(messages: int = 3) -> SynicRig:
    """Return a guest that owes an EOM: message 0 was taken, the others wait."""
    rig = SynicRig()
    for number in range(messages):
        assert rig.synic.post(PORT, 1, bytes([number]) * 9) == HvStatus.SUCCESS
    assert rig.consume(eom=False) == bytes(9)
    rig.interrupts.clear()
    return rig


def contents(first: int, end: int) -> list[bytes]:
    return [bytes([number]) * 9 for number in range(first, end)]


def eom(rig: SynicRig) -> None:
    rig.synic.write_msr(0, msr.EOM, 0)


def test_a_host_dies_anywhere_in_a_delivery_and_each_message_comes_once() -> None:
    def then(rig: SynicRig, where: str) -> None:
        rig.reborn()
        rig.synic.recover()
        assert rig.interrupts, where  # whatever was delivered has been announced
        assert rig.consume_all() == contents(1, 3), where

    assert each_death(busy, eom, then) > 10


def test_a_guest_that_is_quicker_than_the_heir_gets_nothing_twice() -> None:
    def then(rig: SynicRig, where: str) -> None:
        early = rig.consume(eom=False)  # between the death and the heir
        rig.reborn()
        rig.synic.recover()
        late = rig.consume_all()
        assert ([early] if early is not None else []) + late == contents(1, 3), where

    each_death(busy, eom, then)


def test_the_heir_dies_too_anywhere_and_each_message_comes_once() -> None:
    for first in range(1, 16):

        def prepare(first: int = first) -> SynicRig:
            rig = busy()
            with rig.world.dying_at(first):
                eom(rig)
            rig.reborn()
            return rig

        def then(rig: SynicRig, where: str, first: int = first) -> None:
            rig.reborn()
            rig.synic.recover()
            assert rig.consume_all() == contents(1, 3), (first, where)

        each_death(prepare, lambda rig: rig.synic.recover(), then)


def test_a_host_dies_anywhere_in_posting_and_the_message_comes_whole_or_not_at_all() -> None:
    outcomes = set()

    def prepare() -> SynicRig:
        return SynicRig()

    def then(rig: SynicRig, where: str) -> None:
        rig.reborn()
        rig.synic.recover()
        found = rig.consume_all()
        assert found in ([], [b"a message"]), where
        outcomes.add(bool(found))
        posted = [rig.synic.post(PORT, 1, bytes([number])) for number in range(17)]
        assert set(posted) == {HvStatus.SUCCESS}, where  # no buffer is lost
        assert rig.consume_all() == [bytes([number]) for number in range(17)], where

    each_death(prepare, lambda rig: rig.synic.post(PORT, 1, b"a message"), then)
    assert outcomes == {True, False}


def test_a_message_of_the_guest_s_is_the_host_s_until_it_is_done() -> None:
    def handle(rig: SynicRig) -> None:
        message = rig.synic.take(1)
        assert message is not None
        rig.synic.done(message)

    def prepare() -> SynicRig:
        rig = SynicRig()
        for number in range(2):
            assert rig.synic.hv_post_message(1, 1, bytes([number])) == HvStatus.SUCCESS
        return rig

    def then(rig: SynicRig, where: str) -> None:
        rig.reborn()
        message = rig.synic.take(1)
        assert message is not None
        assert message.payload == (b"\1" if "the end" in where else b"\0"), where

    each_death(prepare, handle, then)


def test_what_was_taken_and_not_done_is_given_to_the_heir_first() -> None:
    rig = SynicRig()
    for number in range(3):
        rig.synic.hv_post_message(1, 1, bytes([number]))
    rig.synic.take(1)

    rig.reborn()

    taken = [rig.synic.take(1) for _ in range(4)]
    assert [message.payload if message else None for message in taken] == [b"\0", b"\1", b"\2", None]


def test_a_host_dies_between_a_flag_and_its_interrupt_and_the_heir_interrupts() -> None:
    def then(rig: SynicRig, where: str) -> None:
        set_before = rig.flag(5)
        rig.reborn()
        rig.synic.recover()
        assert bool(rig.interrupts) == set_before, where
        assert rig.synic.signal(EVENTS, 5) == HvStatus.SUCCESS
        assert rig.flag(5), where
        assert rig.interrupts, where

    each_death(SynicRig, lambda rig: rig.synic.signal(EVENTS, 5), then)


def test_an_eom_that_nobody_has_answered_is_answered_by_the_heir() -> None:
    def prepare() -> SynicRig:
        rig = busy()
        rig.memory.store64(Vp.at(0, Vp.EOM), 1)  # the CPU has counted one, in its VP's page
        return rig

    def then(rig: SynicRig, where: str) -> None:
        rig.reborn()
        rig.synic.recover()
        assert rig.consume_all() == contents(1, 3), where

    each_death(prepare, lambda rig: rig.synic.attend_eoms(), then)


def test_recovery_of_a_host_that_did_not_die_changes_nothing() -> None:
    rig = SynicRig()
    rig.synic.post(PORT, 1, b"once")
    rig.consume()
    rig.interrupts.clear()
    delivered = rig.count(Header.DELIVERED)

    rig.reborn()
    rig.synic.recover()

    assert (rig.interrupts, rig.count(Header.DELIVERED), rig.type_in_slot()) == ([], delivered, 0)


def taken(rig: SynicRig) -> list[bytes]:
    """Take, as the host, what the guest has posted."""
    found = []
    while (message := rig.synic.take(1)) is not None:
        rig.synic.done(message)
        found.append(message.payload)
    return found


@pytest.mark.parametrize("before", [0, 3, 20])
def test_a_guest_that_posts_again_what_died_with_a_hypervisor_is_heard_once(before: int) -> None:
    def prepare() -> SynicRig:
        rig = SynicRig()
        for serial in range(1, before + 1):
            assert rig.synic.hv_post_message(1, 1, b"before", serial) == HvStatus.SUCCESS
            assert taken(rig) == [b"before"]
        return rig

    def act(rig: SynicRig) -> None:
        rig.synic.hv_post_message(1, 1, b"once", before + 1)

    def then(rig: SynicRig, where: str) -> None:
        rig.reborn()
        heard = taken(rig)
        assert rig.synic.hv_post_message(1, 1, b"once", before + 1) == HvStatus.SUCCESS, where
        heard += taken(rig)
        for _ in range(2):  # another call with the same words
            assert rig.synic.hv_post_message(1, 1, b"again", before + 2 + _) == HvStatus.SUCCESS, where
        assert heard + taken(rig) == [b"once", b"again", b"again"], where

    assert each_death(prepare, act, then) > 5


def test_what_the_dead_hypervisor_had_done_with_the_message_does_not_matter() -> None:
    rig = SynicRig()
    rig.synic.hv_post_message(1, 1, b"handled", 7)
    assert taken(rig) == [b"handled"]
    rig.synic.post(PORT, 1, b"to the guest")    # takes a number, too
    rig.reborn()

    assert rig.synic.hv_post_message(1, 1, b"refused meanwhile", 6) == HvStatus.SUCCESS
    assert rig.synic.hv_post_message(1, 1, b"handled", 7) == HvStatus.SUCCESS
    assert taken(rig) == [b"refused meanwhile"]


def test_a_serial_that_has_come_round_and_a_guest_that_is_new_are_no_repetition() -> None:
    for forget in (True, False):
        rig = SynicRig()
        rig.synic.hv_post_message(1, 1, b"old", 7)
        taken(rig)
        rig.reborn()
        if forget:
            rig.synic.forget_calls()
        else:
            rig.synic.hv_post_message(1, 1, b"much later", 7 + Buffer.SERIALS // 2)
        rig.synic.hv_post_message(1, 1, b"new", 7)
        assert taken(rig)[-1] == b"new"
