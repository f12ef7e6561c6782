# SPDX-License-Identifier: Apache-2.0
"""The verbs about a domain's VMBus, run as a user does, beside a driver in a process of its own: this one."""

import functools
import json
import re
import uuid
from collections.abc import Iterator
from typing import Any

import pytest

from pvbus.actors.client import VmbusDevice, VmbusDriver
from pvbus.actors.runtime.vmbus_facts import DEVICE_CLASSES, HOST_DEVICES
from pvbus.tests.view.support import pvbus, until
from pvbus.view.pytest_plugin import BootedMachine

CONFIG = """\
[[domain]]
id = 0
platforms = ["xen", "hyperv"]
devices = ["heartbeat"]

[[domain]]
id = 1

[[domain]]
id = 2
platforms = ["hyperv"]
"""
ECHO = str(DEVICE_CLASSES["echo"])
DEVICES = 40  # with their attributes more than a frame holds


class Echo(VmbusDriver):
    """Takes every echo device."""

    name, id_table = "echo", (ECHO,)

    def probe(self, device: VmbusDevice, matched_id: uuid.UUID) -> None:
        device.channel.open(ring_bytes=16 * 1024)


@pytest.fixture(scope="module")
def pvbus_config() -> str:
    return CONFIG


@pytest.fixture
def name(pvbus_shared_machine: BootedMachine) -> str:
    return pvbus_shared_machine.name


@pytest.fixture(autouse=True)
def on_the_bus(pvbus_shared_machine: BootedMachine) -> Iterator[None]:
    """Begin when the bus is up, and withdraw what a test has offered."""
    machine = pvbus_shared_machine.machine
    until(lambda: any(row["class_id"] == str(DEVICE_CLASSES["heartbeat"]) for row in machine.devices()), "the bus is up")
    yield
    for domain in (0, 2):
        for row in machine.channels(domain):
            if row["class"] == "echo":
                machine.rescind(row["relid"], domain)
        until(functools.partial(none_left, machine, domain), "what was offered has gone")


def echoes(machine: Any, domain: int = 0) -> list[dict[str, Any]]:
    return [row for row in machine.devices(domain) if row["class_id"] == ECHO]


def none_left(machine: Any, domain: int) -> bool:
    return not echoes(machine, domain)


def test_an_offer_prints_its_relid_and_nothing_else(name: str, machine: Any) -> None:
    done = pvbus("offer", "echo", machine=name)

    assert (done.returncode, done.stderr) == (0, "")
    assert re.fullmatch(r"\d+\n", done.stdout)
    until(lambda: [row["relid"] for row in echoes(machine)] == [int(done.stdout)], "it is on the bus")


def test_an_offer_takes_guids_a_domain_and_json(name: str, machine: Any) -> None:
    instance = "01234567-89ab-cdef-0123-456789abcdef"

    data = json.loads(pvbus("offer", ECHO, "--instance", instance, "--domain", "2", "--json", machine=name).stdout)

    assert data == {"schema": 1, "domain": 2, "class_id": ECHO, "relid": 1}
    until(lambda: [row["device_id"] for row in echoes(machine, 2)] == [instance], "it is on the bus of domain 2")
    assert echoes(machine) == []


def test_devices_as_json_are_objects_with_every_attribute_as_its_file_would_hold_it(name: str, machine: Any) -> None:
    driver = machine.register_driver(Echo)
    relid = machine.offer("echo")
    until(lambda: [row["driver"] for row in echoes(machine)] == ["echo"], "it is bound")

    data = json.loads(pvbus("devices", "--json", machine=name).stdout)

    assert list(data) == ["schema", "devices"]
    heartbeat, echo = data["devices"]
    assert all(
        list(row) == ["name", "relid", "class_id", "device_id", "driver", "attributes"] for row in data["devices"]
    )
    assert (heartbeat["name"], heartbeat["relid"], heartbeat["driver"]) == ("vmbus_0_1", 1, None)
    assert heartbeat["device_id"] == str(HOST_DEVICES["heartbeat"])
    assert (echo["relid"], echo["class_id"], echo["driver"]) == (relid, ECHO, "echo")
    assert echo["attributes"]["class_id"] == f"{{{ECHO}}}\n"
    assert echo["attributes"]["state"] == "3\n"
    assert echo["attributes"]["out_write_bytes_avail"] == f"{12 * 1024}\n"
    assert len(echo["attributes"]) >= 22
    machine.unregister_driver(driver)


