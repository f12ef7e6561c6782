# SPDX-License-Identifier: Apache-2.0
"""Programs that know nothing of us, in `pvbus run`: they find the devices, read what is so, and change it.

Each needs its Debian package, and says so in the warnings where that is missing. udevadm, systemd-hwdb, systemd-udevd:
`udev`; lsvmbus: `linux-source-6.1`; pyudev: `python3-pyudev`; `waagent`; DPDK: `librte-bus-vmbus23` and, for a closer look,
`librte-net-netvsc23`; `driverctl`.
"""

import os
import re
import subprocess
import sys
import tempfile
import threading
import uuid
from pathlib import Path
from typing import Any

import pytest

from pvbus.actors.runtime.vmbus_facts import DEVICE_CLASSES, HOST_DEVICES, modalias
from pvbus.tests.machine.vmbus_support import Recorder, echo
from pvbus.tests.view.sysfs.lacking import is_lack, not_tested, program, system_python
from pvbus.tests.view.sysfs.rooms import BOUND_S, BUS, Listener, Room, lsvmbus, offered, script, until
from pvbus.view.fuse.debugger import CAN_MEND
from pvbus.view.pytest_plugin import environment

README = Path(__file__).resolve().parents[3] / "README.md"
HWDB = Path("/usr/lib/udev/hwdb.d/20-vmbus-class.hwdb")
ECHO_MODALIAS = modalias(DEVICE_CLASSES["echo"])
PYUDEV_LISTS = """
import pyudev
for device in pyudev.Context().list_devices(subsystem="vmbus"):
    print(device.sys_name, device.attributes.asstring("class_id"), device.driver, device.parent.sys_name, device.parent.subsystem,
          device.properties["MODALIAS"])
"""
WAAGENT = """
from azurelinuxagent.common.osutil.default import DefaultOSUtil
for found in DefaultOSUtil._enumerate_device_id():
    print(*found)
"""
DPDK = """
import ctypes
eal = ctypes.CDLL("librte_eal.so.23", mode=ctypes.RTLD_GLOBAL)
words = "scan --no-huge --no-pci --no-shconf --no-telemetry -l 0 -m 16 -d librte_bus_vmbus.so.23 --log-level=*:debug".split()
arguments = (ctypes.c_char_p * len(words))(*(word.encode() for word in words))
raise SystemExit(eal.rte_eal_init(len(words), arguments) < 0)
"""


# ---- who lists


def test_lsvmbus_lists_the_devices_as_in_a_guest(room: Room, machine: Any) -> None:
    python, tool = program("python3", "python3"), lsvmbus()
    echo_name = offered(machine, "echo")
    network_name = offered(machine, "network", "11111111-2222-3333-4444-555555555555")

    plain, once, twice = (room.must(f"{python} {tool} {flag}") for flag in ("", "-v", "-vv"))

    assert plain.splitlines() == [
        "VMBUS ID  1: [Heartbeat]", "VMBUS ID  2: [Operating system shutdown]", "VMBUS ID  3: Unknown",
        "VMBUS ID  4: Synthetic network adapter",
    ]  # fmt: skip
    assert "VMBUS ID  1: Class_ID = {57164f39-9115-4e78-ab55-382f3bd5422d} - [Heartbeat]\n\tRel_ID=1, target_cpu=0\n" in once
    assert (
        "VMBUS ID  4: Class_ID = {f8615163-df3e-46c5-913f-f2d2f965ed0e} - Synthetic network adapter\n"
        "\tDevice_ID = {11111111-2222-3333-4444-555555555555}\n"
        f"\tSysfs path: {BUS}/devices/{network_name}\n\tRel_ID=4, target_cpu=0\n"
    ) in twice
    assert f"{BUS}/devices/{echo_name}\n" in twice


