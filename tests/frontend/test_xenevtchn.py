# SPDX-License-Identifier: Apache-2.0
"""Programs of Debian's libxenevtchn run on the device file, dynamic and static."""

from __future__ import annotations

import os
import signal

import pytest

from pvbus.tests.contract.support import wait_until
from pvbus.tests.frontend.support import not_shown, run, started, xenevtchn_client
from pvbus.view.fuse.debugger import CAN_MEND
from pvbus.view.pytest_plugin import BootedMachine

BOTH = pytest.mark.parametrize("linking", ["dynamic", "static"])
VIRQ = 3


@BOTH
@pytest.mark.checklist("A9.1", "A9.2", "A9.3", "A9.4", "A9.6", "A9.8", "A10.1")
@pytest.mark.parametrize("what", ["basics", "many", "readers"])
def test_a_client_of_libxenevtchn_gets_what_the_device_gives(
    pvbus_shared_machine: BootedMachine, linking: str, what: str
) -> None:
    done = run(str(xenevtchn_client(linking)), what, name=pvbus_shared_machine.name)

    assert (done.returncode, done.stdout, done.stderr) == (0, "ok\n", "")


@BOTH
def test_ten_thousand_rounds_between_two_processes_lose_nothing(pvbus_shared_machine: BootedMachine, linking: str) -> None:
    done = run(str(xenevtchn_client(linking)), "ping-pong", "10000", name=pvbus_shared_machine.name)

    assert (done.returncode, done.stdout, done.stderr) == (0, "ok\n", "")


@BOTH
@pytest.mark.checklist("A9.9", "A12.3", "A12.10", "A12.11")
def test_a_client_gets_enosys_goes_on_after_signals_and_hears_sigio(pvbus_shared_machine: BootedMachine, linking: str) -> None:
    if not CAN_MEND:
        not_shown("ENOSYS and SA_RESTART through FUSE", "they cannot be had on this processor")
    done = run(str(xenevtchn_client(linking, "xen_client.c")), "signals", name=pvbus_shared_machine.name)

    assert (done.returncode, done.stdout, done.stderr) == (0, "", "")


@BOTH
def test_a_virq_reaches_a_client(pvbus_shared_machine: BootedMachine, linking: str) -> None:
    with started(str(xenevtchn_client(linking)), "virq", name=pvbus_shared_machine.name) as process:
        assert process.stdout is not None
        assert process.stdin is not None
        assert process.stdout.readline() == "bound\n"
        pvbus_shared_machine.machine.raise_virq(VIRQ)
        rest, _ = process.communicate("go\n", timeout=20)

    assert (process.returncode, rest) == (0, "ok\n")


@BOTH
@pytest.mark.checklist("A10.4", "A11.5", "A12.7")
def test_a_client_that_is_killed_in_its_read_releases_its_ports(pvbus_shared_machine: BootedMachine, linking: str) -> None:
    machine = pvbus_shared_machine.machine
    before = machine.ports()
    with started("sh", "-c", f"echo $$; exec {xenevtchn_client(linking)} stay", name=pvbus_shared_machine.name) as process:
        assert process.stdout is not None
        pid = int(process.stdout.readline())
        assert process.stdout.readline() == "bound\n"
        assert len(machine.ports()) == len(before) + 2
        os.kill(pid, signal.SIGKILL)
        wait_until(lambda: machine.ports() == before, "the ports are free")
        process.communicate(timeout=20)

    assert process.returncode == 128 + signal.SIGKILL
