# SPDX-License-Identifier: Apache-2.0
"""The rings of a channel, one step at a time: what lies in the pages, what fits, who has to be signalled."""

import errno
import gc
import random
import struct
from collections.abc import Callable, Iterator

import pytest

from pvbus.shm import _core_explored
from pvbus.shm.channel_ring import PACKET_PAYLOAD_BYTES_MAX, ChannelControl, PacketType
from pvbus.tests.shm.channels import DATA_BYTES, RING_BYTES, Channel, descriptor, errno_of, packet_bytes, padded
from pvbus.tests.shm.rig import M64, Rig

# ---- the bytes


def test_a_packet_lies_in_the_ring_as_the_wire_has_it(rig: Rig) -> None:
    channel = Channel(rig, at=64)

    assert channel.guest.send(b"hello", 0x1122334455667788, completion=True) == 1

    assert channel.data(64, 32).hex(" ", 8) == (
        "0600020003000100"      # type 6, offset 2 * 8, length 3 * 8, completion wanted
        " 8877665544332211"     # transaction id
        " 68656c6c6f000000"     # payload, padded with zeros
        " 0000000040000000"     # trailer: where it began, in the upper half
    )
    assert channel.control(ChannelControl.WRITE_INDEX) == 64 + 32
    assert channel.control(ChannelControl.READ_INDEX) == 64


def test_a_completion_is_a_packet_of_type_11_with_the_id_of_the_request(rig: Rig) -> None:
    channel = Channel(rig)

    channel.guest.complete(7, b"12345678")

    assert channel.data(0, 32).hex(" ", 8) == "0b00020003000000 0700000000000000 3132333435363738 0000000000000000"
    assert channel.host.recv() == (PacketType.COMPLETION, 7, b"12345678", False)


def test_the_writer_announces_in_its_own_ring_that_it_uses_pending_send_sz(rig: Rig) -> None:
    channel = Channel(rig)

    assert [channel.control(ChannelControl.FEATURE_BITS, ring) for ring in (0, 1)] == [1, 1]


def test_padding_shows_nothing_of_what_lay_there_before(rig: Rig) -> None:
    channel = Channel(rig)
    channel.plant(0, b"\xff" * 64)

    channel.guest.send(b"x")

    assert channel.data(16, 8) == b"x" + bytes(7)


def test_a_payload_behind_a_longer_header_is_found(rig: Rig) -> None:
    channel = Channel(rig)
    channel.plant(0, descriptor(4, 5, kind=PacketType.GPA_DIRECT, transaction_id=5) + b"h" * 16 + b"payload!" + bytes(8))
    channel.set_control(ChannelControl.WRITE_INDEX, 48)

    assert channel.host.recv() == (PacketType.GPA_DIRECT, 5, b"payload!", False)
    assert channel.control(ChannelControl.READ_INDEX) == 48


@pytest.mark.parametrize("kind", [0, 1, 6, 7, 9, 0xB, 0xFFFF])
def test_every_type_passes(rig: Rig, kind: int) -> None:
    channel = Channel(rig)

    channel.guest.send(b"", M64, type=kind)

    assert channel.host.recv() == (kind, M64, b"", False)


def test_both_directions_are_apart(rig: Rig) -> None:
    channel = Channel(rig)

    channel.guest.send(b"to host!", 1)
    channel.host.send(b"to guest", 2)

    assert channel.guest.recv() == (6, 2, b"to guest", False)
    assert channel.host.recv() == (6, 1, b"to host!", False)
    assert channel.guest.recv() is channel.host.recv() is None


# ---- every size at every place


@pytest.mark.parametrize("start", [*range(DATA_BYTES - 64, DATA_BYTES, 8), 0, 8, 2048])
def test_a_packet_of_any_size_wraps_anywhere(rig: Rig, start: int) -> None:
    channel = Channel(rig, at=start)
    draw = random.Random(start)

    for size in [*range(48), 63, 64, 65, 1000, DATA_BYTES - 40, DATA_BYTES - 32]:
        payload = draw.randbytes(size)
        channel.guest.send(payload, size)
        end = (channel.control(ChannelControl.READ_INDEX) + packet_bytes(size)) % DATA_BYTES
        assert channel.control(ChannelControl.WRITE_INDEX) == end
        assert channel.host.recv() == (6, size, padded(payload), False)
        assert channel.control(ChannelControl.READ_INDEX) == end
    assert channel.host.recv() is None