def test_udevadm_info_shows_a_device_its_attributes_and_its_parent(room: Room, machine: Any) -> None:
    program("udevadm", "udev")
    machine.register_driver(Recorder("heart", (DEVICE_CLASSES["heartbeat"],), ring_bytes=0))

    known = room.must(f"udevadm info {BUS}/devices/vmbus_0_1")
    walked = room.must(f"udevadm info -a {BUS}/devices/vmbus_0_1")
    machine.unregister_driver("heart")

    for line in ("P: /devices/VMBUS:00/vmbus_0_1", "U: vmbus", "V: heart", "E: SUBSYSTEM=vmbus", "E: DRIVER=heart"):
        assert f"{line}\n" in known
    assert f"E: MODALIAS={modalias(DEVICE_CLASSES['heartbeat'])}\n" in known
    assert 'ATTR{class_id}=="{57164f39-9115-4e78-ab55-382f3bd5422d}"' in walked
    assert 'ATTR{channels/1/cpu}=="0"' in walked
    assert 'DRIVER=="heart"' in walked
    assert 'SUBSYSTEMS=="acpi"' in walked
    assert "V: " not in room.must(f"udevadm info {BUS}/devices/vmbus_0_1")


def test_pyudev_finds_the_devices(room: Room, machine: Any, tmp_path: Path) -> None:
    python = system_python("pyudev", "python3-pyudev")
    name = offered(machine, "echo")

    said = room.must(f"{python} {script(tmp_path, PYUDEV_LISTS)}").splitlines()

    heartbeat = DEVICE_CLASSES["heartbeat"]
    assert said[0] == f"vmbus_0_1 {{{heartbeat}}} None VMBUS:00 acpi {modalias(heartbeat)}"
    assert said[2] == f"{name} {{{DEVICE_CLASSES['echo']}}} None VMBUS:00 acpi {ECHO_MODALIAS}"


def test_waagent_finds_the_instances(room: Room, machine: Any, tmp_path: Path) -> None:
    python = system_python("azurelinuxagent", "waagent")
    disk = "00000000-0001-8899-0000-000000000000"
    name = offered(machine, "ide", disk)

    said = room.must(f"{python} {script(tmp_path, WAAGENT)}").splitlines()

    assert sorted(said) == sorted([
        f"vmbus_0_1 {HOST_DEVICES['heartbeat']}", f"vmbus_0_2 {HOST_DEVICES['shutdown']}", f"{name} {disk}",
    ])  # fmt: skip


def test_dpdk_finds_a_network_device_and_no_driver_of_its_own_for_it(room: Room, machine: Any, tmp_path: Path) -> None:
    if not list(Path("/usr/lib").glob("*/librte_bus_vmbus.so.23")):
        not_tested("there is no librte_bus_vmbus; it is in the package librte-bus-vmbus23")
    python, instance = program("python3", "python3"), str(uuid.uuid4())
    name = offered(machine, "network", instance)
    offered(machine, "echo")

    said = room.must(f"{python} {script(tmp_path, DPDK)}")

    assert re.findall(r"Adding vmbus device (\S+)", said) == [name]
    if "net_netvsc" in said:  # librte-net-netvsc23: it looks closer
        assert f"VMBUS device {instance} on NUMA socket 0" in said
        assert "Not managed by UIO driver" in said


def test_the_database_of_systemd_knows_our_classes_by_the_modalias_that_we_give(room: Room, machine: Any) -> None:
    program("systemd-hwdb", "udev")
    if not HWDB.exists():
        not_tested(f"there is no {HWDB}; it is in the package udev")
    patterns = set(re.findall(r"^(vmbus:[0-9a-f]{32})\*?$", HWDB.read_text(), re.MULTILINE))
    ours = {modalias(class_id): name for name, class_id in DEVICE_CLASSES.items()}

    assert len(patterns) >= 18
    assert patterns <= set(ours)
    name = offered(machine, "network")
    assert room.must(f"systemd-hwdb query $(cat {BUS}/devices/{name}/modalias)").startswith("ID_MODEL_FROM_DATABASE=")
    assert "Heartbeat" in room.must(f"systemd-hwdb query $(cat {BUS}/devices/vmbus_0_1/modalias)")


def test_libudev_takes_the_tree_because_it_is_told_to(room: Room) -> None:
    program("udevadm", "udev")
    asked = f"udevadm info {BUS}/devices/vmbus_0_1"

    assert room.do(asked)[0] == 0
    assert room.do(f"env -u SYSTEMD_DEVICE_VERIFY_SYSFS {asked} 2> /dev/null")[0] != 0


