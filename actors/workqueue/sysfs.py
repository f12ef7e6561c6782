# SPDX-License-Identifier: Apache-2.0
"""What a write to a file of the bus's sysfs tree does: drivers_autoprobe, drivers_probe, bind, unbind, new_id, remove_id, uevent.

Pure: the tree itself, its links and its modes are made by who shows it (view/sysfs). What a device's own files hold stands in
attributes.py; its driver_override is written in process.py.
"""

from __future__ import annotations

import errno
import re
import uuid
from typing import TYPE_CHECKING

from pvbus.actors.runtime import vmbus_messages as vm
from pvbus.actors.workqueue.bus import BUS, PARENT, checked, uevent
from pvbus.actors.workqueue.connection import failed

if TYPE_CHECKING:
    from collections.abc import Callable

    from pvbus.actors.workqueue.bus import Bus, Device, Driver
    from pvbus.actors.workqueue.waits import Steps

ACTIONS = ("add", "remove", "change", "move", "online", "offline", "bind", "unbind")
UUID = re.compile(r"[0-9A-Fa-f]{8}(-[0-9A-Fa-f]{4}){3}-[0-9A-Fa-f]{12}")
ARGUMENT = re.compile(r"([0-9A-Za-z]+)=([0-9A-Za-z]+)")
PARENT_MODALIAS = "acpi:VMBUS:"


def synthetic(text: str) -> tuple[str, list[str]]:
    """Read `ACTION [UUID [KEY=VALUE ...]]`; give the action, and what the uevent says of its asker. EINVAL."""
    action, *rest = (text[:-1] if text.endswith(("\n", "\0")) else text).split(" ")
    if action not in ACTIONS:
        raise failed(errno.EINVAL, f"{action[:32]!r} is no action of a uevent")
    if not rest:
        return action, ["SYNTH_UUID=0"]
    if not UUID.fullmatch(rest[0]):
        raise failed(errno.EINVAL, f"{rest[0][:64]!r} is no UUID")
    said = [f"SYNTH_UUID={rest[0]}"]
    for argument in rest[1:]:
        if not ARGUMENT.fullmatch(argument):
            raise failed(errno.EINVAL, f"{argument[:64]!r} is no KEY=VALUE of letters and digits")
        said.append(f"SYNTH_ARG_{argument}")
    return action, said


def _class_id(text: str) -> bytes:
    """Read a GUID as the kernel does: without braces, and whatever stands behind it. EINVAL."""
    found = UUID.match(text)
    if found is None:
        raise failed(errno.EINVAL, f"{text[:64]!r} is no GUID")
    return uuid.UUID(found[0]).bytes_le


class Sysfs:
    """The bus, as writes to its files see it."""

    def __init__(self, bus: Bus, send_uevent: Callable[[list[str]], None]) -> None:
        self._bus, self._send_uevent = bus, send_uevent

    def read_bus(self, name: str) -> str:
        """Read a file of /sys/bus/vmbus. ENOENT."""
        if name != "drivers_autoprobe":
            raise failed(errno.ENOENT, f"the bus has no file {name} to read")
        return f"{self._bus.autoprobe:d}\n"

    def write(self, message: vm.WriteBus | vm.WriteDriver | vm.WriteUevent) -> Steps[None]:
        """Write what a program has written."""
        match message:
            case vm.WriteBus():
                yield from self.write_bus(message.name, message.text)
            case vm.WriteDriver():
                yield from self.write_driver(message.driver, message.name, message.text)
            case vm.WriteUevent():
                self.write_uevent(message.devpath, message.text)

    def write_bus(self, name: str, text: str) -> Steps[None]:
        """Write a file of /sys/bus/vmbus. ENOENT, ENODEV."""
        if name == "drivers_autoprobe":
            self._bus.autoprobe = not text.startswith("0")
        elif name == "drivers_probe":
            yield from self._bus.rescan(self._device(text))
        else:
            raise failed(errno.ENOENT, f"the bus has no file {name} to write")

    def write_driver(self, driver: str, name: str, text: str) -> Steps[None]:
        """Write a file of /sys/bus/vmbus/drivers/DRIVER. ENOENT, ENODEV, EBUSY, EINVAL, EEXIST, what a probe says."""
        if name == "bind":
            yield from self._bus.attach(self._driver(driver), self._device(text))
        elif name == "unbind":
            yield from self._bus.detach(self._driver(driver), self._device(text))
        elif name == "new_id":
            yield from self._bus.add_id(self._driver(driver), _class_id(text))
        elif name == "remove_id":
            self._bus.remove_id(self._driver(driver), _class_id(text))
        else:
            raise failed(errno.ENOENT, f"driver {driver} has no file {name} to write")

    def write_uevent(self, devpath: str, text: str) -> None:
        """Write a file `uevent`: everybody hears of it. ENODEV, EINVAL, ENOMEM."""
        action, said = synthetic(text)
        parent, _, name = devpath.rpartition("/")
        head = [f"ACTION={action}", f"DEVPATH={devpath}"]
        if parent == PARENT:
            device = self._device(name)
            variables = uevent(device, action, device.driver, said)
        elif parent == f"{BUS}/drivers":
            self._driver(name)
            variables = [*head, "SUBSYSTEM=drivers", *said]
        elif devpath == BUS:
            variables = [*head, "SUBSYSTEM=bus", *said]
        elif devpath == PARENT:
            variables = [*head, "SUBSYSTEM=acpi", *said, f"MODALIAS={PARENT_MODALIAS}"]
        else:
            raise failed(errno.ENODEV, f"nothing stands at {devpath}")
        self._send_uevent(checked(variables))

    def _device(self, text: str) -> Device:
        device = self._bus.devices.get(text.removesuffix("\n"))
        if device is None:
            raise failed(errno.ENODEV, f"there is no device {text[:64]!r}")
        return device

    def _driver(self, name: str) -> Driver:
        driver = self._bus.drivers.get(name)
        if driver is None:
            raise failed(errno.ENODEV, f"there is no driver {name}")
        return driver