def test_many_rounds_in_batches_of_any_size_lose_nothing(rig: Rig) -> None:
    channel = Channel(rig)
    draw = random.Random(5)
    sent: list[bytes] = []
    got: list[tuple[int, int, bytes, bool]] = []

    for _ in range(120):
        payloads = [draw.randbytes(draw.choice((0, 3, 8, 200, 700))) for _ in range(draw.randrange(12))]
        count, _ = channel.guest.send_many(payloads, len(sent), completion=True)
        sent += payloads[:count]
        got += channel.host.recv_many(draw.randrange(12))
    got += channel.host.recv_many(1000)

    assert got == [(6, number, padded(payload), True) for number, payload in enumerate(sent)]
    assert len(sent) > 300


@pytest.mark.parametrize("payload", [b"abc", bytearray(b"abc"), memoryview(b"xabcx")[1:4], memoryview(b"a.b.c.")[::2]])
def test_a_payload_may_be_anything_that_is_like_bytes(rig: Rig, payload: bytes) -> None:
    channel = Channel(rig)

    channel.guest.send(payload)
    channel.guest.send_many(iter([payload]))

    assert [packet[2] for packet in channel.host.recv_many(9)] == [b"abc" + bytes(5)] * 2


# ---- full and empty


def test_a_ring_is_never_filled_up(rig: Rig) -> None:
    channel = Channel(rig)

    assert errno_of(channel.guest.send, bytes(DATA_BYTES - packet_bytes(0))) == errno.EMSGSIZE
    channel.guest.send(bytes(DATA_BYTES - packet_bytes(0) - 8))

    state = channel.guest.state()
    assert (state["out_write_bytes_avail"], state["out_read_bytes_avail"]) == (8, DATA_BYTES - 8)


def test_a_full_ring_says_eagain_and_asks_for_the_room_that_is_needed(rig: Rig) -> None:
    channel = Channel(rig)
    channel.fill(free=packet_bytes(16))

    with pytest.raises(BlockingIOError):
        channel.guest.send(bytes(16))

    assert channel.control(ChannelControl.PENDING_SEND_SZ) == packet_bytes(16) + 8     # equal is not enough
    assert channel.host.recv_many(9)[0][1] == 99
    assert channel.host.take_signal()
    assert not channel.host.take_signal()
    channel.guest.send(bytes(16))
    assert channel.control(ChannelControl.PENDING_SEND_SZ) == 0


def test_room_that_comes_while_the_writer_asks_for_it_is_used() -> None:
    rig = Rig(_core_explored)   # where others can act between two accesses
    channel = Channel(rig)
    channel.fill(free=8)
    rig.world.before["vmr_room"] = channel.host.recv

    assert channel.guest.send(b"fits now") == 1

    assert channel.host.recv()[2] == b"fits now"
    assert channel.control(ChannelControl.PENDING_SEND_SZ) == 0


def test_the_reader_tells_of_room_only_when_it_crosses_what_is_asked(rig: Rig) -> None:
    channel = Channel(rig)
    channel.guest.send_many([b""] * 4)
    channel.fill(free=8)
    assert errno_of(channel.guest.send, bytes(40)) == errno.EAGAIN     # needs 72, three packets of 24 more

    told = []
    for _ in range(5):
        channel.host.recv()
        told.append(channel.host.take_signal())

    assert told == [False, False, True, False, False]


def test_the_low_bits_of_a_demand_do_not_count(rig: Rig) -> None:
    channel = Channel(rig)
    channel.fill(free=8)
    for demand, told in ((7, False), (DATA_BYTES + 7, True)):
        channel.set_control(ChannelControl.PENDING_SEND_SZ, demand)
        channel.host.recv()
        assert channel.host.take_signal() is told
        channel.guest.recv()
        channel.fill(free=8)


def test_a_smaller_packet_does_not_withdraw_the_demand_of_a_larger_one(rig: Rig) -> None:
    channel = Channel(rig)
    channel.fill(free=64)
    assert errno_of(channel.guest.send, bytes(100)) == errno.EAGAIN
    demand = channel.control(ChannelControl.PENDING_SEND_SZ)

    channel.guest.send(b"small")
    assert channel.control(ChannelControl.PENDING_SEND_SZ) == demand == packet_bytes(100) + 8
    channel.host.recv()
    assert channel.host.take_signal()
    channel.guest.send(bytes(100))

    assert channel.control(ChannelControl.PENDING_SEND_SZ) == 0


def test_send_many_stops_when_full_and_has_asked_for_room(rig: Rig) -> None:
    channel = Channel(rig)

    sent, must_signal = channel.guest.send_many([bytes(1000)] * 10, 50)

    assert (sent, must_signal) == (3, True)
    assert channel.control(ChannelControl.PENDING_SEND_SZ) == packet_bytes(1000) + 8
    assert channel.guest.send_many([bytes(1000)]) == (0, False)
    assert [packet[1] for packet in channel.host.recv_many(9)] == [50, 51, 52]
    assert channel.host.take_signal()


