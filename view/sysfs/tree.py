# SPDX-License-Identifier: Apache-2.0
"""The sysfs tree of a domain's VMBus: which name stands where, what it is, and where its content comes from.

    /sys/bus/vmbus          devices/NAME ->, drivers/DRIVER/{NAME ->, bind, unbind, new_id, remove_id, uevent},
                            drivers_autoprobe, drivers_probe, uevent
    /sys/devices/VMBUS:00   NAME/{the attributes, channels/RELID/…, uevent, subsystem ->, driver ->}, uevent, subsystem ->, …

Nothing is remembered of the bus: each look asks `Source`, each read gives the value of now. What is remembered is which node
stands for which thing, for as long as somebody holds it: names of devices are not used again, so the node of one that has gone
stays dead. Pure: knows no mount and no connection.
"""

from __future__ import annotations

import errno
import functools
import weakref
from typing import TYPE_CHECKING, Any, Protocol, TypeVar

from pvbus.view.fuse.abi import NAME_BYTES_MAX
from pvbus.view.fuse.node import Directory, Node, Symlink, Text, error
from pvbus.view.sysfs.late import LateText

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable

    from pvbus.view.sysfs.late import Later

BUS = "/bus/vmbus"
PARENT = "/devices/VMBUS:00"
WRITABLE = {"driver_override"}
PARENT_TEXTS = {"hid": "VMBUS\n", "modalias": "acpi:VMBUS:\n"}

Some = TypeVar("Some", bound=Node)


class Source(Protocol):
    """Where the values come from. OSError goes to the reader as it is."""

    def generation(self) -> int:
        """Number the bus: another number, and names stand for other devices."""

    def device_names(self) -> list[str]:
        """Give the names of all devices."""

    def device(self, name: str) -> dict[str, Any] | None:
        """Describe a device: `driver`, a name or None, and `attributes`, texts by their paths. None when there is none."""

    def drivers(self) -> list[str]:
        """Give the names of all drivers."""

    def devices_of(self, driver: str) -> list[str]:
        """Give the names of a driver's devices."""

    def read_attribute(self, device: str, name: str) -> str:
        """Read a device's attribute. ENODEV, ENOENT."""

    def write_attribute(self, device: str, name: str, text: str) -> None:
        """Write a device's attribute."""

    def read_bus(self, name: str) -> str:
        """Read drivers_autoprobe."""

    def write_bus(self, name: str, text: str) -> None:
        """Write drivers_autoprobe or drivers_probe."""

    def write_driver(self, driver: str, name: str, text: str) -> None:
        """Write a driver's bind or unbind."""

    def write_uevent(self, devpath: str, text: str) -> None:
        """Write the file uevent of what stands at `devpath`."""


class Tree:
    """Both subtrees: `bus` is for /sys/bus/vmbus, `parent` for /sys/devices/VMBUS:00. `later` runs writes that may wait."""

    def __init__(self, source: Source, later: Later) -> None:
        self.source, self._later = source, later
        self._nodes: weakref.WeakValueDictionary[tuple[object, ...], Node] = weakref.WeakValueDictionary()
        self.bus: Node = _BusDirectory(self)
        self.parent: Node = _ParentDirectory(self)

    def node(self, make: Callable[..., Some], *arguments: str) -> Some:
        """Give the node that stands for something; the same while anybody holds it, and the bus is the same."""
        key = (make, self.source.generation(), *arguments)
        found = self._nodes.get(key)
        if found is None:
            found = self._nodes[key] = make(self, *arguments)
        return found  # type: ignore[return-value]  # what `make` has made

    def link(self, target: str) -> Symlink:
        """Give a link; each is as good as another."""
        return self.node(_link, target)

    def text(self, show: Callable[[], str] | None, store: Callable[[str], None] | None = None) -> Text:
        """Make a file; what is written may wait."""
        return LateText(self._later, show, (lambda data: store(_decode(data))) if store is not None else None)

    def describe(self, name: str) -> dict[str, Any]:
        """Describe a device; ENOENT."""
        found = self.source.device(name)
        if found is None:
            raise error(errno.ENOENT)
        return found

    def uevent(self, devpath: str, show: Callable[[], str] | None = None) -> Text:
        """Make the file `uevent` of what stands at `devpath`."""
        return self.text(show, lambda text: self.source.write_uevent(devpath, text))


def _link(_tree: Tree, target: str) -> Symlink:
    return Symlink(target)


def _decode(data: bytes) -> str:
    """Read what a program has written. EINVAL for what is no text."""
    try:
        return data.decode()
    except UnicodeDecodeError:
        raise error(errno.EINVAL) from None


class _Made(Directory):
    """A directory whose fixed files are made once, and whose other entries are asked for. Subclasses say which those are."""

    def __init__(self, tree: Tree, fixed: dict[str, Node]) -> None:
        super().__init__(fixed)
        self.tree = tree

    def lookup(self, name: str) -> Node:
        """Give an entry; ENOENT."""
        try:
            name.encode()
        except UnicodeEncodeError:  # bytes that are no text: nothing of ours is called so, and no message could ask for it
            raise error(errno.ENOENT) from None
        found = self.children.get(name) or self.entry(name)
        if found is None:
            raise error(errno.ENOENT)
        return found

    def entries(self) -> Iterable[tuple[str, Node]]:
        """Give all entries."""
        names = (name for name in self.names() if len(name.encode()) <= NAME_BYTES_MAX)
        return [*self.children.items(), *((name, self.made(name)) for name in names)]

    def names(self) -> list[str]:
        """Ask for the names of what there is."""
        raise NotImplementedError

    def made(self, name: str) -> Node:
        """Give what stands for a name that has just been told."""
        raise NotImplementedError

    def entry(self, name: str) -> Node | None:
        """Ask whether there is such a name; give what stands for it."""
        raise NotImplementedError


