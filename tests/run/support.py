# SPDX-License-Identifier: Apache-2.0
"""What the tests of runs share: a command to its end, one that goes on, and packages."""

from __future__ import annotations

import contextlib
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from pvbus.view.pytest_plugin import environment

RUN_S_MAX = 60
CLIENT = Path(__file__).parent / "xen_client.c"
PVBUS = [sys.executable, "-m", "pvbus.supervisor"]
NOT_TESTED: dict[str, str] = {}
"""Packages that were missing, and by what that was seen."""


class Packages:
    """What is installed here."""

    @staticmethod
    def need(path: str, package: str) -> None:
        """Skip a test, loudly, where a file of a package is missing."""
        if not Path(path).exists():
            NOT_TESTED[package] = path
            pytest.skip(f"NOT TESTED HERE: package {package} is missing")


def _command(machine: str, options: list[str], command: list[str]) -> list[str]:
    return [*PVBUS, "run", "--name", machine, *options, "--", *command]


def in_run(machine: str, options: list[str], *command: str) -> subprocess.CompletedProcess[str]:
    """Run a command to its end."""
    return subprocess.run(
        _command(machine, options, list(command)), env=environment(), stdin=subprocess.DEVNULL, capture_output=True,
        text=True, timeout=RUN_S_MAX, check=False,
    )  # fmt: skip


@contextlib.contextmanager
def running(machine: str, options: list[str], *command: str) -> Iterator[subprocess.Popen[str]]:
    """Have a command run for the length of a with block; its output is a pipe."""
    process = subprocess.Popen(
        _command(machine, options, list(command)), env=environment(), stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, text=True
    )
    try:
        yield process
    finally:
        process.terminate()
        process.communicate(timeout=RUN_S_MAX)
