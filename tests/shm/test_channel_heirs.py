# SPDX-License-Identifier: Apache-2.0
"""A host that answers packets dies before each of its writes; its heir goes on. Nothing is lost, nothing is answered twice."""

from __future__ import annotations

import errno
from typing import Any

import msgspec
import pytest

from pvbus.actors.hypervisor.vmbus.channel import RingPages
from pvbus.actors.hypervisor.vmbus.endpoint import IN_BAND, Endpoint, Packet
from pvbus.shm import _core_explored, store
from pvbus.shm.channel_ring import ChannelControl, PacketType
from pvbus.tests.shm.channels import Channel, errno_of
from pvbus.tests.shm.rig import Rig

STEPS_MAX = 4000
CLAIM = 8
SIZES = (5, 0, 640, 64, 1500, 8)


def taken(channel: Channel) -> list[tuple[int, int]]:
    """Take what the guest has been answered: id and length."""
    return [(packet[1], len(packet[2])) for packet in channel.guest.recv_many(99)]


def echo_all(channel: Channel, host: Any) -> list[tuple[int, int]]:
    """Let a host echo, and the guest read, until nothing moves."""
    got: list[tuple[int, int]] = []
    for _ in range(20):
        count, _, full = host.echo(3)
        got += taken(channel)
        if not count and not full:
            return got
    raise AssertionError("it does not end")


@pytest.mark.parametrize("free", [None, 800])   # of the ring for answers: all of it, or less than they take
def test_an_echo_that_dies_anywhere_answers_each_packet_once(free: int | None) -> None:
    for step in range(1, STEPS_MAX):
        rig = Rig(_core_explored, ())
        channel, claims = Channel(rig, at=4000), rig.memory(4096)
        host = channel.host
        host.keep(claims, CLAIM, False)
        expected = []
        if free is not None:
            host.send(bytes(host.state()["out_write_bytes_avail"] - free - 24), 99)
            expected = [(99, host.state()["out_read_bytes_avail"] - 24)]
        for number, size in enumerate(SIZES):
            channel.guest.send(bytes(size), number, completion=number % 2 == 0)
            expected.append((number, size + -size % 8))
            if number == 2:
                channel.guest.complete(77, b"is dropped")
        with rig.world.dying_at(step):
            host.echo(4)
            host.echo(4)
        died = rig.world.steps == step
        where = f"step {step}, {rig.world.sites[-1]}"

        heir = rig.core.ChannelRing(channel.memory, channel.ring_bytes, 0, channel.ring_bytes)
        heir.keep(claims, CLAIM, True)
        assert taken(channel) + echo_all(channel, heir) == expected, where
        assert channel.control(ChannelControl.READ_INDEX) == channel.control(ChannelControl.WRITE_INDEX), where
        if not died:
            return
    raise AssertionError(f"more than {STEPS_MAX} writes")


def test_an_heir_without_a_claim_word_answers_a_batch_twice() -> None:
    """What the word is for: a death between the two stores."""
    last = 0
    for _ in range(2):
        rig = Rig(_core_explored, ())
        channel = Channel(rig)
        channel.guest.send(b"once", 1)
        with rig.world.dying_at(last):
            channel.host.echo(9)
        last = rig.world.steps
    assert rig.world.sites[-1] == "vmr_reuse"   # the answer is there, and what it answers not given back

    heir = rig.core.ChannelRing(channel.memory, channel.ring_bytes, 0, channel.ring_bytes)
    heir.echo(9)

    assert [number for number, _ in taken(channel)] == [1, 1]


def test_a_claim_of_another_open_is_not_believed(rig: Rig) -> None:
    channel, claims = Channel(rig), rig.memory(4096)
    claims.store64(CLAIM, 1 << 63 | 0 << 31 | 8)  # nothing written, 64 bytes answered
    channel.guest.send(bytes(100), 1)
    channel.host.keep(claims, CLAIM, False)

    assert claims.load64(CLAIM) == 0
    assert channel.host.echo(9)[0] == 1


@pytest.mark.parametrize("claim", [1 << 63 | 2**31 - 1, 1 << 63 | 1 << 40, 0, 2**64 - 1])
def test_a_claim_that_fits_no_ring_is_not_believed(rig: Rig, claim: int) -> None:
    channel, claims = Channel(rig), rig.memory(4096)
    claims.store64(CLAIM, claim)
    channel.guest.send(bytes(100), 1)
    channel.host.keep(claims, CLAIM, True)

    assert channel.host.position()[0] == 0
    assert channel.host.echo(9)[0] == 1


