# SPDX-License-Identifier: Apache-2.0
"""What a write to a file of the bus does: bind, unbind, new_id, drivers_probe, drivers_autoprobe, uevent."""

import errno
import uuid
from typing import Any

import pytest

from pvbus.actors.workqueue.sysfs import Sysfs, synthetic
from pvbus.tests.workqueue.rig import ECHO, KVP, Guest, driver

ASKED = "fe4d7c9d-b8c6-4a70-9ef1-3d8a58d18eed"


class Bus:
    """A guest with its files, one echo device, and a driver that nothing has tried."""

    def __init__(self, *, autoprobe: bool = False) -> None:
        self.guest = Guest().connected()
        self.guest.offer()
        self.sysfs = Sysfs(self.guest.bus, self.guest.uevents.append)
        self.guest.bus.autoprobe = autoprobe
        self.guest.run(self.guest.bus.register(driver("echo", ECHO)))
        self.device = self.guest.bus.devices["vmbus_0_1"]

    def write(self, name: str, text: str, of: str = "echo") -> int:
        """Write a file of a driver; give the errno, or 0."""
        return errno_of(self.guest, self.sysfs.write_driver(of, name, text))

    @property
    def driver(self) -> str | None:
        return self.device.driver.name if self.device.driver is not None else None


def errno_of(guest: Guest, steps: Any) -> int:
    try:
        guest.run(steps)
    except OSError as error:
        assert error.errno is not None
        return error.errno
    return 0


def test_bind_and_unbind_move_a_device_and_say_so() -> None:
    bus = Bus()
    bus.guest.uevents.clear()

    assert (bus.driver, bus.write("bind", "vmbus_0_1\n"), bus.driver) == (None, 0, "echo")
    assert (bus.write("unbind", "vmbus_0_1"), bus.driver) == (0, None)
    assert [event[0] for event in bus.guest.uevents] == ["ACTION=bind", "ACTION=unbind"]
    assert bus.guest.calls == [("probe", "echo", "vmbus_0_1"), ("remove", "echo", "vmbus_0_1")]
    bus.guest.check_at_rest()


def test_bind_refuses_what_does_not_match_what_is_bound_and_what_is_not_there() -> None:
    bus = Bus()
    bus.guest.run(bus.guest.bus.register(driver("kvp", KVP)))

    assert bus.write("bind", "vmbus_0_9") == errno.ENODEV
    assert bus.write("bind", "vmbus_0_1", of="kvp") == errno.ENODEV
    assert bus.write("bind", "vmbus_0_1", of="nobody") == errno.ENODEV
    assert bus.write("bind", "vmbus_0_1") == 0
    assert bus.write("bind", "vmbus_0_1") == errno.EBUSY
    assert bus.write("unbind", "vmbus_0_1", of="kvp") == errno.ENODEV
    assert bus.write("frobnicate", "vmbus_0_1") == errno.ENOENT
    assert bus.driver == "echo"


def test_a_bind_gives_the_error_of_the_probe() -> None:
    bus = Bus()
    bus.guest.driver = lambda _: errno.ENXIO

    assert (bus.write("bind", "vmbus_0_1"), bus.driver) == (errno.ENXIO, None)
    bus.guest.check_at_rest()


@pytest.mark.parametrize("autoprobe", [False, True])
def test_a_driver_takes_the_classes_of_its_new_id_at_once(autoprobe: bool) -> None:
    bus = Bus()
    bus.guest.run(bus.guest.bus.register(driver("uio", KVP)))
    bus.guest.bus.autoprobe = autoprobe

    assert bus.write("new_id", f"{ECHO}\n", of="uio") == 0

    assert (bus.driver, bus.guest.calls) == ("uio", [("probe", "uio", "vmbus_0_1")])
    assert bus.write("new_id", str(ECHO), of="uio") == errno.EEXIST
    assert bus.write("new_id", str(KVP), of="uio") == errno.EEXIST  # of its own table
    assert bus.write("remove_id", f"{ECHO}\n", of="uio") == 0
    assert bus.driver == "uio"
    assert (bus.write("unbind", "vmbus_0_1", of="uio"), bus.write("bind", "vmbus_0_1", of="uio")) == (0, errno.ENODEV)
    assert bus.write("remove_id", f"{ECHO}\n", of="uio") == errno.ENODEV
    assert bus.write("remove_id", f"{KVP}\n", of="uio") == errno.ENODEV
    bus.guest.check_at_rest()


def test_a_new_id_that_is_none_is_refused_and_there_is_an_end_of_them() -> None:
    bus = Bus()

    assert [bus.write("new_id", text) for text in ("", "x", f"{{{KVP}}}", str(uuid.UUID(int=0)))] == [errno.EINVAL] * 4
    assert bus.write("remove_id", "x") == errno.EINVAL
    assert bus.write("new_id", str(KVP), of="nobody") == errno.ENODEV
    assert [bus.write("new_id", str(uuid.UUID(int=at + 1))) for at in range(257)] == [0] * 256 + [errno.ENOMEM]


def test_a_device_that_goes_before_its_turn_cannot_be_bound() -> None:
    bus = Bus()
    bus.guest.server.rescind(bus.device.channel.relid)
    bus.guest.delivers = False
    bus.guest.bus.rescinded(bus.device.channel)

    outcome = bus.guest.start(bus.guest.bus.attach(bus.guest.bus.drivers["echo"], bus.device))
    bus.guest.delivers = True
    bus.guest.deliver()

    assert [error.errno for error in outcome] == [errno.ENODEV]
    assert bus.guest.calls == []


