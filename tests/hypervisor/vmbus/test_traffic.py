# SPDX-License-Identifier: Apache-2.0
"""The VMBus server: timing traps, signals, back-pressure, the heir, foreign bytes."""
# Checklist: H12, H11 (relid 32 and above), X13, X14 (host side)

import random
import uuid
from collections.abc import Iterator

import pytest

from pvbus.actors.hypervisor.vmbus import snapshot
from pvbus.actors.hypervisor.vmbus.channel import CHANNELS_MAX, Channel, State
from pvbus.actors.hypervisor.vmbus.server import REPLIES_MAX
from pvbus.actors.runtime import vmbus_wire as wire
from pvbus.actors.runtime.vmbus_facts import (
    STATUS_SUCCESS,
    STATUS_UNSUCCESSFUL,
    V0_13,
    V5_3,
    VP_NO_INTERRUPT,
    Kind,
)
from pvbus.tests.hypervisor.vmbus.rig import (
    ECHO,
    INSTANCE,
    INTERRUPT_FRAME,
    RING_GPADL,
    PacedDevice,
    Pages,
    Rig,
    connected,
    opened,
)


@pytest.fixture
def pages() -> Iterator[Pages]:
    pages = Pages()
    yield pages
    pages.close()


@pytest.fixture(params=[V0_13, V5_3], ids=["0.13", "5.3"])
def rig(request: pytest.FixtureRequest, pages: Pages) -> Rig:
    return Rig(pages, request.param)


# ------------------------------------------------------------------------------------------------------ timing traps


def test_an_interrupt_may_overtake_the_open_result_that_finds_no_buffer(rig: Rig) -> None:
    device = PacedDevice()
    relid = rig.server.offer(ECHO, INSTANCE, device)
    rig.connect()
    rig.give_pages(relid)
    rig.heard()
    rig.room = 0

    rig.say(rig.opening(relid))
    assert device.handle is not None
    device.handle.signal()

    assert len(rig.flags) == 1
    assert not rig.told
    rig.room = 1
    assert rig.server.flush()
    assert rig.heard() == [wire.OpenResult(relid, 7, STATUS_SUCCESS)]


def test_a_rescind_overtakes_an_open_which_then_has_no_result(rig: Rig) -> None:
    relid = connected(rig)
    rig.give_pages(relid)
    rig.room = 0
    rig.server.rescind(relid)

    assert rig.say(rig.opening(relid)) == []
    rig.room = 9
    rig.server.flush()

    assert rig.heard() == [wire.Rescind(relid)]
    assert (rig.server.counters.overtaken, rig.server.counters.violations) == (1, 0)


def test_a_rescind_while_the_device_opens_ends_the_open_without_a_result(rig: Rig) -> None:
    device = PacedDevice(slow=True)
    relid = opened(rig, device)
    rig.heard()

    rig.server.rescind(relid)
    device.go_on()

    assert rig.heard() == [wire.Rescind(relid)]
    assert device.mapped is None


def test_the_same_open_again_is_not_answered_twice(rig: Rig) -> None:
    device = PacedDevice(slow=True)
    relid = opened(rig, device)
    rig.heard()

    assert rig.say(rig.opening(relid)) == []
    device.go_on()

    assert rig.heard() == [wire.OpenResult(relid, 7, STATUS_SUCCESS)]


# ----------------------------------------------------------------------------------------------------------- signals


def test_below_2_4_a_signal_is_a_bit_of_the_interrupt_page_and_flag_0(pages: Pages) -> None:
    rig = Rig(pages, V0_13)
    for number in range(99):
        rig.server.offer(ECHO, uuid.UUID(int=number), PacedDevice())
    device = PacedDevice()
    relid = opened(rig, device, vp=77)      # the word is no virtual CPU in 0.13
    assert relid == 100
    assert device.handle is not None

    device.handle.signal()

    assert rig.flags == [(0, 0)]
    page = INTERRUPT_FRAME * 4096
    assert [pages.own.load64(page + 8 * word) for word in range(4)] == [0, 1 << 36, 0, 0]


def test_from_2_4_a_signal_is_the_flag_of_the_relid_on_the_target_cpu_which_can_be_changed(pages: Pages) -> None:
    rig, device = Rig(pages), PacedDevice()
    relid = opened(rig, device, vp=1)
    assert device.handle is not None

    device.handle.signal()
    assert rig.say(wire.ModifyChannel(relid, 0))[-1] == wire.ModifyChannelResponse(relid, STATUS_SUCCESS)
    device.handle.signal()
    for vp in (2, VP_NO_INTERRUPT):
        assert rig.say(wire.ModifyChannel(relid, vp)) == [wire.ModifyChannelResponse(relid, STATUS_UNSUCCESSFUL)]

    assert rig.flags == [(relid, 1), (relid, 0)]