def test_wrong_places_are_refused(rig: Rig) -> None:
    channel, claims = Channel(rig), rig.memory(4096)
    for at in (-8, 4, 4096):
        with pytest.raises(ValueError, match=r"claim"):
            channel.host.keep(claims, at, False)
    with pytest.raises(ValueError, match="index of 4"):
        channel.host.release(4)
    with pytest.raises((OverflowError, TypeError)):
        channel.host.release(-1)
    channel.set_control(ChannelControl.WRITE_INDEX, 4)
    assert errno_of(channel.host.recv) == errno.EIO
    assert errno_of(channel.host.release) == errno.EIO


def test_what_is_held_stays_the_writer_s_until_it_is_given_back(rig: Rig) -> None:
    channel = Channel(rig)
    channel.guest.send(b"12345678", 1)
    channel.guest.send(b"12345678", 2)
    channel.host.hold()
    assert [packet[1] for packet in channel.host.recv_many(9)] == [1, 2]
    assert channel.control(ChannelControl.READ_INDEX) == 0
    assert channel.host.position()[0] == 64

    channel.host.release()
    assert channel.control(ChannelControl.READ_INDEX) == 64


# ---- services


class Numbers:
    """Answers every packet but completions with how many it has had, in as many bytes as the packet has."""

    echoes = False

    def __init__(self) -> None:
        self.had = 0

    def on_open(self) -> list[Packet]:
        return []

    def on_packets(self, packets: list[Packet]) -> list[Packet]:
        answers = []
        for packet in packets:
            self.had += 1
            if packet.type != PacketType.COMPLETION:
                answers.append(Packet(IN_BAND, packet.transaction, self.had.to_bytes(8, "little") + packet.payload))
        return answers

    def on_close(self) -> None:
        pass

    def due_ns(self) -> int | None:
        return None

    def tick(self, now_ns: int) -> list[Packet]:
        return []

    def save(self) -> bytes:
        return msgspec.msgpack.encode(self.had)

    def restore(self, state: bytes) -> None:
        self.had = msgspec.msgpack.decode(state, type=int)


class Place:
    """Where a service's endpoint is, and what its heirs find."""

    def __init__(self, free: int | None) -> None:
        self.rig = Rig(_core_explored, ())
        self.channel, self.kept = Channel(self.rig, at=4000), self.rig.memory(store.BYTES)
        if free is not None:
            self.channel.host.send(bytes(self.channel.host.state()["out_write_bytes_avail"] - free - 24), 99)
        self.relid = 1
        self.signals = 0
        self.endpoint = self.open()
        self.endpoint.on_opened()
        self.keep()

    def open(self) -> Endpoint:
        """Make an endpoint over the rings."""
        ring_bytes, make = self.channel.ring_bytes, self.rig.core.ChannelRing
        endpoint = Endpoint(
            Numbers(), lambda _: make(self.channel.memory, ring_bytes, 0, ring_bytes), self.keep, (self.kept, store.CLAIMS),
        )  # fmt: skip
        endpoint.on_open(self, RingPages(self.channel.memory, 0, 2 * ring_bytes, ring_bytes))
        return endpoint

    def keep(self) -> None:
        """Store what an heir needs."""
        store.write(self.kept, self.endpoint.save())

    def heir(self) -> None:
        """Let an heir take over."""
        data = store.read(self.kept)
        self.endpoint = self.open()
        self.endpoint.restore(data)

    def signal(self) -> None:
        """Count."""
        self.signals += 1

    def opened(self, status: int) -> None:
        """It is not slow."""

    def closed(self) -> None:
        """It is not slow."""


@pytest.mark.parametrize("free", [None, 1600])
def test_a_service_that_dies_anywhere_answers_each_packet_once_and_counts_it_once(free: int | None) -> None:
    for step in range(1, STEPS_MAX):
        place = Place(free)
        channel, sizes = place.channel, (700, 600, 8, 800) if free else (5, 0, 64)
        for number, size in enumerate(sizes):
            channel.guest.send(bytes(size), number)
        channel.guest.complete(77, b"is counted")
        got: list[Any] = []
        with place.rig.world.dying_at(step):
            place.endpoint.on_signal()
            place.rig.world.armed = False   # who dies is the host
            got += channel.guest.recv_many(1)
            place.rig.world.armed = True
            place.endpoint.on_signal()
        died = place.rig.world.steps == step
        where = f"step {step}, {place.rig.world.sites[-1]}"

        if died:
            place.heir()
            assert place.signals, where
        for _ in range(4):
            got += channel.guest.recv_many(9)
            place.endpoint.on_signal()
        got = [packet for packet in got if packet[1] != 99]
        assert [packet[1] for packet in got] == list(range(len(sizes))), where
        assert [int.from_bytes(packet[2][:8], "little") for packet in got] == [n + 1 for n in range(len(sizes))], where
        assert place.endpoint.service.had == len(sizes) + 1, where  # type: ignore[attr-defined]
        if not died:
            return
    raise AssertionError(f"more than {STEPS_MAX} writes")
