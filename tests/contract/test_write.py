# SPDX-License-Identifier: Apache-2.0
"""A5: what `write` answers and enables."""

from collections.abc import Callable
from typing import Any

import pytest

from pvbus.tests.contract.support import connect, connect_many, errno_of, pack, take

Opened = Callable[..., Any]


@pytest.mark.checklist("A5.2")
@pytest.mark.parametrize("count", [0, 1, 2, 3])
def test_fewer_bytes_than_a_port_are_taken_as_nothing(opened: Opened, count: int) -> None:
    assert opened().write(bytes(count)) == 0


@pytest.mark.checklist("A5.2", "A5.6")
def test_bytes_after_the_last_whole_port_are_not_counted(machine: Any, opened: Opened) -> None:
    pair = connect(machine, opened(), opened())
    pair.send()
    pair.rx.read(4)

    written = pair.rx.write(pack(pair.rx_port) + b"\xff\xff\xff")

    assert written == 4
    pair.send()
    assert take(machine, pair.rx) == [pair.rx_port]


@pytest.mark.checklist("A5.2", "A5.6")
def test_a_write_takes_at_most_a_page(machine: Any, opened: Opened) -> None:
    pair = connect(machine, opened(), opened())
    pair.send()
    pair.rx.read(4)

    beyond = pair.rx.write(pack(*[0] * 1024, pair.rx_port))
    pair.send()
    assert take(machine, pair.rx) == []
    within = pair.rx.write(pack(*[0] * 1023, pair.rx_port, 0))

    assert (beyond, within) == (4096, 4096)
    assert take(machine, pair.rx) == [pair.rx_port]


@pytest.mark.checklist("A5.5")
def test_unknown_ports_are_skipped_and_counted(machine: Any, opened: Opened) -> None:
    pair = connect(machine, opened(), opened())
    pair.send()
    pair.rx.read(4)

    written = pair.rx.write(pack(0, 4095, 4096, 0xFFFFFFFF, pair.rx_port))

    assert written == 20
    pair.send()
    assert take(machine, pair.rx) == [pair.rx_port]


@pytest.mark.checklist("A5.5", "A2.5")
def test_a_file_cannot_enable_the_port_of_another(machine: Any, opened: Opened) -> None:
    pair, stranger = connect(machine, opened(), opened()), opened()
    pair.send()
    pair.rx.read(4)
    pair.send()

    written = [stranger.write(pack(pair.rx_port)), pair.tx.write(pack(pair.rx_port))]

    assert written == [4, 4]
    assert take(machine, pair.rx) == []


@pytest.mark.checklist("A5.5")
def test_a_port_that_stands_in_the_buffer_twice_is_enabled_once(machine: Any, opened: Opened) -> None:
    pair = connect(machine, opened(), opened())
    pair.send()
    pair.rx.read(4)
    pair.send()

    written = pair.rx.write(pack(pair.rx_port, pair.rx_port, pair.rx_port))

    assert written == 12
    assert take(machine, pair.rx) == [pair.rx_port]


@pytest.mark.checklist("A5.5")
def test_writing_an_enabled_port_changes_nothing(machine: Any, opened: Opened) -> None:
    pair = connect(machine, opened(), opened())

    written = [pair.rx.write(pack(pair.rx_port)) for _ in range(3)]

    assert written == [4, 4, 4]
    pair.send()
    assert take(machine, pair.rx) == [pair.rx_port]
    pair.send()
    assert take(machine, pair.rx) == []


@pytest.mark.checklist("A5.4", "A11.1")
def test_writing_before_reading_lets_a_port_queue_again(machine: Any, opened: Opened) -> None:
    pair = connect(machine, opened(), opened())

    pair.queue(3)

    assert take(machine, pair.rx) == [pair.rx_port] * 3


@pytest.mark.checklist("A5.4")
def test_enable_takes_port_numbers(machine: Any, opened: Opened) -> None:
    rx, tx = opened(), opened()
    pairs = connect_many(machine, rx, tx, 3)
    ports = [pair.rx_port for pair in pairs]
    for pair in pairs:
        pair.send()
    assert take(machine, rx) == ports

    rx.enable(ports)
    tx.notify_many([pair.tx_port for pair in pairs])

    assert sorted(take(machine, rx)) == ports


@pytest.mark.checklist("A5.4", "A8.2")
def test_a_written_back_port_number_of_an_earlier_binding_enables_nothing_else(
    machine: Any, opened: Opened
) -> None:
    pair, other = connect(machine, opened(), opened()), opened()
    pair.send()
    pair.rx.unbind(pair.rx_port)
    assert other.bind_unbound_port(remote_domain=0) == pair.rx_port

    assert take(machine, pair.rx) == [pair.rx_port]
    assert pair.rx.write(pack(pair.rx_port)) == 4

    assert errno_of(pair.rx.notify, pair.rx_port) == "ENOTCONN"
    assert take(machine, other) == []


@pytest.mark.checklist("A12.3", "A5.2", "A5.3")
def test_writev_is_a_write_a_segment_up_to_the_first_short_one(machine: Any, opened: Opened) -> None:
    rx, tx = opened(), opened()
    pairs = connect_many(machine, rx, tx, 5)
    ports = [pair.rx_port for pair in pairs]
    one, two, three, four, five = (pack(port) for port in ports)

    def enabled_by(*segments: bytes | None) -> tuple[int, list[int]]:
        for pair in pairs:
            pair.send()
        assert sorted(take(machine, rx)) == ports
        taken = rx.writev(segments)
        machine.settle()
        enabled = [row["port"] for row in machine.ports(0) if row["port"] in ports and row["enabled"]]
        rx.write(pack(*ports))
        return taken, enabled

    assert enabled_by(one, b"", two + three) == (12, ports[:3])
    assert enabled_by(one + b"\0\0", two) == (4, ports[:1])         # 4 of 6: the second is not begun
    assert enabled_by(four, None, five) == (4, ports[3:4])          # the fault of the second is dropped
    assert errno_of(rx.writev, [None, one]) == "EFAULT"
    assert rx.writev([]) == 0