def test_a_guest_that_wants_no_interrupts_gets_none_and_a_cpu_that_it_does_not_have_is_refused(pages: Pages) -> None:
    rig, device = Rig(pages), PacedDevice()
    relid = opened(rig, device, vp=VP_NO_INTERRUPT)
    assert device.handle is not None
    device.handle.signal()
    assert rig.flags == []
    rig.say(wire.CloseChannel(relid))
    rig.heard()

    assert rig.say(rig.opening(relid, vp=2)) == [wire.OpenResult(relid, 7, STATUS_UNSUCCESSFUL)]


@pytest.mark.checklist("H11")
@pytest.mark.parametrize(("relid", "defect", "seen"), [
    (1, False, 1), (31, False, 31), (32, False, 32), (100, False, 100), (255, False, 255),
    (1, True, 1), (31, True, 31), (32, True, 64), (100, True, 196),
])
def test_the_2012_driver_sets_the_wrong_word_for_relids_from_32_on_and_ours_does_not(
    pages: Pages, relid: int, defect: bool, seen: int
) -> None:
    rig = Rig(pages, V0_13)
    devices = {number: PacedDevice() for number in (relid, seen)}
    for number in range(1, 256):
        rig.server.offer(ECHO, uuid.UUID(int=number), devices.get(number) or PacedDevice())
    rig.connect()
    for number in devices:
        rig.give_pages(number, gpadl=number)
        rig.say(rig.opening(number, gpadl=number))

    rig.server.set_guest_signal(relid, wrong_word=defect)
    rig.server.on_event()

    assert {number: device.calls.count("signal") for number, device in devices.items()} == {
        number: int(number == seen) for number in devices
    }


