# SPDX-License-Identifier: Apache-2.0
"""A4: what `read` answers."""

from collections.abc import Callable
from typing import Any

import pytest

from pvbus.tests.contract.support import InThread, connect, connect_many, errno_of, pack, ready, take, unpack

Opened = Callable[..., Any]


@pytest.mark.checklist("A10.5", "A4.6")
def test_a_fresh_file_has_nothing_to_read(opened: Opened) -> None:
    assert errno_of(opened().read, 4096) == "EAGAIN"


@pytest.mark.checklist("A4.1")
@pytest.mark.parametrize("count", [0, 1, 2, 3])
def test_a_count_below_a_port_reads_nothing_at_once_even_on_a_blocking_file(
    opened: Opened, count: int
) -> None:
    assert opened(nonblock=False).read(count) == b""


@pytest.mark.checklist("A4.1", "A12.6")
def test_a_count_below_a_port_reads_nothing_even_after_an_overflow(machine: Any, opened: Opened) -> None:
    pair = connect(machine, opened(), opened())
    pair.overflow()

    answers = [pair.rx.read(count) for count in range(4)]

    assert answers == [b""] * 4
    assert errno_of(pair.rx.read, 4) == "EFBIG"


@pytest.mark.checklist("A4.1", "A4.8", "A4.10")
def test_a_count_is_rounded_down_and_the_rest_stays_in_order(machine: Any, opened: Opened) -> None:
    rx, tx = opened(), opened()
    pairs = connect_many(machine, rx, tx, 4)
    for pair in pairs:
        pair.send()

    parts = [unpack(rx.read(count)) for count in (7, 11, 5)]

    p, q, r, s = (pair.rx_port for pair in pairs)
    assert parts == [[p], [q, r], [s]]
    assert errno_of(rx.read, 4) == "EAGAIN"


@pytest.mark.checklist("A4.2", "A6.7")
def test_a_read_gives_at_most_a_page_of_ports(machine: Any, opened: Opened) -> None:
    rx, tx = opened(), opened()
    ports = [tx.bind_interdomain(0, rx.bind_unbound_port(remote_domain=0)) for _ in range(1025)]
    machine.settle()

    first, second = tx.read(65536), tx.read(65536)

    assert (len(first), len(second)) == (4096, 4)
    assert sorted(unpack(first + second)) == ports


@pytest.mark.checklist("A4.4")
def test_an_overflow_hides_the_entries_until_a_reset(machine: Any, opened: Opened) -> None:
    pair = connect(machine, opened(), opened())
    pair.overflow()

    refused = [errno_of(pair.rx.read, 4096) for _ in range(3)]
    pair.rx.reset()

    assert refused == ["EFBIG"] * 3
    assert errno_of(pair.rx.read, 4096) == "EAGAIN"


@pytest.mark.checklist("A4.4", "A3.6")
def test_a_blocking_read_of_an_overflowed_file_fails_at_once(machine: Any, opened: Opened) -> None:
    pair = connect(machine, opened(nonblock=False), opened())
    pair.overflow()

    reader = InThread(lambda: pair.rx.read(4096))

    assert reader.done.wait(5)
    assert reader.errno == "EFBIG"


@pytest.mark.checklist("A1.6", "A3.4")
def test_every_slot_of_the_ring_can_be_used(machine: Any, opened: Opened) -> None:
    pair = connect(machine, opened(), opened())

    pair.queue(64)

    assert unpack(pair.rx.read(4096)) == [pair.rx_port] * 64


@pytest.mark.checklist("A4.8", "A1.5")
def test_entries_that_wrap_around_come_out_in_order_whatever_the_count(machine: Any, opened: Opened) -> None:
    rx, tx = opened(), opened()
    first, second = connect_many(machine, rx, tx, 2)
    first.queue(50)
    assert len(take(machine, rx)) == 50
    for _ in range(15):
        first.queue(2)
        second.queue(1)

    parts = [unpack(rx.read(count)) for count in (4, 52, 8, 4096)]

    assert [len(part) for part in parts] == [1, 13, 2, 29]
    assert [port for part in parts for port in part] == [first.rx_port, first.rx_port, second.rx_port] * 15


@pytest.mark.checklist("A4.7")
def test_a_blocking_read_sleeps_until_an_event_comes(machine: Any, opened: Opened) -> None:
    pair = connect(machine, opened(nonblock=False), opened())
    reader = InThread(lambda: pair.rx.read(4096))
    assert reader.sleeps()

    pair.send()

    assert reader.result() == pack(pair.rx_port)


@pytest.mark.checklist("A4.11", "A12.6")
def test_a_drained_ring_has_nothing_although_its_port_is_still_masked(machine: Any, opened: Opened) -> None:
    pair = connect(machine, opened(), opened())
    pair.send()
    pair.rx.read(4096)

    pair.send()

    assert errno_of(pair.rx.read, 4096) == "EAGAIN"
    assert not ready(pair.rx) & 1


