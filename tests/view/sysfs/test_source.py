# SPDX-License-Identifier: Apache-2.0
"""What the tree is made of, on a real machine: uevents in their order, and a bus that dies and comes back."""

import errno
import functools
import threading
from collections.abc import Iterator, Mapping
from typing import Any

import pytest

from pvbus.actors.client import attach
from pvbus.actors.runtime.vmbus_facts import DEVICE_CLASSES, modalias
from pvbus.tests.machine.vmbus_support import ECHO, Recorder, config, kill_and_wait_for_heir, wait_until
from pvbus.view.sysfs.source import BusSource

HEARTBEAT = "/devices/VMBUS:00/vmbus_0_1"
SECOND = "/devices/VMBUS:00/vmbus_0_2"


class Heard:
    """What was sent."""

    def __init__(self) -> None:
        self.all: list[dict[str, str]] = []
        self.refuses: list[str] = []
        self.threads: set[int] = set()

    def send(self, variables: Mapping[str, str]) -> None:
        if variables["ACTION"] in self.refuses:
            raise OSError(1, "not permitted")
        self.all.append(dict(variables))
        self.threads.add(threading.get_ident())

    @property
    def told(self) -> list[tuple[str, str]]:
        return [(variables["ACTION"], variables["DEVPATH"]) for variables in self.all]


@pytest.fixture
def machine(pvbus_boot: Any) -> Any:
    booted = pvbus_boot(config(keys='devices = ["heartbeat"]')).machine
    wait_until("the bus is up", lambda: len(booted.devices()) == 1)
    return booted


@pytest.fixture
def heard() -> Heard:
    return Heard()


@pytest.fixture
def source(machine: Any, heard: Heard) -> Iterator[BusSource]:
    made = BusSource(machine, 0, heard.send)
    yield made
    made.close()


@pytest.mark.checklist("B3.1")
def test_uevents_are_told_with_every_variable_and_not_what_was_there_before(
    source: BusSource, heard: Heard, machine: Any
) -> None:
    relid = machine.offer("echo")
    wait_until("it is added", lambda: heard.told == [("add", SECOND)])
    source.write_uevent(SECOND, "change")
    machine.rescind(relid)
    wait_until("it is removed", lambda: len(heard.all) == 3)

    head = {"DEVPATH": SECOND, "SUBSYSTEM": "vmbus"}
    alias = {"MODALIAS": modalias(ECHO)}
    assert heard.all == [
        {"ACTION": "add", **head, **alias},
        {"ACTION": "change", **head, "SYNTH_UUID": "0", **alias},
        {"ACTION": "remove", **head, **alias},
    ]
    assert list(heard.all[1]) == ["ACTION", "DEVPATH", "SUBSYSTEM", "SYNTH_UUID", "MODALIAS"]


def test_the_bus_is_shown_as_it_is(source: BusSource, machine: Any) -> None:
    driver = Recorder("heart", (DEVICE_CLASSES["heartbeat"],), ring_bytes=0)
    assert (source.drivers(), source.devices_of("heart")) == ([], [])

    machine.register_driver(driver)

    described = source.device("vmbus_0_1")
    assert described is not None
    assert (described["driver"], described["attributes"]["id"]) == ("heart", "1\n")
    assert (source.device("vmbus_0_9"), source.device("")) == (None, None)
    assert (source.device_names(), source.drivers(), source.devices_of("heart")) == (["vmbus_0_1"], ["heart"], ["vmbus_0_1"])
    source.write_driver("heart", "unbind", "vmbus_0_1")
    assert source.devices_of("heart") == []
    source.write_bus("drivers_autoprobe", "0")
    assert source.read_bus("drivers_autoprobe") == "0\n"
    source.write_attribute("vmbus_0_1", "driver_override", "heart\n")
    assert source.read_attribute("vmbus_0_1", "driver_override") == "heart\n"


def test_many_drivers_are_listed_although_no_frame_has_room_for_their_names(source: BusSource, machine: Any) -> None:
    names = [f"{at:02}" + "x" * 3000 for at in range(30)]
    for name in names:
        machine.register_driver(Recorder(name, ring_bytes=0))

    assert source.drivers() == names


def test_a_bus_that_dies_and_comes_back_is_told_as_devices_that_go_and_come(
    source: BusSource, heard: Heard, machine: Any
) -> None:
    machine.offer("echo")
    wait_until("it is added", lambda: len(heard.all) == 1)
    before = source.generation()

    kill_and_wait_for_heir(machine, "workqueue/0")

    wait_until("they are back", lambda: len(heard.all) == 5)
    assert heard.told[:3] == [("add", SECOND), ("remove", HEARTBEAT), ("remove", SECOND)]
    assert sorted(heard.told[3:]) == [("add", HEARTBEAT), ("add", SECOND)]
    assert all(variables["MODALIAS"].startswith("vmbus:") for variables in heard.all)
    assert source.generation() > before
    wait_until("they can be seen", lambda: source.device_names() == ["vmbus_0_1", "vmbus_0_2"])


def test_a_uevent_that_cannot_be_sent_is_reported_and_stops_nothing(
    source: BusSource, heard: Heard, machine: Any, capsys: pytest.CaptureFixture[str]
) -> None:
    heard.refuses.append("change")

    source.write_uevent(HEARTBEAT, "change")
    source.write_uevent(HEARTBEAT, "move")

    wait_until("the next is sent", lambda: heard.told == [("move", HEARTBEAT)])
    assert f"uevent change@{HEARTBEAT} is lost: not permitted" in capsys.readouterr().err


def test_a_driver_whose_probe_writes_to_its_own_bind_hears_of_a_time_out(
    machine: Any, heard: Heard, monkeypatch: pytest.MonkeyPatch
) -> None:
    said: list[int | None] = []

    class BindsItself(Recorder):
        def probe(self, device: Any, matched_id: Any) -> None:
            with pytest.raises(OSError, match="no answer") as raised:
                sysfs.write_driver("heart", "bind", device.name)
            said.append(raised.value.errno)
            super().probe(device, matched_id)

    with attach(machine.name) as of_sysfs:
        sysfs = BusSource(of_sysfs, 0, heard.send)
        connection = of_sysfs.bus(0)._link.connection
        monkeypatch.setattr(connection, "ask", functools.partial(connection.ask, timeout_s=0.3))  # instead of 40 s

        driver = machine.register_driver(BindsItself("heart", (DEVICE_CLASSES["heartbeat"],), ring_bytes=0))
        wait_until("it is probed", lambda: driver.devices)
        sysfs.close()

    assert said == [errno.ETIMEDOUT]
