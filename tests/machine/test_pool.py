# SPDX-License-Identifier: Apache-2.0
"""Spare file processes: taken by opens, replaced, killed, stopped; no open ever suffers from one."""

from __future__ import annotations

import contextlib
import errno
import os
import select
import signal
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest

from pvbus.actors.client import attach
from pvbus.actors.runtime.supervision import RESTART_INTENSITY, RESTART_PERIOD_S, START_DEADLINE_S
from pvbus.actors.supervisor.pool import SPARES

if TYPE_CHECKING:
    from collections.abc import Callable

BOUND_S = 20.0


def wait_until(what: str, condition: Callable[[], bool]) -> None:
    deadline = time.monotonic() + BOUND_S
    while not condition():
        assert time.monotonic() < deadline, f"not within {BOUND_S} s: {what}"
        select.select([], [], [], 0.002)


def spares(machine: Any) -> dict[str, int]:
    """Return the pids of the spare processes by name."""
    return {one["name"]: one["pid"] for one in machine.status()["processes"] if one["state"] == "spare"}


def full_pool(machine: Any) -> dict[str, int]:
    wait_until("the pool is full", lambda: len(spares(machine)) == SPARES)
    return spares(machine)


def title(pid: int) -> str:
    return Path(f"/proc/{pid}/cmdline").read_bytes().rstrip(b"\0").decode()


def works(file: Any) -> bool:
    port = file.bind_unbound_port(remote_domain=0)
    file.unbind(port)
    return bool(port)


@pytest.fixture
def machine(pvbus_machine: Any) -> Any:
    full_pool(pvbus_machine.machine)
    return pvbus_machine.machine


def test_an_open_takes_a_spare_process_and_the_pool_fills_again(machine: Any) -> None:
    before = spares(machine)
    titles = {f"pvbus: file/spare.{place}" for place in range(SPARES)}
    wait_until("each has its title", lambda: {title(pid) for pid in before.values()} == titles)

    with machine.open_evtchn(nonblock=True) as file:
        taken = machine.status()["files"][0]
        assert taken["process_pid"] in before.values()
        assert title(taken["process_pid"]) == f"pvbus: {taken['file']}"
        assert works(file)
        after = full_pool(machine)

    assert len(set(after.values()) - set(before.values())) == 1
    assert all(one["restarts"] == 0 for one in machine.status()["processes"])


def test_a_spare_process_has_no_descriptor_of_its_rehearsal(machine: Any) -> None:
    for pid in spares(machine).values():
        # Three streams, control, epoll, its waking, and two ends for signals; while it rehearses, others for a while.
        def is_done(pid: int = pid) -> bool:
            held = links(pid)
            return len(held) == 8 and not any("memfd" in link for link in held)

        wait_until(f"{links(pid)}", is_done)


def links(pid: int) -> list[str]:
    """Return what a process has open; a descriptor may close under the look."""
    found = []
    for entry in Path(f"/proc/{pid}/fd").iterdir():
        with contextlib.suppress(FileNotFoundError):
            found.append(str(entry.readlink()))
    return found


def test_a_killed_spare_process_is_replaced(machine: Any) -> None:
    name, pid = next(iter(spares(machine).items()))

    os.kill(pid, signal.SIGKILL)

    wait_until("another one is there", lambda: spares(machine).get(name, pid) != pid)
    row = next(one for one in machine.status()["processes"] if one["name"] == name)
    assert row["restarts"] == 1


def test_an_open_whose_spare_process_has_died_gets_a_fork(machine: Any) -> None:
    victims = spares(machine).values()
    for pid in victims:  # stopped first: they die all at once, and nobody has time to notice
        os.kill(pid, signal.SIGSTOP)
    for pid in victims:
        os.kill(pid, signal.SIGKILL)

    files = [machine.open_evtchn(nonblock=True) for _ in range(SPARES)]

    assert all(works(file) for file in files)
    assert not set(victims) & {one["process_pid"] for one in machine.status()["files"]}
    for file in files:
        file.close()
    assert machine.ports() == []
    full_pool(machine)


def test_spare_processes_that_die_too_often_are_missed_by_nobody(pvbus_boot: Any) -> None:
    booted = pvbus_boot('[[domain]]\nid = 0\nplatforms = ["xen"]\n')
    machine = booted.machine
    killed: set[int] = set()

    def kill_those_there_are() -> bool:
        for pid in set(spares(machine).values()) - killed:
            killed.add(pid)
            os.kill(pid, signal.SIGKILL)
        return "spare file processes die too often" in booted.log

    wait_until("the machine has had enough of that", kill_those_there_are)
    assert len(killed) > RESTART_INTENSITY
    for _ in range(SPARES + 1):  # the last spares are taken, and none come
        with machine.open_evtchn(nonblock=True) as file:
            assert works(file)
    machine.settle()
    assert spares(machine) == {}
    machine.advance(RESTART_PERIOD_S + 1)
    full_pool(machine)


def test_a_spare_process_that_does_not_answer_holds_an_open_up_but_does_not_fail_it(machine: Any) -> None:
    for pid in spares(machine).values():
        os.kill(pid, signal.SIGSTOP)
    child = os.fork()
    if child == 0:  # the deadline of a start is there at once
        try:
            with attach(machine.name) as other:
                wait_until("the open is under way", lambda: starting(other))
                other.advance(START_DEADLINE_S + 1)
        finally:
            os._exit(0)

    with machine.open_evtchn(nonblock=True) as file:
        assert works(file)
    os.waitpid(child, 0)
    for pid in spares(machine).values():
        os.kill(pid, signal.SIGCONT)


def starting(machine: Any) -> bool:
    return any(one["name"] == "file/0.0" and one["state"] == "starting" for one in machine.status()["processes"])


def test_a_machine_stops_in_order_while_its_pool_fills(pvbus_boot: Any) -> None:
    for _ in range(5):  # another moment each time: 0, 1, 2 … spares are there
        booted = pvbus_boot('[[domain]]\nid = 0\nplatforms = ["xen"]\n')
        pids = list(spares(booted.machine).values())
        booted.machine.shutdown()
        assert booted.process.wait(BOUND_S) == 0
        assert not any(Path(f"/proc/{pid}").exists() for pid in pids)


@pytest.mark.checklist("A12.7")
def test_a_killed_file_process_that_was_a_spare_is_no_loss_of_the_pool(machine: Any) -> None:
    file = machine.open_evtchn(nonblock=True)
    full_pool(machine)
    os.kill(machine.status()["files"][0]["process_pid"], signal.SIGKILL)
    wait_until("its file is gone", lambda: machine.status()["files"] == [])
    with pytest.raises(OSError) as dead:
        file.bind_unbound_port(remote_domain=0)
    assert dead.value.errno == errno.EIO
    file.close()
    assert all(one["restarts"] == 0 for one in machine.status()["processes"])
