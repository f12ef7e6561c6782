# SPDX-License-Identifier: Apache-2.0
"""The VMBus server: versions, offers and relids, pages."""
# Checklist: H12, H11 (relid 32 and above), X13, X14 (host side)

import uuid
from collections.abc import Iterator

import pytest

from pvbus.actors.hypervisor.vmbus import snapshot
from pvbus.actors.hypervisor.vmbus.channel import CHANNELS_MAX, State
from pvbus.actors.hypervisor.vmbus.connection import ConnectionState
from pvbus.actors.hypervisor.vmbus.gpadl import GPADLS_MAX, WORDS_MAX
from pvbus.actors.hypervisor.vmbus.offers import event_connection, relid_of_connection
from pvbus.actors.runtime import vmbus_wire as wire
from pvbus.actors.runtime.vmbus_facts import (
    STATE_UNKNOWN_FAILURE,
    STATUS_SUCCESS,
    STATUS_UNSUCCESSFUL,
    V0_13,
    V5_3,
    Version,
    WireError,
)
from pvbus.actors.runtime.vmbus_gpadl import gpadl_messages
from pvbus.tests.hypervisor.vmbus.rig import (
    CHANNEL_FRAME,
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


# ------------------------------------------------------------------------------------------------------- connection


def test_a_version_that_both_speak_is_accepted_with_the_connection_for_later_messages(pages: Pages) -> None:
    for version, connection in ((V0_13, V0_13), (V5_3, 4)):
        rig = Rig(pages, version)
        rig.say(rig.contact())

        assert rig.server.link.state is ConnectionState.CONNECTED
        assert wire.decode(rig.raw[-1], V5_3) == wire.VersionResponse(supported=True, connection=connection)


@pytest.mark.parametrize("asked", [*sorted(set(Version) - {V0_13, V5_3}), 0, 12, 14, 0x50004, 0x70000])
def test_every_other_version_is_refused_and_a_lower_one_may_follow(pages: Pages, asked: int) -> None:
    rig = Rig(pages, V5_3)

    assert rig.say(wire.InitiateContact(version=asked, sint=2)) == [wire.VersionResponse(supported=False)]
    assert rig.server.link.state is ConnectionState.DISCONNECTED
    rig.version = V0_13
    assert rig.say(rig.contact()) == [wire.VersionResponse(supported=True)]


def test_a_contact_with_pages_that_the_guest_does_not_have_is_refused_so_that_a_2012_guest_sees_it(pages: Pages) -> None:
    rig = Rig(pages, V0_13)
    for page in (0, 4096 * 100, INTERRUPT_FRAME * 4096 + 8):
        assert rig.say(wire.InitiateContact(version=V0_13, interrupt_page=page)) == [wire.VersionResponse(supported=False)]
    rig.version = V5_3
    for contact in (
        wire.InitiateContact(version=V5_3, sint=2, monitor_guest_to_host=4096 * 100), wire.InitiateContact(version=V5_3, sint=3),
        wire.InitiateContact(version=V5_3, sint=2, vtl=2), wire.InitiateContact(version=V5_3, sint=2, target_vp=2),
    ):  # fmt: skip
        assert rig.say(contact) == [wire.VersionResponse(supported=True, state=STATE_UNKNOWN_FAILURE)]
        assert rig.server.link.state is ConnectionState.DISCONNECTED

    assert rig.server.counters.violations == 7


def test_a_new_contact_resets_everything_and_the_last_of_several_is_answered(pages: Pages) -> None:
    rig, device = Rig(pages), PacedDevice(slow=True)
    relid = opened(rig, device)
    device.go_on()
    rig.heard()

    assert rig.say(wire.InitiateContact(version=Version.COPPER)) == []
    rig.version = V0_13
    assert rig.say(rig.contact()) == []
    assert rig.state(relid) is State.CLOSING_CLIENT_RELEASE
    device.go_on()

    assert rig.heard() == [wire.VersionResponse(supported=True)]
    assert rig.server.link.version == V0_13
    assert len(rig.server.gpadls) == 0
    assert [type(message) for message in rig.say(wire.RequestOffers())] == [wire.OfferChannel, wire.AllOffersDelivered]


def test_unload_is_answered_from_1_1_on_and_a_guest_can_come_back(rig: Rig) -> None:
    relid = opened(rig, device := PacedDevice())
    rig.heard()

    assert rig.say(wire.Unload()) == ([wire.UnloadResponse()] if rig.version == V5_3 else [])

    assert rig.server.link.state is ConnectionState.DISCONNECTED
    assert device.mapped is None
    assert [type(message) for message in rig.connect()] == [wire.VersionResponse, wire.OfferChannel, wire.AllOffersDelivered]
    assert rig.state(relid) is State.CLOSED


# ------------------------------------------------------------------------------------------------- offers and relids


def test_offers_come_in_the_order_of_their_relids_and_a_second_request_gets_the_terminator_alone(rig: Rig) -> None:
    instances = [uuid.UUID(int=i) for i in range(3)]
    for instance in instances:
        rig.server.offer(ECHO, instance, PacedDevice())
    rig.say(rig.contact())

    told = rig.say(wire.RequestOffers())

    offers = [message for message in told if isinstance(message, wire.OfferChannel)]
    assert [(offer.relid, offer.instance_id) for offer in offers] == list(zip([1, 2, 3], instances, strict=True))
    assert told[-1] == wire.AllOffersDelivered()
    assert rig.say(wire.RequestOffers()) == [wire.AllOffersDelivered()]


def test_an_offer_names_its_event_connection(pages: Pages) -> None:
    rig = Rig(pages)
    rig.server.offer(ECHO, INSTANCE, PacedDevice(), flags=0x10, user_data=b"\4", monitor_id=7)

    (offer,) = [message for message in rig.connect() if isinstance(message, wire.OfferChannel)]

    assert (offer.connection, offer.dedicated, offer.monitor_id, offer.monitor_allocated) == (0x2001, True, 7, True)
    assert (offer.flags, offer.user_data) == (0x10, b"\4" + bytes(119))
    assert relid_of_connection(offer.connection) == offer.relid


def test_only_the_connections_of_channels_name_a_relid() -> None:
    assert [relid_of_connection(connection) for connection in (0, 1, 2, 0x2000, 0x1001, 0x12001)] == [None] * 6
    assert [relid_of_connection(event_connection(relid)) for relid in (1, 255)] == [1, 255]


def test_a_device_that_comes_later_is_offered_at_once(rig: Rig) -> None:
    rig.connect()

    relid = rig.server.offer(ECHO, INSTANCE, PacedDevice())

    assert [(type(m), getattr(m, "relid", 0)) for m in rig.heard()] == [(wire.OfferChannel, relid)]


def test_a_relid_is_used_again_only_after_its_release_and_under_another_generation(rig: Rig) -> None:
    rig.connect()
    first = rig.server.offer(ECHO, INSTANCE, PacedDevice())
    generation = rig.channel(first).generation
    rig.server.rescind(first)
    second = rig.server.offer(ECHO, uuid.UUID(int=2), PacedDevice())
    rig.say(wire.RelidReleased(first))
    third = rig.server.offer(ECHO, uuid.UUID(int=3), PacedDevice())

    assert (first, second, third) == (1, 2, 1)
    assert not rig.server.rescind(third, generation)
    assert rig.state(third) is State.CLOSED
    assert rig.server.rescind(third, rig.channel(third).generation)


def test_the_handle_of_a_revoked_device_says_nothing_to_the_channel_that_has_its_relid_now(pages: Pages) -> None:
    rig, old, new = Rig(pages), PacedDevice(slow=True), PacedDevice(slow=True)
    relid = opened(rig, old)
    handle = old.handle
    assert handle is not None
    rig.server.rescind(relid)
    rig.server.offer(ECHO, INSTANCE, new)
    rig.say(wire.RelidReleased(relid))
    rig.give_pages(relid)
    rig.say(rig.opening(relid, 9))
    rig.heard()

    handle.opened(STATUS_SUCCESS)
    handle.closed()
    handle.signal()

    assert rig.state(relid) is State.OPENING
    assert (rig.heard(), rig.flags) == ([], [])


def test_an_instance_offered_again_waits_until_the_guest_has_released_the_old_one(rig: Rig) -> None:
    rig.connect()
    relid = rig.server.offer(ECHO, INSTANCE, PacedDevice())
    rig.server.rescind(relid)
    rig.heard()

    assert rig.server.offer(ECHO, INSTANCE, PacedDevice()) == relid
    assert rig.heard() == []
    (offer,) = rig.say(wire.RelidReleased(relid))
    assert isinstance(offer, wire.OfferChannel)
    assert (offer.relid, offer.instance_id) == (relid, INSTANCE)


def test_there_are_as_many_channels_as_a_2012_guest_looks_at(rig: Rig) -> None:
    for number in range(CHANNELS_MAX):
        rig.server.offer(ECHO, uuid.UUID(int=number), PacedDevice())

    with pytest.raises(OSError, match="255"):
        rig.server.offer(ECHO, INSTANCE, PacedDevice())
    with pytest.raises(WireError):
        rig.server.offer(ECHO, INSTANCE, PacedDevice(), user_data=bytes(121))
    assert len(rig.connect()) == CHANNELS_MAX + 2


# ------------------------------------------------------------------------------------------------------------- pages


@pytest.mark.parametrize("count", [1, 26, 27, 54, 55, 64])
def test_pages_are_put_together_from_header_and_bodies(rig: Rig, count: int) -> None:
    relid = connected(rig)

    assert rig.give_pages(relid, pages=count) == [wire.GpadlCreated(relid, RING_GPADL, STATUS_SUCCESS)]


def test_pages_of_two_gpadls_may_arrive_mixed(rig: Rig) -> None:
    relid = connected(rig)
    frames = range(CHANNEL_FRAME, CHANNEL_FRAME + 60)
    one, two = (wire_messages(relid, gpadl, frames) for gpadl in (5, 6))

    told = [message for pair in zip(one, two, strict=True) for part in pair for message in rig.say(part)]

    assert told == [wire.GpadlCreated(relid, 5, STATUS_SUCCESS), wire.GpadlCreated(relid, 6, STATUS_SUCCESS)]


def wire_messages(relid: int, gpadl: int, frames: range) -> list[wire.ChannelMessage]:
    """Split pages."""
    return list(gpadl_messages(relid, gpadl, len(frames) * 4096, frames))


def test_pages_that_the_guest_does_not_have_are_refused_and_the_handle_is_free_again(rig: Rig) -> None:
    relid = connected(rig)
    (message,) = wire_messages(relid, RING_GPADL, range(CHANNEL_FRAME + 60, CHANNEL_FRAME + 70))

    assert rig.say(message) == [wire.GpadlCreated(relid, RING_GPADL, STATUS_UNSUCCESSFUL)]
    assert rig.give_pages(relid) == [wire.GpadlCreated(relid, RING_GPADL, STATUS_SUCCESS)]


def test_a_body_too_many_a_body_too_long_and_a_body_for_nothing_are_ignored(rig: Rig) -> None:
    relid = connected(rig)
    header, body = wire_messages(relid, 5, range(CHANNEL_FRAME, CHANNEL_FRAME + 28))
    assert isinstance(body, wire.GpadlBody)
    assert rig.say(body) == []
    rig.say(header)
    assert rig.say(wire.GpadlBody(number=1, gpadl=5, words=(CHANNEL_FRAME,) * 3)) == []
    assert rig.say(body) == [wire.GpadlCreated(relid, 5, STATUS_SUCCESS)]
    assert rig.say(body) == []

    assert rig.server.counters.violations == 3


def test_a_header_that_cannot_be_taken_is_answered(rig: Rig) -> None:
    relid = connected(rig)
    rig.give_pages(relid)
    refused = wire.GpadlCreated(relid, RING_GPADL, STATUS_UNSUCCESSFUL)
    ranges = wire.GpadlHeader(relid=relid, gpadl=RING_GPADL, range_bytes=16, range_count=0, words=(4096, CHANNEL_FRAME))

    assert rig.give_pages(relid) == [refused]       # the handle is taken
    assert rig.say(ranges) == [refused]             # no range
    assert rig.give_pages(9, gpadl=7) == [wire.GpadlCreated(9, 7, STATUS_UNSUCCESSFUL)]


def test_what_a_guest_may_hand_over_is_bounded(rig: Rig) -> None:
    relid = connected(rig)
    long = wire.GpadlHeader(relid=relid, gpadl=0, range_bytes=0xFFF8, range_count=1, words=(8190 << 12,))
    for gpadl in range(WORDS_MAX // (0xFFF8 // 8)):
        rig.say(wire.GpadlHeader(relid=relid, gpadl=gpadl, range_bytes=long.range_bytes, range_count=1, words=long.words))
    told = [rig.say(wire.GpadlHeader(relid=relid, gpadl=9, range_bytes=0xFFF8, range_count=1, words=long.words))]
    assert told == [[wire.GpadlCreated(relid, 9, STATUS_UNSUCCESSFUL)]]
    rig.connect()

    for gpadl in range(GPADLS_MAX):
        rig.give_pages(relid, gpadl, 1)
    assert rig.give_pages(relid, GPADLS_MAX, 1) == [wire.GpadlCreated(relid, GPADLS_MAX, STATUS_UNSUCCESSFUL)]
    assert len(snapshot.take(rig.server)) < snapshot.SNAPSHOT_BYTES_MAX


@pytest.mark.parametrize(("pages_given", "downstream"), [(16, 1), (16, 15), (16, 0), (16, 2**32 - 1), (3, 2)])
def test_rings_without_room_for_data_are_refused(rig: Rig, pages_given: int, downstream: int) -> None:
    relid = connected(rig)
    rig.give_pages(relid, pages=pages_given)

    told = rig.say(wire.OpenChannel(relid=relid, open_id=3, ring_gpadl=RING_GPADL, downstream_page=downstream))

    assert told == [wire.OpenResult(relid, 3, STATUS_UNSUCCESSFUL)]
    assert rig.state(relid) is State.CLOSED


@pytest.mark.parametrize("frames", [
    [*range(CHANNEL_FRAME, CHANNEL_FRAME + 15), CHANNEL_FRAME + 16], [*range(CHANNEL_FRAME, CHANNEL_FRAME + 15), 4],
])  # fmt: skip
def test_rings_that_are_not_in_one_piece_are_refused(rig: Rig, frames: list[int]) -> None:
    relid = connected(rig)
    rig.say(wire.GpadlHeader(
        relid=relid, gpadl=RING_GPADL, range_bytes=8 + 8 * len(frames), range_count=1, words=(len(frames) * 4096, *frames),
    ))  # fmt: skip

    assert rig.say(rig.opening(relid)) == [wire.OpenResult(relid, 7, STATUS_UNSUCCESSFUL)]


def test_rings_of_another_channel_and_rings_that_nobody_handed_over_are_refused(rig: Rig) -> None:
    other = rig.server.offer(ECHO, uuid.UUID(int=9), PacedDevice())
    relid = connected(rig)
    rig.give_pages(other)

    assert rig.say(rig.opening(relid)) == [wire.OpenResult(relid, 7, STATUS_UNSUCCESSFUL)]
    assert rig.say(rig.opening(relid, gpadl=77)) == [wire.OpenResult(relid, 7, STATUS_UNSUCCESSFUL)]


def test_a_device_gets_its_rings_and_pages_go_back_only_when_it_has_let_them_go(rig: Rig) -> None:
    device = PacedDevice(slow=True)
    relid = opened(rig, device)
    device.go_on()
    assert device.mapped == (rig.pages.channel, 0, 16 * 4096, 8 * 4096)
    rig.heard()

    rig.say(wire.CloseChannel(relid))
    assert rig.say(wire.GpadlTeardown(relid, RING_GPADL)) == []
    device.go_on()

    assert rig.heard() == [wire.GpadlTorndown(RING_GPADL)]
    assert rig.say(wire.GpadlTeardown(relid, RING_GPADL)) == []
    assert rig.server.counters.violations == 1


def test_an_open_that_the_device_refuses_gives_its_status_and_can_be_tried_again(rig: Rig) -> None:
    device = PacedDevice(status=0xC0000236)
    relid = rig.server.offer(ECHO, INSTANCE, device)
    rig.connect()
    rig.give_pages(relid)

    assert rig.say(rig.opening(relid)) == [wire.OpenResult(relid, 7, 0xC0000236)]
    device.status = STATUS_SUCCESS
    assert rig.say(rig.opening(relid)) == [wire.OpenResult(relid, 7, STATUS_SUCCESS)]
    assert device.calls == ["open", "open", "opened"]
