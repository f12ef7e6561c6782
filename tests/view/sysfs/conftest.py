# SPDX-License-Identifier: Apache-2.0
"""A machine with two devices, and a room on it, for the tests of a module."""

import contextlib
from collections.abc import Iterator
from typing import Any

import pytest

from pvbus.actors.runtime.vmbus_facts import HOST_DEVICES
from pvbus.tests.view.sysfs.rooms import CONFIG, Room, until


@pytest.fixture(scope="module")
def pvbus_config() -> str:
    return CONFIG


@pytest.fixture(scope="module")
def room(pvbus_shared_machine: Any) -> Iterator[Room]:
    made = Room(pvbus_shared_machine.machine)
    yield made
    made.close()
    assert made.process.returncode == 0


@pytest.fixture
def machine(pvbus_shared_machine: Any) -> Iterator[Any]:
    """The machine, its bus as it was at the start."""
    machine = pvbus_shared_machine.machine
    yield machine
    for row in machine.channels():
        if row["instance_id"] not in map(str, HOST_DEVICES.values()):
            with contextlib.suppress(FileNotFoundError):  # the test has rescinded it, and the guest has its number yet
                machine.rescind(row["relid"])
    until("what was offered has gone", lambda: len(machine.devices()) == 2)
