# SPDX-License-Identifier: Apache-2.0
"""A shell in a room of `pvbus run`, to which a test gives commands one by one; and programs for it."""

from __future__ import annotations

import contextlib
import os
import select
import shlex
import shutil
import subprocess
import sys
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pvbus.tests.view.sysfs.lacking import is_lack, not_tested
from pvbus.view.pytest_plugin import environment

if TYPE_CHECKING:
    from collections.abc import Callable

BOUND_S = 30.0
LOOK_S = 0.01
KERNEL_SOURCE = Path("/usr/src/linux-source-6.1.tar.xz")  # Debian has lsvmbus nowhere else
LSVMBUS = "linux-source-6.1/tools/hv/lsvmbus"
CONFIG = """\
[[domain]]
id = 0
cpus = 2
platforms = ["xen", "hyperv"]
devices = ["heartbeat", "shutdown"]
"""
"""What the machines of these tests look like."""
BUS = "/sys/bus/vmbus"


def until(what: str, condition: Callable[[], Any], bound_s: float = BOUND_S) -> Any:
    """Wait for a condition to hold; give what it gave."""
    deadline_s = time.monotonic() + bound_s
    while not (found := condition()):
        assert time.monotonic() < deadline_s, f"not within {bound_s:.0f} s: {what}"
        select.select([], [], [], LOOK_S)
    return found


class Room:
    """`pvbus run -- bash` on a machine that runs; a test of wider scope may keep it, for it belongs to that machine's run."""

    def __init__(self, machine: Any, *wrapper: str) -> None:
        command = [sys.executable, "-m", "pvbus.supervisor", "run", "--name", machine.name, "--", "/bin/bash"]
        self.process = subprocess.Popen(
            [*wrapper, *command], stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, bufsize=0,
            env=environment() | {"PVBUS_RUN_ID": machine.run_id},
        )  # fmt: skip
        self._left = b""
        try:
            self.do("true")
        except (EOFError, BrokenPipeError):
            assert self.process.stdout is not None
            said = self._left + self.process.stdout.read()
            code = self.process.wait(BOUND_S)
            self.close()
            if is_lack(code, said.decode()):
                not_tested(said.decode().strip())
            raise

    def do(self, command: str, bound_s: float = BOUND_S) -> tuple[int, str]:
        """Have a command run; give its exit code and what it said."""
        assert self.process.stdin is not None
        assert self.process.stdout is not None
        self.process.stdin.write(f"{command}\necho ::$?\n".encode())
        deadline_s = time.monotonic() + bound_s
        said = self._left
        while b"::" not in said or not said.rpartition(b"::")[2].endswith(b"\n"):
            left_s = deadline_s - time.monotonic()
            assert left_s > 0, f"{command!r} has not ended within {bound_s:.0f} s; so far {said!r}"
            assert select.select([self.process.stdout], [], [], left_s)[0], f"{command!r} is silent; so far {said!r}"
            piece = os.read(self.process.stdout.fileno(), 65536)
            if not piece:
                self._left = said
                raise EOFError(said.decode())
            said += piece
        text, _, code = said.decode().rpartition("::")
        return int(code), text

    def must(self, command: str) -> str:
        """Have a command run that succeeds."""
        code, text = self.do(command)
        assert code == 0, (command, code, text)
        return text

    def close(self) -> None:
        """Leave it: the shell sees the end of its input."""
        assert self.process.stdin is not None
        assert self.process.stdout is not None
        with contextlib.suppress(BrokenPipeError):
            self.process.stdin.close()
        self.process.wait(BOUND_S)
        self.process.stdout.close()


class Listener:
    """A program in the background of a room, whose lines are read from a file."""

    def __init__(self, room: Room, directory: Path, name: str, *command: str, ready: str) -> None:
        self._file = directory / name
        line = " ".join(map(shlex.quote, ("stdbuf", "-oL", *command)))
        room.must(f"{line} > {self._file} 2>&1 & echo $! > {self._file}.pid")
        self._room = room
        until(f"{name} listens", lambda: ready in self.text)

    @property
    def text(self) -> str:
        return self._file.read_text() if self._file.exists() else ""

    def until(self, what: str) -> str:
        """Wait until it has said something."""
        until(f"{what!r} in {self.text!r}", lambda: what in self.text)
        return self.text

    def stop(self) -> None:
        self._room.do(f"kill $(cat {self._file}.pid)")


def lsvmbus() -> str:
    """Give the path of lsvmbus; where only its package is there, it is taken out once."""
    found = shutil.which("lsvmbus")
    if found is not None:
        return found
    kept = Path(sys.prefix, "lsvmbus")
    if not kept.exists():
        if not KERNEL_SOURCE.exists():
            not_tested("there is no lsvmbus; Debian 12 has it in the package linux-source-6.1")
        taken = subprocess.run(["tar", "-xJOf", KERNEL_SOURCE, "--occurrence=1", LSVMBUS], check=True, capture_output=True)
        kept.write_bytes(taken.stdout)
    kept.chmod(0o755)
    return str(kept)


def offered(machine: Any, device_class: str, instance: str | None = None) -> str:
    """Offer a device; give its name, once it is on the bus."""
    relid = machine.offer(device_class, instance)
    found: str = until("it is on the bus", lambda: next((row["name"] for row in machine.devices() if row["relid"] == relid), ""))
    return found


def script(directory: Path, text: str) -> Path:
    path = directory / "program.py"
    path.write_text(text)
    return path
