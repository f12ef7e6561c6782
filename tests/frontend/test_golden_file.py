# SPDX-License-Identifier: Apache-2.0
"""The recorded scenarios through the device file: system calls of a C driver, and the front end's deviations named."""

from __future__ import annotations

import json
import sys

import pytest

from pvbus.tests.frontend.support import driver, run
from pvbus.tests.golden.replayer import scenarios
from pvbus.tests.golden.through_file import DEVIATIONS
from pvbus.view.pytest_plugin import BootedMachine

SCENARIOS = scenarios()
# The recording kernel: it held four VIRQs and its first ports, and there was no domain 1.
CONFIG = """\
[[domain]]
id = 0
cpus = 1
platforms = ["xen"]
abi = "fifo"
kernel_virqs = [0, 2, 9, 16]
kernel_ports = 13
"""


@pytest.fixture(scope="module")
def pvbus_config() -> str:
    return CONFIG


@pytest.mark.checklist("A1.1", "A4.1", "A5.1", "A6.1", "A9.1", "A9.9", "A10.1", "A12.1", "A12.10", "A12.11")
@pytest.mark.parametrize("frontend", ["fuse", "seccomp"])
def test_the_device_file_gives_the_recorded_answers_but_for_the_deviations(
    pvbus_shared_machine: BootedMachine, frontend: str
) -> None:
    words = [sys.executable, "-m", "pvbus.tests.golden.through_file", str(driver()), frontend, "1", "fifo", *SCENARIOS]

    done = run(*words, name=pvbus_shared_machine.name, options=["--frontend", frontend])

    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout)
    assert list(found) == list(SCENARIOS)
    differences = [text for result in found.values() for text in result["differences"]]
    assert not differences, "\n".join(differences)
    for name, result in found.items():
        assert result["left_out"] == sum(scenario == name for scenario, _ in DEVIATIONS[frontend])
        assert result["compared"] + result["made_only"] + result["left_out"] == result["steps"]


def test_every_deviation_names_a_step_that_exists() -> None:
    recorded = {step.key for steps in SCENARIOS.values() for step in steps}

    assert all(set(steps) <= recorded for steps in DEVIATIONS.values())
