# SPDX-License-Identifier: Apache-2.0
"""The other side of a channel writes what it likes: EIO, never a byte from outside the ring, never a loop without end."""

import errno
import random
from types import ModuleType
from typing import Any

import pytest

from pvbus.shm.channel_ring import ChannelControl
from pvbus.tests.shm.channels import DATA_BYTES, RING_BYTES, Channel, descriptor, errno_of, padded
from pvbus.tests.shm.rig import CORES, Rig

M32 = 2**32 - 1
IMPOSSIBLE = [DATA_BYTES, DATA_BYTES + 8, 4, 1, 2**31, M32, M32 - 7]


@pytest.mark.parametrize("index", IMPOSSIBLE)
def test_an_impossible_write_index_breaks_the_reader(rig: Rig, index: int) -> None:
    channel = Channel(rig)
    channel.set_control(ChannelControl.WRITE_INDEX, index)

    assert errno_of(channel.host.recv) == errno.EIO
    channel.set_control(ChannelControl.WRITE_INDEX, 0)
    assert (errno_of(channel.host.recv), channel.host.broken) == (errno.EIO, 1)


@pytest.mark.parametrize("index", IMPOSSIBLE)
def test_an_impossible_read_index_breaks_the_writer_when_it_needs_room(rig: Rig, index: int) -> None:
    channel = Channel(rig)
    channel.fill(free=8)
    channel.set_control(ChannelControl.READ_INDEX, index)

    assert errno_of(channel.guest.send, b"") == errno.EIO
    assert errno_of(channel.guest.send_many, [b""]) == errno.EIO
    assert errno_of(channel.guest.recv) == errno.EIO       # nothing of this side can be believed
    assert channel.guest.broken == 1


@pytest.mark.parametrize("call", ["end_read", "recv", "send", "begin_read", "recv_many", "send_many", "complete"])
def test_a_broken_ring_answers_eio_to_all_and_can_be_looked_at(rig: Rig, call: str) -> None:
    channel = Channel(rig)
    channel.set_control(ChannelControl.WRITE_INDEX, M32)
    assert errno_of(channel.host.end_read) == errno.EIO
    arguments: dict[str, tuple[Any, ...]] = {
        "send": (b"",), "send_many": ([],), "recv_many": (1,), "complete": (1, b""),
    }

    assert errno_of(getattr(channel.host, call), *arguments.get(call, ())) == errno.EIO

    state = channel.host.state()
    assert (state["broken"], state["in_write_index"]) == (1, M32)
    assert (state["in_read_bytes_avail"], state["in_write_bytes_avail"]) == (0, 0)


@pytest.mark.parametrize("field", [ChannelControl.WRITE_INDEX, ChannelControl.READ_INDEX])
@pytest.mark.parametrize("ring", [0, 1])
def test_a_view_of_impossible_pages_is_broken_from_the_start(rig: Rig, field: int, ring: int) -> None:
    channel = Channel(rig)
    channel.set_control(field, 12, ring)

    guest = rig.core.ChannelRing(channel.memory, 0, RING_BYTES, RING_BYTES)

    looked_at_first = (ring, field) != (1, ChannelControl.WRITE_INDEX)
    assert guest.broken == looked_at_first
    assert errno_of(guest.recv) == errno.EIO


@pytest.mark.parametrize("raw", [
    descriptor(0, 2), descriptor(1, 2), descriptor(3, 2), descriptor(0xFFFF, 0xFFFF), descriptor(2, 0xFFFF), descriptor(2, 0),
    descriptor(2, 2, flags=2), descriptor(2, 2, flags=0x8000), descriptor(2, 2, flags=3), descriptor(2, 4),
], ids=lambda raw: raw[:8].hex())
def test_an_impossible_descriptor_breaks_the_reader(rig: Rig, raw: bytes) -> None:
    channel = Channel(rig)
    channel.plant(0, raw)
    channel.set_control(ChannelControl.WRITE_INDEX, 32)     # room for a payload of 8 bytes

    assert errno_of(channel.host.recv) == errno.EIO
    assert channel.control(ChannelControl.READ_INDEX) == 0


@pytest.mark.parametrize("held", [8, 16])
def test_less_than_a_descriptor_and_a_trailer_is_no_packet(rig: Rig, held: int) -> None:
    channel = Channel(rig)
    channel.plant(0, descriptor(2, 2))
    channel.set_control(ChannelControl.WRITE_INDEX, held)

    assert errno_of(channel.host.recv) == errno.EIO


def test_good_packets_before_a_bad_one_are_given_out_first(rig: Rig) -> None:
    channel = Channel(rig)
    channel.guest.send_many([b"one", b"two"])
    channel.plant(64, descriptor(2, 1))
    channel.set_control(ChannelControl.WRITE_INDEX, 96)

    assert [packet[2] for packet in channel.host.recv_many(9)] == [padded(b"one"), padded(b"two")]
    assert channel.control(ChannelControl.READ_INDEX) == 64
    assert errno_of(channel.host.recv_many, 9) == errno.EIO


def test_a_descriptor_that_changes_behind_the_check_is_not_looked_at_again() -> None:
    """The header is copied, then checked: what is written over it between the two comes too late."""
    rig = Rig(CORES[1])     # where others can act between two accesses
    channel = Channel(rig)
    channel.guest.send(b"12345678", 1)
    reads = 0

    def overwrite() -> None:
        nonlocal reads
        reads += 1
        if reads == 3:      # both words of the descriptor have been read
            channel.plant(0, descriptor(2, 0xFFFF, flags=0xFFFF))
        else:
            rig.world.before["vmr.packet"] = overwrite

    rig.world.before["vmr.packet"] = overwrite

    assert channel.host.recv() == (6, 1, b"12345678", False)
    assert reads == 3


