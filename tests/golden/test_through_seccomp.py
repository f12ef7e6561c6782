# SPDX-License-Identifier: Apache-2.0
"""The recorded answers once more, through the descriptor that the seccomp front end injects."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

from pvbus.tests.golden import through_file
from pvbus.tests.golden.replayer import scenarios
from pvbus.tests.golden.test_golden import CONFIG
from pvbus.tests.run.support import in_run
from pvbus.view.pytest_plugin import BootedMachine


@pytest.fixture(scope="module")
def pvbus_config() -> str:
    return CONFIG.format(cpus=1, abi="fifo", affinity="vcpu0")


@pytest.mark.checklist("A9.9", "A12.10", "A12.11")
def test_an_injected_descriptor_gives_the_recorded_answers(pvbus_shared_machine: BootedMachine, tmp_path: Path) -> None:
    driver = tmp_path / "driver.so"
    subprocess.run(
        ["cc", "-O1", "-shared", "-fPIC", "-o", driver, Path(through_file.__file__).with_name("evtchn_driver.c")], check=True
    )
    command = [sys.executable, "-m", "pvbus.tests.golden.through_file", str(driver), "seccomp", "1", "fifo", *scenarios()]

    done = in_run(pvbus_shared_machine.name, ["--frontend", "seccomp"], *command)

    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout)
    assert sorted(found) == sorted(scenarios())
    assert [line for result in found.values() for line in result["differences"]] == []
    assert sum(result["left_out"] for result in found.values()) == len(through_file.DEVIATIONS["seccomp"])
