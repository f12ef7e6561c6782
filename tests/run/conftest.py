# SPDX-License-Identifier: Apache-2.0
"""Commands in a run, real clients compiled for it, and a loud word where a package is missing."""

from __future__ import annotations

import subprocess
from collections.abc import Callable
from pathlib import Path

import pytest

from pvbus.tests.run.support import CLIENT, NOT_TESTED, Packages
from pvbus.view.pytest_plugin import BootedMachine

CONFIG = """\
[[domain]]
id = 0
cpus = 1
platforms = ["xen"]
"""


@pytest.fixture(scope="module")
def pvbus_config() -> str:
    return CONFIG


@pytest.fixture
def machine_name(pvbus_shared_machine: BootedMachine) -> str:
    return pvbus_shared_machine.name


@pytest.fixture(scope="session")
def compiled(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    """Return a function that compiles the client, `dynamic` or `static`."""
    made: dict[str, Path] = {}

    def client(linking: str) -> Path:
        Packages.need("/usr/include/xenevtchn.h", "libxen-dev")
        if linking not in made:
            made[linking] = tmp_path_factory.mktemp("client") / linking
            libraries = ["-lxenevtchn", "-lpthread"]
            if linking == "static":
                libraries = ["-static", "-lxenevtchn", "-lxentoolcore", "-lxentoollog", "-lpthread"]
            subprocess.run(["cc", "-O1", "-Wall", "-o", made[linking], CLIENT, *libraries], check=True)
        return made[linking]

    return client


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter) -> None:
    """Say once more, where nobody overlooks it, what was not tested for want of a package."""
    if NOT_TESTED:
        terminalreporter.section("NOT TESTED HERE", sep="!", red=True, bold=True)
        for package, what in sorted(NOT_TESTED.items()):
            terminalreporter.line(f"package {package} is missing ({what}): its programs were not run", red=True)
