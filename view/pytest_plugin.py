# SPDX-License-Identifier: Apache-2.0
"""Give tests a running machine, and attach the machine's state to a failure.

Fixtures: `pvbus_machine` (a machine a test), `pvbus_shared_machine` (one a module), `pvbus_boot` (a factory
for machines with their own configuration) and `pvbus_config` (module scope; override it to change what the
first two boot). A failing test gets a report section "pvbus": status, ports, and an explanation of every
bound port.

The plugin is loaded into every pytest run of whoever has pvbus installed: nothing but pytest and the standard
library may be imported at the top of this module.
"""

from __future__ import annotations

import contextlib
import itertools
import json
import os
import re
import select
import selectors
import signal
import subprocess
import sys
import tempfile
import time
import traceback
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

if TYPE_CHECKING:
    from collections.abc import Callable, Generator, Iterator

    from pvbus.actors.client import Machine

READY_TIMEOUT_S = 20.0  # a cold boot with every process on a busy two-core machine stays well below
STOP_TIMEOUT_S = 20.0  # ordered stop of every process, right to left
EXPLAINED_PORTS_MAX = 32  # a report is read by people
LOG_TAIL_BYTES = 8192  # what of the supervisor's output goes into a report

DEFAULT_CONFIG = """\
[[domain]]
id = 0
cpus = 1
platforms = ["xen"]

[[domain]]
id = 1
cpus = 1
platforms = ["xen"]
"""

# Run ids of machines that fixtures hold at this moment: a check for leftovers after each test skips them.
ALIVE_RUN_IDS: set[str] = set()

_alive: list[BootedMachine] = []
_serial = itertools.count(1)


class MachineError(Exception):
    """A machine under test did not start, or did not stop, as it must."""


@dataclass
class BootedMachine:
    """One machine under test: a supervisor process, and a connection attached to it."""

    name: str
    config: str
    directory: Path
    process: subprocess.Popen[bytes]
    machine: Machine = field(init=False)
    run_id: str = ""
    exit_code_expected: int = 0  # for a test that makes the machine give up
    output: bytes = b""
    attachment: contextlib.ExitStack = field(default_factory=contextlib.ExitStack)

    @property
    def log(self) -> str:
        """Return the end of what the supervisor has said on standard output and standard error."""
        self.collect_output()
        errors = (self.directory / "stderr").read_bytes()
        return (self.output + errors)[-LOG_TAIL_BYTES:].decode(errors="replace")

    def collect_output(self) -> None:
        """Take what lies in the supervisor's standard output, without waiting."""
        stdout = self.process.stdout
        if stdout is None or stdout.closed:
            return
        with contextlib.suppress(BlockingIOError):
            while data := os.read(stdout.fileno(), 65536):
                self.output += data


def environment() -> dict[str, str]:
    """Return the environment of a supervisor: it finds the same pvbus as this process does."""
    places = [place for place in sys.path if place and (Path(place) / "pvbus").is_dir()]
    inherited = os.environ.get("PYTHONPATH")
    wanted = [*places, *([inherited] if inherited else [])]
    return os.environ | ({"PYTHONPATH": os.pathsep.join(wanted)} if wanted else {})


def boot(config: str, directory: Path) -> BootedMachine:
    """Boot a machine and attach to it; raise MachineError if it is not ready in time."""
    name = f"test-{os.getpid()}-{next(_serial)}"
    directory.mkdir(parents=True, exist_ok=True)
    config_file = directory / "machine.toml"
    config_file.write_text(config)
    command = [sys.executable, "-m", "pvbus.supervisor", "up", "--name", name, "--config", str(config_file)]
    with (directory / "stderr").open("wb") as errors:
        process = subprocess.Popen(
            command, stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=errors, env=environment()
        )
    assert process.stdout is not None
    os.set_blocking(process.stdout.fileno(), False)
    booted = BootedMachine(name, config, directory, process)
    try:
        _wait_until_ready(booted)
        _attach(booted)
    except BaseException:
        _kill(booted)
        raise
    return booted


def _wait_until_ready(booted: BootedMachine) -> None:
    assert booted.process.stdout is not None
    deadline = time.monotonic() + READY_TIMEOUT_S
    with selectors.DefaultSelector() as selector:
        selector.register(booted.process.stdout, selectors.EVENT_READ)
        while b"ready" not in booted.output.split():
            remaining = deadline - time.monotonic()
            if remaining <= 0:
                text = f"machine {booted.name} was not ready after {READY_TIMEOUT_S:g} s\n{booted.log}"
                raise MachineError(text)
            if not selector.select(remaining):
                continue
            before = len(booted.output)
            booted.collect_output()
            if len(booted.output) == before:  # readable and nothing to read: end of file
                code = booted.process.wait(timeout=STOP_TIMEOUT_S)
                text = f"machine {booted.name} ended with exit code {code} before it was ready\n{booted.log}"
                raise MachineError(text)


def _attach(booted: BootedMachine) -> None:
    from pvbus.actors.client import attach

    booted.machine = booted.attachment.enter_context(attach(name=booted.name))
    booted.run_id = str(booted.machine.status()["run_id"])
    ALIVE_RUN_IDS.add(booted.run_id)
    _alive.append(booted)


def _forget(booted: BootedMachine) -> None:
    ALIVE_RUN_IDS.discard(booted.run_id)
    if booted in _alive:
        _alive.remove(booted)
    if booted.process.stdout is not None:
        booted.process.stdout.close()


def _kill(booted: BootedMachine) -> None:
    booted.process.kill()
    booted.process.wait()
    _forget(booted)