def test_a_packet_that_can_never_fit_sends_nothing_of_its_batch(rig: Rig) -> None:
    channel = Channel(rig, ring_bytes=1 << 20)

    assert errno_of(channel.guest.send_many, [b"fits", bytes(PACKET_PAYLOAD_BYTES_MAX + 1)]) == errno.EMSGSIZE
    assert channel.control(ChannelControl.WRITE_INDEX) == 0
    channel.guest.send(bytes(PACKET_PAYLOAD_BYTES_MAX))
    assert len(channel.host.recv()[2]) == PACKET_PAYLOAD_BYTES_MAX


def test_an_empty_batch_touches_nothing(rig: Rig) -> None:
    channel = Channel(rig)

    assert channel.guest.send_many([]) == (0, False)
    assert channel.host.recv_many(0) == channel.host.recv_many(5) == []


# ---- too small a buffer


def test_too_small_a_limit_tells_the_size_needed_and_leaves_the_packet(rig: Rig) -> None:
    channel = Channel(rig)
    channel.guest.send(bytes(30), 4)

    for receive, arguments in ((channel.host.recv, (31,)), (channel.host.recv_many, (4, 31))):
        with pytest.raises(rig.core.BufferTooSmall) as caught:
            receive(*arguments)
        assert (caught.value.errno, caught.value.needed) == (errno.ENOBUFS, 32)
    assert channel.control(ChannelControl.READ_INDEX) == 0

    assert channel.host.recv(32) == (6, 4, bytes(32), False)


def test_a_limit_of_bytes_bounds_the_payloads_of_a_batch_together(rig: Rig) -> None:
    channel = Channel(rig)
    channel.guest.send_many([bytes(16)] * 5)

    assert [len(channel.host.recv_many(9, limit)) for limit in (47, 32, 100)] == [2, 2, 1]


# ---- signals


def test_the_reader_is_signalled_only_when_the_ring_was_empty(rig: Rig) -> None:
    channel = Channel(rig)

    assert [channel.guest.send(b""), channel.guest.send(b""), channel.guest.send_many([b"", b""])] == [1, 0, (2, False)]
    channel.host.recv_many(3)
    assert channel.guest.send(b"") == 0
    channel.host.recv_many(9)
    assert channel.guest.send_many([b"", b""]) == (2, True)
    assert channel.guest.state()["out_signals"] == 2


def test_a_reader_with_its_mask_up_is_not_signalled_and_looks_again_at_the_end(rig: Rig) -> None:
    channel = Channel(rig)

    channel.host.begin_read()
    assert channel.control(ChannelControl.INTERRUPT_MASK) == 1
    assert channel.guest.send(b"") == 0
    assert channel.host.end_read() is True
    assert channel.control(ChannelControl.INTERRUPT_MASK) == 0
    channel.host.begin_read()
    channel.host.recv()
    assert channel.host.end_read() is False
    assert channel.guest.send(b"") == 1


def test_protocol_0_13_signals_at_every_packet_unless_masked(rig: Rig) -> None:
    channel = Channel(rig, signal_always=True)

    assert [channel.guest.send(b""), channel.guest.send(b""), channel.guest.send_many([b"", b""])] == [1, 1, (2, True)]
    channel.host.begin_read()
    assert channel.guest.send(b"") == 0


# ---- one side after another


def test_a_new_view_of_a_side_goes_on_where_the_old_one_stood(rig: Rig) -> None:
    channel = Channel(rig, at=4000)
    channel.guest.send_many([bytes([i]) * 50 for i in range(5)])
    channel.host.recv_many(2)

    host = rig.core.ChannelRing(channel.memory, RING_BYTES, 0, RING_BYTES)
    guest = rig.core.ChannelRing(channel.memory, 0, RING_BYTES, RING_BYTES)
    guest.send(b"\5" * 50)

    assert [packet[2][0] for packet in host.recv_many(9)] == [2, 3, 4, 5]


def test_the_state_has_the_figures_of_the_attributes(rig: Rig) -> None:
    channel = Channel(rig, at=DATA_BYTES - 8)
    channel.guest.send(b"12345678")
    channel.host.begin_read()

    guest, host = channel.guest.state(), channel.host.state()

    assert {name: guest[name] for name in guest if name.startswith("out_")} == {
        "out_intr_mask": 1, "out_read_index": DATA_BYTES - 8, "out_write_index": 24, "out_read_bytes_avail": 32,
        "out_write_bytes_avail": DATA_BYTES - 32, "out_pending_send_sz": 0, "out_full": 0, "out_signals": 1,
    }
    for field in ("intr_mask", "read_index", "write_index", "read_bytes_avail", "write_bytes_avail", "pending_send_sz"):
        assert guest["out_" + field] == host["in_" + field]


# ---- wrong arguments


