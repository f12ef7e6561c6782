# SPDX-License-Identifier: Apache-2.0
"""Two real processes over one sealed memfd, each sending and receiving: nothing is lost, and load makes signals rarer."""

import json
import os
import random
import select
import struct
import traceback
import zlib
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import pytest

from pvbus.shm.memory import ChannelRing, Memory
from pvbus.shm.segment import sealed_memfd

RING_BYTES = 64 * 1024
PACKETS = 200_000
POOL = random.Random(1).randbytes(16384)
HEADER = struct.Struct("<III")      # number, bytes that follow, their checksum
WAIT_MS_MAX = 30_000                # of one sleep: a lost signal ends here, and as an error


class Bells(NamedTuple):
    """The eventfds of a channel: which side's it is that is rung."""

    ours: int
    theirs: int


class Traffic(NamedTuple):
    """What one side did, and how often it found the ring full."""

    sent: int
    received: int
    signals: int
    full: int


def payload(number: int, draw: random.Random) -> bytes:
    """Make a packet that says what it is."""
    size = draw.randrange(4000) if number % 64 == 0 else draw.randrange(200)
    at = draw.randrange(8192)
    body = POOL[at:at + size]
    return HEADER.pack(number, size, zlib.crc32(body)) + body


def check(packet: tuple[int, int, bytes, bool], number: int) -> None:
    """Refuse a packet that is not the one that is due, or not whole."""
    kind, transaction_id, data, completion = packet
    said, size, checksum = HEADER.unpack_from(data)
    body = memoryview(data)[HEADER.size:HEADER.size + size]
    if (kind, transaction_id, completion, said) != (6, number, False, number):
        raise AssertionError(f"packet {number} is {packet[:2]}, {said}")
    if len(data) != (HEADER.size + size + 7) // 8 * 8 or zlib.crc32(body) != checksum:
        raise AssertionError(f"packet {number} of {size} bytes is damaged")


def signal(bells: Bells) -> int:
    os.eventfd_write(bells.theirs, 1)
    return 1


def sleep(bells: Bells) -> None:
    poll = select.poll()
    poll.register(bells.ours, select.POLLIN)
    if not poll.poll(WAIT_MS_MAX):
        raise TimeoutError("nobody signals")
    os.eventfd_read(bells.ours)


def stream(ring: ChannelRing, bells: Bells, seed: int) -> Traffic:
    """Send PACKETS packets in bursts of any length, and receive as many meanwhile; sleep when neither is possible."""
    draw = random.Random(seed)
    sent = received = signals = made = 0
    waiting: list[bytes] = []
    while sent < PACKETS or received < PACKETS:
        while len(waiting) < draw.randrange(1, 64) and made < PACKETS:
            waiting.append(payload(made, draw))
            made += 1
        count, must_signal = ring.send_many(waiting, sent)
        del waiting[:count]
        sent += count
        ring.begin_read()
        packets = ring.recv_many(draw.randrange(1, 256))
        more = ring.end_read()
        if ring.take_signal() or must_signal:
            signals += signal(bells)
        for packet in packets:
            check(packet, received)
            received += 1
        if not count and not packets and not more and (sent < PACKETS or received < PACKETS):
            sleep(bells)
    return Traffic(sent, received, signals, ring.state()["out_full"])


def ask(ring: ChannelRing, bells: Bells, packets: int) -> Traffic:
    """Send a packet only when the one before it has been answered."""
    signals = 0
    for number in range(packets):
        signals += ring.send(b"x" * 64, number) and signal(bells)
        while (answer := ring.recv()) is None:
            sleep(bells)
        if answer[:2] != (0xB, number):
            raise AssertionError(f"answer to {number}: {answer}")
    return Traffic(packets, packets, signals, 0)


def echo(ring: ChannelRing, bells: Bells, packets: int) -> Traffic:
    """Answer each packet, and sleep without the mask."""
    signals = 0
    for _ in range(packets):
        while (packet := ring.recv()) is None:
            sleep(bells)
        signals += ring.complete(packet[1], b"") and signal(bells)
    return Traffic(packets, packets, signals, 0)


def push(ring: ChannelRing, bells: Bells, packets: int) -> Traffic:
    """Send packets one by one as fast as they go."""
    signals = number = 0
    while number < packets:
        try:
            signals += ring.send(b"x" * 64, number) and signal(bells)
        except BlockingIOError:
            sleep(bells)
        else:
            number += 1
    return Traffic(packets, 0, signals, ring.state()["out_full"])


def take(ring: ChannelRing, bells: Bells, packets: int) -> Traffic:
    """Receive packets in batches, in their order, with the mask up."""
    received = signals = 0
    while received < packets:
        ring.begin_read()
        while batch := ring.recv_many(64):
            if [packet[1] for packet in batch] != list(range(received, received + len(batch))):
                raise AssertionError(f"after {received} packets: {batch[0][1]}")
            received += len(batch)
            if ring.take_signal():
                signals += signal(bells)
        if not ring.end_read() and received < packets:
            sleep(bells)
    return Traffic(0, received, signals, 0)


@pytest.fixture
def both(record_property: Callable[[str, object], None]) -> Iterator[Callable[..., tuple[Traffic, Traffic]]]:
    """Run a guest's and a host's part, the host in a process of its own; give what either did."""
    memfd = sealed_memfd("pvbus-test-channel", 2 * RING_BYTES)
    bells = [os.eventfd(0, os.EFD_CLOEXEC), os.eventfd(0, os.EFD_CLOEXEC)]
    result, report = os.pipe()

    def run(guest: Callable[..., Traffic], host: Callable[..., Traffic], *arguments: Any) -> tuple[Traffic, Traffic]:
        child = os.fork()
        if child == 0:
            try:
                ring = ChannelRing(Memory(memfd, 2 * RING_BYTES), RING_BYTES, 0, RING_BYTES)
                did = host(ring, Bells(bells[1], bells[0]), *arguments)
                os.write(report, json.dumps(did).encode() + b"\n")
                os._exit(0)
            except BaseException:   # the parent must see it, whatever it is
                traceback.print_exc()
            finally:
                os._exit(1)
        try:
            ours = guest(ChannelRing(Memory(memfd, 2 * RING_BYTES), 0, RING_BYTES, RING_BYTES), Bells(*bells), *arguments)
        finally:
            status = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
        assert status == 0
        theirs = Traffic(*json.loads(os.read(result, 4096)))
        record_property("guest", str(ours))
        record_property("host", str(theirs))
        return ours, theirs

    yield run
    for fd in (memfd, result, report, *bells):
        os.close(fd)


def test_packets_of_all_sizes_in_both_directions_arrive_once_in_order_and_whole(
    both: Callable[..., tuple[Traffic, Traffic]],
) -> None:
    guest, host = both(stream, stream, 7)

    assert [(side.sent, side.received) for side in (guest, host)] == [(PACKETS, PACKETS)] * 2


def test_signals_a_packet_fall_under_load(both: Callable[..., tuple[Traffic, Traffic]]) -> None:
    packets = 50_000

    idle, _ = both(ask, echo, 2000)
    busy, reader = both(push, take, packets)

    a_packet = [idle.signals / idle.sent, busy.signals / busy.sent]
    print("signals a packet: one at a time {:.4f}, under load {:.4f}".format(*a_packet))
    assert a_packet[0] == 1         # a reader that has found nothing is woken, by each
    assert a_packet[1] < 0.5
    assert reader.received == packets
    assert reader.signals <= 2 * busy.full
