# SPDX-License-Identifier: Apache-2.0
"""`pvbus demo`: a machine of both worlds, its user processes, one murdered cpu, and nothing lost.

Boots a machine of its own, runs ping and pong between two domains, a storm beside them, and two drivers of
VMBus devices: echo (demo_users.py) and heartbeat. Shows what goes on: live on a terminal, a line a second into
a pipe. Every figure is counted: by the users in their own words, by the kernel (a wake-up is a voluntary context
switch in /proc), by `machine.status()`. It reads the machine through the client and kills one cpu process; it
belongs to no process of the machine.
"""

from __future__ import annotations

import contextlib
import ctypes
import json
import os
import select
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, TextIO

from pvbus.actors.client import attach
from pvbus.view import demo_users as words_of
from pvbus.view.cli_vmbus import device_row
from pvbus.view.demo_screen import Frame, Screen

SCHEMA = 1
SECONDS_MAX = 3600.0
WAIT_S_MAX = 20.0  # for anything that must happen: a boot, a user's start, a cpu's return, the last event
FRAME_S = 0.25
LOOK_S = 0.1  # between two looks whether a silent child still lives
VICTIM = "cpu/0.0"
PR_SET_PDEATHSIG = 1
CONFIG = """\
name = "{name}"

[[domain]]
id = 0
cpus = 2
platforms = ["xen", "hyperv"]
devices = ["echo", "heartbeat"]
affinity = "spread"

[[domain]]
id = 1
cpus = 1
platforms = ["xen"]
"""

_prctl = ctypes.CDLL(None).prctl


def _tie_to_parent() -> None:
    """Make a child die with us, and leave the terminal's Ctrl-C to us."""
    _prctl(PR_SET_PDEATHSIG, signal.SIGTERM)
    signal.signal(signal.SIGINT, signal.SIG_IGN)


class DemoError(RuntimeError):
    """Something did not happen in time."""


@dataclass
class Outcome:
    """What the demo has shown."""

    round_trips: int = 0
    trip_p50_us: float = 0.0
    storm_notifies: int = 0
    storm_events: int = 0
    lost: int = 0
    doubled: int = 0
    packets: int = 0
    packets_per_s: float = 0.0
    device: str = ""
    heartbeat: int = 0
    cpu_back_ms: float = 0.0
    explained_port: str = ""
    explanation: str = ""

    @property
    def held(self) -> bool:
        """Whether nothing was lost and nothing came twice."""
        return not self.lost and not self.doubled


class Child:
    """A process of ours whose standard output we read by lines."""

    def __init__(self, arguments: list[str], errors: Any, fds: tuple[int, ...] = ()) -> None:
        self._rest = b""
        self.process = subprocess.Popen(
            [sys.executable, "-m", *arguments],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=errors,
            pass_fds=fds,
            preexec_fn=_tie_to_parent,  # noqa: PLW1509 -- two system calls
        )
        self._what = " ".join(arguments[:2])

    def fresh(self) -> list[str]:
        """Take the lines that are there, without waiting."""
        stream = self.process.stdout
        while stream is not None and select.select([stream], [], [], 0)[0] and (data := os.read(stream.fileno(), 4096)):
            self._rest += data
        *lines, self._rest = self._rest.split(b"\n")
        return [line.decode() for line in lines]

    def line(self) -> str:
        """Read one line, within the bound."""
        deadline = time.monotonic() + WAIT_S_MAX
        stream = self.process.stdout
        while b"\n" not in self._rest and stream is not None:
            if select.select([stream], [], [], LOOK_S)[0]:
                data = os.read(stream.fileno(), 4096)
                self._rest += data
                ended = not data
            else:
                ended = self.process.poll() is not None
            if ended or time.monotonic() > deadline:
                raise DemoError(f"{self._what} ended or was silent for {WAIT_S_MAX:.0f} s")
        line, _, self._rest = self._rest.partition(b"\n")
        return line.decode()

    def wish(self) -> None:
        """Send a line, and wait for the answer."""
        if self.process.stdin is not None:
            self.process.stdin.write(b"\n")
            self.process.stdin.flush()
        self.line()

    def stop(self) -> None:
        """Let go of the leash, then insist."""
        with contextlib.suppress(BrokenPipeError):
            if self.process.stdin is not None:
                self.process.stdin.close()
        for ask in (self.process.terminate, self.process.kill):
            ask()
            try:
                self.process.wait(WAIT_S_MAX)
                break
            except subprocess.TimeoutExpired:
                continue
        if self.process.stdout is not None:
            self.process.stdout.close()


@contextmanager
def _booted(name: str) -> Iterator[float]:
    """Boot a machine and yield how many seconds it took."""
    with tempfile.TemporaryDirectory(prefix="pvbus-demo-") as directory:
        path = Path(directory, "machine.toml")
        path.write_text(CONFIG.replace("{name}", name))
        begin = time.monotonic()
        supervisor = Child(["pvbus.supervisor", "up", "--name", name, "--config", str(path)], None)
        try:
            while "ready" not in supervisor.line():
                continue
            yield time.monotonic() - begin
        finally:
            supervisor.stop()


