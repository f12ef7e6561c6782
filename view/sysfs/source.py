# SPDX-License-Identifier: Apache-2.0
"""What the tree shows and what the uevents tell, from one connection to a domain's bus.

When the bus's process dies its heir brings the bus up anew: devices get new names, or old names that mean others. Whoever listens
hears that as a guest would that loses its bus and finds it again: each device is removed, and what is offered then is added.
"""

from __future__ import annotations

import sys
import threading
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping

    from pvbus.actors.client import Machine


class BusSource:
    """A domain's bus, for a `Tree`; `send` gets each uevent, in order, one at a time."""

    def __init__(self, machine: Machine, domain: int, send: Callable[[Mapping[str, str]], None]) -> None:
        self._send = send
        self._lock = threading.Lock()   # over what has been told
        self._told: dict[str, dict[str, str]] = {}  # by devpath: the variables of its last uevent
        self._gone: set[str] | None = None  # while the bus is being listed: who was removed meanwhile
        self._closed = False
        self._bus = machine.bus(domain)
        self._bus.listen(self._heard, self._died, self._come_back)
        self._look(silently=True)   # who starts now looks for himself

    # ---- the connection

    def _look(self, *, silently: bool) -> None:
        """Tell of what is on the bus and has not been told of."""
        with self._lock:
            gone: set[str] = set()
            self._gone = gone
        try:
            for device in self._bus.devices():
                variables = _variables(device)
                with self._lock:
                    if variables["DEVPATH"] not in {*self._told, *gone}:     # a uevent was faster than the list
                        self._tell(variables, silently=silently)
        finally:
            self._gone = None

    def _heard(self, variables: dict[str, str]) -> None:
        with self._lock:
            self._tell(variables)

    def _died(self) -> None:
        with self._lock:
            for variables in list(self._told.values()) if not self._closed else ():
                self._tell({**variables, "ACTION": "remove"})

    def _come_back(self) -> None:
        try:
            self._look(silently=False)
        except OSError as error:    # it has died again, and its heir comes; or it has no heir, and everybody reads EIO
            print(f"pvbus: the bus's heir cannot be looked at: {error}", file=sys.stderr)

    def _tell(self, variables: dict[str, str], *, silently: bool = False) -> None:
        """Send a uevent, and remember whom it was about. The caller holds the lock."""
        if variables.get("SUBSYSTEM") == "vmbus" and "SYNTH_UUID" not in variables:
            if variables["ACTION"] == "remove":
                self._told.pop(variables["DEVPATH"], None)
                if self._gone is not None:
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
        """Tell nobody any more. The machine is the caller's to close."""
        self._closed = True

    # ---- Source

    def generation(self) -> int:
        """Number the bus."""
        return self._bus.generation

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