def test_the_kernel_s_own_tree_is_there_and_can_only_be_read(room: Room) -> None:
    assert room.must("cat /sys/class/net/lo/ifindex") == "1\n"
    assert "Read-only file system" in room.do("echo 1400 > /sys/class/net/lo/mtu")[1]
    assert "Read-only file system" in room.do(f"{program('udevadm', 'udev')} trigger")[1]
    below = [line.split()[1] for line in Path("/proc/mounts").read_text().splitlines() if line.split()[1].startswith("/sys/")]
    assert all(room.do(f"mountpoint -q {point}")[0] == 0 for point in below)


def test_udevadm_knows_the_device_by_its_place_in_sys_and_by_its_file(room: Room) -> None:
    program("udevadm", "udev")

    assert "N: xen/evtchn" in room.must("udevadm info '/sys/class/misc/xen!evtchn'")
    if CAN_MEND:
        assert "P: /devices/virtual/misc/xen!evtchn" in room.must("udevadm info --name=/dev/xen/evtchn")


def test_stat_shows_two_links_and_one_time_and_a_private_mapping_the_value(room: Room) -> None:
    device = "/sys/devices/VMBUS:00/vmbus_0_1"
    shown = room.must(f"stat -c '%h %Y' /sys/devices/VMBUS:00 {device} {device}/channels {device}/id").split()
    mapped = "import mmap, os, sys; f = os.open(sys.argv[1], 0); print(mmap.mmap(f, 4096, mmap.MAP_PRIVATE)[:64].rstrip(b'\\0'))"

    assert shown[::2] == ["2", "2", "2", "1"]
    assert len(set(shown[1::2])) == 1
    assert room.must(f'{sys.executable} -c "{mapped}" {device}/id') == "b'1\\n'\n"
    assert room.must(f"cat {device}/id") == "1\n"


# ---- what is read is so


@pytest.mark.checklist("B2.3", "B2.5")
def test_an_attribute_changes_under_traffic_and_is_stable_at_rest(room: Room, machine: Any) -> None:
    name = offered(machine, "echo")
    driver = machine.register_driver(Recorder("traffic"))
    until("it is bound", lambda: driver.devices)
    files = [f"{BUS}/devices/{name}/{side}_{index}_index" for side in ("in", "out") for index in ("read", "write")]

    def look() -> list[int]:
        return [int(line) for line in room.must(f"cat {' '.join(files)}").split()]

    before = look()
    echo(driver.channel, 50)
    machine.settle()
    after = look()

    assert all(new != old for new, old in zip(after, before, strict=True)), (before, after)
    assert look() == look() == after
    assert room.must(f"cat {BUS}/devices/{name}/state") == "3\n"
    machine.unregister_driver("traffic")
    assert room.must(f"cat {BUS}/devices/{name}/state {files[0]}") == "2\n0\n"


def test_a_value_is_read_anew_from_the_start_of_an_open_file(room: Room, machine: Any) -> None:
    python = program("python3", "python3")
    opened = f'import os; f = os.open("{BUS}/drivers_autoprobe", os.O_RDWR)'
    twice = 'print(os.read(f, 9), os.write(f, b"0"), os.pread(f, 9, 0)); os.write(f, b"1")'

    assert room.must(f"{python} -c '{opened}; {twice}'") == "b'1\\n' 1 b'0\\n'\n"


# ---- who changes something


