# SPDX-License-Identifier: Apache-2.0
"""What the view tests share: bounded waiting, and processes that are stopped for a while."""

import contextlib
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from typing import Any

from pvbus.view.processes import condition_of
from pvbus.view.pytest_plugin import environment

WAIT_S_MAX = 10.0
LOOK_S = 0.002  # between two looks at a condition
RUN_S_MAX = 40
PVBUS = [sys.executable, "-m", "pvbus.supervisor"]
Done = subprocess.CompletedProcess[str]


def until(condition: Callable[[], Any], what: str) -> None:
    """Wait for a condition, within the bound."""
    deadline_s = time.monotonic() + WAIT_S_MAX
    while not condition():
        assert time.monotonic() < deadline_s, f"not within {WAIT_S_MAX:.0f} s: {what}"
        time.sleep(LOOK_S)


def pid_of(machine: Any, name: str) -> int:
    """Return the pid of a process of the machine."""
    return int(next(row["pid"] for row in machine.status()["processes"] if row["name"] == name))


@contextlib.contextmanager
def stopped(pid: int) -> Iterator[int]:
    """Stop a process for the length of a with block."""
    os.kill(pid, signal.SIGSTOP)
    try:
        until(lambda: condition_of(pid) == "stopped", f"process {pid} is stopped")
        yield pid
    finally:
        with contextlib.suppress(ProcessLookupError):
            os.kill(pid, signal.SIGCONT)


def pvbus(*arguments: str, machine: str | None = None, **variables: str) -> Done:
    """Run one command to its end."""
    inherited = {name: value for name, value in environment().items() if name != "PVBUS_MACHINE"}
    chosen = {"PVBUS_MACHINE": machine} if machine is not None else {}
    return subprocess.run(
        [*PVBUS, *arguments],
        env=inherited | chosen | variables,
        stdin=subprocess.DEVNULL,
        capture_output=True,
        text=True,
        timeout=RUN_S_MAX,
        check=False,
    )
