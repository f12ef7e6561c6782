# SPDX-License-Identifier: Apache-2.0
"""Interrupted reads of the FUSE file: on x86-64 each goes on or ends as on the device; elsewhere it ends with EINTR."""

from __future__ import annotations

import errno
import json
import os
import signal
import sys
from typing import Any

import pytest

from pvbus.tests.contract.support import wait_until
from pvbus.tests.frontend.restarts import LOOKS, ROUNDS
from pvbus.tests.frontend.support import driver, run, server_of, started
from pvbus.view.fuse.debugger import CAN_MEND, Debuggers
from pvbus.view.fuse.disguise import restart
from pvbus.view.fuse.request import Request
from pvbus.view.pytest_plugin import BootedMachine
from pvbus.view.run.fitting import new_inbox

STOPS = f"{signal.SIGSTOP:x}7f ffff " * ROUNDS
SEEN = {
    "a thread's own signal": ["4", "4" if CAN_MEND else "EINTR", "4"],
    "a thread's own signal without SA_RESTART": ["4", "EINTR", "4"],
    "an event behind such a signal": "4",
    "readv": "8" if CAN_MEND else "EINTR",
    "preadv2": "4" if CAN_MEND else "EINTR",
    "a storm": {"each once": True, "interrupted": not CAN_MEND, "ended": [0, 0]},
    "SIGKILL": [signal.SIGKILL],
    "a debugger's reader": ["EINTR", f"0x{signal.SIGUSR1:x}7f", 0],
    "a debugger's program": ["ENOTTY", "-rw------- 4096 0:0", "0x65735546"],
    "SIGSTOP of one thread": STOPS + ("0" if CAN_MEND else "100"),
    "SIGSTOP of three threads": STOPS + ("0" if CAN_MEND else "300"),
    "exec of another thread": [0],
    "an exec that hangs": ["EINTR", signal.SIGKILL, signal.SIGKILL],
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


@pytest.mark.parametrize("process", ["alive", "ended"])
def test_with_no_debugger_free_or_no_reader_left_the_answer_is_eintr_at_once(process: str) -> None:
    class Answers:
        """A session that remembers what it has answered."""

        def __init__(self) -> None:
            self.numbers: list[int] = []

        def answer(self, _unique: int, number: int) -> None:
            self.numbers.append(number)

    inbox, session = new_inbox("test"), Answers()
    reader = os.getpid() if process == "alive" else os.posix_spawn("/bin/true", ["true"], {})
    if process == "ended":
        os.waitpid(reader, 0)
    request = Request(session, 1, 1, reader)  # type: ignore[arg-type]

    Debuggers(inbox, traced_max=int(process == "ended")).see_out(request, lambda: request.fail(errno.EINTR), restart)
    wait_until(lambda: bool(session.numbers), "it is answered")

    inbox.abandon()
    assert session.numbers == [errno.EINTR]


STORM = """\
import os, signal, sys
from pvbus.tests.frontend.restarts import *
DeviceFile.driver = Driver(sys.argv[1])
signal.signal(RESTARTING, lambda *_: None)
signal.siginterrupt(RESTARTING, False)
a, _, _, _ = pair()
reader = child_of(lambda: os.write(1, name_of(lambda: a.read(4)).encode()) and 7)
wait_for(lambda: is_in_read(reader), "it reads")
print("reads", flush=True)
seen = 0
while not seen:
    seen, status = os.waitpid(reader, os.WNOHANG | os.WUNTRACED)
    if not seen:
        os.kill(reader, RESTARTING)
print("", os.waitstatus_to_exitcode(status), flush=True)
"""


def test_a_server_that_is_killed_in_a_storm_of_signals_lets_its_readers_go(pvbus_shared_machine: BootedMachine) -> None:
    with started(sys.executable, "-c", STORM, str(driver()), name=pvbus_shared_machine.name) as process:
        assert process.stdout is not None
        assert process.stdout.readline() == "reads\n"
        os.kill(server_of(process.pid, pvbus_shared_machine.name), signal.SIGKILL)
        answers, _ = process.communicate(timeout=20)

    answer, code = answers.split()
    assert answer in {"ECONNABORTED", "ENOTCONN", "EINTR"}
    assert code == "7"
