# SPDX-License-Identifier: Apache-2.0
"""The bus: devices of offered channels, drivers of user processes, and who is bound to whom.

A device has a queue of its own for what waits for drivers (bind, unbind, removal), so that a probe that waits for its host holds
up nobody else, and a removal comes behind the probe that it ends. Names are given in the order of the offers and never again.
Pure: drivers are called by yielding Probe, Remove and Shutdown; uevents and log lines leave through what is handed in.
"""

from __future__ import annotations

import errno
from collections import deque
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from pvbus.actors.runtime.vmbus_facts import modalias
from pvbus.actors.workqueue.channel import ChannelState
from pvbus.actors.workqueue.connection import failed
from pvbus.actors.workqueue.waits import Probe, Remove, Shutdown, Steps, Until

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from pvbus.actors.workqueue.channel import Channel
    from pvbus.actors.workqueue.channels import Channels

GUID_BYTES = 16
NULL_GUID = bytes(GUID_BYTES)
IDS_MAX = 256
NAME_BYTES_MAX = 4095
"""Of a driver, and in driver_override: less than a page, as a file of sysfs takes. Calls with names in them fit a frame."""
UEVENT_BYTES_MAX = 2048
"""Room for the variables of one uevent in the kernel."""

PARENT = "/devices/VMBUS:00"
BUS = "/bus/vmbus"


@dataclass(eq=False, slots=True)
class Driver:
    """A driver of a user process. The table ends with the null GUID."""

    name: str
    id_table: Sequence[bytes]
    owner: object = None            # whose it is: told to whoever answers Probe, Remove and Shutdown
    has_probe: bool = True
    has_remove: bool = True
    has_shutdown: bool = True
    new_ids: list[bytes] = field(default_factory=list)  # that were written to its file new_id

    @property
    def devpath(self) -> str:
        """Where it stands in sysfs."""
        return f"{BUS}/drivers/{self.name}"


@dataclass(eq=False, slots=True)
class Device:
    """A device of the bus: a channel that has been offered."""

    number: int
    channel: Channel
    driver: Driver | None = None
    driver_override: str = ""
    removed: bool = False
    work: deque[Steps[None]] = field(default_factory=deque)
    working: bool = False

    @property
    def name(self) -> str:
        """The name that it has on the bus."""
        return f"vmbus_0_{self.number}"

    @property
    def devpath(self) -> str:
        """Where it stands in sysfs."""
        return f"{PARENT}/{self.name}"


def is_null_guid(guid: bytes) -> bool:
    """Mirror is_null_guid (B3.2)."""
    return guid == NULL_GUID


def get_id(driver: Driver, class_id: bytes) -> bytes | None:
    """Mirror hv_vmbus_get_id (B3.3): the first entry that is equal, up to the terminator."""
    for guid in driver.id_table:
        if is_null_guid(guid):
            return None
        if guid == class_id:
            return guid
    return None


def matching_id(driver: Driver, class_id: bytes) -> bytes | None:
    """Find a class in what the driver takes: ids that were added since, then its table."""
    return class_id if class_id in driver.new_ids else get_id(driver, class_id)


def match(driver: Driver, device: Device) -> bool:
    """Mirror vmbus_match (B3.4). A device with a driver_override takes that driver only, and whatever its table says."""
    if device.driver_override:
        return device.driver_override == driver.name
    return matching_id(driver, device.channel.offer.class_id.bytes_le) is not None


def uevent(device: Device, action: str, driver: Driver | None, synthetic: Sequence[str] = ()) -> list[str]:
    """Mirror vmbus_uevent (B3.1), with what the kernel puts before it. ENOMEM: more than there is room for.

    `synthetic`: what is said of one that a program has asked for.
    """
    variables = [f"ACTION={action}", f"DEVPATH={device.devpath}", "SUBSYSTEM=vmbus", *synthetic]
    variables += [f"DRIVER={driver.name}"] if driver is not None else []
    return checked([*variables, "MODALIAS=" + modalias(device.channel.offer.class_id)])


def checked(variables: list[str]) -> list[str]:
    """Give the variables of a uevent back. ENOMEM: more than there is room for."""
    if sum(len(text.encode()) + 1 for text in variables) > UEVENT_BYTES_MAX:
        raise failed(errno.ENOMEM)
    return variables