class Demo:
    """The machine, its users, and what has been seen of them."""

    def __init__(self, machine: Any, name: str, stack: ExitStack) -> None:
        self.machine = machine
        self.name = name
        self.outcome = Outcome()
        fd = os.memfd_create("pvbus-demo")
        stack.callback(os.close, fd)
        os.ftruncate(fd, 8 * words_of.WORDS)
        self.words = words_of.counters(fd)
        self.users: dict[str, Child] = {}
        self.ports: dict[str, list[int]] = {}
        for role, offerer in (("pong", None), ("ping", "pong"), ("sink", None), ("storm", "sink")):
            offered = [str(port) for port in self.ports.get(offerer or "", [])]
            child = Child(["pvbus.view.demo_users", role, name, str(fd), *offered], None, (fd,))
            stack.callback(child.stop)
            self.users[role] = child
            self.ports[role] = [int(port) for port in child.line().split()]
        for role, arguments in (
            ("echo", ["pvbus.view.demo_users", "echo", name, str(fd)]),
            ("heartbeat", ["pvbus.verify.drivers.heartbeat", "--name", name]),
        ):
            child = self.users[role] = Child(arguments, None, (fd,))
            stack.callback(child.stop)
            self._hear(child.line())
        self.began = time.monotonic()

    def _hear(self, line: str) -> None:
        """Take what a driver says: its device; the heartbeat, which of the host's numbers it has answered."""
        words = line.split()
        if words[1:2] == ["heartbeat"]:
            self.outcome.heartbeat = int(words[2])

    def look_at_the_bus(self) -> str:
        """Give a line of `devices`: the one that the echo driver has."""
        for line in self.users["heartbeat"].fresh():
            self._hear(line)
        found = (device_row(device) for device in self.machine.devices() if device["driver"] == "echo")
        row = next(found, None)
        if row is None:
            raise DemoError("the echo device has no driver")
        return f"{row['device']}  relid {row['relid']}  {row['class']}  driver {row['driver']}  {row['device_id']}"

    def total(self, first: int) -> int:
        """Add up the storm's words."""
        return sum(self.words[first : first + words_of.STORM_PORTS])

    def frame(self, note: str) -> Frame:
        """Look at everything once."""
        status = self.machine.status()
        people = [(role, child.process.pid) for role, child in self.users.items()]
        return Frame(
            at_s=time.monotonic(),
            processes=status["processes"],
            users=people,
            files=len(status["files"]),
            trips=self.words[words_of.TRIPS],
            trip_p50_us=self.words[words_of.TRIP_P50_NS] / 1000,
            sent=self.total(words_of.SENT),
            seen=self.total(words_of.SEEN),
            storm_ports=dict(
                zip(self.ports["sink"], self.words[words_of.SEEN : words_of.SEEN + 64].tolist(), strict=True)
            ),
            ports=len(self.machine.ports()),
            packets=self.words[words_of.PACKETS_BACK],
            device=self.look_at_the_bus(),
            heartbeat=self.outcome.heartbeat,
            note=note,
        )

    def _victim(self) -> dict[str, Any]:
        for row in self.machine.status()["processes"]:
            if row["name"] == VICTIM:
                return dict(row)
        raise DemoError(f"the machine has no {VICTIM}")

    def kill_cpu(self) -> str:
        """Kill a cpu, wait until it is back, and say so."""
        before = self._victim()
        begin = time.monotonic()
        os.kill(before["pid"], signal.SIGKILL)

        def is_back() -> bool:
            now = self._victim()
            return bool(now["restarts"] > before["restarts"] and now["pid"] not in (None, 0, before["pid"]))

        _until(is_back, f"{VICTIM} is back")
        self.outcome.cpu_back_ms = (time.monotonic() - begin) * 1000
        after = self._victim()["pid"]
        took = f"{self.outcome.cpu_back_ms:.0f} ms"
        return f"killed {VICTIM} (pid {before['pid']}) with -9: back as pid {after} after {took}"

    def settle_accounts(self) -> None:
        """Stop the senders, let all arrive, and count."""
        words, outcome = self.words, self.outcome
        words[words_of.STOP] = 1
        echoes_over = 0
        self.users["storm"].line()
        self.users["echo"].line()
        outcome.packets = words[words_of.PACKETS_BACK]
        outcome.packets_per_s = outcome.packets / (time.monotonic() - self.began)
        outcome.lost += words[words_of.PACKETS_SENT] - outcome.packets
        outcome.doubled += words[words_of.PACKETS_WRONG]
        outcome.device = self.look_at_the_bus()
        try:
            self.users["ping"].line()
        except DemoError:  # it waits for an answer that does not come
            outcome.lost += 1
            echoes_over = 1  # pong may have answered what ping has not seen
        self.machine.settle()

        def behind() -> int:
            return sum(
                words[words_of.LAST + index] != words[words_of.SENT + index]
                for index in range(words_of.STORM_PORTS)
            )

        with contextlib.suppress(DemoError):  # what is still missing then is lost, and said
            _until(lambda: not behind(), "the last event has arrived", WAIT_S_MAX / 4)
        outcome.round_trips, echoes = words[words_of.TRIPS], words[words_of.ECHOES]
        outcome.trip_p50_us = words[words_of.TRIP_P50_NS] / 1000
        outcome.storm_notifies = self.total(words_of.SENT)
        outcome.storm_events = self.total(words_of.SEEN)
        outcome.lost += behind() + max(0, outcome.round_trips - echoes)
        seen, sent = (
            words[first : first + words_of.STORM_PORTS].tolist() for first in (words_of.SEEN, words_of.SENT)
        )
        outcome.doubled += max(0, echoes - outcome.round_trips - echoes_over)
        outcome.doubled += sum(events > notifies for events, notifies in zip(seen, sent, strict=True))

    def explain(self) -> None:
        """Raise one event that nobody reads, and ask where it stands."""
        self.words[words_of.REST] = 1
        self.users["sink"].line()
        self.users["storm"].wish()
        self.machine.settle()
        self.outcome.explained_port = f"0:{self.ports['sink'][0]}"
        result = subprocess.run(
            [sys.executable, "-m", "pvbus.supervisor", "explain", "port", self.outcome.explained_port],
            env={**os.environ, "PVBUS_MACHINE": self.name},
            capture_output=True,
            text=True,
            check=False,
            timeout=WAIT_S_MAX,
        )
        self.outcome.explanation = (result.stdout or result.stderr).strip()


