# SPDX-License-Identifier: Apache-2.0
"""Reads of the FUSE file that signals interrupt: on x86-64 each goes on or ends as on the device; elsewhere it ends with EINTR."""

from __future__ import annotations

import errno
import json
import os
import platform
import signal
import subprocess
import sys
import threading
from pathlib import Path
from typing import Any

import pytest

from pvbus.tests.contract.support import wait_until
from pvbus.tests.frontend.restarts import LOOKS, ROUNDS
from pvbus.tests.frontend.support import driver, run, started
from pvbus.view.fuse import restart
from pvbus.view.fuse.abi import OUT_HEADER
from pvbus.view.fuse.request import Request
from pvbus.view.pytest_plugin import BootedMachine
from pvbus.view.run.fitting import new_inbox

RESTARTS = platform.machine() == "x86_64"
STOPS = f"{signal.SIGSTOP:x}7f ffff " * ROUNDS
SEEN = {
    "a thread's own signal": ["4", "4" if RESTARTS else "EINTR", "4"],
    "a thread's own signal without SA_RESTART": ["4", "EINTR", "4"],
    "an event behind such a signal": "4",
    "readv": "8" if RESTARTS else "EINTR",
    "preadv2": "4" if RESTARTS else "EINTR",
    "a storm": {"each once": True, "interrupted": not RESTARTS, "ended": [0, 0]},
    "SIGKILL": [signal.SIGKILL],
    "a debugger's reader": ["EINTR", f"0x{signal.SIGUSR1:x}7f", 0],
    "SIGSTOP of one thread": STOPS + ("0" if RESTARTS else "100"),
    "SIGSTOP of three threads": STOPS + ("0" if RESTARTS else "300"),
    "exec of another thread": [0],
}


@pytest.fixture(scope="module")
def seen(pvbus_shared_machine: BootedMachine) -> dict[str, Any]:
    done = run(sys.executable, "-m", "pvbus.tests.frontend.restarts", str(driver()), name=pvbus_shared_machine.name)
    assert done.returncode == 0, done.stderr
    found: dict[str, Any] = json.loads(done.stdout)
    return found


@pytest.mark.parametrize("what", LOOKS)
def test_an_interrupted_read_goes_on_as_on_the_device(seen: dict[str, Any], what: str) -> None:
    assert seen[what] == SEEN[what]
