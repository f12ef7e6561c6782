# SPDX-License-Identifier: Apache-2.0
"""A machine that stops while its hypervisor is dead, dies or comes back: nobody is waited for who never comes."""

from __future__ import annotations

import os
import select
import signal
import threading
import time
from typing import Any

import psutil
import pytest

from pvbus.actors.runtime import rundir
from pvbus.tests.machine.vmbus_support import BOUND_S, config, process, wait_until

STOP_S_MAX = 3.0  # a child that does not stop is killed after five
HEIRS_MAX = 8  # below what stops the machine


def test_a_machine_without_a_hypervisor_is_not_held_up_by_those_that_would_take_their_leave(pvbus_boot: Any) -> None:
    domain = '[[domain]]\nid = {}\nplatforms = ["hyperv"]\n'
    booted = pvbus_boot("".join(domain.format(number) for number in range(3)))
    machine = booted.machine
    machine.settle()
    forkserver, directory = process(machine, "forkserver")["pid"], rundir.run_directory(booted.name)

    os.kill(forkserver, signal.SIGSTOP)  # so that there is no heir before the machine stops, and none afterwards
    try:
        os.kill(process(machine, "hypervisor")["pid"], signal.SIGKILL)
        booted.process.send_signal(signal.SIGTERM)
        wait_until("the machine stops", lambda: not rundir.connectable(directory))
        begin = time.monotonic()
    finally:
        os.kill(forkserver, signal.SIGCONT)

    assert booted.process.wait(BOUND_S) == 0
    assert time.monotonic() - begin < STOP_S_MAX


@pytest.mark.parametrize("waits_s", [0.01, 0.1])
def test_a_machine_whose_hypervisor_dies_while_a_workqueue_leaves_it_stops_at_once(pvbus_boot: Any, waits_s: float) -> None:
    booted = pvbus_boot(config())
    hypervisor = process(booted.machine, "hypervisor")["pid"]
    booted.machine.settle()

    os.kill(hypervisor, signal.SIGSTOP)
    booted.process.send_signal(signal.SIGTERM)
    select.select([], [], [], waits_s)  # the workqueue has asked, or is about to
    os.kill(hypervisor, signal.SIGKILL)
    begin = time.monotonic()

    assert booted.process.wait(BOUND_S) == 0
    assert time.monotonic() - begin < STOP_S_MAX


def stopped_heir(machine: Any) -> psutil.Process:
    """Kill the hypervisor, and stop its heir while it starts; a heir that is up before we see it is the next to be killed."""
    for _ in range(HEIRS_MAX):
        killed = process(machine, "hypervisor")["pid"]
        os.kill(killed, signal.SIGKILL)
        wait_until("it has an heir", lambda: process(machine, "hypervisor")["pid"] not in (0, killed))  # noqa: B023
        stopped = psutil.Process(process(machine, "hypervisor")["pid"])
        stopped.suspend()
        wait_until("it is stopped", lambda: stopped.status() == psutil.STATUS_STOPPED)  # noqa: B023
        if process(machine, "hypervisor")["state"] == "starting":
            return stopped
    pytest.fail(f"{HEIRS_MAX} heirs were up at once")


def test_a_machine_stops_in_order_while_an_heir_of_its_hypervisor_starts_and_somebody_waits_for_that(pvbus_boot: Any) -> None:
    booted = pvbus_boot(config())
    machine = booted.machine
    machine.settle()
    forkserver = process(machine, "forkserver")["pid"]
    refused: list[OSError] = []

    def advance() -> None:
        with pytest.raises(OSError) as gone:
            machine.advance(0)
        refused.append(gone.value)

    heir = stopped_heir(machine)
    try:
        caller = threading.Thread(target=advance)
        caller.start()
        select.select([], [], [], 0.05)  # it has asked
        booted.process.send_signal(signal.SIGTERM)
        wait_until("all others have stopped", lambda: psutil.Process(forkserver).children() == [heir])
    finally:
        heir.resume()

    assert booted.process.wait(BOUND_S) == 0, booted.log
    caller.join(BOUND_S)
    assert len(refused) == 1
