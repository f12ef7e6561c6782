# SPDX-License-Identifier: Apache-2.0
"""Echo, heartbeat and shutdown behind a server, over rings in memory; their messages byte for byte."""

import errno
from collections.abc import Iterator

import pytest

from pvbus.actors.hypervisor.vmbus import heartbeat, integration, shutdown, snapshot
from pvbus.actors.hypervisor.vmbus.channel import RingPages
from pvbus.actors.hypervisor.vmbus.echo import Echo
from pvbus.actors.hypervisor.vmbus.endpoint import (
    BATCH_PACKETS_MAX,
    COMPLETION,
    IN_BAND,
    ROUNDS_MAX,
    Endpoint,
    Packet,
)
from pvbus.actors.hypervisor.vmbus.heartbeat import PERIOD_NS, Heartbeat
from pvbus.actors.hypervisor.vmbus.integration import (
    HEARTBEAT,
    NEGOTIATE,
    SHUTDOWN,
    V1_0,
    V3_0,
    IcError,
    IcMessage,
    decode,
    versions_body,
    versions_of,
)
from pvbus.actors.hypervisor.vmbus.shutdown import FORCE, Shutdown
from pvbus.actors.runtime import vmbus_wire as wire
from pvbus.actors.runtime.vmbus_facts import STATUS_UNSUCCESSFUL
from pvbus.tests.hypervisor.vmbus.channels import Driver, MemoryRing, PacketByPacket
from pvbus.tests.hypervisor.vmbus.rig import ECHO, INSTANCE, Pages, Rig


@pytest.fixture
def pages() -> Iterator[Pages]:
    pages = Pages()
    yield pages
    pages.close()


# -------------------------------------------------------------------------------------------------------------- echo


@pytest.mark.parametrize("echo", [Echo, PacketByPacket])
def test_echo_completes_what_wants_a_completion_and_sends_the_rest_back_in_band(pages: Pages, echo: type[Echo]) -> None:
    driver = Driver(pages, echo())

    driver.put(Packet(IN_BAND, 5, b"wants", True), Packet(IN_BAND, 6, b"plain"), Packet(COMPLETION, 7, b"of nothing"))

    assert driver.take() == [Packet(COMPLETION, 5, b"wants"), Packet(IN_BAND, 6, b"plain")]
    assert driver.rig.flags == [(driver.relid, 0)]      # one signal for both


@pytest.mark.parametrize(("echo", "held"), [(Echo, 3), (PacketByPacket, BATCH_PACKETS_MAX)])
def test_a_full_ring_holds_the_echo_back_and_nothing_is_lost_or_reordered(pages: Pages, echo: type[Echo], held: int) -> None:
    driver = Driver(pages, echo(), capacity=3)
    sent = [Packet(IN_BAND, number, b"x", True) for number in range(200)]

    driver.put(*sent)
    assert len(driver.ring.to_guest) == 3
    assert len(driver.ring.to_host) == 200 - held
    got: list[Packet] = []
    while taken := driver.take():
        got += taken

    assert [packet.transaction for packet in got] == list(range(200))
    assert (driver.endpoint.received, driver.endpoint.sent) == (200, 200)


@pytest.mark.parametrize("echo", [Echo, PacketByPacket])
def test_one_signal_serves_a_bounded_number_of_packets_and_the_timer_goes_on(pages: Pages, echo: type[Echo]) -> None:
    driver, count = Driver(pages, echo(), capacity=10_000), BATCH_PACKETS_MAX * ROUNDS_MAX + 9
    driver.put(*(Packet(IN_BAND, number, b"") for number in range(count)))
    assert len(driver.take()) == count - 9
    assert driver.rig.server.due_ns() == 0

    driver.rig.server.tick(0)

    assert len(driver.take()) == 9
    assert driver.rig.server.due_ns() is None


@pytest.mark.parametrize("echo", [Echo, PacketByPacket])
def test_a_guest_that_waits_for_room_is_signalled_once_its_packets_are_read(pages: Pages, echo: type[Echo]) -> None:
    driver = Driver(pages, echo())
    driver.ring.guest_blocked = True

    driver.put(Packet(COMPLETION, 1, b""))

    assert driver.take() == []
    assert driver.rig.flags == [(driver.relid, 0)]


@pytest.mark.parametrize("echo", [Echo, PacketByPacket])
@pytest.mark.parametrize("fault", ["broken ring", "strange type"])
def test_a_ring_with_something_impossible_is_left_alone_and_the_channel_can_be_opened_again(
    pages: Pages, echo: type[Echo], fault: str
) -> None:
    driver = Driver(pages, echo())
    driver.ring.broken = fault == "broken ring"
    driver.put(Packet(2 if fault == "strange type" else IN_BAND, 1, b""))
    assert driver.endpoint.fault
    driver.ring.broken = False

    driver.put(Packet(IN_BAND, 2, b""))
    assert driver.take() == []
    driver.rig.say(wire.CloseChannel(driver.relid))
    driver.ring.to_host.clear()
    driver.rig.say(driver.rig.opening(driver.relid))
    driver.put(Packet(IN_BAND, 3, b""))

    assert driver.take() == [Packet(IN_BAND, 3, b"")]


