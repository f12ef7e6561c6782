# SPDX-License-Identifier: Apache-2.0
"""Connecting, posting and leaving, against the real protocol server."""

import errno

import pytest

from pvbus.actors.runtime import vmbus_wire as wire
from pvbus.actors.runtime.vmbus_facts import SPOKEN, STATE_LOW_RESOURCES, V0_13, V5_3
from pvbus.actors.workqueue.connection import ConnectionState, HostError
from pvbus.actors.workqueue.waits import Post
from pvbus.shm.hyperv import PAGE, Frame, Header
from pvbus.tests.workqueue.rig import Guest


@pytest.mark.checklist("X11")
@pytest.mark.parametrize(("version", "connection", "relids"), [(V5_3, 4, 1), (V0_13, 1, 0)])
def test_each_version_connects_on_its_connection_with_its_way_of_signalling(version: int, connection: int, relids: int) -> None:
    guest = Guest(versions=(version,))

    guest.run(guest.connection.connect())

    assert guest.connection.state is ConnectionState.CONNECTED
    assert guest.server.link.version == version
    assert {post.connection for post in guest.posts} == {connection}
    assert guest.memory.load32(Header.FLAGS_ARE_RELIDS) == relids
    guest.check_at_rest()


@pytest.mark.checklist("X11")
def test_the_contact_names_the_three_pages_and_they_are_zeroed_before() -> None:
    guest = Guest(versions=(V0_13,))
    for frame in (Frame.INTERRUPT, Frame.MONITOR, Frame.MONITOR + 1):
        guest.memory.store64(frame * PAGE + PAGE - 8, 77)

    guest.run(guest.connection.connect())

    contact = wire.decode(guest.posts[0].payload, V0_13)
    assert isinstance(contact, wire.InitiateContact)
    pages = (contact.interrupt_page, contact.monitor_host_to_guest, contact.monitor_guest_to_host)
    assert pages == (Frame.INTERRUPT * PAGE, Frame.MONITOR * PAGE, (Frame.MONITOR + 1) * PAGE)
    assert [guest.memory.load64(page + PAGE - 8) for page in pages] == [0, 0, 0]


def refuse(guest: Guest, *versions: int, state: int | None = None) -> None:
    """Have the host refuse versions, or take them in a bad state."""

    def post(asked: Post) -> int | None:
        contact = wire.decode(asked.payload, V5_3)
        if isinstance(contact, wire.InitiateContact) and contact.version in versions:
            answer = wire.VersionResponse(supported=state is not None, state=state or 0)
            guest.to_guest.append(answer.encode(contact.version))
            return 0
        return None

    guest.post_status = post


@pytest.mark.checklist("X11")
@pytest.mark.parametrize("state", [None, STATE_LOW_RESOURCES])
def test_a_refused_version_is_followed_by_the_next_lower_one(state: int | None) -> None:
    guest = Guest()
    refuse(guest, V5_3, state=state)

    guest.run(guest.connection.connect())

    assert guest.connection.version == V0_13
    assert [post.connection for post in guest.posts] == [4, 1]


def test_a_host_that_does_not_know_connection_4_is_asked_for_a_lower_version() -> None:
    guest = Guest()
    guest.post_status = lambda post: 18 if post.connection == 4 else None

    guest.run(guest.connection.connect())

    assert guest.connection.version == V0_13


@pytest.mark.checklist("X11")
def test_when_every_version_is_refused_it_is_econnrefused_and_everything_is_given_back() -> None:
    guest = Guest()
    refuse(guest, *SPOKEN)

    with pytest.raises(OSError) as caught:
        guest.run(guest.connection.connect())

    assert caught.value.errno == errno.ECONNREFUSED
    assert guest.connection.state is ConnectionState.DISCONNECTED
    assert guest.memory.load32(Header.FLAGS_ARE_RELIDS) == 0
    assert len(guest.requests) == 0


def test_a_host_that_answers_with_one_byte_is_understood() -> None:
    guest = Guest()

    def post(asked: Post) -> int | None:
        if asked.connection == 4:
            guest.to_guest.append(bytes([15, 0, 0, 0, 0, 0, 0, 0, 0]))
            return 0
        return None

    guest.post_status = post
    guest.run(guest.connection.connect())

    assert guest.connection.version == V0_13


@pytest.mark.checklist("X11")
def test_no_answer_within_five_seconds_is_etimedout_and_a_late_one_is_nobody_s() -> None:
    guest = Guest(deliver=False)

    with pytest.raises(TimeoutError):
        guest.run(guest.connection.connect())

    assert guest.clock.now_ns() == 5_000_000_000
    assert guest.connection.state is ConnectionState.DISCONNECTED
    guest.deliver()
    assert guest.channels.counters.late == 1
    assert guest.connection.state is ConnectionState.DISCONNECTED
    assert len(guest.requests) == 0


@pytest.mark.checklist("X17")
def test_insufficient_buffers_is_tried_three_times_a_tenth_of_a_second_apart_by_the_2012_driver() -> None:
    guest = Guest(versions=(V0_13,))
    guest.post_status = lambda _: 19

    with pytest.raises(HostError) as caught:
        guest.run(guest.connection.connect())

    assert (caught.value.status, caught.value.errno) == (19, errno.ENOBUFS)
    assert len(guest.posts) == 3
    assert guest.clock.now_ns() == 200_000_000


@pytest.mark.checklist("X17")
def test_a_buffer_that_becomes_free_ends_the_tries() -> None:
    guest = Guest(versions=(V5_3,))
    statuses = iter([19, 19])
    guest.post_status = lambda _: next(statuses, None)

    guest.run(guest.connection.connect())

    assert len(guest.posts) == 3
    assert guest.clock.now_ns() == 3_000    # one and two microseconds


@pytest.mark.checklist("X17")
def test_another_status_is_given_as_it_is_and_not_tried_again() -> None:
    guest = Guest().connected()
    posts = len(guest.posts)
    guest.post_status = lambda _: 6

    assert guest.run(guest.connection.post(wire.RequestOffers())) == 6
    assert len(guest.posts) == posts + 1


@pytest.mark.checklist("X12", "H6")
def test_requesting_offers_waits_for_nothing_unless_the_driver_s_defect_is_switched_on() -> None:
    guest, seed = Guest().connected(), Guest(stalls=True)
    seed.run(seed.connection.connect())

    with pytest.raises(TimeoutError):
        seed.run(seed.connection.request_offers())

    assert guest.clock.now_ns() == 0
    assert seed.clock.now_ns() == 5_000_000_000


@pytest.mark.parametrize("version", SPOKEN)
def test_unload_leaves_the_host_and_connecting_again_starts_anew(version: int) -> None:
    guest = Guest(versions=(version,)).connected()
    guest.offer()

    assert guest.run(guest.connection.unload())
    guest.run(guest.bus.remove_all())

    assert guest.server.link.version == 0
    assert guest.connection.state is ConnectionState.DISCONNECTED
    guest.connected()
    assert [channel.epoch for channel in guest.channels] == [2]
    guest.check_at_rest()


@pytest.mark.checklist("H9")
def test_unload_waits_for_its_answer_and_no_longer_than_five_seconds() -> None:
    guest = Guest().connected()
    guest.delivers = False

    assert guest.run(guest.connection.unload()) is False

    assert guest.clock.now_ns() == 5_000_000_000
    assert guest.connection.state is ConnectionState.DISCONNECTED


def test_nothing_can_be_posted_without_a_connection() -> None:
    guest = Guest()

    with pytest.raises(OSError) as caught:
        guest.run(guest.connection.request_offers())

    assert caught.value.errno == errno.ENOTCONN
