# SPDX-License-Identifier: Apache-2.0
"""Whatever process of VMBus is killed: channels go on or end cleanly, everything in bounded time, and can be had again."""

from __future__ import annotations

import errno
import os
import select
import signal
import threading
import time
import uuid
from typing import Any

import pytest

from pvbus.tests.machine.vmbus_support import (
    BOUND_S,
    Recorder,
    config,
    drive,
    driver_process,
    echo,
    guests,
    holds_as_before,
    kill_and_wait_for_heir,
    process,
    receive,
    wait_until,
)

STOP_S_MAX = 3.0  # a child that does not stop is killed after five
KILLS = 3


@pytest.fixture
def machine(pvbus_boot: Any) -> Any:
    return pvbus_boot(config(cpus=2)).machine


def transfer(machine: Any, pipe: Any) -> None:
    """Drive whatever comes, with packets under way all the time, until killed."""
    driver = drive(machine)
    channel = driver.channel
    echo(channel, 100)
    pipe.send(channel.ring_bytes)
    number = 0
    while True:
        number += channel.send_many([b"z" * 700] * 8, number)
        channel.recv_many()


def a_driver(machine: Any) -> str | None:
    (device,) = machine.devices()
    found: str | None = device["driver"]
    return found


@pytest.mark.checklist("B3.6", "B7.4")
def test_a_driver_process_killed_in_mid_transfer_lets_its_device_go(machine: Any) -> None:
    relid = machine.offer("echo")
    machine.settle()
    assert a_driver(machine) is None
    before = guests(machine)
    for _ in range(KILLS):
        with driver_process(machine, transfer) as child:
            assert child.receive() > 0
            child.kill()
        wait_until("the device is free", lambda: a_driver(machine) is None)
        machine.settle()
        assert [one["state"] for one in machine.channels()] == ["closed"]
        holds_as_before(machine, before)

    driver = drive(machine)
    echo(driver.channel, 500)
    machine.rescind(relid)
    machine.settle()
    machine.offer("echo")
    machine.settle()
    echo(driver.channel, 500)


def hesitate(machine: Any, pipe: Any) -> None:
    class Hesitant(Recorder):
        def probe(self, device: Any, matched_id: Any) -> None:
            device.channel.open()
            pipe.send(device.name)
            select.select([], [], [])  # until killed

    machine.register_driver(Hesitant())


@pytest.mark.checklist("B3.5")
def test_a_driver_process_killed_in_its_probe_has_refused(machine: Any) -> None:
    machine.offer("echo")
    machine.settle()
    with driver_process(machine, hesitate) as child:
        child.receive()
        child.kill()
    wait_until("the device is free", lambda: a_driver(machine) is None)
    driver = drive(machine)
    echo(driver.channel, 10)


@pytest.mark.checklist("B4.1", "H12")
def test_a_killed_workqueue_has_an_heir_that_has_every_driver_again(machine: Any) -> None:
    machine.offer("echo")
    driver = drive(machine)
    channel = driver.channel
    echo(channel, 100)
    machine.settle()
    before = guests(machine)

    for turn in range(KILLS):
        poll = select.poll()
        poll.register(channel.fileno(), select.POLLIN)
        kill_and_wait_for_heir(machine, "workqueue/0")

        assert poll.poll(BOUND_S * 1000)  # whoever waits is woken
        for call, argument in ((channel.send, b"x"), (channel.send_many, [b"x"]), (channel.recv, None), (channel.recv_many, 1)):
            with pytest.raises(OSError) as gone:
                call(argument)
            assert gone.value.errno in (errno.EIO, errno.ENOTCONN)  # closed by now
        machine.settle()
        assert [call for call, _ in driver.calls] == ["probe", "remove"] * (turn + 1) + ["probe"]
        channel = driver.channel
        echo(channel, 100)

    machine.settle()
    holds_as_before(machine, before)
    (device,) = machine.devices()
    assert device["driver"] == "echo"
    assert [one["state"] for one in machine.channels()] == ["open"]