def test_unbind_and_bind_move_a_device_and_say_what_is_wrong(room: Room, machine: Any, tmp_path: Path) -> None:
    program("udevadm", "udev")
    machine.register_driver(Recorder("heart", (DEVICE_CLASSES["heartbeat"],), ring_bytes=0))
    driver = f"{BUS}/drivers/heart"
    listener = Listener(room, tmp_path, "udevadm", "udevadm", "monitor", "--kernel", ready="KERNEL - ")

    assert room.must(f"readlink {BUS}/devices/vmbus_0_1/driver") == "../../../bus/vmbus/drivers/heart\n"
    assert room.do(f"echo vmbus_0_1 > {driver}/unbind") == (0, "")
    assert room.do(f"ls -d {driver}/vmbus_0_1 {BUS}/devices/vmbus_0_1/driver")[0] != 0
    assert "No such device" in room.do(f"echo vmbus_0_1 > {driver}/unbind")[1]
    assert "No such device" in room.do(f"echo vmbus_0_2 > {driver}/bind")[1]
    assert room.do(f"echo vmbus_0_1 > {driver}/bind") == (0, "")
    assert "Device or resource busy" in room.do(f"echo vmbus_0_1 > {driver}/bind")[1]
    machine.unregister_driver("heart")
    assert room.do(f"ls -d {driver}")[0] != 0
    heard = listener.until("remove   /bus/vmbus/drivers/heart (drivers)")
    listener.stop()
    assert re.findall(r"\] (\w+) .*vmbus_0_1 ", heard) == ["unbind", "bind", "unbind"]


def test_a_new_id_gives_a_driver_the_devices_of_another_class(room: Room, machine: Any) -> None:
    probed = []

    class Uio(Recorder):
        def probe(self, device: Any, matched_id: uuid.UUID) -> None:
            probed.append(str(matched_id))

    machine.register_driver(Uio("uio", (DEVICE_CLASSES["scsi"],)))
    class_id, driver = DEVICE_CLASSES["heartbeat"], f"{BUS}/drivers/uio"

    assert "Invalid argument" in room.do(f"echo {{{class_id}}} > {driver}/new_id")[1]
    assert room.do(f"echo {class_id} > {driver}/new_id") == (0, "")
    assert room.must(f"readlink {BUS}/devices/vmbus_0_1/driver") == "../../../bus/vmbus/drivers/uio\n"
    assert probed == [str(class_id)]
    assert "File exists" in room.do(f"echo {class_id} > {driver}/new_id")[1]
    assert room.do(f"echo {class_id} > {driver}/remove_id") == (0, "")
    assert "No such device" in room.do(f"echo {class_id} > {driver}/remove_id")[1]
    machine.unregister_driver("uio")


def test_a_bind_that_waits_for_its_probe_keeps_nobody_from_looking(room: Room, machine: Any, tmp_path: Path) -> None:
    probing, may_end = threading.Event(), threading.Event()

    class Slow(Recorder):
        def probe(self, device: Any, matched_id: uuid.UUID) -> None:
            probing.set()
            assert may_end.wait(BOUND_S)

    room.must(f"echo 0 > {BUS}/drivers_autoprobe")
    machine.register_driver(Slow("slow", (DEVICE_CLASSES["heartbeat"],)))
    room.must(f"{{ echo vmbus_0_1 > {BUS}/drivers/slow/bind; echo $? > {tmp_path}/bound; }} &")
    assert probing.wait(BOUND_S)

    assert room.must(f"cat {BUS}/devices/vmbus_0_1/id") == "1\n"
    assert "vmbus_0_1" in room.must(f"ls -l {BUS}/drivers/slow {BUS}/devices/")
    assert not (tmp_path / "bound").exists() or not (tmp_path / "bound").read_text()
    may_end.set()
    until("it is bound", lambda: (tmp_path / "bound").exists() and (tmp_path / "bound").read_text() == "0\n")
    machine.unregister_driver("slow")
    room.must(f"echo 1 > {BUS}/drivers_autoprobe")


def test_driverctl_gives_a_device_to_another_driver(room: Room, machine: Any) -> None:
    driverctl = program("driverctl", "driverctl")
    machine.register_driver(Recorder("first", (DEVICE_CLASSES["heartbeat"],), ring_bytes=0))

    listed = room.must(f"{driverctl} -b vmbus list-devices")
    room.must(f"{driverctl} -b vmbus --nosave --noprobe set-override vmbus_0_1 none")

    assert listed == "vmbus_0_1 first\nvmbus_0_2 (none)\n"
    assert room.must(f"{driverctl} -b vmbus list-overrides") == "vmbus_0_1 (none)\n"
    room.must(f"{driverctl} -b vmbus --nosave unset-override vmbus_0_1")
    assert room.must(f"{driverctl} -b vmbus list-devices") == "vmbus_0_1 first\nvmbus_0_2 (none)\n"
    machine.unregister_driver("first")