@pytest.mark.parametrize(("out", "into", "size"), [
    (0, 8192, 4096), (0, 8192, 8200), (0, 4096, 8192), (0, 8192, 12288), (-4096, 8192, 8192), (8, 8192, 8192), (0, 12288, 8192),
    (0, 0, 8192), (0, 8192, 1 << 31), (1 << 62, 0, 8192),
])
def test_rings_that_do_not_lie_in_the_memory_are_refused(rig: Rig, out: int, into: int, size: int) -> None:
    memory = rig.memory(16384)

    with pytest.raises((ValueError, OverflowError)):
        rig.core.ChannelRing(memory, out, into, size)


def test_arguments_of_the_wrong_kind_are_refused_and_send_nothing(rig: Rig) -> None:
    channel = Channel(rig)
    guest, host = channel.guest, channel.host

    calls: list[Callable[[], object]] = [
        guest.send, lambda: guest.send("text"), lambda: guest.send([1, 2]), lambda: guest.send(b"", payload=b""),
        lambda: guest.send(b"", 0, False, 6, 1), lambda: guest.send(b"", kind=6), lambda: guest.send_many([b"", "text"]),
        lambda: guest.send_many(5), lambda: guest.complete(1), lambda: guest.send(b"", "1"), lambda: host.recv("1"),
        host.recv_many, lambda: rig.core.ChannelRing(7, 0, 8192, 8192),
    ]
    for call in calls:
        with pytest.raises(TypeError):
            call()
    for call in (lambda: guest.send(b"", type=1 << 16), lambda: guest.send(b"", type=-1), lambda: host.recv(-1)):
        with pytest.raises(ValueError, match=r"\d"):
            call()
    for number in (-1, 1 << 64):
        with pytest.raises(OverflowError):
            guest.send(b"", number)
    assert host.recv() is None


def test_a_closed_memory_is_an_error_and_no_crash(rig: Rig) -> None:
    channel = Channel(rig)
    channel.guest.send(b"x")
    channel.memory.close()
    guest, host = channel.guest, channel.host

    for call in (
        lambda: guest.send(b""), lambda: guest.send_many([b""]), lambda: guest.complete(0, b""), host.recv,
        lambda: host.recv_many(1), host.begin_read, host.end_read, host.state,
        lambda: rig.core.ChannelRing(channel.memory, 0, 8192, 8192),
    ):
        with pytest.raises(ValueError, match="closed"):
            call()


def test_a_memory_that_is_closed_while_a_payload_is_made_is_an_error(rig: Rig) -> None:
    channel = Channel(rig)

    def payloads() -> Iterator[bytes]:
        yield b"x"
        channel.memory.close()

    with pytest.raises(ValueError, match="closed"):
        channel.guest.send_many(payloads())


class Nosy:
    """Garbage whose finaliser reads from the ring, or closes its memory, in the middle of whatever made an object."""

    def __init__(self, act: Callable[[], object]) -> None:
        self.act = act
        self.myself = self      # only the collector ends it

    def __del__(self) -> None:
        self.act()


@pytest.fixture
def eager_collector() -> Iterator[None]:
    """Let the collector, whenever it is on, run at the next object that is made."""
    thresholds = gc.get_threshold()
    gc.collect()  # empties the interpreter's free lists, too: what is made of those is not counted
    gc.set_threshold(1, 1, 1)
    yield
    gc.set_threshold(*thresholds)
    gc.enable()


@pytest.mark.usefixtures("eager_collector")
def test_a_finaliser_that_reads_from_the_ring_takes_no_packet_twice(rig: Rig) -> None:
    channel = Channel(rig)
    got: list[tuple[int, int, bytes, bool]] = []
    taken: list[tuple[int, int, bytes, bool]] = []
    sent = 0

    for _ in range(40):
        gc.disable()
        Nosy(lambda: taken.append(channel.host.recv()))
        sent += channel.guest.send_many([b"12345678"] * 40, sent)[0]
        gc.enable()
        got += channel.host.recv_many(1000)

    assert len(taken) == 40
    assert sorted(packet[1] for packet in [*got, *taken]) == list(range(sent))


@pytest.mark.usefixtures("eager_collector")
def test_a_finaliser_that_closes_the_memory_ends_a_receive_with_an_error(rig: Rig) -> None:
    channel = Channel(rig)
    channel.guest.send_many([b"12345678"] * 40)
    gc.disable()
    Nosy(channel.memory.close)
    gc.enable()

    with pytest.raises(ValueError, match="closed"):
        channel.host.recv_many(1000)


def test_the_trailer_is_not_believed(rig: Rig) -> None:
    channel = Channel(rig)
    channel.guest.send(b"12345678")
    channel.plant(24, struct.pack("<Q", M64))

    assert channel.host.recv()[2] == b"12345678"