def test_rings_that_cannot_be_mapped_fail_the_open(pages: Pages) -> None:
    def refuse(_: RingPages) -> MemoryRing:
        raise ValueError("unequal rings")

    rig = Rig(pages)
    endpoint = Endpoint(Echo(), refuse)
    relid = rig.server.offer(ECHO, INSTANCE, endpoint)
    rig.connect()
    rig.give_pages(relid)

    assert rig.say(rig.opening(relid)) == [wire.OpenResult(relid, 7, STATUS_UNSUCCESSFUL)]
    assert endpoint.fault == "unequal rings"
    assert rig.server.rescind(relid)


def test_what_was_written_before_the_open_is_answered_after_it(pages: Pages) -> None:
    rig, ring = Rig(pages), MemoryRing()
    relid = rig.server.offer(ECHO, INSTANCE, Endpoint(Echo(), lambda _: ring))
    ring.to_host.append(Packet(IN_BAND, 1, b"early"))
    rig.connect()
    rig.give_pages(relid)
    rig.say(rig.opening(relid))

    assert list(ring.to_guest) == [Packet(IN_BAND, 1, b"early")]


# ------------------------------------------------------------------------------------------ integration messages


def test_an_integration_message_has_the_bytes_of_the_wire_facts() -> None:
    message = IcMessage(
        type=HEARTBEAT, body=heartbeat.body(0x0102), frame=V3_0, version=V1_0, status=0x80004005, transaction=9, flags=5
    )

    payload = message.encode()

    assert payload.hex() == (
        "01000000" "3c000000"                       # pipe: data, 20 + 40 bytes
        "0300" "0000" "0100" "0100" "0000" "2800"   # frame 3.0, heartbeat, message 1.0, 40 bytes
        "05400080" "09" "05" "0000"                 # status, transaction, transaction | response
        "0201000000000000" + "00" * 32              # sequence
    )
    assert decode(payload + bytes(4)) == message    # a packet is padded


def test_a_negotiation_has_the_bytes_of_two_lists_of_versions() -> None:
    assert versions_body((V1_0, V3_0), (V3_0,)).hex() == "0200" "0100" "00000000" "01000000" "03000000" "03000000"


def test_a_shutdown_has_2060_bytes() -> None:
    data = shutdown.body(0x10, 5, FORCE, "power")

    assert len(data) == 2060
    assert data[:17].hex() == "10000000" "05000000" "01000000" "706f776572"
    assert shutdown.body_of(data) == (0x10, 5, FORCE, "power")


@pytest.mark.parametrize("cut", [0, 7, 27, 28, 67])
def test_a_message_whose_sizes_do_not_fit_is_refused(cut: int) -> None:
    payload = IcMessage(type=HEARTBEAT, body=heartbeat.body(1)).encode()

    with pytest.raises(IcError, match=r"\d"):
        decode(payload[:cut])


def test_bodies_that_end_too_early_are_refused() -> None:
    for read, data in (
        (versions_of, b"\1\0\1\0\0\0\0\0\1\0"), (versions_of, b""), (heartbeat.sequence_of, bytes(39)),
        (shutdown.body_of, bytes(99)),
    ):  # fmt: skip
        with pytest.raises(IcError, match=r"\d"):
            read(data)


# --------------------------------------------------------------------------------------------------------- heartbeat


def beat(driver: Driver, now_ns: int) -> IcMessage:
    """Let time pass; give the request that comes of it."""
    driver.rig.server.tick(now_ns)
    (packet,) = driver.take()
    asked = decode(packet.payload)
    assert asked.type == HEARTBEAT
    return asked


def test_a_heartbeat_is_asked_for_every_two_seconds_once_versions_are_agreed(pages: Pages) -> None:
    service = Heartbeat()
    driver = Driver(pages, service)
    assert driver.rig.server.due_ns() is None
    driver.agree()
    assert driver.rig.server.due_ns() == 0

    now = 10**12
    for number in (1, 2, 3):
        asked = beat(driver, now)
        assert (heartbeat.sequence_of(asked.body), asked.frame, asked.version) == (number, V3_0, V3_0)
        driver.answer(asked, body=heartbeat.body(number + 1))
        assert service.alive
        assert driver.rig.server.due_ns() == now + PERIOD_NS
        driver.rig.server.tick(now + PERIOD_NS - 1)
        assert driver.take() == []
        now += PERIOD_NS

    assert (service.state.beats, service.state.missed, service.state.wrong) == (3, 0, 0)


def test_a_guest_that_does_not_answer_is_missed_and_one_that_answers_late_is_back(pages: Pages) -> None:
    service = Heartbeat()
    driver = Driver(pages, service)
    driver.agree(frame=V1_0, version=V1_0)
    beat(driver, 0)
    assert not service.alive
    asked = beat(driver, 10 * PERIOD_NS)    # nine periods slept through are not made up for
    assert service.state.missed == 1

    driver.answer(asked, body=heartbeat.body(3))

    assert service.alive


