# SPDX-License-Identifier: Apache-2.0
"""A guest that finds no VMBus device, or one without an interrupt: drivers are told ENODEV, in the machine's time."""

from __future__ import annotations

import errno
import threading
import time
from typing import Any

import pytest

from pvbus.tests.machine.vmbus_support import BOUND_S, Recorder, config, wait_until

DISCOVERY_S = 5.0
REAL_S_MAX = 4.0


def register(machine: Any, outcome: list[int]) -> None:
    try:
        machine.register_driver(Recorder())
        outcome.append(0)
    except OSError as error:
        outcome.append(error.errno or 0)


@pytest.mark.checklist("B9.3", "B9.7", "B1.2", "B7.1", "B9.8")
def test_without_an_acpi_device_drivers_are_refused_after_five_seconds_of_the_machines_clock(pvbus_boot: Any) -> None:
    booted = pvbus_boot(config(keys="acpi_device = false"))
    begin = time.monotonic()
    outcome: list[int] = []
    registering = threading.Thread(target=register, args=(booted.machine, outcome))
    registering.start()
    wait_until("it is being registered", lambda: 0 in booted.machine._buses)
    assert outcome == []

    booted.machine.advance(DISCOVERY_S)

    registering.join(BOUND_S)
    assert outcome == [errno.ENODEV]
    assert time.monotonic() - begin < REAL_S_MAX
    register(booted.machine, outcome)
    assert outcome == [errno.ENODEV] * 2
    assert booted.machine.devices() == []
    assert "no VMBUS device in ACPI" in booted.log


@pytest.mark.checklist("B9.5", "B8.4")
def test_a_device_without_an_interrupt_is_no_bus(pvbus_boot: Any) -> None:
    booted = pvbus_boot(config(keys="vmbus_irq = 0"))
    booted.machine.settle()
    begin = time.monotonic()
    outcome: list[int] = []

    register(booted.machine, outcome)

    assert outcome == [errno.ENODEV]
    assert time.monotonic() - begin < REAL_S_MAX
    assert "no irq" in booted.log


@pytest.mark.checklist("B6.5", "B9.4")
@pytest.mark.parametrize("irq", [1, 9])
def test_another_interrupt_line_is_as_good(pvbus_boot: Any, irq: int) -> None:
    machine = pvbus_boot(config(keys=f"vmbus_irq = {irq}")).machine
    machine.offer("echo")
    machine.settle()
    driver = machine.register_driver(Recorder())
    assert [call for call, _ in driver.calls] == ["probe"]
