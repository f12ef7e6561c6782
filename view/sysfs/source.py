# SPDX-License-Identifier: Apache-2.0
"""What the tree shows and what the uevents tell, from one connection to a domain's bus.

When the bus's process dies its heir brings the bus up anew: devices get new names, or old names that mean others. Whoever listens
hears that as a guest would that loses its bus and finds it again: each device is removed, and what is offered then is added.
"""

from __future__ import annotations

import sys
import threading
from typing import TYPE_CHECKING, Any

from pvbus.actors.client import MachineNotFoundError

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping

    from pvbus.actors.client import Machine
    from pvbus.actors.client.vmbus import Bus

HEIR_LOOK_S = 0.1   # how often a bus that has gone is asked for: an heir takes some tenths of a second


class BusSource:
    """A domain's bus, for a `Tree`; `send` gets each uevent, in order, in one thread at a time."""

    def __init__(self, machine: Machine, domain: int, send: Callable[[Mapping[str, str]], None]) -> None:
        self._machine, self._domain, self._send = machine, domain, send
        self._lock = threading.Lock()   # over what has been told
        self._told: dict[str, dict[str, str]] = {}  # by devpath: the variables of its last uevent
        self._gone: set[str] = set()    # who was removed while the bus was being listed
        self._generation = 0
        self._ended = threading.Event()
        self._bus = self._connect(silently=True)
        self._watcher = threading.Thread(target=self._watch, name="pvbus-uevents", daemon=True)
        self._watcher.start()

    # ---- the connection

    def _connect(self, *, silently: bool) -> Bus:
        """Find the bus. What is on it is told, unless everybody must find out for himself, as at the start."""
        bus = self._machine.bus(self._domain)
        with self._lock:
            self._generation += 1
            self._bus = bus
            self._gone.clear()
            bus.listen(lambda variables: self._heard(bus, variables))
        for device in bus.devices():
            variables = _variables(device)
            with self._lock:
                if variables["DEVPATH"] not in {*self._told, *self._gone}:     # a uevent was faster than the list
                    self._tell(variables, silently=silently)
        return bus

    def _watch(self) -> None:
        """Follow the bus from heir to heir."""
        while not self._ended.is_set():
            if not self._bus.wait_gone(None) or self._ended.is_set():
                return
            with self._lock:
                for variables in list(self._told.values()):
                    self._tell({**variables, "ACTION": "remove"})
            while not self._ended.wait(HEIR_LOOK_S):
                try:
                    self._connect(silently=False)
                except MachineNotFoundError:
                    return
                except OSError:     # it is not there yet, or not any more: both end
                    continue
                break

    def _heard(self, bus: Bus, variables: dict[str, str]) -> None:
        with self._lock:
            if bus is self._bus:
                self._tell(variables)

    def _tell(self, variables: dict[str, str], *, silently: bool = False) -> None:
        """Send a uevent, and remember whom it was about. The caller holds the lock."""
        if variables.get("SUBSYSTEM") == "vmbus" and "SYNTH_UUID" not in variables:
            if variables["ACTION"] == "remove":
                self._told.pop(variables["DEVPATH"], None)
                self._gone.add(variables["DEVPATH"])
            else:
                self._told[variables["DEVPATH"]] = {**variables, "ACTION": "add"}
        if silently:
            return
        try:
            self._send(variables)
        except OSError as error:
            print(f"pvbus: uevent {variables['ACTION']}@{variables['DEVPATH']} is lost: {error.strerror}", file=sys.stderr)

    def close(self) -> None:
        """Follow no further. The machine is the caller's to close."""
        self._ended.set()

    # ---- Source

    def generation(self) -> int:
        """Number the bus."""
        return self._generation

    def device_names(self) -> list[str]:
        """Give the names of all devices."""
        return [device["name"] for device in self._bus.devices()]

    def device(self, name: str) -> dict[str, Any] | None:
        """Describe a device."""
        return self._bus.device(name)

    def drivers(self) -> list[str]:
        """Give the names of all drivers."""
        return self._bus.drivers()

    def devices_of(self, driver: str) -> list[str]:
        """Give the names of a driver's devices."""
        return [device["name"] for device in self._bus.devices() if device["driver"] == driver]

    def read_attribute(self, device: str, name: str) -> str:
        """Read a device's attribute."""
        return self._bus.read_attribute(device, name)

    def write_attribute(self, device: str, name: str, text: str) -> None:
        """Write a device's attribute."""
        self._bus.write_attribute(device, name, text)

    def read_bus(self, name: str) -> str:
        """Read drivers_autoprobe."""
        return self._bus.read_bus(name)

    def write_bus(self, name: str, text: str) -> None:
        """Write drivers_autoprobe or drivers_probe."""
        self._bus.write_bus(name, text)

    def write_driver(self, driver: str, name: str, text: str) -> None:
        """Write a driver's bind or unbind."""
        self._bus.write_driver(driver, name, text)

    def write_uevent(self, devpath: str, text: str) -> None:
        """Write the file uevent of what stands at `devpath`."""
        self._bus.write_uevent(devpath, text)


def _variables(device: dict[str, Any]) -> dict[str, str]:
    """Give what an `add` of a device says."""
    driver = {"DRIVER": device["driver"]} if device["driver"] is not None else {}
    return {
        "ACTION": "add", "DEVPATH": f"/devices/VMBUS:00/{device['name']}", "SUBSYSTEM": "vmbus", **driver,
        "MODALIAS": device["attributes"]["modalias"].rstrip("\n"),
    }  # fmt: skip