def test_without_autoprobe_neither_devices_nor_drivers_are_tried_until_drivers_probe() -> None:
    bus = Bus()
    bus.guest.offer()
    assert bus.sysfs.read_bus("drivers_autoprobe") == "0\n"
    assert bus.guest.calls == []

    assert errno_of(bus.guest, bus.sysfs.write_bus("drivers_probe", "vmbus_0_1\n")) == 0
    assert errno_of(bus.guest, bus.sysfs.write_bus("drivers_probe", "vmbus_0_7\n")) == errno.ENODEV
    assert bus.driver == "echo"

    assert errno_of(bus.guest, bus.sysfs.write_bus("drivers_autoprobe", "1\n")) == 0
    assert bus.sysfs.read_bus("drivers_autoprobe") == "1\n"
    bus.guest.offer()
    assert [name for _, _, name in bus.guest.calls] == ["vmbus_0_1", "vmbus_0_3"]


def test_drivers_probe_takes_the_driver_that_the_override_names() -> None:
    bus = Bus()
    bus.guest.run(bus.guest.bus.register(driver("other", KVP)))
    bus.guest.bus.override(bus.device, "other\n")

    assert errno_of(bus.guest, bus.sysfs.write_bus("drivers_probe", "vmbus_0_1")) == 0
    assert bus.driver == "other"
    assert bus.write("unbind", "vmbus_0_1", of="other") == 0
    assert bus.write("bind", "vmbus_0_1") == errno.ENODEV


def test_the_bus_has_no_other_files() -> None:
    bus = Bus()

    assert errno_of(bus.guest, bus.sysfs.write_bus("drivers", "x")) == errno.ENOENT
    with pytest.raises(FileNotFoundError):
        bus.sysfs.read_bus("drivers_probe")


@pytest.mark.checklist("B3.1")
def test_a_uevent_on_request_says_what_an_own_one_says_and_that_it_was_asked_for() -> None:
    bus = Bus(autoprobe=True)
    bus.guest.uevents.clear()
    modalias = "MODALIAS=vmbus:" + ECHO.bytes_le.hex()
    head = ["DEVPATH=/devices/VMBUS:00/vmbus_0_1", "SUBSYSTEM=vmbus"]

    bus.sysfs.write_uevent("/devices/VMBUS:00/vmbus_0_1", "change\n")
    bus.sysfs.write_uevent("/devices/VMBUS:00/vmbus_0_1", f"add {ASKED} A=1 B=abc")
    bus.sysfs.write_uevent("/bus/vmbus/drivers/echo", "add")
    bus.sysfs.write_uevent("/bus/vmbus", "add")
    bus.sysfs.write_uevent("/devices/VMBUS:00", "add")

    assert bus.guest.uevents == [
        ["ACTION=change", *head, "SYNTH_UUID=0", "DRIVER=echo", modalias],
        ["ACTION=add", *head, f"SYNTH_UUID={ASKED}", "SYNTH_ARG_A=1", "SYNTH_ARG_B=abc", "DRIVER=echo", modalias],
        ["ACTION=add", "DEVPATH=/bus/vmbus/drivers/echo", "SUBSYSTEM=drivers", "SYNTH_UUID=0"],
        ["ACTION=add", "DEVPATH=/bus/vmbus", "SUBSYSTEM=bus", "SYNTH_UUID=0"],
        ["ACTION=add", "DEVPATH=/devices/VMBUS:00", "SUBSYSTEM=acpi", "SYNTH_UUID=0", "MODALIAS=acpi:VMBUS:"],
    ]


@pytest.mark.parametrize(
    "devpath", ["/devices/VMBUS:00/vmbus_0_9", "/bus/vmbus/drivers/nobody", "/bus/vmbus/drivers", "/", "", "vmbus_0_1"]
)
def test_a_uevent_about_nothing_is_enodev(devpath: str) -> None:
    bus = Bus()

    with pytest.raises(OSError) as refused:
        bus.sysfs.write_uevent(devpath, "add")

    assert refused.value.errno == errno.ENODEV


@pytest.mark.parametrize("text", [
    "", "\n", "frob", "ADD", "add ", "add\n\n", "add 1", f"add {ASKED}x", f"add {ASKED} A", f"add {ASKED} A=",
    f"add {ASKED} A=b-c", f"add {ASKED}  A=1", "add\tchange", f"add {ASKED} A=1\nB",
])  # fmt: skip
def test_what_is_no_request_for_a_uevent_is_einval_and_sends_none(text: str) -> None:
    bus = Bus()
    bus.guest.uevents.clear()

    with pytest.raises(OSError) as refused:
        bus.sysfs.write_uevent("/bus/vmbus", text)

    assert refused.value.errno == errno.EINVAL
    assert bus.guest.uevents == []


def test_a_uevent_with_more_arguments_than_there_is_room_for_is_enomem() -> None:
    bus = Bus()

    with pytest.raises(OSError) as refused:
        bus.sysfs.write_uevent("/bus/vmbus", f"add {ASKED} " + " ".join(f"K{at}=x" for at in range(300)))

    assert refused.value.errno == errno.ENOMEM


@pytest.mark.parametrize("action", ["add", "remove", "change", "move", "online", "offline", "bind", "unbind"])
def test_every_action_of_the_kernel_may_be_asked_for(action: str) -> None:
    for end in ("", "\n", "\0"):
        assert synthetic(action + end) == (action, ["SYNTH_UUID=0"])


@pytest.mark.parametrize("name", ["", ".", "..", "a/b", "a\0b", "a\nb", "x" * 4096])
def test_a_driver_cannot_be_named_what_no_file_is(name: str) -> None:
    bus = Bus()

    assert errno_of(bus.guest, bus.guest.bus.register(driver(name, ECHO))) == errno.EINVAL