# ---- /sys/bus/vmbus


class _BusDirectory(Directory):
    def __init__(self, tree: Tree) -> None:
        source = tree.source
        super().__init__({
            "devices": _DeviceLinks(tree, {}),
            "drivers": _DriversDirectory(tree, {}),
            "drivers_autoprobe": tree.text(
                functools.partial(source.read_bus, "drivers_autoprobe"), functools.partial(source.write_bus, "drivers_autoprobe")
            ),
            "drivers_probe": tree.text(None, functools.partial(source.write_bus, "drivers_probe")),
            "uevent": tree.uevent(BUS),
        })


class _DeviceLinks(_Made):
    """devices/: a link for each device."""

    def names(self) -> list[str]:
        return self.tree.source.device_names()

    def made(self, name: str) -> Node:
        return self.tree.link(f"../../..{PARENT}/{name}")

    def entry(self, name: str) -> Node | None:
        return self.made(name) if self.tree.source.device(name) is not None else None


class _DriversDirectory(_Made):
    """drivers/: a directory for each driver."""

    def names(self) -> list[str]:
        return self.tree.source.drivers()

    def made(self, name: str) -> Node:
        return self.tree.node(_DriverDirectory, name)

    def entry(self, name: str) -> Node | None:
        return self.made(name) if name in self.tree.source.drivers() else None


class _DriverDirectory(_Made):
    """drivers/DRIVER/: what binds and unbinds, what makes it take other classes, and a link for each of its devices."""

    def __init__(self, tree: Tree, name: str) -> None:
        self.name = name
        write = tree.source.write_driver
        super().__init__(tree, {
            **{file: tree.text(None, functools.partial(write, name, file)) for file in ("bind", "unbind", "new_id", "remove_id")},
            "uevent": tree.uevent(f"{BUS}/drivers/{name}"),
        })

    def names(self) -> list[str]:
        return self.tree.source.devices_of(self.name)

    def made(self, name: str) -> Node:
        return self.tree.link(f"../../../..{PARENT}/{name}")

    def entry(self, name: str) -> Node | None:
        device = self.tree.source.device(name)
        return self.made(name) if device is not None and device["driver"] == self.name else None


# ---- /sys/devices/VMBUS:00


class _ParentDirectory(_Made):
    """The ACPI device that the bus belongs to: its own few files, and a directory for each device of the bus."""

    def __init__(self, tree: Tree) -> None:
        fixed: dict[str, Node] = {name: Text(functools.partial(str, text)) for name, text in PARENT_TEXTS.items()}
        fixed["uevent"] = tree.uevent(PARENT, lambda: "MODALIAS=" + PARENT_TEXTS["modalias"])
        fixed["subsystem"] = Symlink("../../bus/acpi")
        super().__init__(tree, fixed)

    def names(self) -> list[str]:
        return self.tree.source.device_names()

    def made(self, name: str) -> Node:
        return self.tree.node(_DeviceDirectory, name)

    def entry(self, name: str) -> Node | None:
        return self.made(name) if self.tree.source.device(name) is not None else None


class _Attributes(_Made):
    """A directory of a device's attributes: what is below `head` of their paths."""

    def __init__(self, tree: Tree, device: str, head: str, fixed: dict[str, Node]) -> None:
        super().__init__(tree, fixed)
        self.device, self.head = device, head

    def entries(self) -> Iterable[tuple[str, Node]]:
        """Give all entries, of one moment."""
        device = self.tree.describe(self.device)
        below = (path.removeprefix(self.head) for path in device["attributes"] if path.startswith(self.head))
        names = dict.fromkeys([*(path.partition("/")[0] for path in below), "driver"])
        found = ((name, self.below(device, name)) for name in names)
        return [*self.children.items(), *((name, node) for name, node in found if node is not None)]

    def entry(self, name: str) -> Node | None:
        return self.below(self.tree.describe(self.device), name)

    def below(self, device: dict[str, Any], name: str) -> Node | None:
        """Give the attribute or the directory of that name."""
        path = self.head + name
        if path in device["attributes"]:
            return self.tree.node(_attribute, self.device, path)
        if any(known.startswith(path + "/") for known in device["attributes"]):
            return self.tree.node(_attributes, self.device, path)
        return None


class _DeviceDirectory(_Attributes):
    """A device: its attributes, and where it belongs."""

    def __init__(self, tree: Tree, name: str) -> None:
        uevent = tree.uevent(f"{PARENT}/{name}", self._uevent)
        super().__init__(tree, name, "", {"uevent": uevent, "subsystem": Symlink(f"../../..{BUS}")})

    def _uevent(self) -> str:
        device = self.tree.source.device(self.device)
        if device is None:
            raise error(errno.ENODEV)
        driver = f"DRIVER={device['driver']}\n" if device["driver"] is not None else ""
        return f"{driver}MODALIAS={device['attributes']['modalias']}"

    def below(self, device: dict[str, Any], name: str) -> Node | None:
        """Give an attribute, channels/, or the link to the driver."""
        if name != "driver":
            return super().below(device, name)
        return self.tree.link(f"../../..{BUS}/drivers/{device['driver']}") if device["driver"] is not None else None


def _attributes(tree: Tree, device: str, path: str) -> _Attributes:
    return _Attributes(tree, device, path + "/", {})


def _attribute(tree: Tree, device: str, path: str) -> Text:
    source = tree.source
    store = functools.partial(source.write_attribute, device, path) if path in WRITABLE else None
    return tree.text(functools.partial(source.read_attribute, device, path), store)
