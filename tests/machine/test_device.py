# SPDX-License-Identifier: Apache-2.0
"""The device as a whole: where it is, what it says in the log, what an open file keeps alive, and the end of it all."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from pvbus.actors.client import MachineNotFoundError, attach
from pvbus.tests.contract.support import InThread, errno_of, wait_until

CONFIG = """\
[[domain]]
id = 0
platforms = ["xen"]

[[domain]]
id = 1
platforms = ["hyperv"]

[[domain]]
id = 2
platforms = ["hyperv", "xen"]
"""
RUN_S_MAX = 60


@pytest.fixture(scope="module")
def pvbus_config() -> str:
    return CONFIG


def pid_of(machine: Any, name: str) -> int:
    return next(int(row["pid"]) for row in machine.status()["processes"] if row["name"] == name)


def process_of(machine: Any, file: Any) -> int:
    """Return the process behind a file; it must be the only one that is open."""
    (row,) = machine.status()["files"]
    assert not file.closed
    return int(row["process_pid"])


def is_gone(pid: int) -> bool:
    return not Path(f"/proc/{pid}").exists()


def holders(machine: Any, name: str) -> list[str]:
    """Return the processes of the machine that have a memfd of this name open or mapped."""
    found = []
    for row in machine.status()["processes"]:
        proc = Path("/proc", str(row["pid"]))
        try:
            links = [str(link.readlink()) for link in (proc / "fd").iterdir()]
            text = (proc / "maps").read_text() + "\n".join(links)
        except OSError:         # ends at this moment
            continue
        if f"/memfd:{name} " in text:
            found.append(row["name"])
    return found


@pytest.mark.checklist("A10.6", "A10.7", "X10b")
def test_a_domain_with_xen_has_the_device_and_no_other_has(pvbus_shared_machine: Any) -> None:
    machine = pvbus_shared_machine.machine

    devices = {row["id"]: row["devices"] for row in machine.status()["domains"]}

    assert devices == {0: ["/dev/xen/evtchn"], 1: [], 2: ["/dev/xen/evtchn"]}
    for domid, has in devices.items():
        if has:
            machine.open_evtchn(domain=domid).close()
        else:
            assert errno_of(machine.open_evtchn, domain=domid) == "ENODEV"


@pytest.mark.checklist("A10.7", "A10.9", "X10c")
def test_the_log_says_once_a_domain_that_the_device_is_there(pvbus_shared_machine: Any) -> None:
    said = [line for line in pvbus_shared_machine.log.splitlines() if "device" in line]

    assert said == [f"xen:evtchn: event-channel device installed in domain {domid}" for domid in (0, 2)]


@pytest.mark.checklist("A10.7", "A10.9", "X10c")
def test_a_device_that_cannot_be_registered_is_an_error_with_a_line_in_the_log() -> None:
    """Something lies where the machine's socket belongs, from the moment that its directory exists."""
    planted = """
import pvbus.actors.supervisor.process as p
create = p.rundir.create
def create_and_plant(*arguments):
    directory = create(*arguments)
    (directory / "machine.sock").mkdir()
    return directory
p.rundir.create = create_and_plant
from pvbus.supervisor import main
raise SystemExit(main(["up", "--name", "taken"]))
"""

    done = subprocess.run(
        [sys.executable, "-c", planted], capture_output=True, timeout=RUN_S_MAX, text=True, check=False
    )

    assert (done.returncode, done.stdout) == (1, "")
    first = done.stderr.splitlines()[0]
    assert first == f"xen:evtchn: cannot register the event-channel device: {os.strerror(98)}"
    assert "Traceback" not in done.stderr


@pytest.mark.checklist("A10.6", "A10.4")
def test_what_serves_a_file_is_there_while_any_reference_is_and_no_longer(pvbus_shared_machine: Any) -> None:
    machine = pvbus_shared_machine.machine
    file = machine.open_evtchn(domain=0, nonblock=True)
    pid = process_of(machine, file)
    other = file.dup()

    file.close()
    port = other.bind_unbound_port(remote_domain=0)

    assert process_of(machine, other) == pid
    assert not is_gone(pid)
    other.unbind(port)
    other.close()
    wait_until(lambda: is_gone(pid), "the process of the file has ended")


@pytest.mark.checklist("A2.1", "A10.4")
@pytest.mark.parametrize("ports", [0, 1, 65])
def test_the_ring_of_a_closed_file_is_freed_and_so_is_that_of_a_file_that_never_had_one(
    pvbus_shared_machine: Any, ports: int
) -> None:
    machine = pvbus_shared_machine.machine
    file = machine.open_evtchn(domain=0, nonblock=True)
    for _ in range(ports):
        file.bind_unbound_port(remote_domain=0)
    (row,) = machine.status()["files"]
    memfd = f"pvbus-{machine.run_id}-{row['file'].rpartition('.')[2]}"
    assert row["ring_size"] == {0: 0, 1: 64, 65: 128}[ports]
    held_by = set(holders(machine, memfd))
    assert {"supervisor", "hypervisor", "cpu/0.0", row["file"]} <= held_by

    file.close()

    wait_until(lambda: holders(machine, memfd) == [], "nobody holds the ring any more")


@pytest.mark.checklist("A10.8")
def test_a_machine_that_ends_under_open_files_ends_each_of_their_calls(pvbus_boot: Any) -> None:
    """The driver cannot be unloaded under an open file; a machine can be stopped: no call is left without an answer."""
    booted = pvbus_boot(CONFIG)
    machine = booted.machine
    reading, calling = machine.open_evtchn(domain=0, nonblock=False), machine.open_evtchn(domain=0)
    reader = InThread(lambda: reading.read(4))
    assert reader.sleeps()
    hypervisor = pid_of(machine, "hypervisor")
    os.kill(hypervisor, signal.SIGSTOP)
    try:
        caller = InThread(lambda: calling.bind_unbound_port(remote_domain=0))
        assert caller.sleeps()      # half way: its file waits for the hypervisor

        machine.shutdown()

        assert (caller.result(), caller.errno) == (None, "EIO")
    finally:
        os.kill(hypervisor, signal.SIGCONT)
    assert (reader.result(), reader.errno) == (None, "EIO")     # the hypervisor has let go of its doorbell
    assert booted.process.wait(RUN_S_MAX) == 0
    for file in (reading, calling):
        assert errno_of(file.bind_virq, 3) == "EIO"
        file.close()
    with pytest.raises(MachineNotFoundError):
        attach(booted.name)