@pytest.mark.parametrize("sequence", [0, 1, 3, 2**64 - 1])
def test_an_answer_with_another_number_does_not_count(pages: Pages, sequence: int) -> None:
    service = Heartbeat()
    driver = Driver(pages, service)
    driver.agree()
    driver.answer(beat(driver, 0), body=heartbeat.body(sequence))

    assert (service.alive, service.state.beats, service.state.wrong) == (False, 0, 1)


def test_nonsense_and_a_second_negotiation_are_counted(pages: Pages) -> None:
    service = Heartbeat()
    driver = Driver(pages, service)
    driver.agree()

    driver.put(Packet(IN_BAND, 0, b"nonsense"), Packet(IN_BAND, 0, IcMessage(type=HEARTBEAT, body=heartbeat.body(1)).encode()))
    driver.answer(IcMessage(type=NEGOTIATE), body=versions_body((V3_0,), (V3_0,)))

    assert service.state.wrong == 3


def test_a_guest_that_speaks_none_of_the_versions_is_left_in_peace(pages: Pages) -> None:
    for body, refused in ((versions_body((), ()), True), (versions_body((V3_0,), (integration.IcVersion(9, 9),)), False)):
        service = Heartbeat()
        driver = Driver(pages, service)
        (question,) = driver.take()
        driver.answer(decode(question.payload), body=body)

        assert (service.state.talk.refused, service.state.wrong) == (refused, int(not refused))
        assert driver.rig.server.due_ns() is None


def test_beats_that_find_the_ring_full_are_dropped(pages: Pages) -> None:
    driver = Driver(pages, Heartbeat(), capacity=2)
    driver.agree()
    for number in range(9):
        driver.rig.server.tick(number * PERIOD_NS)

    assert len(driver.take()) == 2
    assert len(driver.take()) == 1
    assert driver.take() == []


def test_an_heir_goes_on_with_the_sequence(pages: Pages) -> None:
    driver = Driver(pages, Heartbeat())
    driver.agree()
    driver.answer(beat(driver, 0), body=heartbeat.body(2))
    data, heir = snapshot.take(driver.rig.server), Rig(pages)
    service = Heartbeat()

    snapshot.restore(heir.server, data, lambda _: Endpoint(service, lambda _: driver.ring))
    driver.rig = heir

    assert driver.take() == []
    assert heartbeat.sequence_of(beat(driver, PERIOD_NS).body) == 2
    assert service.state.beats == 1


# ---------------------------------------------------------------------------------------------------------- shutdown


def test_a_shutdown_is_asked_for_and_the_status_of_the_answer_comes_back(pages: Pages) -> None:
    service, answers = Shutdown(), list[int | None]()
    driver = Driver(pages, service)
    driver.agree()

    driver.endpoint.submit(service.shutdown(0x80070000, 10**9, answers.append, graceful=False, text="power off"))
    with pytest.raises(OSError, match="busy"):
        service.shutdown(0, 10**9, answers.append)
    (packet,) = driver.take()
    asked = decode(packet.payload)
    driver.answer(asked, status=0x80004005)

    assert asked.type == SHUTDOWN
    assert shutdown.body_of(asked.body) == (0x80070000, 0, FORCE, "power off")
    assert answers == [0x80004005]
    assert driver.rig.server.due_ns() is None


def test_a_shutdown_without_a_driver_is_refused(pages: Pages) -> None:
    service = Shutdown()
    Driver(pages, service)

    with pytest.raises(OSError) as caught:
        service.shutdown(0, 10**9, print)
    assert caught.value.errno == errno.ENOTCONN


def test_a_shutdown_that_is_not_answered_is_given_up_and_the_late_answer_is_not_that_of_the_next(pages: Pages) -> None:
    service, answers = Shutdown(), list[int | None]()
    driver = Driver(pages, service)
    driver.agree()
    driver.endpoint.submit(service.shutdown(0, 5, answers.append))
    first = decode(driver.take()[0].payload)
    driver.rig.server.tick(4)
    assert answers == []
    driver.rig.server.tick(5)
    assert answers == [None]

    driver.endpoint.submit(service.shutdown(0, 10, answers.append))
    driver.answer(first)
    assert answers == [None]
    driver.answer(decode(driver.take()[0].payload))

    assert answers == [None, 0]
    assert service.state.wrong == 1


@pytest.mark.parametrize("end", ["close", "rescind", "initiate"])
def test_a_shutdown_under_way_ends_with_its_channel(pages: Pages, end: str) -> None:
    service, answers = Shutdown(), list[int | None]()
    driver = Driver(pages, service)
    driver.agree()
    driver.endpoint.submit(service.shutdown(0, 5, answers.append))

    if end == "rescind":
        driver.rig.server.rescind(driver.relid)
    else:
        driver.rig.say(wire.CloseChannel(driver.relid) if end == "close" else driver.rig.contact())

    assert answers == [None]
    assert not service.ready
