# SPDX-License-Identifier: Apache-2.0
"""A driver process that forks, that has no descriptor left, and whose driver leaves in the middle of a call."""

from __future__ import annotations

import errno
import os
import signal
import sys
import threading
from pathlib import Path
from typing import Any

import pytest

from pvbus.actors.client import attach
from pvbus.tests.machine.vmbus_support import ECHO, Recorder, config, descriptors, drive, echo

sys.path.insert(0, str(Path(__file__).parents[1] / "runtime"))
from rig import descriptors_left  # type: ignore[import-not-found]


@pytest.fixture
def machine(pvbus_boot: Any) -> Any:
    return pvbus_boot(config()).machine


def test_a_forked_child_has_a_bus_of_its_own_and_leaves_its_parent_s_alone(machine: Any) -> None:
    machine.offer("echo")
    driver = drive(machine)
    bus = machine.bus()
    pid = os.fork()
    if pid == 0:
        code = 1
        signal.alarm(20)
        try:
            assert bus.closed
            with pytest.raises(OSError, match="the bus has gone"):
                driver.channel.send(b"from the child")
            (device,) = machine.devices()  # asked on a connection of its own
            assert device["driver"] == "echo"
            with pytest.raises(OSError, match="is registered") as refused:
                machine.register_driver(Recorder())
            assert refused.value.errno == errno.EBUSY
            bus.close()
            machine.close()
            code = 0
        finally:
            os._exit(code)
    assert os.waitpid(pid, 0)[1] == 0
    machine.settle()
    assert machine.bus() is bus
    echo(driver.channel, 20)


def test_a_forked_child_does_not_wait_for_whoever_held_its_parent_s_locks(machine: Any) -> None:
    machine.offer("echo")
    driver = drive(machine)
    with machine.bus()._connection._sending, driver.channel._lock:
        pid = os.fork()
        if pid == 0:
            code = 1
            signal.alarm(20)
            try:
                machine.devices()
                driver.channel.close()
                machine.close()
                code = 0
            finally:
                os._exit(code)
    assert os.waitpid(pid, 0)[1] == 0
    echo(driver.channel, 20)


def test_an_open_without_room_for_its_descriptors_fails_at_once_and_leaves_nothing_open(machine: Any) -> None:
    machine.offer("echo")
    driver = drive(machine, Recorder(ring_bytes=0))
    (device,) = driver.devices.values()
    before = descriptors(os.getpid())
    with descriptors_left(2), pytest.raises(OSError) as refused:
        device.channel.open()
    assert refused.value.errno == errno.EMFILE
    assert descriptors(os.getpid()) == before
    machine.settle()
    assert [channel["state"] for channel in machine.channels()] != ["open"]
    device.channel.open()
    echo(device.channel, 20)


def test_a_driver_that_leaves_in_its_remove_does_no_harm(machine: Any, capfd: Any) -> None:
    relid = machine.offer("echo")
    left = threading.Event()

    with attach(name=machine.name) as other:
        class Leaver(Recorder):
            def remove(self, device: Any) -> None:
                super().remove(device)
                other.close()
                left.set()

        drive(other, Leaver("leaver", (ECHO,)))
        machine.rescind(relid)
        assert left.wait(20.0)
        machine.settle()
        for thread in threading.enumerate():
            if thread.name == "pvbus-driver":
                thread.join(20.0)
    assert "Traceback" not in capfd.readouterr().err
    machine.offer("echo")
    echo(drive(machine).channel, 20)