def _ends(process: subprocess.Popen[bytes], timeout_s: float) -> bool:
    """Wait until a process has ended, and no longer: Popen.wait with a limit looks every twentieth of a second."""
    if process.poll() is not None:
        return True
    pidfd = os.pidfd_open(process.pid)
    try:
        return bool(select.select([pidfd], [], [], timeout_s)[0])
    finally:
        os.close(pidfd)


def shut_down(booted: BootedMachine) -> None:
    """Detach, stop the machine with SIGTERM, and demand that it ends in order with exit code 0."""
    died_early = booted.process.poll() is not None
    try:
        booted.attachment.close()
    except OSError:
        if not died_early:
            _kill(booted)
            raise
    booted.process.send_signal(signal.SIGTERM)
    if not _ends(booted.process, STOP_TIMEOUT_S):
        text = f"machine {booted.name} did not stop within {STOP_TIMEOUT_S:g} s of SIGTERM\n{booted.log}"
        _kill(booted)
        raise MachineError(text)
    code = booted.process.wait()
    log = booted.log
    _forget(booted)
    if code != booted.exit_code_expected:
        text = f"machine {booted.name} ended with exit code {code}, not {booted.exit_code_expected}\n{log}"
        raise MachineError(text)


@contextlib.contextmanager
def running(config: str, directory: Path) -> Iterator[BootedMachine]:
    """Boot a machine for the length of a with block."""
    booted = boot(config, directory)
    try:
        yield booted
    finally:
        shut_down(booted)


@contextlib.contextmanager
def _machine_in_temporary_directory(config: str) -> Iterator[BootedMachine]:
    with (
        tempfile.TemporaryDirectory(prefix="pvbus-test-") as directory,
        running(config, Path(directory)) as booted,
    ):
        yield booted


# Fixtures -----------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def pvbus_config() -> str:
    """Return the configuration that `pvbus_machine` and `pvbus_shared_machine` boot; to be overridden."""
    return DEFAULT_CONFIG


@pytest.fixture
def pvbus_machine(pvbus_config: str) -> Iterator[BootedMachine]:
    """Boot a machine for one test."""
    with _machine_in_temporary_directory(pvbus_config) as booted:
        yield booted


@pytest.fixture(scope="module")
def pvbus_shared_machine(pvbus_config: str) -> Iterator[BootedMachine]:
    """Boot a machine that the tests of a module share. Each test closes the files that it opens."""
    with _machine_in_temporary_directory(pvbus_config) as booted:
        yield booted


@pytest.fixture
def pvbus_boot() -> Iterator[Callable[[str], BootedMachine]]:
    """Return a factory that takes a configuration, as TOML text, and boots it until the test's end."""
    with contextlib.ExitStack() as stack:

        def factory(config_toml: str) -> BootedMachine:
            return stack.enter_context(_machine_in_temporary_directory(config_toml))

        yield factory


# Reports ------------------------------------------------------------------------------------------


def describe(booted: BootedMachine) -> str:
    """Say what a machine is doing: its status, its ports, an explanation of each, the supervisor's output."""
    from pvbus.view.explain import explain

    parts = [f"machine {booted.name} (run {booted.run_id})"]
    try:
        parts.append("status " + json.dumps(booted.machine.status(), indent=1, default=str))
        ports = booted.machine.ports()
        parts.extend("port " + json.dumps(port, default=str) for port in ports)
        bound = [port for port in ports if port.get("file") is not None]
        parts.extend(
            f"explain {port['domain']}:{port['port']}: "
            + explain(booted.machine, port["domain"], port["port"]).text
            for port in bound[:EXPLAINED_PORTS_MAX]
        )
        if len(bound) > EXPLAINED_PORTS_MAX:
            parts.append(f"({len(bound) - EXPLAINED_PORTS_MAX} more bound ports are not explained)")
    except OSError as problem:
        code = booted.process.poll()
        if code is None:
            parts.append(f"the supervisor runs, but its state could not be had: {problem!r}")
        else:
            parts.append(f"the machine is dead (supervisor's exit code {code}): {problem!r}")
    parts.append("supervisor's output\n" + booted.log)
    return "\n".join(parts)


def _describe_safely(booted: BootedMachine) -> str:
    """Never let a report hide the failure that it is about: what goes wrong in describing is part of the text."""
    try:
        return describe(booted)
    except Exception:
        return f"machine {booted.name} could not be described\n{traceback.format_exc()}"


def pytest_addoption(parser: pytest.Parser) -> None:
    """Add the plugin's options."""
    parser.getgroup("pvbus").addoption(
        "--pvbus-artifacts",
        metavar="DIR",
        default=None,
        help="write the state of the machine at each failure into a file in DIR",
    )


@pytest.hookimpl(wrapper=True)
def pytest_runtest_makereport(item: pytest.Item) -> Generator[None, pytest.TestReport, pytest.TestReport]:
    """Attach the state of every running machine to the report of a test that failed."""
    report = yield
    if report.failed and _alive:
        text = "\n\n".join(_describe_safely(booted) for booted in _alive)
        report.sections.append(("pvbus", text))
        artifacts = item.config.getoption("--pvbus-artifacts")
        if artifacts is not None:
            directory = Path(artifacts)
            directory.mkdir(parents=True, exist_ok=True)
            file_name = re.sub(r"[^A-Za-z0-9_.-]+", "_", f"{item.nodeid}.{report.when}")[-200:]
            (directory / f"{file_name}.txt").write_text(text + "\n")
    return report