def _until(condition: Callable[[], bool], what: str, timeout_s: float = WAIT_S_MAX) -> None:
    deadline = time.monotonic() + timeout_s
    while not condition():
        if time.monotonic() > deadline:
            raise DemoError(f"not within {timeout_s:.0f} s: {what}")
        time.sleep(0.001)


def run(seconds: float, screen: Screen) -> Outcome:
    """Boot, show, kill, count, explain, stop."""
    name = f"demo-{os.getpid()}"
    with ExitStack() as stack:
        boot_s = stack.enter_context(_booted(name))
        screen.line(f"a machine with two domains is ready after {boot_s * 1000:.0f} ms; starting six users")
        machine = stack.enter_context(attach(name=name))
        demo = Demo(machine, name, stack)
        begin = time.monotonic()
        note, killed = f"{VICTIM} will be killed at half time", False
        while (elapsed := time.monotonic() - begin) < seconds:
            if not killed and elapsed >= seconds / 2:
                note, killed = demo.kill_cpu(), True
                screen.line(note)
            screen.show(demo.frame(note), elapsed)
            time.sleep(min(FRAME_S, max(0.0, seconds - elapsed)))
        demo.settle_accounts()
        demo.explain()
        return demo.outcome


def _summary(outcome: Outcome) -> list[str]:
    merged = outcome.storm_notifies / outcome.storm_events if outcome.storm_events else 0.0
    verdict = "nothing lost, nothing twice" if outcome.held else "BROKEN"
    counted = f"{outcome.lost} lost, {outcome.doubled} doubled"
    storm = f"{outcome.storm_notifies:,} notifies became {outcome.storm_events:,} events"
    return [
        f"{outcome.round_trips:,} round trips at a p50 of {outcome.trip_p50_us:.0f} µs",
        f"the storm's {storm}, {merged:.1f} merged into one",
        f"{outcome.packets:,} packets to a VMBus device and back, {outcome.packets_per_s:,.0f} a second: {outcome.device}",
        f"the host's heartbeat is at {outcome.heartbeat}, and answered",
        f"one cpu killed and back in {outcome.cpu_back_ms:.0f} ms: {verdict} ({counted})",
        f"one event more, which nobody reads. $ pvbus explain port {outcome.explained_port}",
        f"  {outcome.explanation}",
    ]


def command(seconds: float = 6.0, as_json: bool = False, stream: TextIO | None = None) -> int:
    """Do what `pvbus demo` does, and return its exit code."""
    out = stream or sys.stdout
    if not 1 <= seconds <= SECONDS_MAX:
        print(f"--seconds {seconds:g}: a demo takes 1 to {SECONDS_MAX:.0f} seconds", file=sys.stderr)
        return 2
    try:
        outcome = run(seconds, Screen(out, silent=as_json))
    except KeyboardInterrupt:
        return 130
    except (DemoError, OSError, subprocess.TimeoutExpired) as error:
        print(f"the demo could not go on: {error}", file=sys.stderr)
        return 4 if isinstance(error, DemoError) else 3
    if as_json:
        print(json.dumps({"schema": SCHEMA, "held": outcome.held, **asdict(outcome)}), file=out)
    else:
        print(*_summary(outcome), "the machine is stopped", sep="\n", file=out)
    return 0 if outcome.held else 1


if __name__ == "__main__":
    sys.exit(command())
