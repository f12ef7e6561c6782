# SPDX-License-Identifier: Apache-2.0
"""The toolstack takes devices away while drivers in other processes open and close them: nothing hangs, nothing is left."""

from __future__ import annotations

import errno
import time
from typing import Any

import pytest

from pvbus.actors.client import VmbusDriver
from pvbus.tests.machine.vmbus_support import ECHO, Recorder, config, driver_process, echo, guests, holds_as_before, receive

ROUNDS = 300
SECONDS_MAX = 20.0
GONE = {errno.ENODEV, errno.ENOTCONN, errno.EIO, errno.EBUSY, errno.EPERM, errno.EISCONN}


@pytest.fixture
def machine(pvbus_boot: Any) -> Any:
    return pvbus_boot(config(cpus=2)).machine


class Restless(VmbusDriver):
    """Opens and closes its device in its probe; leaves it open every other time."""

    id_table = (ECHO,)

    def __init__(self, name: str) -> None:
        self.name = name  # type: ignore[misc]
        self.probes = self.removes = self.opened = 0

    def probe(self, device: Any, _matched: Any) -> None:
        self.probes += 1
        try:
            for _ in range(self.probes % 3):
                device.channel.open(ring_bytes=8192)
                device.channel.send(b"into the blue", 1, completion=True)
                device.channel.close()
            if self.probes % 2:
                device.channel.open(ring_bytes=8192)
                self.opened += 1
        except OSError as error:
            if error.errno not in GONE:
                raise
            raise OSError(errno.ENODEV, "it has gone") from None

    def remove(self, _device: Any) -> None:
        self.removes += 1


def restless(machine: Any, pipe: Any) -> None:
    driver = machine.register_driver(Restless("restless"))
    pipe.send("registered")
    pipe.recv()
    machine.unregister_driver(driver)
    pipe.send((driver.probes, driver.removes, driver.opened))
    pipe.recv()


def everything_is_gone(machine: Any) -> None:
    machine.settle()
    assert machine.channels() == []
    assert machine.devices() == []


@pytest.mark.checklist("H12", "X13", "B7.7")
def test_offers_and_rescinds_race_with_a_driver_that_opens_and_closes(machine: Any) -> None:
    relid = machine.offer("echo")
    machine.rescind(relid)
    with driver_process(machine, restless) as child:
        assert child.receive() == "registered"
        everything_is_gone(machine)
        before = guests(machine)
        begin = time.monotonic()
        for turn in range(ROUNDS):
            relids = [machine.offer("echo") for _ in range(1 + turn % 3)]
            if turn % 4 == 0:
                machine.settle()  # else the rescind comes while it is opened
            for relid in relids:
                machine.rescind(relid)
            if turn % 16 == 15:
                machine.settle()  # or the guest is a hundred offers behind
        everything_is_gone(machine)
        assert time.monotonic() - begin < SECONDS_MAX
        holds_as_before(machine, before)  # no frame, doorbell or ring is held
        child.pipe.send("end")
        probes, removes, opened = child.receive()

    assert probes > ROUNDS // 2
    assert opened > 0
    assert removes <= probes
    everything_is_gone(machine)
    relid = machine.offer("echo")
    assert relid == 1  # every relid was released


@pytest.mark.checklist("H12", "B3.6")
def test_a_rescind_in_the_middle_of_an_open_ends_it(machine: Any) -> None:
    ended = []

    class Victim(Recorder):
        def probe(self, device: Any, matched_id: Any) -> None:
            machine.rescind(device.relid)
            try:
                device.channel.open()
            except OSError as error:
                ended.append(error.errno)
            raise OSError(errno.ENODEV, "too late")

    machine.register_driver(Victim("victim"))
    for _ in range(50):
        machine.offer("echo")
        machine.settle()

    assert len(ended) == 50
    assert set(ended) <= {errno.ENODEV}
    everything_is_gone(machine)


@pytest.mark.checklist("H12", "X13")
def test_a_rescind_while_a_channel_closes_takes_it_once(machine: Any) -> None:
    driver = machine.register_driver(Recorder())
    machine.settle()
    before = guests(machine)
    for _ in range(50):
        relid = machine.offer("echo")
        machine.settle()
        channel = driver.channel
        machine.rescind(relid)
        channel.close()  # before, while, or after the removal closes it
        everything_is_gone(machine)

    holds_as_before(machine, before)
    assert len(driver.calls) == 100


@pytest.mark.checklist("X13", "B7.6")
def test_an_instance_that_is_offered_again_at_once_is_another_device(machine: Any) -> None:
    instance = "11111111-2222-3333-4444-555555555555"
    driver = machine.register_driver(Recorder())
    relid = machine.offer("echo", instance)
    machine.settle()
    with pytest.raises(OSError) as twice:
        machine.offer("echo", instance)
    assert twice.value.errno == errno.EEXIST
    for _ in range(50):
        machine.rescind(relid)
        relid = machine.offer("echo", instance)
        machine.settle()
        (device,) = machine.devices()
        echo(driver.devices[device["name"]].channel, 3)

    assert len({name for _, name in driver.calls}) == 51


def test_a_driver_that_uses_its_channel_while_it_is_rescinded_gets_an_error_not_a_crash(machine: Any) -> None:
    driver = machine.register_driver(Recorder())
    for _ in range(50):
        relid = machine.offer("echo")
        machine.settle()
        channel = driver.channel
        channel.send(b"x", 1)
        receive(channel)
        machine.rescind(relid)
        with pytest.raises(OSError) as gone:
            while True:
                channel.send_many([b"y" * 100] * 50)
                channel.recv_many()
        assert gone.value.errno in GONE
    everything_is_gone(machine)
