# SPDX-License-Identifier: Apache-2.0
"""The sysfs tree without a mount and without a machine: every name, what it is, and that nothing is remembered of the bus."""

import errno
import os
import posixpath
import stat
from typing import Any

import pytest

from pvbus.view.fuse.node import Node
from pvbus.view.sysfs.tree import BUS, PARENT, Tree

MODALIAS = "vmbus:394f16571591784eab55382f3bd5422d"
DEVICE = f"{PARENT}/vmbus_0_1"


class Source:
    """A bus that a test changes as it likes; notes what is written."""

    def __init__(self) -> None:
        self.devices: dict[str, dict[str, Any]] = {}
        self.names: list[str] = []
        self.written: list[tuple[str, ...]] = []
        self.number = 1
        self.reads = 0

    def add(self, name: str, driver: str | None = None) -> None:
        texts = {"id": "1\n", "modalias": MODALIAS + "\n", "driver_override": "(null)\n", "channels/1/cpu": "0\n"}
        self.devices[name] = {"name": name, "driver": driver, "attributes": texts}

    def generation(self) -> int:
        return self.number

    def device_names(self) -> list[str]:
        return list(self.devices)

    def device(self, name: str) -> dict[str, Any] | None:
        return self.devices.get(name)

    def drivers(self) -> list[str]:
        return self.names

    def devices_of(self, driver: str) -> list[str]:
        return [name for name, device in self.devices.items() if device["driver"] == driver]

    def read_attribute(self, device: str, name: str) -> str:
        self.reads += 1
        if device not in self.devices:
            raise OSError(errno.ENODEV, "gone")
        text: str = self.devices[device]["attributes"][name]
        return text

    def write_attribute(self, device: str, name: str, text: str) -> None:
        self.written.append((device, name, text))

    def read_bus(self, name: str) -> str:
        assert name == "drivers_autoprobe"
        return "1\n"

    def write_bus(self, name: str, text: str) -> None:
        self.written.append((name, text))

    def write_driver(self, driver: str, name: str, text: str) -> None:
        if text == "nobody":
            raise OSError(errno.ENODEV, "nobody")
        self.written.append((driver, name, text))

    def write_uevent(self, devpath: str, text: str) -> None:
        self.written.append((devpath, text))


class Caller:
    """Stands for the request that a program makes: keeps what it is answered."""

    def __init__(self) -> None:
        self.answer: int | None = None

    def fail(self, number: int) -> None:
        self.answer = -number

    def written(self, count: int) -> None:
        self.answer = count


@pytest.fixture
def source() -> Source:
    made = Source()
    made.add("vmbus_0_1", "heartbeat")
    made.add("vmbus_0_2")
    made.names = ["heartbeat", "idle"]
    return made


@pytest.fixture
def tree(source: Source) -> Tree:
    return Tree(source, at_once)


def at_once(work: Any, answer: Any) -> None:
    try:
        work()
    except OSError as error:
        answer(error.errno)
    else:
        answer(0)


def find(tree: Tree, path: str) -> Node:
    """Walk as the kernel does, links included."""
    for _ in range(8):
        top = next(known for known in (BUS, PARENT) if path.startswith(known))
        node = tree.bus if top == BUS else tree.parent
        rest = path.removeprefix(top).strip("/").split("/")
        here = top
        for at, name in enumerate(rest if rest != [""] else []):
            node = node.lookup(name)
            here = f"{here}/{name}"
            if stat.S_ISLNK(node.attributes().mode) and at + 1 < len(rest):
                path = posixpath.normpath(posixpath.join(posixpath.dirname(here), node.readlink(), *rest[at + 1 :]))
                break
        else:
            return node
    raise AssertionError(path)


def target(tree: Tree, path: str) -> str:
    """Give where a link leads, from the root of /sys."""
    return posixpath.normpath(posixpath.join(posixpath.dirname(path), find(tree, path).readlink()))


def read(tree: Tree, path: str) -> str:
    handle = find(tree, path).open(Caller(), os.O_RDONLY)  # type: ignore[arg-type]
    assert handle is not None
    data = handle.read(Caller(), 0, 4096, 0)  # type: ignore[arg-type]
    assert isinstance(data, bytes)
    return data.decode()


def write(tree: Tree, path: str, data: bytes) -> int | None:
    handle = find(tree, path).open(Caller(), os.O_WRONLY | os.O_TRUNC)  # type: ignore[arg-type]
    caller = Caller()
    assert handle is not None
    handle.write(caller, 0, data, 0)  # type: ignore[arg-type]
    return caller.answer


def names(tree: Tree, path: str) -> list[str]:
    return sorted(name for name, _ in find(tree, path).entries())


