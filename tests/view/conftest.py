# SPDX-License-Identifier: Apache-2.0
"""The machine of the view tests, and files that close themselves."""

from collections.abc import Callable, Iterator
from typing import Any

import pytest

from pvbus.view.pytest_plugin import BootedMachine

CONFIG = """\
[[domain]]
id = 0
cpus = 1
platforms = ["xen"]
kernel_virqs = [0]
kernel_ports = 3

[[domain]]
id = 1
cpus = 1
platforms = ["xen"]
"""


@pytest.fixture(scope="module")
def pvbus_config() -> str:
    """Return a machine with two domains, whose kernel holds ports 1 to 3 of domain 0."""
    return CONFIG


@pytest.fixture
def machine(pvbus_shared_machine: BootedMachine) -> Any:
    """Return the attached machine that the tests of a module share."""
    return pvbus_shared_machine.machine


@pytest.fixture
def opened(machine: Any) -> Iterator[Callable[..., Any]]:
    """Return open_evtchn, non-blocking, domain 0 unless told otherwise; the files close after the test."""
    files: list[Any] = []

    def open_file(domain: int = 0) -> Any:
        files.append(machine.open_evtchn(domain=domain, nonblock=True))
        return files[-1]

    yield open_file
    for file in files:
        file.close()
