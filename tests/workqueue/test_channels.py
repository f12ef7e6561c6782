# SPDX-License-Identifier: Apache-2.0
"""Channels: messages, open, close, and a RESCIND at every moment of them, against the real protocol server."""

import errno
from collections.abc import Callable
from typing import Any

import pytest

from pvbus.actors.hypervisor.vmbus.channel import State
from pvbus.actors.runtime import vmbus_wire as wire
from pvbus.actors.runtime.vmbus_facts import SPOKEN, STATUS_SUCCESS, V0_13, V5_3, Kind
from pvbus.actors.workqueue.channel import ChannelState
from pvbus.actors.workqueue.connection import HostError
from pvbus.actors.workqueue.waits import Post, Wait
from pvbus.shm.hyperv import PAGE, Frame
from pvbus.tests.workqueue.rig import Echo, Guest, RingMemory


@pytest.mark.parametrize("version", SPOKEN)
@pytest.mark.parametrize("pages", [4, 20, 26, 27, 54, 55, 100])
def test_open_and_close_with_one_header_and_with_bodies(version: int, pages: int) -> None:
    guest = Guest(versions=(version,)).connected()
    relid = guest.offer()
    channel, ring, echo = guest.channel(relid), RingMemory(guest, pages), guest.devices[0]

    guest.run(guest.channels.open(channel, ring, target_vp=1))

    assert channel.state is ChannelState.OPENED
    assert echo.pages is not None
    assert (echo.pages.size, echo.pages.downstream) == (pages * PAGE, pages // 2 * PAGE)
    assert guest.listening == {relid}
    guest.run(guest.channels.close(channel))
    assert [channel.state.name, ring.freed, echo.pages] == ["OPEN", 1, None]
    assert guest.listening == set()
    guest.run(guest.channels.open(channel, RingMemory(guest, pages)))
    guest.check_at_rest()


@pytest.mark.parametrize("version", SPOKEN)
def test_a_device_s_signal_arrives_in_the_way_of_the_version(version: int) -> None:
    guest = Guest(versions=(version,)).connected()
    relid = guest.offer()
    guest.run(guest.channels.open(guest.channel(relid), RingMemory(guest, 20), target_vp=1))
    handle = guest.devices[0].handle
    assert handle is not None

    handle.signal()

    if version == V0_13:
        assert guest.flags == [(0, 0)]
        assert guest.memory.load64(Frame.INTERRUPT * PAGE) == 1 << relid
    else:
        assert guest.flags == [(relid, 1)]


@pytest.mark.checklist("X13", "B7.3")
def test_an_offer_of_the_same_type_and_instance_is_dropped() -> None:
    guest = Guest().connected()
    guest.offer()
    channel = next(iter(guest.channels))

    guest.channels.onmessage(channel.offer.encode(V5_3))

    assert list(guest.channels) == [channel]
    assert guest.channels.counters.duplicates == 1


@pytest.mark.checklist("X13")
@pytest.mark.parametrize(
    ("payload", "text"),
    [(b"\x63\0\0\0\0\0\0\0", "message type 99"), (wire.RequestOffers().encode(V5_3), "no handler for REQUESTOFFERS"),
     (b"\x01\0\0\0", "4 bytes"), (b"\x02\0\0\0\0\0\0\0", "RESCIND of 8 bytes")],
)  # fmt: skip
def test_a_message_that_nobody_handles_is_logged_with_its_bytes(payload: bytes, text: str) -> None:
    guest = Guest().connected()

    guest.channels.onmessage(payload)

    assert text in guest.log[-1]
    assert payload.hex(" ") in guest.log[-1]
    assert guest.channels.counters.bad == 1


@pytest.mark.checklist("X13")
def test_a_rescind_of_an_unknown_relid_and_a_second_one_are_ignored() -> None:
    guest = Guest().connected()
    relid = guest.offer()
    rescind = wire.Rescind(relid).encode(V5_3)
    guest.channels.onmessage(wire.Rescind(9).encode(V5_3))
    guest.server.rescind(relid)

    guest.channels.onmessage(rescind)
    guest.deliver()

    assert guest.channels.counters.strangers == 2
    assert guest.server.offers.get(relid) is None   # released once: a second RELID_RELEASED would be a violation
    guest.check_at_rest()


@pytest.mark.parametrize("status", [0xC0000236, 0x8000FFFF])
def test_a_device_that_refuses_to_open_gives_its_status_and_the_pages_come_back(status: int) -> None:
    guest = Guest().connected()
    relid = guest.offer(device=Echo(status))
    channel = guest.channel(relid)

    with pytest.raises(HostError) as caught:
        guest.run(guest.channels.open(channel, RingMemory(guest, 40)))

    assert caught.value.status == status
    assert channel.state is ChannelState.OPEN
    assert guest.listening == set()
    guest.check_at_rest()


def test_pages_that_the_host_does_not_know_are_refused() -> None:
    guest = Guest().connected()
    channel = guest.channel(guest.offer())
    ring = RingMemory(guest, 4)
    ring.frames = range(0x500000, 0x500004)
    guest.rings.clear()

    with pytest.raises(HostError) as caught:
        guest.run(guest.channels.open(channel, ring))

    assert caught.value.errno == errno.EDQUOT
    assert ring.freed == 1
    guest.check_at_rest()


@pytest.mark.parametrize("lost", range(1, 6))
def test_a_post_that_fails_in_the_middle_of_open_leaves_nothing_behind(lost: int) -> None:
    guest = Guest().connected()
    channel = guest.channel(guest.offer())
    posts = len(guest.posts)
    guest.post_status = lambda _: 6 if len(guest.posts) == posts + lost else None   # 3 GPADL messages, then OPENCHANNEL

    if lost == 5:
        guest.run(guest.channels.open(channel, RingMemory(guest, 80)))
    else:
        with pytest.raises(HostError):
            guest.run(guest.channels.open(channel, RingMemory(guest, 80)))
    guest.post_status = lambda _: None

    if lost == 1:
        assert guest.server.last_violation.startswith("GPADL_TEARDOWN")     # the host had not heard of it
        guest.server.last_violation = ""
        assert [lent.limbo for lent in channel.lent.values()] == [True]
    guest.check_at_rest()


def test_an_answer_after_the_time_out_is_used_to_take_back_what_was_lent() -> None:
    guest = Guest().connected()
    relid = guest.offer(device=Echo(None))      # it does not say yet
    channel, ring = guest.channel(relid), RingMemory(guest, 20)

    with pytest.raises(TimeoutError):
        guest.run(guest.channels.open(channel, ring))
    assert ring.freed == 0
    with pytest.raises(OSError) as caught:
        guest.run(guest.channels.open(channel, RingMemory(guest, 20)))
    assert caught.value.errno == errno.EBUSY
    handle = guest.devices[0].handle
    assert handle is not None
    handle.opened(STATUS_SUCCESS)
    guest.deliver()

    assert (ring.freed, channel.late_open_id, guest.server.offers.get(relid).state) == (1, 0, State.CLOSED)  # type: ignore[union-attr]
    guest.devices[0].status = STATUS_SUCCESS
    guest.run(guest.channels.open(channel, RingMemory(guest, 20)))
    guest.check_at_rest()


def test_a_rescind_while_a_late_open_is_undone_ends_that_and_nothing_is_said_of_the_relid_any_more() -> None:
    guest = Guest().connected()
    relid = guest.offer(device=Echo(None))
    channel, ring = guest.channel(relid), RingMemory(guest, 20)
    with pytest.raises(TimeoutError):
        guest.run(guest.channels.open(channel, ring))

    ask = guest.ask
    held: list[Any] = []

    def slow_to_answer(wait: Wait, answer: Callable[[Any], None]) -> None:
        slow = isinstance(wait, Post) and wire.kind_of(wait.payload, V5_3) is Kind.CLOSECHANNEL
        ask(wait, held.append if slow else answer)
        if slow:
            held.append(answer)

    guest.ask = slow_to_answer  # type: ignore[method-assign]
    guest.devices[0].handle.opened(STATUS_SUCCESS)  # type: ignore[union-attr]
    guest.deliver()
    status, answer = held
    guest.server.rescind(relid)
    guest.deliver()
    answer(status)
    guest.deliver()

    assert (ring.freed, guest.channels.find(relid), guest.server.offers.get(relid)) == (1, None, None)
    guest.check_at_rest()


@pytest.mark.parametrize("after_ns", [4_999_999_999, 5_000_000_000, 5_000_000_001])
def test_a_gpadl_answered_before_at_and_after_the_deadline(after_ns: int) -> None:
    guest = Guest(deliver=True).connected()
    channel, ring = guest.channel(guest.offer()), RingMemory(guest, 20)
    guest.delivers = False
    outcome = guest.start(guest.channels.open(channel, ring))
    guest.clock.advance(ns=after_ns)
    if after_ns > 5_000_000_000:
        guest.pass_time()
    guest.deliver(1)
    if not outcome:
        guest.pass_time() if after_ns == 5_000_000_000 and not guest.to_guest else guest.deliver()
    guest.delivers = True
    guest.deliver()

    if after_ns <= 5_000_000_000:
        assert outcome == [None]
        assert channel.state is ChannelState.OPENED
    else:
        assert isinstance(outcome[0], TimeoutError)
        assert ring.freed == 1
    guest.check_at_rest()


def test_the_target_cpu_is_changed_and_the_host_s_refusal_told() -> None:
    guest, old = Guest().connected(), Guest(versions=(V0_13,)).connected()
    channel = guest.channel(guest.offer())
    guest.run(guest.channels.open(channel, RingMemory(guest, 20)))

    guest.run(guest.channels.modify(channel, 1))

    assert channel.target_vp == 1
    with pytest.raises(HostError):
        guest.run(guest.channels.modify(channel, 7))
    assert channel.target_vp == 1
    with pytest.raises(OSError) as caught:
        old.run(old.channels.modify(old.channel(old.offer()), 1))
    assert caught.value.errno == errno.EOPNOTSUPP


def attempt(guest: Guest, relid: int) -> list[Any]:
    """Open and close, as a driver does, whatever happens to the channel meanwhile."""
    channel = guest.channel(relid)

    def steps() -> Any:
        try:
            yield from guest.channels.open(channel, RingMemory(guest, 60))
            yield from guest.channels.close(channel)
        except OSError as error:
            return error.errno
        return 0

    return guest.start(steps())


@pytest.mark.checklist("H12")
@pytest.mark.parametrize("version", SPOKEN)
@pytest.mark.parametrize("answers", [True, False])
@pytest.mark.parametrize("again", [True, False])
@pytest.mark.parametrize("delivered", range(4))
@pytest.mark.parametrize("posted", range(8))
def test_a_rescind_at_any_moment_ends_every_wait_and_frees_once(
    posted: int, delivered: int, again: bool, answers: bool, version: int
) -> None:
    """The host rescinds behind the n-th message of the guest; the guest hears of it so many deliveries later."""
    guest = Guest(versions=(version,)).connected()
    relid = guest.offer(device=Echo(STATUS_SUCCESS if answers else None))
    instance = guest.channel(relid).offer.instance_id
    guest.delivers = False
    first = len(guest.posts)

    def rescind_behind(post: Post) -> int | None:
        if len(guest.posts) - first == posted + 1:
            status = guest.server.on_message(post.payload)
            guest.server.rescind(relid)
            if again:
                guest.offer(instance=instance)
            return 0 if status else 19
        return None

    if posted == 0:
        guest.server.rescind(relid)
        if again:
            guest.offer(instance=instance)
        guest.deliver(delivered)
        outcome = attempt(guest, relid) if guest.channels.find(relid) else [errno.ENODEV]
    else:
        guest.post_status = rescind_behind
        outcome = attempt(guest, relid)
        guest.deliver(delivered)
    guest.delivers = True
    guest.deliver()
    while not outcome:
        assert guest.pass_time(), "nobody will ever answer"

    known = guest.server.offers.get(relid)
    if known is not None and known.state is State.OPENING:      # it never rescinded: the guest posts fewer messages
        assert not answers
        return
    assert outcome[0] in (0, errno.ENODEV, errno.ETIMEDOUT)
    assert (guest.channels.find(relid) is None) == (known is None)     # the host's last message decides
    assert set(guest.bus.devices) == {device.name for device in guest.bus.devices.values() if not device.channel.gone}
    if guest.server.last_violation.startswith("a body for GPADL"):
        guest.server.last_violation = ""    # the host had refused the header; the guest had not heard of either
    guest.check_at_rest()


def test_the_connection_s_end_ends_every_wait_and_takes_every_page_back() -> None:
    guest = Guest().connected()
    relid = guest.offer(device=Echo(None))
    open_too = guest.offer()
    guest.run(guest.channels.open(guest.channel(open_too), RingMemory(guest, 20)))
    waiting = guest.start(guest.channels.open(guest.channel(relid), RingMemory(guest, 20)))

    guest.devices[0].on_close = lambda: True  # type: ignore[method-assign]
    handle = guest.devices[0].handle
    unload = guest.start(guest.connection.unload())
    assert handle is not None
    handle.opened(STATUS_SUCCESS)
    guest.deliver()
    guest.devices[0].pages = None
    guest.run(guest.bus.remove_all())

    assert unload == [True]
    assert isinstance(waiting[0], OSError)
    assert list(guest.channels) == []
    assert [ring.freed for ring in guest.rings] == [1, 1]
    guest.check_at_rest()


def test_the_doorbell_is_known_before_open_is_asked_for_and_forgotten_before_the_rings_go() -> None:
    guest = Guest().connected()
    channel = guest.channel(guest.offer())
    guest.trace.clear()

    guest.run(guest.channels.open(channel, RingMemory(guest, 20)))
    guest.run(guest.channels.close(channel))

    order = [wait.payload[0] if isinstance(wait, Post) else type(wait).__name__ for wait in guest.trace]
    assert order == [8, "Listen", 5, "Quiesce", 7, 11]