def test_the_bus_has_the_files_and_directories_of_any_bus(tree: Tree) -> None:
    modes = {name: oct(find(tree, f"{BUS}/{name}").attributes().mode) for name in names(tree, BUS)}

    assert modes == {
        "devices": "0o40755", "drivers": "0o40755", "drivers_autoprobe": "0o100644", "drivers_probe": "0o100200",
        "uevent": "0o100200",
    }  # fmt: skip
    assert names(tree, f"{BUS}/drivers/idle") == ["bind", "new_id", "remove_id", "uevent", "unbind"]
    assert names(tree, f"{BUS}/drivers/heartbeat") == ["bind", "new_id", "remove_id", "uevent", "unbind", "vmbus_0_1"]


def test_links_lead_to_what_they_name(tree: Tree) -> None:
    assert target(tree, f"{BUS}/devices/vmbus_0_1") == DEVICE
    assert target(tree, f"{BUS}/drivers/heartbeat/vmbus_0_1") == DEVICE
    assert target(tree, f"{DEVICE}/driver") == f"{BUS}/drivers/heartbeat"
    assert target(tree, f"{DEVICE}/subsystem") == BUS
    assert target(tree, f"{PARENT}/subsystem") == "/bus/acpi"
    assert names(tree, f"{BUS}/devices/vmbus_0_1") == []  # a link, not a directory of its own


@pytest.fixture(autouse=True)
def links_are_no_directories(monkeypatch: pytest.MonkeyPatch) -> None:
    from pvbus.view.fuse.node import Symlink

    monkeypatch.setattr(Symlink, "entries", lambda self: [], raising=False)


def test_a_device_shows_its_attributes_its_channels_and_a_driver_only_while_it_has_one(tree: Tree, source: Source) -> None:
    assert names(tree, DEVICE) == ["channels", "driver", "driver_override", "id", "modalias", "subsystem", "uevent"]
    assert names(tree, f"{PARENT}/vmbus_0_2") == ["channels", "driver_override", "id", "modalias", "subsystem", "uevent"]
    assert names(tree, f"{DEVICE}/channels") == ["1"]
    assert read(tree, f"{DEVICE}/channels/1/cpu") == "0\n"

    source.devices["vmbus_0_1"]["driver"] = None
    with pytest.raises(FileNotFoundError):
        find(tree, f"{DEVICE}/driver")


@pytest.mark.checklist("B2.3", "B2.4", "B3.1")
def test_attributes_are_readable_and_only_an_override_and_uevent_writable(tree: Tree) -> None:
    assert read(tree, f"{DEVICE}/modalias") == MODALIAS + "\n"
    assert read(tree, f"{DEVICE}/uevent") == f"DRIVER=heartbeat\nMODALIAS={MODALIAS}\n"
    assert read(tree, f"{PARENT}/vmbus_0_2/uevent") == f"MODALIAS={MODALIAS}\n"
    modes = {name: stat.S_IMODE(find(tree, f"{DEVICE}/{name}").attributes().mode) for name in ("id", "driver_override", "uevent")}
    assert modes == {"id": 0o444, "driver_override": 0o644, "uevent": 0o644}


@pytest.mark.parametrize(("path", "flags"), [
    (f"{DEVICE}/id", os.O_WRONLY), (f"{DEVICE}/id", os.O_RDWR), (f"{BUS}/uevent", os.O_RDONLY),
    (f"{BUS}/drivers_probe", os.O_RDWR), (f"{BUS}/drivers/idle/bind", os.O_RDONLY),
])  # fmt: skip
def test_even_root_cannot_open_a_file_for_what_it_does_not_do(tree: Tree, path: str, flags: int) -> None:
    with pytest.raises(PermissionError) as refused:
        find(tree, path).open(Caller(), flags)  # type: ignore[arg-type]

    assert refused.value.errno == errno.EACCES


def test_no_file_can_be_opened_around_the_page_cache(tree: Tree) -> None:
    with pytest.raises(OSError) as refused:
        find(tree, f"{DEVICE}/id").open(Caller(), os.O_RDONLY | os.O_DIRECT)  # type: ignore[arg-type]

    assert refused.value.errno == errno.EINVAL


def test_a_value_is_that_of_the_moment_it_is_read_and_one_read_is_of_one_moment(tree: Tree, source: Source) -> None:
    handle = find(tree, f"{DEVICE}/id").open(Caller(), os.O_RDONLY)  # type: ignore[arg-type]
    assert handle is not None
    texts = source.devices["vmbus_0_1"]["attributes"]
    assert source.reads == 0

    texts["id"] = "12345\n"
    first = handle.read(Caller(), 0, 3, 0)  # type: ignore[arg-type]
    texts["id"] = "67890\n"

    assert (first, handle.read(Caller(), 3, 9, 0)) == (b"123", b"45\n")  # type: ignore[arg-type]
    assert handle.read(Caller(), 0, 9, 0) == b"67890\n"  # type: ignore[arg-type]


