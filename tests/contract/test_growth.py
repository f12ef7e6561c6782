# SPDX-License-Identifier: Apache-2.0
"""A6: how the ring grows, and what that leaves as it was."""

from collections.abc import Callable
from typing import Any

import pytest

from pvbus.tests.contract.support import READY_OUT, connect, connect_many, errno_of, ready, take

Opened = Callable[..., Any]


@pytest.mark.checklist("A6.1", "A6.2")
@pytest.mark.parametrize(("ports", "size"), [(1, 64), (64, 64), (65, 128), (128, 128), (129, 256)])
def test_the_ring_has_room_for_every_bound_port_in_steps_of_two(
    machine: Any, opened: Opened, ports: int, size: int
) -> None:
    rx, tx = opened(), opened()
    pair = connect(machine, rx, tx)
    for _ in range(ports - 1):
        rx.bind_unbound_port(remote_domain=0)

    pair.queue(size)
    assert not ready(rx) & 8
    pair.send()

    assert errno_of(rx.read, 4096) == "EFBIG"


@pytest.mark.checklist("A6.5", "A6.6", "A1.5")
@pytest.mark.parametrize("position", [0, 1, 40, 63])
def test_growth_keeps_a_full_ring_and_its_order_wherever_it_wraps(
    machine: Any, opened: Opened, position: int
) -> None:
    rx, tx = opened(), opened()
    first, second = connect_many(machine, rx, tx, 2)
    first.queue(position)
    assert len(take(machine, rx)) == position
    for _ in range(16):
        first.queue(3)
        second.queue(1)

    for _ in range(63):
        rx.bind_unbound_port(remote_domain=0)
    second.queue(64)

    assert take(machine, rx) == [*[first.rx_port] * 3, second.rx_port] * 16 + [second.rx_port] * 64


@pytest.mark.checklist("A6.7")
def test_the_ring_does_not_shrink(machine: Any, opened: Opened) -> None:
    rx, tx = opened(), opened()
    pair = connect(machine, rx, tx)
    for port in [rx.bind_unbound_port(remote_domain=0) for _ in range(64)]:
        rx.unbind(port)

    pair.queue(128)

    assert take(machine, rx) == [pair.rx_port] * 128


@pytest.mark.checklist("A6.1", "A4.4", "A9.7")
def test_growth_does_not_cure_an_overflow(machine: Any, opened: Opened) -> None:
    rx, tx = opened(), opened()
    pair = connect(machine, rx, tx)
    pair.overflow()

    for _ in range(64):
        rx.bind_unbound_port(remote_domain=0)

    assert (errno_of(rx.read, 4096), ready(rx)) == ("EFBIG", 8)
    rx.reset()
    pair.enable()
    pair.queue(128)
    assert take(machine, rx) == [pair.rx_port] * 128


@pytest.mark.checklist("A11.2", "A8.2")
def test_entries_of_ports_that_are_gone_can_fill_the_ring(machine: Any, opened: Opened) -> None:
    rx, tx = opened(), opened()
    pairs = connect_many(machine, rx, tx, 64)
    for pair in pairs:
        pair.send()
    assert ready(rx) & 1

    rx.unbind(pairs[0].rx_port)
    rx.bind_interdomain(0, tx.bind_unbound_port(remote_domain=0))
    machine.settle()

    assert errno_of(rx.read, 4096) == "EFBIG"


@pytest.mark.checklist("A6.2")
def test_a_failed_bind_leaves_the_file_as_it_was(machine: Any, opened: Opened) -> None:
    file = opened()

    refused = errno_of(file.bind_interdomain, 0, 4095)

    assert refused == "EINVAL"
    assert ready(file) == READY_OUT
    assert errno_of(file.read, 4096) == "EAGAIN"
