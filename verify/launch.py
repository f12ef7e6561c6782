# SPDX-License-Identifier: Apache-2.0
"""A machine of one's own, as a child process, for as long as a `with` block.

Writes a configuration file that only the supervisor reads, and reads the supervisor's standard output up to
the line `ready`. It starts and stops machines and knows nothing of what runs on them; do not add calls to
the machine here.
"""

from __future__ import annotations

import ctypes
import os
import select
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

READY_S_MAX = 20.0  # a boot takes a tenth of a second; a loaded build machine may take a hundred times that
LOOK_S = 0.1  # between two looks whether the supervisor still lives
STOP_S_MAX = 10.0  # an ordered stop asks each child in turn, each with a deadline of its own
PR_SET_PDEATHSIG = 1

_prctl = ctypes.CDLL(None, use_errno=True).prctl  # looked up here: nothing is loaded between fork and exec

TWO_DOMAINS = """\
name = "{name}"

[[domain]]
id = 0
cpus = 2
platforms = ["xen"]
abi = "2-level"
affinity = "spread"

[[domain]]
id = 1
cpus = 1
platforms = ["xen"]
abi = "2-level"
"""


class OpenFile(Protocol):
    """An open event-channel file, as far as users here need it."""

    def bind_unbound_port(self, remote_domain: int, /) -> int:
        """Give a port that `remote_domain` may bind to."""

    def bind_interdomain(self, remote_domain: int, remote_port: int, /) -> int:
        """Bind to a port that the other side offers; the local end is born pending."""

    def unbind(self, port: int, /) -> object:
        """Close the port."""

    def notify(self, port: int, /) -> object:
        """Raise the event at the port's peer."""

    def notify_many(self, ports: list[int], /) -> object:
        """Notify each in turn."""

    def read(self, length: int, /) -> bytes:
        """Take port numbers, four bytes each."""

    def write(self, data: bytes, /) -> int:
        """Enable the ports in `data`."""

    def read_ports(self, ports_max: int, /) -> list[int]:
        """Read, as a list."""

    def enable(self, ports: list[int], /) -> object:
        """Write, from a list."""

    def poll(self, events: int, /, timeout_ms: int = 0) -> int:
        """Wait for readiness; 0 at the time-out."""

    def close(self) -> object:
        """Drop this reference."""


class Machine(Protocol):
    """An attached machine, as far as users here need it."""

    def open_evtchn(self, *, domain: int = 0, nonblock: bool = False) -> OpenFile:
        """Open the event-channel device of a domain."""

    def settle(self) -> object:
        """Return when every ring, doorbell and upcall is idle."""

    def status(self) -> dict[str, Any]:
        """Say which processes, domains and files there are."""

    def ports(self) -> list[dict[str, Any]]:
        """List every port of every domain that is in use."""


class LaunchError(RuntimeError):
    """The machine did not come up; the text has what the supervisor said."""


@dataclass(frozen=True)
class Launched:
    """A running machine that this process started."""

    name: str
    process: subprocess.Popen[bytes]
    boot_s: float


def die_with_parent(signal_number: int) -> Callable[[], None]:
    """Make a function for `preexec_fn` that ties a child's life to ours, SIGKILL included."""

    def tie() -> None:
        _prctl(PR_SET_PDEATHSIG, signal_number)
        signal.signal(signal.SIGINT, signal.SIG_IGN)  # the terminal's Ctrl-C is for us; we end them

    return tie


def _await_ready(process: subprocess.Popen[bytes], deadline: float) -> None:
    stream = process.stdout
    if stream is None:
        raise LaunchError("the supervisor was started without a pipe")
    said = b""
    while b"ready" not in said.split():
        remaining = deadline - time.monotonic()
        if remaining <= 0:
            raise LaunchError(f"the machine was not ready after {READY_S_MAX:.0f} s; it said: {said!r}")
        if not select.select([stream], [], [], min(remaining, LOOK_S))[0]:
            if process.poll() is not None:  # its children may hold the pipe open
                raise LaunchError(f"the supervisor ended with exit code {process.returncode}")
            continue
        data = os.read(stream.fileno(), 4096)
        if not data:
            raise LaunchError(f"the supervisor ended with exit code {process.wait(STOP_S_MAX)}")
        said += data


def stop(process: subprocess.Popen[bytes]) -> int:
    """Stop a child in order, or by force when it does not; return its exit code."""
    if process.poll() is None:
        process.terminate()
    try:
        return process.wait(STOP_S_MAX)
    except subprocess.TimeoutExpired:
        process.kill()
        return process.wait(STOP_S_MAX)


@contextmanager
def launched(name: str, config: str = TWO_DOMAINS) -> Iterator[Launched]:
    """Boot a machine from the text of a configuration (`{name}` is filled in), and stop it at the end."""
    with tempfile.TemporaryDirectory(prefix="pvbus-launch-") as directory:
        path = Path(directory, "machine.toml")
        path.write_text(config.replace("{name}", name))
        errors = Path(directory, "stderr")
        begin = time.monotonic()
        with errors.open("wb") as error_stream:
            process = subprocess.Popen(
                [sys.executable, "-m", "pvbus.supervisor", "up", "--name", name, "--config", str(path)],
                stdin=subprocess.DEVNULL,
                stdout=subprocess.PIPE,
                stderr=error_stream,
                preexec_fn=die_with_parent(signal.SIGTERM),  # noqa: PLW1509 -- two system calls
            )
        try:
            try:
                _await_ready(process, begin + READY_S_MAX)
            except LaunchError as error:
                raise LaunchError(f"{error}\n{errors.read_text()[-4000:]}".rstrip()) from None
            yield Launched(name, process, time.monotonic() - begin)
        finally:
            stop(process)
            if process.stdout is not None:
                process.stdout.close()