def test_our_own_indices_are_not_read_back(rig: Rig) -> None:
    channel = Channel(rig)
    channel.guest.send(b"first", 1)
    channel.set_control(ChannelControl.READ_INDEX, 2048)    # the host's own word
    assert channel.host.recv() == (6, 1, padded(b"first"), False)

    channel.set_control(ChannelControl.WRITE_INDEX, M32)    # the guest's own word
    channel.guest.send(b"second", 2)

    assert channel.host.recv() == (6, 2, padded(b"second"), False)


def test_a_demand_for_more_than_the_ring_has_is_never_met_and_does_no_harm(rig: Rig) -> None:
    channel = Channel(rig)
    channel.set_control(ChannelControl.PENDING_SEND_SZ, M32)

    for _ in range(300):
        channel.guest.send(b"")
        channel.set_control(ChannelControl.PENDING_SEND_SZ, M32)
        channel.host.recv()

    assert not channel.host.take_signal()


def attack(channel: Channel, draw: random.Random) -> None:
    """Write something into pages of both rings: mostly plausible, so that it passes the first checks."""
    kind = draw.randrange(6)
    if kind == 0:
        index = draw.choice([draw.randrange(0, DATA_BYTES, 8), draw.getrandbits(32), draw.choice(IMPOSSIBLE)])
        channel.set_control(draw.choice((0, 4, 8, 12)), index, draw.randrange(2))
    elif kind == 1:
        raw = descriptor(draw.randrange(8), draw.randrange(40), draw.choice((0, 0, 1, 2)), draw.getrandbits(16))
        channel.plant(draw.randrange(0, DATA_BYTES, 8), raw)
    elif kind == 2:
        channel.plant(draw.randrange(0, DATA_BYTES, 8), draw.randbytes(draw.randrange(0, 64, 8)))
    elif kind == 3:
        channel.set_control(ChannelControl.WRITE_INDEX, draw.randrange(0, DATA_BYTES, 8))
    else:   # as an honest guest would, from where the pages say that it stands
        guest = channel.rig.core.ChannelRing(channel.memory, 0, RING_BYTES, RING_BYTES)
        errno_of(guest.send, bytes(draw.randrange(300)), draw.getrandbits(64))


def answer(channel: Channel, draw: random.Random) -> object:
    """Do one thing as the honest host; an errno is an answer too."""
    host = channel.host
    call, arguments = draw.choice([
        (host.recv, (draw.choice((None, 0, 64, 5000)),)), (host.recv_many, (draw.randrange(300), draw.choice((None, 100)))),
        (host.send, (bytes(draw.randrange(600)), draw.getrandbits(64))), (host.send_many, ([bytes(100)] * draw.randrange(9),)),
        (host.begin_read, ()), (host.end_read, ()), (host.take_signal, ()), (host.state, ()),
    ])
    try:
        return call(*arguments)
    except OSError as error:
        return errno.errorcode[error.errno or 0], getattr(error, "needed", None)


def under_attack(core: ModuleType, seed: int, answers: list[object]) -> None:
    """Let a host live 60 rounds with a guest that writes anything anywhere; all that lies outside the rings stays."""
    rig = Rig(core)
    draw = random.Random(seed)
    channel = Channel(rig, at=draw.randrange(0, DATA_BYTES, 8))
    for _ in range(60):
        attack(channel, draw)
        answers.append(answer(channel, draw))
        if channel.host.broken:     # the guest reopens the channel with what lies there
            channel.host = rig.core.ChannelRing(channel.memory, RING_BYTES, 0, RING_BYTES)
    rig.close()


def test_no_bytes_of_a_hostile_guest_crash_or_hang_a_host_and_both_compilations_agree() -> None:
    machine: list[object] = []
    explored: list[object] = []

    for seed in range(60):
        under_attack(CORES[0], seed, machine)
        under_attack(CORES[1], seed, explored)

    assert machine == explored
    seen = {answer[0] for answer in machine if isinstance(answer, tuple) and isinstance(answer[0], str)}
    assert seen == {"EIO", "ENOBUFS", "EAGAIN"}
    assert any(isinstance(answer, list) and answer for answer in machine)     # some of it passes for packets


def test_a_hostile_payload_stays_inside_the_ring(rig: Rig) -> None:
    """The longest packet that a ring can hold, begun at its last eight bytes, next to pages full of a secret."""
    memory = rig.memory(2 * RING_BYTES + 8192)
    for at in [*range(8192, 2 * RING_BYTES, 8), *range(2 * RING_BYTES, 2 * RING_BYTES + 8192, 8)]:
        memory.store64(at, 0x5EC12E75EC12E7)
    channel = Channel(rig, at=DATA_BYTES - 8)
    ring_at = RING_BYTES
    for field in (ChannelControl.WRITE_INDEX, ChannelControl.READ_INDEX):
        memory.store32(field, DATA_BYTES - 8)
        memory.store32(ring_at + field, 0)
    host = rig.core.ChannelRing(memory, ring_at, 0, RING_BYTES)
    longest = (DATA_BYTES - 16) // 8
    channel.memory = memory
    channel.plant(DATA_BYTES - 8, descriptor(2, longest))
    memory.store32(ChannelControl.WRITE_INDEX, DATA_BYTES - 16)

    packet = host.recv()

    assert packet is not None
    assert len(packet[2]) == longest * 8 - 16
    assert set(packet[2]) == {0}
