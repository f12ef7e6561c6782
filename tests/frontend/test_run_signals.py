# SPDX-License-Identifier: Apache-2.0
"""`pvbus run` under a terminal and under signals: what the command would see, and its shell, if it were started without us."""

from __future__ import annotations

import contextlib
import os
import pty
import select
import signal
import sys
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

import pytest

from pvbus.tests.contract.support import wait_until
from pvbus.tests.frontend.support import RUN_S_MAX, command, environment, need_namespaces, started
from pvbus.view.pytest_plugin import BootedMachine

HEARS = """
import contextlib, signal, sys
heard = signal.valid_signals() - {signal.SIGKILL, signal.SIGSTOP, signal.SIGCHLD}
signal.pthread_sigmask(signal.SIG_BLOCK, heard)
print("ready", flush=True)
number = signal.sigwait(heard)
with contextlib.suppress(OSError):
    print(int(number), flush=True)
sys.stdout = None
sys.exit(40)
"""
WAITS = """
import signal
signal.pthread_sigmask(signal.SIG_BLOCK, [signal.SIGCONT])
signal.signal(signal.SIGINT, signal.SIG_DFL)
print("ready", flush=True)
while signal.sigwait([signal.SIGCONT]):
    print("on", flush=True)
"""


@pytest.mark.parametrize("number", [signal.SIGPIPE, signal.SIGTSTP, signal.SIGIO, signal.SIGRTMAX])
def test_any_signal_that_can_be_passed_on_is(pvbus_shared_machine: BootedMachine, number: int) -> None:
    with started(sys.executable, "-c", HEARS, name=pvbus_shared_machine.name) as process:
        assert process.stdout is not None
        assert process.stdout.readline() == "ready\n"
        process.send_signal(number)
        assert process.communicate(timeout=RUN_S_MAX)[0] == f"{int(number)}\n"

    assert process.returncode == 40


class Terminal:
    """A program that leads the session of a terminal."""

    def __init__(self, words: Sequence[str]) -> None:
        self.pid, self.fd = pty.fork()
        if self.pid == 0:
            for number in (signal.SIGINT, signal.SIGQUIT, signal.SIGTSTP):  # a background job's are ignored
                signal.signal(number, signal.SIG_DFL)
            os.execvpe(words[0], list(words), environment())
        self._said = b""

    def until(self, what: bytes) -> None:
        """Wait until it has said something, and forget what it has said so far."""
        while what not in self._said:
            assert select.select([self.fd], [], [], RUN_S_MAX)[0], f"{what!r} in {self._said!r}"
            self._said += os.read(self.fd, 4096)  # EIO: the last process with the terminal has ended
        self._said = self._said.partition(what)[2]

    def type(self, keys: bytes) -> None:
        """Press keys."""
        os.write(self.fd, keys)

    def hang_up(self) -> None:
        """Take the terminal away."""
        os.close(self.fd)
        self.fd = -1

    def end(self) -> None:
        """Leave nothing behind."""
        if self.fd >= 0:
            os.close(self.fd)
        with contextlib.suppress(ProcessLookupError, ChildProcessError):
            os.kill(self.pid, signal.SIGKILL)
            os.waitpid(self.pid, 0)


@pytest.fixture
def terminal() -> Iterator[Callable[[Sequence[str]], Terminal]]:
    need_namespaces()
    made: list[Terminal] = []

    def make(words: Sequence[str]) -> Terminal:
        made.append(Terminal(words))
        return made[-1]

    yield make
    for one in made:
        one.end()


def test_a_terminal_that_hangs_up_is_heard_of_by_the_command(
    pvbus_shared_machine: BootedMachine, terminal: Callable[[Sequence[str]], Terminal]
) -> None:
    leader = terminal(command(sys.executable, "-c", HEARS, name=pvbus_shared_machine.name))
    leader.until(b"ready\r\n")

    leader.hang_up()

    assert os.waitstatus_to_exitcode(os.waitpid(leader.pid, 0)[1]) == 40


def state(pid: int) -> str:
    """Give the letter that ps shows."""
    return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0]


def test_a_command_that_stops_stops_the_run_and_goes_on_with_it(
    pvbus_shared_machine: BootedMachine, terminal: Callable[[Sequence[str]], Terminal]
) -> None:
    words = command(sys.executable, "-c", WAITS, name=pvbus_shared_machine.name)
    shell = terminal(["sh", "-c", 'set -m; "$@"; echo stopped; read line; fg > /dev/null; echo ended', "sh", *words])
    shell.until(b"ready\r\n")

    shell.type(b"\x1a")
    shell.until(b"stopped")
    (run,) = map(int, Path(f"/proc/{shell.pid}/task/{shell.pid}/children").read_text().split())
    children = list(map(int, Path(f"/proc/{run}/task/{run}/children").read_text().split()))
    states = [state(pid) for pid in children]
    shell.type(b"\n")
    shell.until(b"on\r\n")

    # The servers go on, for whoever else is in the run; the command, started last, has stopped.
    assert (states[-1], "T" in states[:-1]) == ("T", False)
    wait_until(lambda: state(run) != "T", "the run goes on")
    shell.type(b"\x03")
    shell.until(b"ended")


def test_a_signal_to_the_whole_group_leaves_the_servers_alone(pvbus_shared_machine: BootedMachine) -> None:
    words = "trap 'cat /sys/bus/vmbus/drivers_autoprobe; exec 3<> /dev/xen/evtchn && exit 5' USR2; echo ready; read; read"
    need_namespaces()
    leader = Terminal(command("bash", "-c", words, name=pvbus_shared_machine.name))  # of a group of its own
    try:
        leader.until(b"ready\r\n")
        os.killpg(leader.pid, signal.SIGUSR2)
        assert os.waitstatus_to_exitcode(os.waitpid(leader.pid, 0)[1]) == 5
    finally:
        leader.end()
