# SPDX-License-Identifier: Apache-2.0
"""Channels with a monitor, across real processes: triggers instead of hypercalls, and what both sides do when nobody looks."""

from __future__ import annotations

import os
import signal
from typing import TYPE_CHECKING, Any

import pytest

from pvbus.shm import monitor
from pvbus.tests.machine.vmbus_support import (
    Recorder,
    config,
    drive,
    driver_process,
    echo,
    kill_and_wait_for_heir,
    process,
    receive,
    wait_until,
)

if TYPE_CHECKING:
    from collections.abc import Iterator

LATENCY_US, SLOW_US = 500, 6500


@pytest.fixture(scope="module", params=["5.3", "0.13"])
def pvbus_config(request: pytest.FixtureRequest) -> str:
    return config(cpus=2, keys=f'vmbus_versions = ["{request.param}"]')


@pytest.fixture
def machine(pvbus_shared_machine: Any) -> Iterator[Any]:
    machine = pvbus_shared_machine.machine
    yield machine
    for channel in machine.channels():
        if channel["state"] != "revoked":
            machine.rescind(channel["relid"])
    for name in list(machine.bus()._drivers):
        machine.unregister_driver(name)
    machine.settle()


def attributes(machine: Any, relid: int) -> dict[str, str]:
    return next(device["attributes"] for device in machine.devices() if device["relid"] == relid)


def monitored(machine: Any, latency_us: float = LATENCY_US) -> tuple[int, Any]:
    """Offer an echo with a monitor and drive it; its relid, its channel."""
    relid = machine.offer("echo", monitor_latency_us=latency_us)
    return relid, drive(machine).channel


@pytest.mark.checklist("B2.8")
def test_a_driver_whose_channel_has_a_monitor_signals_by_triggers_and_the_first_time_by_hypercall(machine: Any) -> None:
    _, channel = monitored(machine)

    for first in range(0, 400, 10):
        echo(channel, 10, first)

    assert channel.triggers > channel.hypercalls
    assert machine.channels()[0]["monitor_id"] == 0


def test_a_channel_without_a_monitor_has_no_triggers(machine: Any) -> None:
    machine.offer("echo")
    channel = drive(machine).channel
    echo(channel, 100)

    assert (channel.triggers, machine.channels()[0]["monitor_id"]) == (0, None)


def test_a_host_that_has_seen_nothing_for_a_while_looks_no_more_and_is_told_by_hypercall(machine: Any) -> None:
    _, channel = monitored(machine)
    echo(channel, 10)
    memory, page, number = channel._triggers
    wait_until("nobody looks", lambda: not memory.load64(page))

    hypercalls = channel.hypercalls
    channel.send(b"awake?")
    assert len(receive(channel)) == 1
    assert channel.hypercalls == hypercalls + 1
    assert not monitor.is_triggered(memory, page, number)


@pytest.mark.checklist("B2.8")
def test_the_attributes_of_a_monitor_are_what_stands_in_the_pages_now(machine: Any, pvbus_config: str) -> None:
    other = machine.offer("shutdown", monitor_latency_us=100)
    relid, channel = monitored(machine, SLOW_US)
    seen = attributes(machine, relid)
    connection = 2 if "0.13" in pvbus_config else relid | 2 << 12
    assert (seen["monitor_id"], seen["client_monitor_latency"]) == ("1\n", "65000\n")
    assert seen["client_monitor_conn_id"] == f"{connection}\n"
    assert (seen["server_monitor_pending"], seen[f"channels/{relid}/latency"]) == ("0\n", "65000\n")
    assert attributes(machine, other)["client_monitor_latency"] == "1000\n"

    pid = process(machine, "hypervisor")["pid"]
    os.kill(pid, signal.SIGSTOP)  # nobody looks now
    try:
        memory, page, number = channel._triggers
        monitor.trigger(memory, page, number)
        assert attributes(machine, relid)["client_monitor_pending"] == "2\n"
        assert attributes(machine, other)[f"channels/{other}/pending"] == "2\n"
    finally:
        os.kill(pid, signal.SIGCONT)
    machine.settle()
    assert attributes(machine, relid)["client_monitor_pending"] == "0\n"


def test_settling_waits_for_no_latency(machine: Any) -> None:
    _, channel = monitored(machine, SLOW_US)
    channel.send(b"first")
    assert len(receive(channel)) == 1

    channel.send(b"second")
    machine.settle()
    assert len(channel.recv_many()) == 1


def test_what_was_triggered_while_the_hypervisor_died_is_seen_by_its_heir(machine: Any) -> None:
    _, channel = monitored(machine, SLOW_US)
    memory, page, _ = channel._triggers
    pid = process(machine, "hypervisor")["pid"]

    def stopped_while_it_looks() -> bool:
        os.kill(pid, signal.SIGCONT)
        echo(channel, 1)
        os.kill(pid, signal.SIGSTOP)
        return bool(memory.load64(page))

    wait_until("the hypervisor stands still, and says that it looks", stopped_while_it_looks)
    hypercalls = channel.hypercalls
    channel.send(b"asked under the dead", 77)
    kill_and_wait_for_heir(machine, "hypervisor")

    assert channel.hypercalls == hypercalls
    assert [packet[1] for packet in receive(channel)] == [77]
    echo(channel, 100, 100)


def test_the_trigger_of_a_driver_that_was_killed_is_free_for_the_next(machine: Any) -> None:
    relid = machine.offer("echo", monitor_latency_us=LATENCY_US)

    def work(_machine: Any, pipe: Any) -> None:
        channel = _machine.register_driver(Recorder()).channel
        echo(channel, 10)
        pipe.send(channel.triggers + channel.hypercalls)
        pipe.recv()

    with driver_process(machine, work) as child:
        assert child.receive() > 0
        child.kill()
    machine.settle()
    machine.rescind(relid)
    machine.settle()

    _, channel = monitored(machine)
    echo(channel, 10)
    assert machine.channels()[0]["monitor_id"] == 0


def test_128_channels_have_monitors_and_the_next_one_has_none(machine: Any) -> None:
    ids = [machine.offer("echo", monitor_latency_us=LATENCY_US) for _ in range(129)]
    seen = {channel["relid"]: channel["monitor_id"] for channel in machine.channels()}

    assert [seen[relid] for relid in ids] == [*range(128), None]
    with pytest.raises(OSError, match="65540 x 100 ns"):
        machine.offer("echo", monitor_latency_us=6554)
