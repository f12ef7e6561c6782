# SPDX-License-Identifier: Apache-2.0
"""A10: poll, open and release."""

import os
import select
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from pvbus.tests.contract.support import (
    EVERYTHING,
    READY_IN,
    READY_OUT,
    InThread,
    connect,
    connect_many,
    errno_of,
    pack,
    ready,
    take,
)

Opened = Callable[..., Any]


@pytest.mark.checklist("A10.1")
def test_an_idle_file_can_be_written_at_any_time(opened: Opened) -> None:
    assert ready(opened()) == READY_OUT


@pytest.mark.checklist("A10.1")
def test_a_file_with_an_entry_can_be_read_until_it_is_drained(machine: Any, opened: Opened) -> None:
    rx, tx = opened(), opened()
    for pair in connect_many(machine, rx, tx, 2):
        pair.send()

    seen = [ready(rx)]
    rx.read(4)
    seen.append(ready(rx))
    rx.read(4)
    seen.append(ready(rx))

    assert seen == [READY_OUT | READY_IN, READY_OUT | READY_IN, READY_OUT]


@pytest.mark.checklist("A10.1")
@pytest.mark.parametrize("events", [0, select.POLLIN, select.POLLOUT, EVERYTHING])
def test_an_overflowed_file_is_in_error_and_nothing_else(
    machine: Any, opened: Opened, events: int
) -> None:
    pair = connect(machine, opened(), opened())
    pair.overflow()

    assert pair.rx.poll(events, timeout_ms=0) == select.POLLERR
    pair.rx.reset()
    assert ready(pair.rx) == READY_OUT


@pytest.mark.checklist("A10.1")
def test_poll_gives_only_what_was_asked_for(machine: Any, opened: Opened) -> None:
    pair = connect(machine, opened(), opened())
    pair.send()

    masks = [pair.rx.poll(events, timeout_ms=0) for events in (select.POLLIN, select.POLLOUT, 0)]

    assert masks == [select.POLLIN, select.POLLOUT, 0]


@pytest.mark.checklist("A10.1")
def test_poll_returns_at_once_when_something_is_ready(opened: Opened) -> None:
    started = time.monotonic()

    mask = opened().poll(select.POLLIN | select.POLLOUT, timeout_ms=10_000)

    assert mask == select.POLLOUT
    assert time.monotonic() - started < 5


@pytest.mark.checklist("A10.1")
def test_poll_gives_nothing_at_its_time_out_and_not_before(opened: Opened) -> None:
    file = opened()
    started = time.monotonic()

    mask = file.poll(select.POLLIN, timeout_ms=50)

    assert mask == 0
    assert time.monotonic() - started >= 0.05


@pytest.mark.checklist("A10.1")
def test_poll_without_a_time_out_sleeps_until_an_event_comes(machine: Any, opened: Opened) -> None:
    pair = connect(machine, opened(), opened())
    sleeper = InThread(lambda: pair.rx.poll(select.POLLIN, timeout_ms=-1))
    assert sleeper.sleeps()

    pair.send()

    assert sleeper.result() == select.POLLIN


@pytest.mark.checklist("A12.6", "A3.6")
def test_an_overflow_wakes_no_sleeping_poll(machine: Any, opened: Opened) -> None:
    pair = connect(machine, opened(), opened())
    pair.queue(64)
    sleeper = InThread(lambda: pair.rx.poll(0, timeout_ms=500))
    started = time.monotonic()
    assert sleeper.sleeps()

    pair.send()

    assert sleeper.result() == select.POLLERR
    assert time.monotonic() - started >= 0.4


@pytest.mark.checklist("A10.3", "A1.1")
def test_two_opens_share_nothing(machine: Any, opened: Opened) -> None:
    pair, other = connect(machine, opened(), opened()), opened()
    other.restrict_domid(1)
    pair.overflow()

    assert ready(other) == READY_OUT
    assert errno_of(other.notify, pair.rx_port) == "ENOTCONN"
    assert pair.tx.bind_unbound_port(remote_domain=0) > 0


@pytest.mark.checklist("A10.3", "X10c")
def test_a_blocked_read_holds_up_no_write_and_no_call(machine: Any, opened: Opened) -> None:
    pair = connect(machine, opened(nonblock=False), opened())
    pair.send()
    assert pair.rx.read(4) == pack(pair.rx_port)
    reader = InThread(lambda: pair.rx.read(4))
    assert reader.sleeps()

    assert pair.rx.write(pack(pair.rx_port)) == 4
    pair.rx.unbind(pair.rx.bind_unbound_port(remote_domain=0))

    assert reader.sleeps()
    pair.send()
    assert reader.result() == pack(pair.rx_port)


