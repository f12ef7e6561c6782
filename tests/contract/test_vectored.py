# SPDX-License-Identifier: Apache-2.0
"""A12.3: readv and writev are one call of the driver a segment, and the first short one ends them."""

import os
from collections.abc import Callable
from typing import Any

import pytest

from pvbus.tests.contract.support import InThread, Pair, connect, connect_many, errno_of, pack, take, unpack

Opened = Callable[..., Any]


def queued(machine: Any, rx: Any, tx: Any, count: int) -> list[int]:
    """Connect ports, raise each once, and give rx's."""
    pairs = connect_many(machine, rx, tx, count)
    for pair in pairs:
        pair.send()
    return [pair.rx_port for pair in pairs]


@pytest.mark.checklist("A12.3", "A4.10")
def test_readv_fills_one_segment_after_the_other(machine: Any, opened: Opened) -> None:
    rx = opened()
    ports = queued(machine, rx, opened(), 3)
    first, empty, second = bytearray(8), bytearray(0), bytearray(4)

    count = rx.readv([first, empty, second])

    assert count == 12
    assert unpack(bytes(first + second)) == ports


@pytest.mark.checklist("A12.3", "A4.1")
@pytest.mark.parametrize(("sizes", "taken"), [([6, 8], 1), ([8, 3, 4], 2), ([4, 7, 8], 2), ([4, 4, 16, 4], 4)])
def test_readv_stops_at_the_first_segment_that_is_not_filled(
    machine: Any, opened: Opened, sizes: list[int], taken: int
) -> None:
    rx = opened()
    ports = queued(machine, rx, opened(), 4)
    segments = [bytearray(size) for size in sizes]

    count = rx.readv(segments)

    assert count == 4 * taken
    got = [port for segment in segments for port in unpack(bytes(segment[: len(segment) // 4 * 4])) if port]
    assert got == ports[:taken]
    assert take(machine, rx) == ports[taken:]


@pytest.mark.checklist("A12.3", "A4.6")
def test_eagain_in_a_later_segment_is_the_count_so_far_and_in_the_first_an_error(
    machine: Any, opened: Opened
) -> None:
    rx = opened()
    (port,) = queued(machine, rx, opened(), 1)
    segments = [bytearray(4), bytearray(4)]

    assert rx.readv(segments) == 4
    assert unpack(bytes(segments[0] + segments[1])) == [port, 0]
    assert errno_of(rx.readv, segments) == "EAGAIN"


@pytest.mark.checklist("A12.3", "A4.7")
def test_a_blocking_readv_sleeps_in_a_segment_that_finds_the_ring_empty(machine: Any, opened: Opened) -> None:
    pair = connect(machine, opened(nonblock=False), opened())
    pair.send()
    segments = [bytearray(4), bytearray(4)]
    reader = InThread(lambda: pair.rx.readv(segments))
    assert reader.sleeps()
    assert unpack(bytes(segments[0])) == [pair.rx_port]

    pair.enable()
    pair.send()

    assert reader.result() == 8
    assert unpack(bytes(segments[1])) == [pair.rx_port]


@pytest.mark.checklist("A12.3", "A4.4")
def test_readv_of_an_overflowed_file_fails_unless_it_asks_for_nothing(machine: Any, opened: Opened) -> None:
    pair: Pair = connect(machine, opened(), opened())
    pair.overflow()

    assert errno_of(pair.rx.readv, [bytearray(0), bytearray(4)]) == "EFBIG"
    assert pair.rx.readv([bytearray(3), bytearray(4)]) == 0
    assert pair.rx.readv([]) == 0


@pytest.mark.checklist("A12.3", "A5.4", "A5.6")
def test_writev_writes_back_segment_by_segment_until_one_is_short(machine: Any, opened: Opened) -> None:
    rx, tx = opened(), opened()
    pairs = connect_many(machine, rx, tx, 4)
    for pair in pairs:
        pair.send()
    p, q, r, s = take(machine, rx)

    count = rx.writev([pack(p), b"", pack(q), pack(r) + b"..", pack(s)])

    assert count == 12
    for pair in pairs:
        pair.send()
    assert take(machine, rx) == [p, q, r]


@pytest.mark.checklist("A12.3", "A5.2")
def test_a_segment_of_more_than_a_page_is_short(opened: Opened) -> None:
    assert opened().writev([bytes(8192), bytes(4)]) == 4096


@pytest.mark.checklist("A12.3", "A12.2")
def test_readv_and_writev_need_their_access_mode(opened: Opened) -> None:
    read_only, write_only = opened(flags=os.O_RDONLY), opened(flags=os.O_WRONLY)

    refused = [errno_of(read_only.writev, []), errno_of(write_only.readv, []), errno_of(write_only.writev, [b"1234"])]

    assert refused == ["EBADF", "EBADF", ""]


@pytest.mark.checklist("A12.3")
def test_more_segments_than_a_call_may_have_answer_einval(opened: Opened) -> None:
    file = opened()

    assert errno_of(file.writev, [b""] * 1025) == "EINVAL"
    assert file.writev([b""] * 1024) == 0


def test_a_segment_that_is_no_buffer_takes_nothing_from_the_ring(machine: Any, opened: Opened) -> None:
    rx = opened()
    ports = queued(machine, rx, opened(), 2)

    with pytest.raises(TypeError):
        rx.readv([bytearray(4), None])
    with pytest.raises(TypeError):
        rx.readv([bytearray(4), 4])

    assert take(machine, rx) == ports
    with pytest.raises(TypeError):
        rx.writev([pack(ports[0]), 4])
    machine.settle()
    assert not [row for row in machine.ports(0) if row["port"] in ports and row["enabled"]]


@pytest.mark.checklist("A12.3", "A4.9", "A5.3")
def test_a_segment_that_faults_counts_as_one_with_its_length(machine: Any, opened: Opened) -> None:
    rx = opened()
    ports = queued(machine, rx, opened(), 2)

    assert rx.readv([bytes(3), bytearray(4)]) == 0      # too short to copy anything, so short and no fault
    assert rx.readv([bytes(0), bytearray(4)]) == 4
    assert errno_of(rx.readv, [bytes(4096)]) == "EFAULT"
    assert take(machine, rx) == ports[1:]
    assert errno_of(rx.writev, [b"", None, pack(ports[0])]) == "EFAULT"
