# SPDX-License-Identifier: Apache-2.0
"""The machine as a whole: platforms, VIRQs, side by side, its end."""

from __future__ import annotations

import errno
import os
import select
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest

from pvbus.actors.client import MachineNotFoundError, attach

BOUND_S = 20.0


def pids_of(machine: Any) -> list[int]:
    status = machine.status()
    return [one["pid"] for one in status["processes"]] + [file["process_pid"] for file in status["files"]]


def is_gone(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] == "Z"
    except (FileNotFoundError, ProcessLookupError):
        return True


@pytest.mark.checklist("A10.7", "X10b")
def test_a_domain_without_the_xen_platform_answers_enodev(pvbus_boot: Any) -> None:
    booted = pvbus_boot('[[domain]]\nid = 0\nplatforms = ["hyperv"]\n')

    with pytest.raises(OSError) as refused:
        booted.machine.open_evtchn(domain=0)
    assert refused.value.errno == errno.ENODEV
    with pytest.raises(OSError) as unknown:
        booted.machine.open_evtchn(domain=7)
    assert unknown.value.errno == errno.ENODEV


@pytest.mark.checklist("A9.1", "X7")
def test_virqs_reach_who_bound_them(pvbus_machine: Any) -> None:
    machine = pvbus_machine.machine
    file = machine.open_evtchn(domain=0, nonblock=True)
    port = file.bind_virq(3)

    assert machine.raise_virq(3) == port

    assert file.poll(select.POLLIN, 5000) & select.POLLIN
    assert file.read_ports(4) == [port]
    with pytest.raises(OSError) as unbound:
        machine.raise_virq(5)
    assert unbound.value.errno == errno.ENOENT
    with pytest.raises(OSError) as bad:
        machine.raise_virq(24)
    assert bad.value.errno == errno.EINVAL
    file.close()


def test_a_virq_that_the_kernel_holds_is_taken_by_it(pvbus_boot: Any) -> None:
    booted = pvbus_boot('[[domain]]\nid = 0\nplatforms = ["xen"]\nkernel_virqs = [0, 2]\nkernel_ports = 5\n')
    machine = booted.machine
    with machine.open_evtchn(domain=0, nonblock=True) as file:
        with pytest.raises(OSError) as held:
            file.bind_virq(2)
        assert held.value.errno == errno.EEXIST
        assert file.bind_unbound_port(remote_domain=0) == 6

        machine.raise_virq(0)
        machine.settle()

        assert [one["pending"] for one in machine.ports(0)] == [False] * 6
    assert [one["file"] for one in machine.ports(0)] == ["kernel"] * 5


def test_two_machines_run_side_by_side_and_know_nothing_of_each_other(pvbus_boot: Any) -> None:
    first = pvbus_boot('[[domain]]\nid = 0\nplatforms = ["xen"]\n')
    second = pvbus_boot('[[domain]]\nid = 0\nplatforms = ["xen"]\n')
    with first.machine.open_evtchn(nonblock=True) as a, second.machine.open_evtchn(nonblock=True) as b:
        assert a.bind_unbound_port(remote_domain=0) == 1
        assert b.bind_unbound_port(remote_domain=0) == 1
        os.kill(first.process.pid, signal.SIGTERM)
        assert first.process.wait(20) == 0
        assert b.bind_unbound_port(remote_domain=0) == 2
        with pytest.raises(OSError) as dead:
            a.bind_unbound_port(remote_domain=0)
        assert dead.value.errno == errno.EIO
        assert a.poll(select.POLLIN, 5000) & select.POLLHUP


def test_a_killed_supervisor_takes_everything_with_it(pvbus_boot: Any) -> None:
    booted = pvbus_boot('[[domain]]\nid = 0\nplatforms = ["xen"]\n')
    booted.exit_code_expected = -signal.SIGKILL
    machine = booted.machine
    file = machine.open_evtchn(nonblock=True)
    file.bind_unbound_port(remote_domain=0)
    pids, run_id = pids_of(machine), machine.run_id

    booted.process.kill()
    booted.process.wait(20)

    deadline = time.monotonic() + BOUND_S
    leftovers: list[object] = ["not looked yet"]
    while leftovers:
        leftovers = [pid for pid in pids if not is_gone(pid)]
        leftovers += list(Path("/dev/shm").glob(f"pvbus-{run_id}*"))
        leftovers += [path for path in [Path(os.environ["XDG_RUNTIME_DIR"], "pvbus", booted.name)] if path.exists()]
        assert time.monotonic() < deadline, leftovers
        select.select([], [], [], 0.005)
    with pytest.raises(OSError) as dead:
        file.bind_unbound_port(remote_domain=0)
    assert dead.value.errno == errno.EIO
    file.close()
    with pytest.raises(MachineNotFoundError, match="pvbus up"):
        attach(booted.name)


def test_the_installed_command_boots_a_machine_without_any_path_set() -> None:
    command = Path(sys.executable).with_name("pvbus")
    if not command.exists():
        pytest.skip("pvbus is not installed in this environment; make test installs it")
    environment = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}

    demo = [str(command), "demo", "--seconds", "1"]
    done = subprocess.run(demo, env=environment, cwd="/", capture_output=True, timeout=60, text=True, check=False)

    assert done.returncode == 0, done.stdout + done.stderr
    assert "nothing lost, nothing twice" in done.stdout


def test_a_machine_whose_fork_server_cannot_start_says_so_and_ends(tmp_path: Path) -> None:
    broken = "import pvbus.actors.supervisor.process as p; p.PRELOAD = ('pvbus.no_such_room',); "
    broken += "from pvbus.supervisor import main; "

    done = subprocess.run(
        [sys.executable, "-c", broken + "raise SystemExit(main(['up', '--name', 'broken']))"],
        capture_output=True, timeout=60, text=True, check=False,
    )  # fmt: skip

    assert done.returncode == 1
    assert "pvbus.no_such_room" in done.stderr


def test_the_clock_moves_only_forward(pvbus_machine: Any) -> None:
    machine = pvbus_machine.machine
    machine.advance(3600)
    with pytest.raises(OSError) as refused:
        machine.advance(-1)
    assert refused.value.errno == errno.EINVAL
    machine.settle()


@pytest.mark.checklist("A12.7")
def test_sixty_files_are_open_at_once_and_all_are_released(pvbus_machine: Any) -> None:
    machine = pvbus_machine.machine
    files = [machine.open_evtchn(nonblock=True) for _ in range(60)]
    ports = [file.bind_unbound_port(remote_domain=0) for file in files]
    assert ports == list(range(1, 61))
    for file in files:
        file.close()
    assert machine.ports() == []


def test_a_detached_machine_holds_no_descriptor_of_who_started_it(tmp_path: Path) -> None:
    command = [sys.executable, "-m", "pvbus.supervisor"]

    up = [*command, "up", "--detach", "--name", "detached"]
    done = subprocess.run(up, capture_output=True, timeout=30, text=True, check=False)

    assert (done.returncode, done.stdout) == (0, "ready\n"), done.stderr
    with attach("detached") as machine:
        assert machine.status()["state"] == "ready"
        log = Path(os.environ["XDG_RUNTIME_DIR"]) / "pvbus" / "detached" / "log"
        assert log.read_text().startswith("xen:evtchn: event-channel device installed in domain 0\n")
    down = subprocess.run([*command, "down", "--name", "detached"], capture_output=True, timeout=30, text=True, check=False)
    assert down.returncode == 0, down.stderr