@pytest.mark.checklist("B4.1")
def test_messages_that_lay_in_the_work_ring_are_their_heirs(machine: Any) -> None:
    workqueue = process(machine, "workqueue/0")
    os.kill(workqueue["pid"], signal.SIGSTOP)
    relids = [machine.offer("echo") for _ in range(40)]
    gone = [machine.offer("echo") for _ in range(5)]
    for relid in gone:
        machine.rescind(relid)

    kill_and_wait_for_heir(machine, "workqueue/0")
    machine.settle()

    assert sorted(device["relid"] for device in machine.devices()) == relids
    assert sorted(one["relid"] for one in machine.channels()) == relids


def test_a_workqueue_killed_while_drivers_register_and_open_leaves_a_bus_that_works(machine: Any) -> None:
    for _ in range(4):
        machine.offer("echo")
    for _ in range(KILLS):
        killer = threading.Thread(target=kill_and_wait_for_heir, args=(machine, "workqueue/0"))
        killer.start()
        while killer.is_alive():
            try:
                driver = machine.register_driver(Recorder())
                machine.unregister_driver(driver)
            except OSError as error:
                assert error.errno in (errno.EIO, errno.EBUSY)
        killer.join()
    driver = machine.register_driver(Recorder("last"))
    machine.settle()
    assert len(driver.devices) == 4
    for device in driver.devices.values():
        echo(device.channel, 20)


class Traffic:
    """Echo traffic in a thread: every packet is counted when it comes back."""

    def __init__(self, channel: Any) -> None:
        self.channel = channel
        self.sent = 0
        self.got: list[int] = []
        self.stop = False
        self.error: BaseException | None = None
        self.thread = threading.Thread(target=self._run)
        self.thread.start()

    def _run(self) -> None:
        try:
            poll = select.poll()
            poll.register(self.channel.fileno(), select.POLLIN)
            while not self.stop:
                self.turn(poll)
        except BaseException as error:
            self.error = error

    def turn(self, poll: Any) -> None:
        self.sent += self.channel.send_many([b"t" * 64] * 16, self.sent)
        packets = self.channel.recv_many()
        self.got += [packet[1] for packet in packets]
        if not packets:
            poll.poll(20)

    def end(self) -> None:
        self.stop = True
        self.thread.join(BOUND_S)
        if self.error is not None:
            raise self.error


@pytest.mark.parametrize("vcpu", [0, 1])
def test_a_cpu_killed_under_traffic_loses_nothing(machine: Any, vcpu: int) -> None:
    machine.offer("echo")
    driver = drive(machine)
    (device,) = driver.devices.values()
    device.modify_target(vcpu)
    traffic = Traffic(device.channel)
    for turn in range(KILLS):
        wait_until("packets come back", lambda: len(traffic.got) > 500 * (turn + 1))  # noqa: B023 -- at once
        kill_and_wait_for_heir(machine, f"cpu/0.{vcpu}")
    mark = len(traffic.got)
    wait_until("packets come back after the last kill", lambda: len(traffic.got) > mark + 500)
    traffic.end()

    receive_rest(traffic)
    assert traffic.got == list(range(traffic.sent))
    machine.settle()
    assert device.channel.recv() is None


def receive_rest(traffic: Traffic) -> None:
    missing = traffic.sent - len(traffic.got)
    if missing:
        traffic.got += [packet[1] for packet in receive(traffic.channel, missing)]


def test_a_hypervisor_killed_under_traffic_goes_on_with_the_channel(machine: Any) -> None:
    """Every packet is answered once, and in order."""
    machine.offer("echo")
    driver = drive(machine)
    channel = driver.channel
    traffic = Traffic(channel)
    for _ in range(KILLS):
        mark = len(traffic.got)
        wait_until("packets come back", lambda: len(traffic.got) > mark + 500)  # noqa: B023 -- at once
        kill_and_wait_for_heir(machine, "hypervisor")
    mark = len(traffic.got)
    wait_until("packets come back after the last kill", lambda: len(traffic.got) > mark + 500)
    traffic.end()
    machine.settle()
    traffic.got += [packet[1] for packet in channel.recv_many(100_000)]
    while more := channel.recv_many(100_000):
        traffic.got += [packet[1] for packet in more]
        machine.settle()

    assert traffic.got == list(range(traffic.sent))
    echo(channel, 100)
    assert [call for call, _ in driver.calls] == ["probe"]
    assert [one["state"] for one in machine.channels()] == ["open"]