@pytest.mark.checklist("A10.3")
def test_a_file_is_named_for_the_thread_that_opened_it_in_15_characters(machine: Any, opened: Opened) -> None:
    def open_it() -> None:
        Path(f"/proc/self/task/{threading.get_native_id()}/comm").write_text("sixteen-and-more")
        opened()

    InThread(open_it).result()

    assert [row["name"] for row in machine.status()["files"]] == ["evtchn:sixteen-and-mor"]


@pytest.mark.checklist("A12.2")
def test_a_read_only_file_refuses_writes_and_does_all_else(machine: Any, opened: Opened) -> None:
    pair = connect(machine, opened(flags=os.O_RDONLY), opened())
    pair.send()

    refused = [errno_of(pair.rx.write, data) for data in (pack(pair.rx_port), b"")]

    assert refused == ["EBADF", "EBADF"]
    assert ready(pair.rx) == READY_OUT | READY_IN
    assert take(machine, pair.rx) == [pair.rx_port]


@pytest.mark.checklist("A12.2")
def test_a_write_only_file_refuses_reads_and_does_all_else(machine: Any, opened: Opened) -> None:
    file = opened(flags=os.O_WRONLY)
    port = file.bind_unbound_port(remote_domain=0)

    assert [errno_of(file.read, count) for count in (0, 4)] == ["EBADF", "EBADF"]
    assert file.write(pack(port)) == 4
    assert ready(file) == READY_OUT


@pytest.mark.checklist("A10.7")
def test_a_domain_without_xen_answers_enodev(machine: Any) -> None:
    assert errno_of(machine.open_evtchn, domain=2) == "ENODEV"


@pytest.mark.checklist("A10.4", "A12.14")
def test_close_frees_all_ports_at_once_and_the_lowest_is_handed_out_first(
    machine: Any, opened: Opened
) -> None:
    rx, tx = opened(), opened()
    pairs = connect_many(machine, rx, tx, 5)
    for pair in pairs:
        pair.send()

    rx.close()

    other = opened()
    again = [other.bind_unbound_port(remote_domain=0) for _ in range(6)]
    assert again[:5] == [pair.rx_port for pair in pairs]
    assert again[5] == pairs[-1].tx_port + 1


@pytest.mark.checklist("A10.4", "A11.5")
def test_close_leaves_the_peers_unbound_and_undisturbed(machine: Any, opened: Opened) -> None:
    pair = connect(machine, opened(), opened())

    pair.rx.close()

    assert take(machine, pair.tx) == []
    assert errno_of(pair.tx.notify, pair.tx_port) == ""
    other = opened()
    assert take(machine, other) == []
    new_port = other.bind_interdomain(0, pair.tx_port)
    assert take(machine, other) == [new_port]


@pytest.mark.checklist("A10.4")
def test_a_virq_of_a_closed_file_can_be_bound_again(opened: Opened) -> None:
    first = opened()
    port = first.bind_virq(7)

    first.close()

    assert opened().bind_virq(7) == port


@pytest.mark.checklist("A12.14")
def test_freed_numbers_are_handed_out_lowest_first_across_files(opened: Opened) -> None:
    first, second = opened(), opened()
    ports = [first.bind_unbound_port(remote_domain=0) for _ in range(6)]
    for index in (4, 1, 3):
        first.unbind(ports[index])

    handed_out = [second.bind_unbound_port(remote_domain=0), first.bind_unbound_port(remote_domain=0)]
    handed_out += [second.bind_unbound_port(remote_domain=0), first.bind_unbound_port(remote_domain=0)]

    assert handed_out == [ports[1], ports[3], ports[4], ports[5] + 1]


@pytest.mark.checklist("A12.14", "X7")
def test_the_first_number_lies_above_those_of_the_kernel_and_the_last_one_is_4095(file_2level: Any) -> None:
    ports = []

    while (refused := errno_of(lambda: ports.append(file_2level.bind_unbound_port(remote_domain=0)))) == "":
        assert len(ports) < 5000

    assert refused == "ENOSPC"
    assert ports == list(range(4, 4096))
