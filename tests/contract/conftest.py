# SPDX-License-Identifier: Apache-2.0
"""The machine of the contract tests, and files that close themselves."""

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

[[domain]]
id = 2
cpus = 1
platforms = ["hyperv"]
"""


@pytest.fixture(scope="module")
def pvbus_config() -> str:
    """Return a machine with a second Xen domain, a domain without Xen, and a kernel that holds a little."""
    return CONFIG


@pytest.fixture
def file_2level(pvbus_boot: Callable[[str], BootedMachine]) -> Iterator[Any]:
    """Return a non-blocking file of domain 0 of such a machine whose domains are on the 2-level ABI; closes it."""
    booted = pvbus_boot(CONFIG.replace('platforms = ["xen"]', 'platforms = ["xen"]\nabi = "2-level"'))
    with booted.machine.open_evtchn(domain=0, nonblock=True) as file:
        yield file


@pytest.fixture
def machine(pvbus_shared_machine: BootedMachine) -> Any:
    """Return the attached machine that the tests of a module share."""
    return pvbus_shared_machine.machine


@pytest.fixture
def opened(machine: Any) -> Iterator[Callable[..., Any]]:
    """Return open_evtchn, non-blocking on domain 0 unless told otherwise; closes the files after the test."""
    files: list[Any] = []

    def open_file(**options: Any) -> Any:
        files.append(machine.open_evtchn(**({"domain": 0, "nonblock": True} | options)))
        return files[-1]

    yield open_file
    for file in files:
        file.close()
