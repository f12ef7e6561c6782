# SPDX-License-Identifier: Apache-2.0
"""The echo inside a ring pair: what the host's echo device does without a Python object a packet, over both compilations."""

import errno
import random

import pytest

from pvbus.actors.hypervisor.vmbus.echo import Echo
from pvbus.actors.hypervisor.vmbus.endpoint import Packet
from pvbus.shm import _core_explored
from pvbus.shm.channel_ring import ChannelControl, PacketType
from pvbus.tests.shm.channels import DATA_BYTES, Channel, errno_of, packet_bytes
from pvbus.tests.shm.rig import Rig

TYPES = sorted(PacketType.HOST_TAKES)


@pytest.mark.parametrize("seed", range(3))
def test_it_sends_back_what_the_service_would_wherever_a_packet_wraps(rig: Rig, seed: int) -> None:
    rng = random.Random(seed)
    channel = Channel(rig, at=8 * rng.randrange(DATA_BYTES // 8))
    for round_ in range(60):
        sizes = [rng.choice((0, 1, 8, 63, 64, 1024, 1500)) for _ in range(rng.randrange(4))]
        sent = [
            Packet(rng.choice(TYPES), 100 * round_ + i, rng.randbytes(size), rng.random() < 0.5) for i, size in enumerate(sizes)
        ]
        for packet in sent:
            channel.guest.send(packet.payload, packet.transaction, packet.completion, packet.type)
        arrived = [packet._replace(payload=packet.payload + bytes(-len(packet.payload) % 8)) for packet in sent]

        taken, signal, full = channel.host.echo(100)

        wanted = Echo().on_packets(arrived)
        assert (taken, signal, full) == (len(sent), bool(wanted), False)
        assert [Packet(*packet) for packet in channel.guest.recv_many(100)] == wanted
    assert channel.host.echo(100) == (0, False, False)
    assert not channel.host.broken
    assert not channel.guest.broken


def test_it_takes_no_more_than_it_is_told_and_gives_their_room_back(rig: Rig) -> None:
    channel = Channel(rig)
    channel.guest.send_many([b"12345678"] * 5, 1)

    assert channel.host.echo(3) == (3, True, False)

    assert channel.control(ChannelControl.READ_INDEX) == 3 * packet_bytes(8)
    assert channel.host.echo(3) == (2, False, False)     # the guest has not read yet: it has been signalled
    assert [packet[1] for packet in channel.guest.recv_many(9)] == [1, 2, 3, 4, 5]


def test_a_full_ring_keeps_the_packet_and_asks_for_its_room(rig: Rig) -> None:
    channel = Channel(rig)
    channel.guest.send_many([bytes(1000)] * 3, 1)
    channel.host.send(bytes(2000))

    assert channel.host.echo(9) == (2, False, True)      # no signal: the one before them has not been read
    assert channel.control(ChannelControl.PENDING_SEND_SZ, ring=1) == packet_bytes(1000) + 8
    assert channel.host.echo(9) == (0, False, True)
    channel.guest.recv_many(9)
    assert channel.guest.take_signal()

    assert channel.host.echo(9) == (1, True, False)
    assert [packet[1] for packet in channel.guest.recv_many(9)] == [3]
    assert channel.control(ChannelControl.PENDING_SEND_SZ, ring=1) == 0


def test_room_that_comes_while_it_asks_is_used() -> None:
    rig = Rig(_core_explored)
    channel = Channel(rig)
    channel.guest.send(bytes(1000), 7)
    channel.host.send(bytes(3200))
    rig.world.before["vmr_room"] = channel.guest.recv

    assert channel.host.echo(9) == (1, True, False)


def test_a_guest_that_waits_for_the_room_is_to_be_signalled(rig: Rig) -> None:
    channel = Channel(rig)
    channel.fill(free=8)
    assert errno_of(channel.guest.send, b"more") == errno.EAGAIN

    channel.host.echo(1)

    assert channel.host.take_signal()


def test_a_type_that_no_channel_carries_is_met_after_what_came_before_it(rig: Rig) -> None:
    channel = Channel(rig)
    channel.guest.send(b"good", 1)
    channel.guest.send(b"strange", 2, type=2)

    assert channel.host.echo(9) == (1, True, False)

    assert errno_of(channel.host.echo, 9) == errno.EPROTO
    assert channel.guest.recv()[1] == 1
    assert channel.guest.recv() is None


def test_an_impossible_descriptor_breaks_it_after_what_came_before(rig: Rig) -> None:
    channel = Channel(rig)
    channel.guest.send(b"good", 1)
    channel.plant(packet_bytes(4), b"\xff" * 16)
    channel.set_control(ChannelControl.WRITE_INDEX, packet_bytes(4) + 64)

    assert channel.host.echo(9)[0] == 1
    assert errno_of(channel.host.echo, 9) == errno.EIO
    assert channel.host.broken


@pytest.mark.parametrize("index", [4, DATA_BYTES, 2**32 - 8])
def test_impossible_indices_break_it(rig: Rig, index: int) -> None:
    writer, reader = Channel(rig), Channel(rig)
    writer.set_control(ChannelControl.WRITE_INDEX, index)
    assert errno_of(writer.host.echo, 1) == errno.EIO

    reader.guest.send(bytes(2000))
    reader.host.send(bytes(2048))
    reader.set_control(ChannelControl.READ_INDEX, index, ring=1)
    assert errno_of(reader.host.echo, 1) == errno.EIO


def test_a_packet_that_changes_while_it_is_copied_stays_within_its_size() -> None:
    rig = Rig(_core_explored)
    channel = Channel(rig)
    channel.guest.send(bytes(64), 1)
    rig.world.before["vmr.data"] = lambda: channel.plant(0, b"\xff" * 16)     # behind the check, before the copy

    assert channel.host.echo(9) == (1, True, False)

    assert [len(packet[2]) for packet in channel.guest.recv_many(9)] == [64]
    assert not channel.guest.broken


def test_a_closed_memory_and_a_wrong_argument_are_errors(rig: Rig) -> None:
    channel = Channel(rig)
    with pytest.raises(TypeError):
        channel.host.echo("9")
    assert channel.host.echo(-1) == (0, False, False)
    channel.memory.close()
    with pytest.raises(ValueError, match="closed"):
        channel.host.echo(1)
