# SPDX-License-Identifier: Apache-2.0
"""The programs of README.md run as they are written, against the machine that it says."""

import re
import subprocess
import sys
from pathlib import Path

import pytest

from pvbus.tests.view.support import RUN_S_MAX, pvbus
from pvbus.view.pytest_plugin import environment

README = Path(__file__).resolve().parents[2] / "README.md"
PROGRAMS = [
    program for program in re.findall(r"^```python\n(.*?)^```$", README.read_text(), re.MULTILINE | re.DOTALL)
    if "attach()" in program
]


def test_there_is_a_program_for_each_world() -> None:
    assert ["open_evtchn" in program for program in PROGRAMS] == [True, False]


@pytest.mark.parametrize(("program", "said"), [
    (PROGRAMS[0], r"event on port \d+\n"),
    (PROGRAMS[1], r"vmbus_0_3 answers \(11, 7, b'hello[^']*', False\)\n"),
], ids=["xen", "hyperv"])  # fmt: skip
def test_a_program_of_the_readme_runs_on_the_default_machine(program: str, said: str, tmp_path: Path) -> None:
    (tmp_path / "program.py").write_text(program)
    assert pvbus("up", "--name", "readme", "--detach").returncode == 0
    try:
        done = subprocess.run(
            [sys.executable, str(tmp_path / "program.py")], env=environment() | {"PVBUS_MACHINE": "readme"},
            capture_output=True, text=True, timeout=RUN_S_MAX, check=False,
        )  # fmt: skip
    finally:
        assert pvbus("down", "--name", "readme").returncode == 0

    assert (done.returncode, done.stderr) == (0, "")
    assert re.fullmatch(said, done.stdout), done.stdout