def test_what_sysfs_refuses_is_refused_as_there(room: Room) -> None:
    device = f"{BUS}/devices/vmbus_0_1"

    for command, why in (
        (f"echo 1 > {device}/id", "Permission denied"), (f"cat {BUS}/uevent", "Permission denied"),
        (f"touch {BUS}/new", "Permission denied"), (f"mkdir {BUS}/new", "Operation not permitted"),
        (f"rm {BUS}/uevent", "Operation not permitted"), (f"ln -s x {BUS}/new", "Operation not permitted"),
        (f"echo frob > {device}/uevent", "Invalid argument"), (f"echo vmbus_0_9 > {BUS}/drivers_probe", "No such device"),
        (f"ls {BUS}/devices/vmbus_0_9", "No such file or directory"),
        (f"ls {BUS}/devices/$'\\xff\\n'", "No such file or directory"),
        (f"echo $'\\xff' > {BUS}/drivers_probe", "Invalid argument"),
    ):  # fmt: skip
        code, said = room.do(f"({command}) 2>&1")
        assert (code != 0, why in said) == (True, True), (command, code, said)


def test_the_event_channel_device_stands_among_the_misc_devices(room: Room, tmp_path: Path) -> None:
    program("udevadm", "udev")
    here = "/sys/class/misc/xen!evtchn"
    listener = Listener(room, tmp_path, "misc", "udevadm", "monitor", "--kernel", "--property", ready="KERNEL - ")

    number = room.must(f"cat '{here}/dev'").strip()
    room.must(f"echo add > '{here}/uevent'")

    assert re.fullmatch(r"10:\d+", number)
    assert room.must(f"cat '{here}/uevent'") == f"MAJOR=10\nMINOR={number[3:]}\nDEVNAME=xen/evtchn\n"
    links = room.must(f"readlink -f '{here}/subsystem' /sys/dev/char/{number}")
    assert links == "/sys/class/misc\n/sys/devices/virtual/misc/xen!evtchn\n"
    listener.until("DEVPATH=/devices/virtual/misc/xen!evtchn\nSUBSYSTEM=misc\n")
    listener.stop()


def test_the_host_s_own_tree_is_left_alone(room: Room) -> None:
    assert room.must(f"ls {BUS}/devices") == "vmbus_0_1\nvmbus_0_2\n"

    outside = Path(BUS, "devices")
    assert not outside.exists() or "vmbus_0_1" not in {path.name for path in outside.iterdir()}
    assert room.must("ls /sys/class/net") == "lo\n"  # of the room's own network namespace


def test_the_commands_of_the_readme_work_as_a_newcomer_types_them() -> None:
    program("udevadm", "udev")
    typed = re.findall(r"^\.venv/bin/pvbus run -- (lsvmbus .*|udevadm info .*)$", README.read_text(), re.MULTILINE)
    places = [str(Path(lsvmbus()).parent), str(Path(sys.executable).parent), os.environ["PATH"]]
    with tempfile.TemporaryDirectory(prefix="pvt-", dir="/tmp") as root:  # where no machine runs, and short
        environ = environment() | {"PATH": os.pathsep.join(places), "XDG_RUNTIME_DIR": root}
        said = [
            subprocess.run(
                [sys.executable, "-m", "pvbus.supervisor", "run", "--", *command.split()],
                check=False, capture_output=True, text=True, env=environ, timeout=BOUND_S,
            )
            for command in typed
        ]  # fmt: skip

    if is_lack(said[0].returncode, said[0].stderr):
        not_tested(said[0].stderr)
    assert [done.returncode for done in said] == [0, 0], said
    assert re.findall(r"^VMBUS ID  \d: Class_ID = .* - (.*)$", said[0].stdout, re.MULTILINE) == [
        "[Heartbeat]", "[Operating system shutdown]", "Unknown",
    ]  # fmt: skip
    assert "looking at device '/devices/VMBUS:00/vmbus_0_1'" in said[1].stdout