@pytest.mark.checklist("A4.10")
def test_read_ports_gives_numbers_and_no_more_than_asked(machine: Any, opened: Opened) -> None:
    rx, tx = opened(), opened()
    pairs = connect_many(machine, rx, tx, 3)
    for pair in pairs:
        pair.send()

    first, second = rx.read_ports(2), rx.read_ports(10)

    assert first + second == [pair.rx_port for pair in pairs]
    assert errno_of(rx.read_ports, 10) == "EAGAIN"


@pytest.mark.checklist("A4.3", "A12.9")
def test_readers_of_single_ports_share_what_came_without_loss(machine: Any, opened: Opened) -> None:
    rx, tx = opened(nonblock=False), opened()
    pairs = connect_many(machine, rx, tx, 8)
    readers = [InThread(lambda: rx.read(4)) for _ in pairs]
    assert all(reader.sleeps() for reader in readers)

    tx.notify_many([pair.tx_port for pair in pairs])

    got = [unpack(reader.result())[0] for reader in readers]
    assert sorted(got) == [pair.rx_port for pair in pairs]


@pytest.mark.checklist("A4.5")
@pytest.mark.parametrize("nonblock", [False, True])
def test_a_read_of_a_file_with_entries_does_not_sleep(machine: Any, opened: Opened, nonblock: bool) -> None:
    rx, tx = opened(nonblock=nonblock), opened()
    pairs = connect_many(machine, rx, tx, 3)
    for pair in pairs:
        pair.send()

    readers = [InThread(lambda: rx.read(4)) for _ in pairs]

    assert all(reader.done.wait(5) for reader in readers)
    assert sorted(unpack(reader.value)[0] for reader in readers) == [pair.rx_port for pair in pairs]


# A buffer of one's own, and several ------------------------------------------------------------------


@pytest.mark.checklist("A4.9", "A4.10")
def test_a_buffer_that_cannot_be_written_faults_and_nothing_is_taken(machine: Any, opened: Opened) -> None:
    rx, tx = opened(), opened()
    pairs = connect_many(machine, rx, tx, 3)
    for pair in pairs:
        pair.send()

    refused = [errno_of(rx.readinto, bytes(count)) for count in (4, 12, 4096)]

    assert refused == ["EFAULT"] * 3
    assert ready(rx) & 1
    assert take(machine, rx) == [pair.rx_port for pair in pairs]


@pytest.mark.checklist("A4.9", "A12.6", "A4.1")
def test_overflow_and_emptiness_come_before_the_fault_and_small_counts_before_all(
    machine: Any, opened: Opened
) -> None:
    pair = connect(machine, opened(), opened())

    seen = [errno_of(pair.rx.readinto, bytes(4))]
    pair.overflow()
    seen.append(errno_of(pair.rx.readinto, bytes(4)))

    assert seen == ["EAGAIN", "EFBIG"]
    assert [pair.rx.readinto(bytes(count)) for count in range(4)] == [0] * 4


@pytest.mark.checklist("A4.9")
def test_a_blocking_read_faults_when_there_is_something_to_copy(machine: Any, opened: Opened) -> None:
    pair = connect(machine, opened(nonblock=False), opened())
    reader = InThread(lambda: pair.rx.readinto(bytes(4)))
    assert reader.sleeps()

    pair.send()

    assert (reader.result(), reader.errno) == (None, "EFAULT")
    assert unpack(pair.rx.read(4)) == [pair.rx_port]


@pytest.mark.checklist("A12.3")
def test_readv_is_a_read_a_segment_up_to_the_first_short_one(machine: Any, opened: Opened) -> None:
    rx, tx = opened(), opened()
    pairs = connect_many(machine, rx, tx, 8)
    ports = [pair.rx_port for pair in pairs]
    for pair in pairs:
        pair.send()

    def readv(*lengths: int) -> list[list[int]]:
        buffers = [bytearray(length) for length in lengths]
        taken = rx.readv(buffers)
        got = [unpack(bytes(buffer[: len(buffer) // 4 * 4])) for buffer in buffers]
        assert taken == 4 * sum(port != 0 for part in got for port in part)
        return got

    assert readv(4, 0, 8) == [ports[:1], [], ports[1:3]]
    assert readv(6, 4) == [ports[3:4], [0]]             # 4 of 6: short, though more would be there
    assert readv(4, 4096, 4)[0] == ports[4:5]           # 12 of 4096: the third is not begun
    for pair in pairs[:1]:
        pair.enable()
        pair.send()
    assert readv(4, 4) == [ports[:1], [0]]              # EAGAIN of the second is dropped: the first has read
    assert errno_of(rx.readv, [bytearray(4)]) == "EAGAIN"
    assert rx.readv([]) == 0


@pytest.mark.checklist("A12.3", "A4.9")
def test_an_error_of_a_later_segment_is_dropped(machine: Any, opened: Opened) -> None:
    rx, tx = opened(), opened()
    pairs = connect_many(machine, rx, tx, 2)
    for pair in pairs:
        pair.send()

    assert errno_of(rx.readv, [bytes(4), bytearray(4)]) == "EFAULT"
    assert rx.readv([bytearray(4), bytes(4)]) == 4
    assert take(machine, rx) == [pairs[1].rx_port]
