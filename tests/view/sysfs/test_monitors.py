# SPDX-License-Identifier: Apache-2.0
"""Who listens for uevents: udevadm, pyudev and a systemd-udevd of its own hear what happens, as root and as an ordinary user."""

import os
import re
import sys
from pathlib import Path
from typing import Any

import pytest

from pvbus.actors.runtime.vmbus_facts import DEVICE_CLASSES, modalias
from pvbus.tests.view.sysfs.lacking import not_tested, program, system_python
from pvbus.tests.view.sysfs.rooms import BOUND_S, BUS, CONFIG, Listener, Room, offered, script, until

ECHO_MODALIAS = modalias(DEVICE_CLASSES["echo"])
PYUDEV_LISTENS = """
import pyudev
monitor = pyudev.Monitor.from_netlink(pyudev.Context(), source="{source}")
monitor.filter_by("vmbus")
monitor.start()
print("listens", flush=True)
while True:
    device = monitor.poll()
    if device is None:
        continue    # the real kernel has said something about a device of another kind
    print(device.action, device.device_path, device.properties["MODALIAS"], flush=True)
"""


def test_both_monitors_hear_add_change_and_remove_with_the_modalias(room: Room, machine: Any, tmp_path: Path) -> None:
    program("udevadm", "udev")
    python = system_python("pyudev", "python3-pyudev")
    listens = script(tmp_path, PYUDEV_LISTENS.format(source="kernel"))
    udevadm = Listener(room, tmp_path, "udevadm", "udevadm", "monitor", "--kernel", "--property", ready="KERNEL - ")
    pyudev = Listener(room, tmp_path, "pyudev", python, str(listens), ready="listens")

    name = offered(machine, "echo")
    path = f"/devices/VMBUS:00/{name}"
    pyudev.until(f"add {path} {ECHO_MODALIAS}\n")
    room.must(f"udevadm trigger --action=change --sysname-match={name}")
    pyudev.until(f"change {path} {ECHO_MODALIAS}\n")
    machine.rescind(next(row["relid"] for row in machine.devices() if row["name"] == name))
    pyudev.until(f"remove {path} {ECHO_MODALIAS}\n")

    alias = f"MODALIAS={ECHO_MODALIAS}\n"
    events = udevadm.until(f"ACTION=remove\nDEVPATH={path}\nSUBSYSTEM=vmbus\n{alias}").split("\n\n")
    pyudev.stop()
    udevadm.stop()
    ours = [event for event in events if f"DEVPATH={path}\n" in event]
    said = {re.search(r"ACTION=(\w+)", event)[1]: event for event in ours}  # type: ignore[index]
    assert set(said) == {"add", "change", "remove"}
    assert f"ACTION=add\nDEVPATH={path}\nSUBSYSTEM=vmbus\n{alias}" in said["add"]
    assert f"ACTION=change\nDEVPATH={path}\nSUBSYSTEM=vmbus\nSYNTH_UUID=0\n{alias}" in said["change"]


def test_udevd_runs_its_rules_and_tells_who_listens_to_udev(machine: Any, tmp_path: Path) -> None:
    program("udevadm", "udev")
    udevd = program("systemd-udevd", "udev")
    own = Room(machine)  # a daemon of its own, and /run/udev
    try:
        if own.do("mkdir -p /run/udev && mount -t tmpfs none /run/udev")[0]:
            not_tested("there is no /run/udev, and nobody here may make one")
        own.must(f"{udevd} --daemon")
        listener = Listener(own, tmp_path, "udev", "udevadm", "monitor", "--udev", "--property", ready="UDEV - ")

        name = offered(machine, "network")
        listener.until(f"MODALIAS={modalias(DEVICE_CLASSES['network'])}\n")
        own.must(f"udevadm trigger --action=add --sysname-match={name} --settle")

        assert "E: ID_MODEL_FROM_DATABASE=Microsoft Hyper-V" in own.must(f"udevadm info {BUS}/devices/{name}")
        listener.until("ID_MODEL_FROM_DATABASE=Microsoft Hyper-V")
    finally:
        own.close()


def test_all_of_it_works_without_rights_over_the_system(machine: Any, tmp_path: Path) -> None:
    program("udevadm", "udev")
    setpriv = program("setpriv", "util-linux")
    if os.geteuid():
        pytest.skip("every room of this run is one of an ordinary user")
    own = Room(machine, setpriv, "--bounding-set", "-sys_admin", "--inh-caps", "-sys_admin")  # as good as an ordinary user's
    try:
        assert own.must("cat /proc/self/uid_map").split() != ["0", "0", "4294967295"]
        listener = Listener(own, tmp_path, "udevadm", "udevadm", "monitor", "--kernel", ready="KERNEL - ")
        assert own.must(f"cat {BUS}/devices/vmbus_0_2/id") == "2\n"
        own.must(f"echo change > {BUS}/devices/vmbus_0_2/uevent")
        listener.until("change   /devices/VMBUS:00/vmbus_0_2 (vmbus)")
        assert own.must(f"{sys.executable} -m pvbus.supervisor offer echo") == "3\n"  # $PVBUS_MACHINE leads to the machine
        listener.until("add      /devices/VMBUS:00/vmbus_0_")
        listener.stop()
    finally:
        own.close()


def test_a_machine_that_stops_leaves_errors_and_says_that_its_devices_have_gone(pvbus_boot: Any, tmp_path: Path) -> None:
    program("udevadm", "udev")
    booted = pvbus_boot(CONFIG)
    until("the bus is up", lambda: len(booted.machine.devices()) == 2)
    own = Room(booted.machine)
    try:
        listener = Listener(own, tmp_path, "udevadm", "udevadm", "monitor", "--kernel", ready="KERNEL - ")
        own.must(f"cat {BUS}/devices/vmbus_0_1/id")

        booted.machine.shutdown()
        booted.process.wait(BOUND_S)

        listener.until("remove   /devices/VMBUS:00/vmbus_0_2 (vmbus)")
        code, output = own.do(f"cat {BUS}/devices/vmbus_0_1/id 2> /dev/null")
        assert code == 1
        assert re.fullmatch("(pvbus run: machine '.*' has stopped; its devices answer with errors\n)?", output)
        assert own.do(f"ls {BUS}/devices 2> /dev/null")[0] != 0
    finally:
        own.close()


def test_where_no_room_can_be_made_that_is_said_and_nothing_is_held_to_be_tested(machine: Any) -> None:
    for wait in ("", "read line; "):    # it ends before we have said a word, and behind the first
        with pytest.warns(UserWarning, match="NOT TESTED: there is no /dev/fuse"), pytest.raises(pytest.skip.Exception):
            Room(machine, "sh", "-c", f"{wait}echo there is no /dev/fuse; exit 3")
    with pytest.raises((EOFError, BrokenPipeError)):
        Room(machine, "sh", "-c", "echo machine x has stopped; exit 3")
