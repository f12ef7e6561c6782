# SPDX-License-Identifier: Apache-2.0
"""Drivers whose workqueue dies: what each of their calls answers meanwhile, and who is still registered afterwards."""

from __future__ import annotations

import errno
import threading
from typing import Any

import pytest

from pvbus.actors.client import attach
from pvbus.tests.machine.vmbus_support import (
    BOUND_S,
    HEARTBEAT,
    Recorder,
    config,
    drive,
    driver_process,
    echo,
    kill_and_wait_for_heir,
)


@pytest.fixture
def machine(pvbus_boot: Any) -> Any:
    return pvbus_boot(config()).machine


def test_an_heir_has_the_drivers_of_every_process_and_the_devices_that_were_theirs(machine: Any) -> None:
    def work(own: Any, pipe: Any) -> None:
        driver = drive(own, Recorder("beats", (HEARTBEAT,)))
        pipe.send(driver.calls)
        pipe.recv()
        own.settle()
        pipe.send(driver.calls)
        pipe.recv()

    machine.offer("heartbeat")
    relids = [machine.offer("echo") for _ in range(3)]
    driver = drive(machine)
    with driver_process(machine, work) as child:
        assert [call for call, _ in child.receive()] == ["probe"]
        kill_and_wait_for_heir(machine, "workqueue/0")
        child.pipe.send("go on")
        assert [call for call, _ in child.receive()] == ["probe", "remove", "probe"]
        machine.settle()

        found = {device["relid"]: device["driver"] for device in machine.devices()}
        assert found == {1: "beats"} | dict.fromkeys(relids, "echo")
        for device in driver.devices.values():
            echo(device.channel, 20)
        child.pipe.send("leave")


def test_a_driver_that_is_unregistered_is_not_the_heir_s(machine: Any) -> None:
    machine.offer("echo")
    drive(machine)
    machine.unregister_driver("echo")
    kill_and_wait_for_heir(machine, "workqueue/0")
    machine.settle()

    (device,) = machine.devices()
    assert device["driver"] is None


def test_a_remove_that_fails_keeps_nobody_from_the_heir(machine: Any, capfd: Any) -> None:
    class Clumsy(Recorder):
        def remove(self, device: Any) -> None:
            super().remove(device)
            raise RuntimeError("dropped it")

    machine.offer("echo")
    driver = drive(machine, Clumsy())
    kill_and_wait_for_heir(machine, "workqueue/0")
    machine.settle()

    echo(driver.channel, 20)
    assert "dropped it" in capfd.readouterr().err


def test_calls_while_there_is_no_workqueue_wait_for_the_heir(machine: Any) -> None:
    relid = machine.offer("echo")
    drive(machine)
    killer = threading.Thread(target=kill_and_wait_for_heir, args=(machine, "workqueue/0"))
    killer.start()
    answers = 0
    while killer.is_alive():
        try:
            answers += [device["relid"] for device in machine.devices()] in ([relid], [])
        except OSError as error:
            assert error.errno == errno.EIO  # asked before it died
    killer.join(BOUND_S)

    machine.settle()
    assert answers
    assert [device["driver"] for device in machine.devices()] == ["echo"]


def test_whoever_leaves_while_its_bus_has_no_workqueue_is_not_waited_for(machine: Any) -> None:
    machine.offer("echo")
    other = attach(name=machine.name)
    drive(other)
    killer = threading.Thread(target=kill_and_wait_for_heir, args=(machine, "workqueue/0"))
    killer.start()
    other.close()
    killer.join(BOUND_S)
    assert not killer.is_alive()

    echo(drive(machine).channel, 20)