def test_a_hypervisor_killed_between_offers_and_opens_forgets_none(machine: Any) -> None:
    driver = machine.register_driver(Recorder())
    relids = []
    for _ in range(KILLS):
        relids += [machine.offer("echo") for _ in range(3)]
        kill_and_wait_for_heir(machine, "hypervisor")
        machine.settle()
    assert sorted(device.relid for device in driver.devices.values()) == relids
    for device in driver.devices.values():
        echo(device.channel, 20)
    kill_and_wait_for_heir(machine, "hypervisor")
    for relid in relids:
        machine.rescind(relid)
    machine.settle()
    assert driver.devices == {}
    assert machine.channels() == []


def offer_surely(machine: Any) -> int:
    """Offer once, whoever dies meanwhile."""
    relid: int
    instance, deadline = str(uuid.uuid4()), time.monotonic() + BOUND_S
    while time.monotonic() < deadline:
        try:
            relid = machine.offer("echo", instance)
        except FileExistsError:
            relid = next(one["relid"] for one in machine.channels() if one["instance_id"] == instance)
            return relid
        except OSError as error:
            assert error.errno == errno.EIO  # the call died with the hypervisor: nobody knows if it was made
        else:
            return relid
    raise AssertionError(f"not offered within {BOUND_S} s")


def test_what_was_offered_outlives_workqueue_and_hypervisor_together(machine: Any) -> None:
    relids = [machine.offer("echo") for _ in range(3)]
    driver = drive(machine)
    for victims in (("workqueue/0", "hypervisor"), ("hypervisor", "workqueue/0")):
        pids = [process(machine, name)["pid"] for name in victims]
        births = {name: process(machine, name)["restarts"] for name in victims}
        for pid in pids:
            os.kill(pid, signal.SIGKILL)
        relids.append(offer_surely(machine))  # waits for an heir that knows of the others

        wait_until("both are back", lambda: all(process(machine, one)["restarts"] > births[one] for one in victims))  # noqa: B023
        machine.settle()
        assert sorted(device.relid for device in driver.devices.values()) == relids
        for device in driver.devices.values():
            echo(device.channel, 20)
    assert sorted(one["relid"] for one in machine.channels()) == relids


def test_offers_and_rescinds_made_while_the_hypervisor_dies_are_all_done(machine: Any) -> None:
    driver = drive(machine)
    kept = []
    for _ in range(KILLS):
        killer = threading.Thread(target=kill_and_wait_for_heir, args=(machine, "hypervisor"))
        killer.start()
        while killer.is_alive():
            try:
                kept.append(machine.offer("echo"))
                machine.rescind(kept.pop()) if len(kept) > 3 else None
            except OSError as error:
                assert error.errno == errno.EIO  # the call died with the hypervisor: nobody knows if it was made
        killer.join()
        machine.settle()
    offered = sorted(one["relid"] for one in machine.channels())
    assert sorted(device.relid for device in driver.devices.values()) == offered
    for relid in offered:
        machine.rescind(relid)
    machine.settle()
    assert driver.devices == {}
    assert machine.channels() == []


def test_a_machine_stops_in_order_while_channels_are_open(pvbus_boot: Any) -> None:
    booted = pvbus_boot(config(cpus=2))
    machine = booted.machine
    for _ in range(3):
        machine.offer("echo")
    driver = drive(machine)
    machine.settle()
    assert len(driver.devices) == 3

    channels = [device.channel for device in driver.devices.values()]

    begin = time.monotonic()
    booted.process.send_signal(signal.SIGTERM)
    assert booted.process.wait(BOUND_S) == 0

    assert time.monotonic() - begin < STOP_S_MAX
    assert driver.devices == {}     # the bus has called remove for each before it left its host
    assert not any(channel.is_open for channel in channels)
    with pytest.raises(OSError) as gone:
        channels[0].send(b"anybody?")
    assert gone.value.errno == errno.ENOTCONN