def test_the_guests_half_of_the_interrupt_page_is_taken_bit_by_bit(pages: Pages) -> None:
    rig, device = Rig(pages, V0_13), PacedDevice()
    for number in range(99):
        rig.server.offer(ECHO, uuid.UUID(int=number), PacedDevice())
    relid = opened(rig, device)
    for bit in (relid, 3):
        pages.own.test_and_set_bit(INTERRUPT_FRAME * 4096 + 2048 + bit // 64 * 8, bit % 64)

    rig.server.on_event()
    rig.server.on_event()

    assert device.calls.count("signal") == 1
    assert rig.server.counters.stray_signals == 1


def test_a_signal_for_a_channel_that_is_not_open_is_counted(rig: Rig) -> None:
    relid = connected(rig)

    for stray in (relid, 0, 9, 2**31):
        rig.server.on_signal(stray)

    assert rig.server.counters.stray_signals == 4


def test_timers_run_while_a_channel_is_open(rig: Rig) -> None:
    device = PacedDevice()
    relid = opened(rig, device)
    rig.server.tick(5)
    rig.say(wire.CloseChannel(relid))
    rig.server.tick(6)

    assert device.calls == ["open", "opened", "tick 5", "close"]
    assert rig.server.due_ns() is None


# ------------------------------------------------------------------------------------------------------ back-pressure


def test_messages_wait_for_buffers_in_order_and_then_the_guest_is_not_heard(rig: Rig) -> None:
    relid = connected(rig)
    rig.heard()
    rig.room = 0
    asked = 0
    while rig.server.on_message(wire.RequestOffers().encode(rig.version)):
        asked += 1
    assert asked == REPLIES_MAX == len(rig.server.outgoing)
    assert rig.server.counters.refused == 1
    rig.server.rescind(relid)

    rig.room = 100
    assert not rig.server.flush()
    rig.room = 1000
    rig.server.tick(0)

    assert rig.heard() == [wire.AllOffersDelivered()] * REPLIES_MAX + [wire.Rescind(relid)]
    assert rig.say(wire.RequestOffers()) == [wire.AllOffersDelivered()]


def test_a_new_contact_is_heard_even_then_and_drops_what_waited(rig: Rig) -> None:
    connected(rig)
    rig.heard()
    rig.room = 0
    while rig.server.on_message(wire.RequestOffers().encode(rig.version)):
        pass

    rig.say(rig.contact())
    rig.room = 1000
    rig.server.flush()

    assert [type(message) for message in rig.heard()] == [wire.VersionResponse]


# ----------------------------------------------------------------------------------------------------------- the heir


def heir_of(rig: Rig) -> tuple[Rig, dict[int, PacedDevice]]:
    """Start an heir from the record."""
    devices: dict[int, PacedDevice] = {}

    def device_of(channel: Channel) -> PacedDevice:
        return devices.setdefault(channel.relid, PacedDevice())

    heir = Rig(rig.pages, rig.version)
    heir.room = rig.room
    snapshot.restore(heir.server, snapshot.take(rig.server), device_of)
    return heir, devices


def test_an_heir_has_open_channels_open_without_telling_the_guest(rig: Rig) -> None:
    relid = opened(rig, PacedDevice())
    other = rig.server.offer(ECHO, uuid.UUID(int=5), PacedDevice())

    heir, devices = heir_of(rig)

    assert heir.heard() == []
    assert devices[relid].calls == ["open", "restored paced"]
    assert devices[other].calls == []
    assert devices[relid].mapped == (rig.pages.channel, 0, 16 * 4096, 8 * 4096)
    heir.server.on_signal(relid)
    assert devices[relid].calls[-1] == "signal"
    heir.say(wire.CloseChannel(relid))
    assert heir.say(wire.GpadlTeardown(relid, RING_GPADL)) == [wire.GpadlTorndown(RING_GPADL)]
    heir.server.rescind(other)
    assert heir.server.offer(ECHO, uuid.UUID(int=6), PacedDevice()) == 3


def test_an_heir_says_what_its_forerunner_could_not(rig: Rig) -> None:
    connected(rig)
    rig.room = 0
    rig.say(wire.RequestOffers())

    heir, _ = heir_of(rig)
    heir.room = 10
    heir.server.tick(0)

    assert heir.heard() == [wire.AllOffersDelivered()]


@pytest.mark.parametrize("last", ["open", "close", "reopen", "initiate", "unload"])
def test_an_heir_ends_what_a_device_was_about_to_do(pages: Pages, last: str) -> None:
    rig, device = Rig(pages), PacedDevice(slow=True)
    relid = opened(rig, device)
    if last != "open":
        device.go_on()
        rig.say({"initiate": rig.contact(), "unload": wire.Unload()}.get(last, wire.CloseChannel(relid)))
    if last == "reopen":
        rig.say(rig.opening(relid, 9))

    heir, _ = heir_of(rig)

    told = {
        "open": [wire.OpenResult(relid, 7, STATUS_SUCCESS)], "close": [], "reopen": [wire.OpenResult(relid, 9, STATUS_SUCCESS)],
        "initiate": [wire.VersionResponse(supported=True, connection=4)], "unload": [wire.UnloadResponse()],
    }  # fmt: skip
    assert heir.heard() == told[last]
    assert heir.state(relid) in (State.OPEN, State.CLOSED, State.CLIENT_RELEASED)


def test_an_heir_that_does_not_find_the_rings_rescinds_the_channel(rig: Rig) -> None:
    relid = opened(rig, PacedDevice())
    data = snapshot.take(rig.server)
    heir = Rig(rig.pages, rig.version)
    heir.pages.find = lambda frame: None  # type: ignore[method-assign]

    snapshot.restore(heir.server, data, lambda _: PacedDevice())

    assert heir.heard() == [wire.Rescind(relid)]


@pytest.mark.parametrize("data", [b"", b"\x80", b"\xff" * 40, b"\x81\xa4link\xc0"])
def test_a_record_that_is_none_is_refused(rig: Rig, data: bytes) -> None:
    with pytest.raises(snapshot.SnapshotError):
        snapshot.restore(rig.server, data, lambda _: PacedDevice())


def test_the_record_of_a_full_server_stays_within_its_bound(rig: Rig) -> None:
    for number in range(CHANNELS_MAX):
        rig.server.offer(ECHO, uuid.UUID(int=number), PacedDevice(), user_data=bytes(120))
    rig.connect()
    for relid in range(1, CHANNELS_MAX + 1):
        rig.give_pages(relid, relid)
        rig.say(rig.opening(relid, gpadl=relid))
    rig.room = 0
    while rig.server.on_message(wire.RequestOffers().encode(rig.version)):
        pass
    for relid in range(1, CHANNELS_MAX + 1):
        rig.server.rescind(relid)

    assert len(snapshot.take(rig.server)) < snapshot.SNAPSHOT_BYTES_MAX


# -------------------------------------------------------------------------------------------------------- foreign bytes


@pytest.mark.parametrize("seed", range(10))
def test_random_payloads_end_in_no_exception_and_leave_a_server_that_works(rig: Rig, seed: int) -> None:
    chance = random.Random(seed)
    connected(rig)
    kinds = [*Kind, 0, 18, 99, 2**31]
    for _ in range(3000):
        kind = chance.choice(kinds)
        if kind in (Kind.INITIATE_CONTACT, Kind.UNLOAD) and chance.random() < 0.9:
            continue
        small = b"".join(chance.choice((0, 1, 2, 8, 16, RING_GPADL, 0xFFFFFFFF)).to_bytes(4, "little") for _ in range(58))
        body = chance.choice((small, chance.randbytes(232)))[: chance.choice((0, 4, 8, 12, 24, 32, 140, 232, 240))]
        rig.server.on_message(kind.to_bytes(4, "little") + bytes(4) + body)
        if not rig.server.link.version:
            rig.connect()
    rig.heard()

    rig.connect()
    rig.heard()
    assert rig.give_pages(1) == [wire.GpadlCreated(1, RING_GPADL, STATUS_SUCCESS)]
    assert rig.say(rig.opening(1)) == [wire.OpenResult(1, 7, STATUS_SUCCESS)]
    assert rig.server.counters.violations > 500