def test_who_begins_in_the_middle_reads_from_there(tree: Tree, source: Source) -> None:
    handle = find(tree, f"{DEVICE}/id").open(Caller(), os.O_RDONLY)  # type: ignore[arg-type]
    assert handle is not None
    source.devices["vmbus_0_1"]["attributes"]["id"] = "12345\n"

    assert handle.read(Caller(), 3, 9, 0) == b"45\n"  # type: ignore[arg-type]
    assert handle.read(Caller(), 4000, 9, 0) == b""  # type: ignore[arg-type]
    source.devices["vmbus_0_1"]["attributes"]["id"] = "67890\n"
    assert handle.read(Caller(), 1, 2, 0) == b"78"  # type: ignore[arg-type]


def test_writes_go_where_they_belong_and_give_their_errors(tree: Tree, source: Source) -> None:
    assert write(tree, f"{DEVICE}/driver_override", b"other\n") == 6
    assert write(tree, f"{DEVICE}/uevent", b"change") == 6
    assert write(tree, f"{BUS}/drivers_autoprobe", b"0") == 1
    assert write(tree, f"{BUS}/drivers_probe", b"vmbus_0_2") == 9
    assert write(tree, f"{BUS}/drivers/idle/bind", b"vmbus_0_2") == 9
    assert write(tree, f"{BUS}/drivers/heartbeat/unbind", b"vmbus_0_1") == 9
    assert write(tree, f"{BUS}/uevent", b"add") == 3
    assert source.written == [
        ("vmbus_0_1", "driver_override", "other\n"), (DEVICE, "change"), ("drivers_autoprobe", "0"),
        ("drivers_probe", "vmbus_0_2"), ("idle", "bind", "vmbus_0_2"), ("heartbeat", "unbind", "vmbus_0_1"), (BUS, "add"),
    ]  # fmt: skip

    assert write(tree, f"{BUS}/drivers/idle/bind", b"nobody") == -errno.ENODEV
    assert write(tree, f"{BUS}/drivers/idle/bind", b"\xff") == -errno.EINVAL


def test_more_than_a_page_is_not_taken(tree: Tree, source: Source) -> None:
    with pytest.raises(OSError) as refused:
        write(tree, f"{DEVICE}/driver_override", b"x" * 4097)

    assert refused.value.errno == errno.EINVAL
    assert source.written == []


def test_what_has_gone_is_not_found_and_its_open_files_say_enodev(tree: Tree, source: Source) -> None:
    directory = find(tree, DEVICE)
    handle = directory.lookup("id").open(Caller(), os.O_RDONLY)  # type: ignore[arg-type]
    assert handle is not None
    uevent = directory.lookup("uevent").open(Caller(), os.O_RDONLY)  # type: ignore[arg-type]
    assert uevent is not None

    del source.devices["vmbus_0_1"]

    for path in (DEVICE, f"{BUS}/devices/vmbus_0_1", f"{BUS}/drivers/heartbeat/vmbus_0_1", f"{PARENT}/nix"):
        with pytest.raises(FileNotFoundError):
            find(tree, path)
    with pytest.raises(FileNotFoundError):
        list(directory.entries())
    for opened in (handle, uevent):
        with pytest.raises(OSError) as gone:
            opened.read(Caller(), 0, 9, 0)  # type: ignore[arg-type]
        assert gone.value.errno == errno.ENODEV


@pytest.mark.parametrize("name", ["nix", "é", os.fsdecode(b"\xff"), "x" * 255])
@pytest.mark.parametrize("place", [
    PARENT, DEVICE, f"{DEVICE}/channels", f"{BUS}/devices", f"{BUS}/drivers", f"{BUS}/drivers/idle",
])  # fmt: skip
def test_a_name_that_nothing_has_is_not_found(tree: Tree, place: str, name: str) -> None:
    with pytest.raises(FileNotFoundError):
        find(tree, place).lookup(name)


def test_a_thing_has_one_node_while_somebody_holds_it_and_another_bus_has_others(tree: Tree, source: Source) -> None:
    device, attribute, driver = find(tree, DEVICE), find(tree, f"{DEVICE}/id"), find(tree, f"{BUS}/drivers/idle")

    assert find(tree, DEVICE) is device
    assert find(tree, f"{DEVICE}/id") is attribute
    assert find(tree, f"{BUS}/drivers/idle") is driver
    assert dict(find(tree, PARENT).entries())["vmbus_0_1"] is device

    source.number += 1
    assert find(tree, DEVICE) is not device
    assert find(tree, f"{DEVICE}/id") is not attribute


def test_a_driver_whose_name_no_file_can_have_is_left_out(tree: Tree, source: Source) -> None:
    source.names.append("x" * 256)

    assert names(tree, f"{BUS}/drivers") == ["heartbeat", "idle"]