class Bus:
    """All devices and drivers of a guest."""

    def __init__(
        self, channels: Channels, spawn: Callable[[Steps[Any]], None], log: Callable[[str], None],
        send_uevent: Callable[[list[str]], None],
    ) -> None:  # fmt: skip
        self._channels, self._spawn, self._log, self._send_uevent = channels, spawn, log, send_uevent
        self.exists = False     # vmbus_exists (B1.2): discovery.py has found the ACPI device
        self.registered = False
        self.autoprobe = True   # drivers_autoprobe: whether devices and drivers that are new are tried by themselves
        self.devices: dict[str, Device] = {}
        self.drivers: dict[str, Driver] = {}
        self._last_number = 0
        channels.devices = self

    # ----------------------------------------------------------------------------------------------- devices

    def offered(self, channel: Channel) -> None:
        """Mirror vmbus_device_create and vmbus_device_register (B7.5, B7.6); who drives it is found out behind it."""
        self._last_number += 1
        device = Device(self._last_number, channel)
        self.devices[device.name] = device
        self._emit(device, "add")
        self._log(f"child device {device.name} registered")
        if self.autoprobe:
            self._queue(device, self._bind(device))

    def rescinded(self, channel: Channel) -> None:
        """Mirror vmbus_device_unregister (B7.7): remove, uevent, then the relid is released. Once a channel."""
        for device in list(self.devices.values()):
            if device.channel is channel and not device.removed:
                device.removed = True
                self._queue(device, self._delete(device))

    def after(self, channel: Channel, call: Callable[[], None]) -> None:
        """Call when the device of a channel has done all that is queued with it; at once without a device."""
        def steps() -> Steps[None]:
            call()
            yield Until(lambda: True)

        device = next((one for one in self.devices.values() if one.channel is channel and not one.removed), None)
        if device is None:
            call()
        else:
            self._queue(device, steps())

    def _delete(self, device: Device) -> Steps[None]:
        yield from self._unbind(device)
        del self.devices[device.name]
        self._emit(device, "remove")
        self._log(f"child device {device.name} unregistered")
        yield from self._channels.release(device.channel)

    def _queue(self, device: Device, steps: Steps[None]) -> None:
        device.work.append(steps)
        if not device.working:
            device.working = True
            self._spawn(self._work(device))

    def _work(self, device: Device) -> Steps[None]:
        while device.work:
            try:
                yield from device.work.popleft()
            except OSError as error:    # the next in the queue is another's concern
                self._log(f"{device.name}: {error}")
        device.working = False

    def _emit(self, device: Device, action: str, driver: Driver | None = None) -> None:
        try:
            self._send_uevent(uevent(device, action, driver or device.driver))
        except OSError as error:
            self._log(f"{device.name}: no uevent {action}: {error}")

    def _emit_driver(self, driver: Driver, action: str) -> None:
        try:
            self._send_uevent(checked([f"ACTION={action}", f"DEVPATH={driver.devpath}", "SUBSYSTEM=drivers"]))
        except OSError as error:
            self._log(f"driver {driver.name}: no uevent {action}: {error}")

    # --------------------------------------------------------------------------------------- bind and unbind

    def _bind(self, device: Device, only: Driver | None = None) -> Steps[None]:
        for driver in [only] if only is not None else list(self.drivers.values()):
            if device.removed or device.driver is not None:
                return
            if self.drivers.get(driver.name) is not driver or not match(driver, device):
                continue
            if (yield from self._probe(driver, device)) == 0:
                self._emit(device, "bind")

    def attach(self, driver: Driver, device: Device) -> Steps[None]:
        """Bind one device to one driver, as a write to its `bind` asks: ENODEV unless they match, EBUSY, what its probe says."""

        def steps() -> Steps[None]:
            if device.removed or self.drivers.get(driver.name) is not driver or not match(driver, device):
                raise failed(errno.ENODEV)
            if device.driver is not None:
                raise failed(errno.EBUSY, f"{device.name} has driver {device.driver.name}")
            if status := (yield from self._probe(driver, device)):
                raise failed(status)
            self._emit(device, "bind")

        yield from self._in_turn(device, steps())

    def add_id(self, driver: Driver, class_id: bytes) -> Steps[None]:
        """Have a driver take one more class, as a write to its `new_id` asks, and try its devices. EINVAL, EEXIST, ENOMEM."""
        if is_null_guid(class_id):
            raise failed(errno.EINVAL)
        if matching_id(driver, class_id) is not None:
            raise failed(errno.EEXIST)
        if len(driver.new_ids) >= IDS_MAX:
            raise failed(errno.ENOMEM)
        driver.new_ids.append(class_id)
        yield from self._on_each(list(self.devices.values()), lambda device: self._bind(device, driver))

    def remove_id(self, driver: Driver, class_id: bytes) -> None:
        """Have it take a class no more that was added; who is bound stays so. ENODEV."""
        if class_id not in driver.new_ids:
            raise failed(errno.ENODEV)
        driver.new_ids.remove(class_id)

    def detach(self, driver: Driver, device: Device) -> Steps[None]:
        """Take a device from its driver, as a write to `unbind` asks: ENODEV when it is another's, or nobody's."""

        def steps() -> Steps[None]:
            if device.driver is not driver:
                raise failed(errno.ENODEV)
            yield from self._unbind(device)

        yield from self._in_turn(device, steps())

    def rescan(self, device: Device) -> Steps[None]:
        """Find a driver for a device that has none, as a write to drivers_probe asks. That there is none is no failure."""
        yield from self._in_turn(device, self._bind(device))

    def _in_turn(self, device: Device, steps: Steps[None]) -> Steps[None]:
        """Queue something with a device, wait until it is done, and have its error."""
        ends: list[OSError | None] = []

        def kept() -> Steps[None]:
            try:
                yield from steps
            except OSError as error:
                ends.append(error)
            else:
                ends.append(None)

        self._queue(device, kept())
        yield Until(lambda: bool(ends))
        if ends[0] is not None:
            raise ends[0]

    def _probe(self, driver: Driver, device: Device) -> Steps[int]:
        """Mirror vmbus_probe (B3.5)."""
        matched = matching_id(driver, device.channel.offer.class_id.bytes_le)
        if not driver.has_probe:
            self._log(f"driver not set for {device.name}")
            return errno.ENODEV
        device.driver = driver
        status: int = yield Probe(driver, device, matched)
        if status:
            self._log(f"probe failed for device {device.name} ({status})")
            yield from self._quiet(device)
            device.driver = None
        return status

    def _unbind(self, device: Device) -> Steps[None]:
        """Mirror vmbus_remove (B3.6): what the driver's remove answers is ignored; a channel that it leaves open is closed."""
        driver = device.driver
        if driver is None:
            return
        if driver.has_remove:
            yield Remove(driver, device)
        else:
            self._log(f"remove not set for {device.name}")
        yield from self._quiet(device)
        device.driver = None
        self._emit(device, "unbind", driver)

    def _quiet(self, device: Device) -> Steps[None]:
        channel = device.channel
        yield Until(lambda: channel.busy == 0)
        if channel.state is ChannelState.OPENED:
            yield from self._channels.close(channel)

    # ----------------------------------------------------------------------------------------------- drivers

    def register(self, driver: Driver) -> Steps[None]:
        """Mirror vmbus_child_driver_register (B7.1 to B7.3): ENODEV, EBUSY for a name that is taken, EINVAL for a bad table.

        Every device without a driver has been offered to it when this returns; probes that fail do not fail it. Offers are
        requested again in any case, and repeated ones are dropped.
        """
        self._log(f"registering driver {driver.name}")
        if not self.exists:
            raise failed(errno.ENODEV)
        error = self._register_error(driver)
        if error is None:
            self.drivers[driver.name] = driver
            if self.autoprobe:
                yield from self._on_each(list(self.devices.values()), lambda device: self._bind(device, driver))
            self._emit_driver(driver, "add")
        try:
            yield from self._channels.connection.request_offers()
        except OSError as failure:
            self._log(f"{driver.name}: offers not requested: {failure}")
        if error is not None:
            raise error

    def _register_error(self, driver: Driver) -> OSError | None:
        table = list(driver.id_table)
        if not 0 < len(table) <= IDS_MAX or any(len(guid) != GUID_BYTES for guid in table) or not is_null_guid(table[-1]):
            return failed(errno.EINVAL, f"{driver.name}: a table of 16-byte GUIDs ends with a null GUID")
        if driver.name in ("", ".", "..") or set(driver.name) & set("/\0\n") or len(driver.name.encode()) > NAME_BYTES_MAX:
            return failed(errno.EINVAL, f"{driver.name[:NAME_BYTES_MAX]!r} is no name of a driver")
        return failed(errno.EBUSY, f"driver {driver.name} is registered") if driver.name in self.drivers else None

    def unregister(self, driver: Driver) -> Steps[None]:
        """Mirror vmbus_driver_unregister (B7.4): it is removed from every device that it is bound to."""
        self._log(f"unregistering driver {driver.name}")
        if not self.exists or self.drivers.get(driver.name) is not driver:
            return
        del self.drivers[driver.name]
        yield from self._on_each(list(self.devices.values()), lambda device: self._unbind_from(device, driver))
        self._emit_driver(driver, "remove")

    def _unbind_from(self, device: Device, driver: Driver) -> Steps[None]:
        if device.driver is driver:
            yield from self._unbind(device)

    def _on_each(self, devices: Sequence[Device], steps: Callable[[Device], Steps[None]]) -> Steps[None]:
        """Queue something with every device, and wait until it is done everywhere."""
        left = len(devices)

        def counted(device: Device) -> Steps[None]:
            nonlocal left
            try:
                yield from steps(device)
            finally:
                left -= 1

        for device in devices:
            self._queue(device, counted(device))
        yield Until(lambda: left == 0)

    def shutdown(self) -> Steps[None]:
        """Mirror vmbus_shutdown (B3.7) for every device: those without a driver, or whose driver has none, hear nothing."""
        for device in list(self.devices.values()):
            if device.driver is not None and device.driver.has_shutdown:
                yield Shutdown(device.driver, device)

    def remove_all(self) -> Steps[None]:
        """Mirror vmbus_free_channels (X16), each device once (H8)."""
        self._channels.reset()
        yield Until(lambda: not self.devices and self._channels.unreleased == 0)

    def override(self, device: Device, name: str) -> None:
        """Mirror driver_override_store: who may drive the device from the next match on; empty: whoever matches. EINVAL."""
        if len(name.encode()) > NAME_BYTES_MAX:
            raise failed(errno.EINVAL)
        device.driver_override = name.rstrip("\n")