def test_devices_and_channels_for_people_are_tables(name: str, machine: Any) -> None:
    relid = machine.offer("echo")
    until(lambda: echoes(machine), "it is on the bus")

    devices = pvbus("devices", machine=name).stdout.splitlines()
    channels = pvbus("channels", machine=name).stdout.splitlines()

    assert devices[0].split() == ["DEVICE", "RELID", "CLASS", "DEVICE", "ID", "DRIVER", "OPENED"]
    assert devices[1].split() == ["vmbus_0_1", "1", "heartbeat", str(HOST_DEVICES["heartbeat"]), "-", "no"]
    assert channels[0].split() == ["RELID", "CLASS", "INSTANCE", "ID", "STATE", "TARGET", "VP", "MONITOR", "ID", "GENERATION"]
    assert channels[2].split()[:2] == [str(relid), "echo"]
    assert pvbus("devices", "--domain", "2", machine=name).stdout == "no device is on the bus\n"
    assert pvbus("channels", "--domain", "2", machine=name).stdout == "the host offers no channel\n"


def test_channels_as_json_are_the_hosts_view(name: str, machine: Any) -> None:
    relid = machine.offer("echo")

    data = json.loads(pvbus("channels", "--json", machine=name).stdout)

    assert list(data) == ["schema", "channels"]
    assert [(row["relid"], row["class"], row["state"]) for row in data["channels"]] == [
        (1, "heartbeat", "closed"), (relid, "echo", "closed"),
    ]  # fmt: skip


def test_more_devices_than_a_frame_holds_are_listed_all(name: str, machine: Any) -> None:
    relids = [machine.offer("echo", domain=2) for _ in range(DEVICES)]
    until(lambda: len(echoes(machine, 2)) == DEVICES, "all are on the bus")

    data = json.loads(pvbus("devices", "--domain", "2", "--json", machine=name).stdout)

    assert sorted(row["relid"] for row in data["devices"]) == sorted(relids)
    assert len({row["name"] for row in data["devices"]}) == DEVICES


def test_a_rescind_takes_the_device_away(name: str, machine: Any) -> None:
    first, second = machine.offer("echo"), machine.offer("echo")

    said = pvbus("rescind", str(first), machine=name)
    data = json.loads(pvbus("rescind", str(second), "--json", machine=name).stdout)

    assert (said.returncode, said.stdout) == (0, f"relid {first} of domain 0 is withdrawn\n")
    assert data == {"schema": 1, "domain": 0, "relid": second, "state": "rescinded"}
    until(lambda: echoes(machine) == [], "both have gone")


def test_a_class_without_a_device_of_ours_is_offered_and_nobody_answers(name: str, machine: Any) -> None:
    relid = int(pvbus("offer", "network", machine=name).stdout)
    until(lambda: len(machine.devices()) == 2, "it is on the bus")

    described = machine.devices()[1]
    assert (described["relid"], described["class_id"]) == (relid, str(DEVICE_CLASSES["network"]))

    class Sends(VmbusDriver):
        name, id_table = "sends", (DEVICE_CLASSES["network"],)
        channel: Any = None

        def probe(self, device: Any, matched_id: uuid.UUID) -> None:
            device.channel.open()
            type(self).channel = device.channel

    machine.register_driver(Sends)
    for _ in range(32):  # four times what the ring holds: what is sent is read
        if not Sends.channel.send_many([bytes(8192)]):
            machine.settle()
            Sends.channel.send(bytes(8192))
    machine.settle()
    assert Sends.channel.recv() is None
    machine.unregister_driver("sends")
    machine.rescind(relid)
    until(lambda: len(machine.devices()) == 1, "it has gone")


def test_status_shows_the_workqueues_and_which_platforms_a_domain_is_on(name: str) -> None:
    said = pvbus("status", machine=name).stdout

    assert re.search(r"^workqueue/0 +\d+ +0 +up$", said, re.MULTILINE)
    assert re.search(r"^workqueue/2 +\d+ +0 +up$", said, re.MULTILINE)
    assert "workqueue/1" not in said
    assert re.search(r"^0 +xen,hyperv +fifo", said, re.MULTILINE)
    assert re.search(r"^2 +hyperv ", said, re.MULTILINE)


@pytest.mark.parametrize(("arguments", "named"), [
    (["offer", "floppy"], "class 'floppy' is no GUID; the classes are network, ide, scsi, "),
    (["offer", str(uuid.UUID(int=5))], str(uuid.UUID(int=5))),
    (["offer", "echo", "--instance", "12"], "--instance '12' is no GUID"),
    (["offer", "heartbeat", "--instance", str(HOST_DEVICES["heartbeat"])], "is offered already"),
    (["offer", "echo", "--domain", "1"], "--domain 1 is not on the Hyper-V platform"),
    (["offer", "echo", "--domain", "9"], "--domain 9 is not there"),
    (["offer"], "CLASS"),
    (["rescind", "77"], "relid 77 is not offered in domain 0"),
    (["rescind", "one"], "'one'"),
    (["rescind", "1", "--domain", "1"], "--domain 1"),
    (["devices", "--domain", "1"], "--domain 1"),
    (["channels", "--domain", "9"], "--domain 9"),
])  # fmt: skip
def test_a_bad_argument_is_named(name: str, arguments: list[str], named: str) -> None:
    done = pvbus(*arguments, machine=name)

    assert done.returncode == 2
    assert named in done.stderr
    assert "Traceback" not in done.stderr
