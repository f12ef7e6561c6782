# SPDX-License-Identifier: Apache-2.0
"""Runs of `pvbus run` and C programs for them; and a loud word where this system has not got what a test needs."""

from __future__ import annotations

import functools
import os
import shutil
import subprocess
import sys
import tempfile
import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import NoReturn

import pytest

from pvbus.view import pytest_plugin

HERE = Path(__file__).parent
RUN_S_MAX = 60.0
COMMAND = [sys.executable, "-P", "-m", "pvbus.supervisor", "run"]


def not_shown(what: str, why: str) -> NoReturn:
    """Skip a test, with a warning in the summary: what it would show is not shown here."""
    text = f"not shown here: {what}; {why}"
    warnings.warn(text, stacklevel=2)
    pytest.skip(text)


@functools.cache
def _namespaces_work() -> str:
    """Give why `pvbus run` cannot work here; empty if it can."""
    code = "from pvbus.view.run.room import Room; Room('none', 0).enter()"
    tried = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=False, timeout=RUN_S_MAX, env=environment()
    )
    return tried.stderr.strip().rpartition("\n")[2] if tried.returncode else ""


def need_namespaces() -> None:
    """Skip loudly where namespaces or FUSE are not to be had."""
    why = _namespaces_work()
    if why:
        not_shown("unmodified programs on the device file", why)


def environment() -> dict[str, str]:
    """Give the environment of a run; it finds the same pvbus as this process does."""
    return pytest_plugin.environment()


def command(*words: str, name: str | None = None, options: Sequence[str] = ()) -> list[str]:
    """Give the words of a run."""
    return [*COMMAND, *(["--name", name] if name else []), *options, "--", *words]


def run(*words: str, name: str | None = None, options: Sequence[str] = ()) -> subprocess.CompletedProcess[str]:
    """Run a command with the devices in place, in the machine of that name or one of its own."""
    need_namespaces()
    return subprocess.run(
        command(*words, name=name, options=options),
        capture_output=True, text=True, check=False, timeout=RUN_S_MAX, env=environment(), stdin=subprocess.DEVNULL,
    )  # fmt: skip


def started(*words: str, name: str | None = None, options: Sequence[str] = ()) -> subprocess.Popen[str]:
    """Start a run, and talk to it."""
    need_namespaces()
    return subprocess.Popen(
        command(*words, name=name, options=options),
        stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=environment(),
    )  # fmt: skip


def server_of(run_: int, machine: str, title: str = "evtchn") -> int:
    """Give the server's process of a run, by the run's own."""
    (server,) = [
        int(child) for child in Path(f"/proc/{run_}/task/{run_}/children").read_text().split()
        if Path("/proc", child, "cmdline").read_bytes().startswith(f"pvbus: {title}/{machine}".encode())
    ]  # fmt: skip
    return server


_directory = tempfile.TemporaryDirectory(prefix="pvbus-c-")


@functools.cache
def compiled(source: Path, *options: str) -> Path:
    """Compile a C program, once a session."""
    target = Path(_directory.name, f"{source.stem}-{abs(hash(options)):x}")
    compiler = shutil.which(os.environ.get("CC", "cc")) or "gcc"
    words = [compiler, "-Wall", "-Wextra", "-O1", "-o", str(target), str(source), *options]
    done = subprocess.run(words, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    return target


def xenevtchn_client(linking: str, source: str = "xenevtchn_client.c") -> Path:
    """Give a client of libxenevtchn, "dynamic" or "static"; skip loudly without the library."""
    if not Path("/usr/include/xenevtchn.h").exists():
        not_shown("clients of libxenevtchn", "install Debian's package libxen-dev")
    libraries = ["-lxenevtchn", "-lpthread"]
    if linking == "static":
        libraries = ["-static", "-lxenevtchn", "-lxentoolcore", "-lxentoollog", "-lpthread"]
    return compiled(HERE / source, *libraries)


def client_32(*defines: str) -> Path:
    """Give a 32-bit client; skip loudly where such programs cannot be made, or do not run."""
    options = ["-m32", "-static", "-nostdlib", "-ffreestanding", "-fno-pie", "-no-pie", "-fno-stack-protector"]
    with tempfile.TemporaryDirectory(prefix="pvbus-c-") as directory:
        source, program = Path(directory, "nothing.c"), Path(directory, "nothing")
        source.write_text('void _start(void) { __asm__ volatile("int $0x80" : : "a"(1), "b"(0)); }\n')
        try:
            subprocess.run(["cc", *options, "-o", str(program), str(source)], capture_output=True, text=True, check=True)
            subprocess.run([str(program)], check=True)
        except (OSError, subprocess.CalledProcessError) as error:
            why = getattr(error, "stderr", None) or str(error)
            not_shown("32-bit programs on the device file", f"none can be made and run: {why.strip().splitlines()[-1]}")
    return compiled(HERE / "client32.c", *options, *defines)


def driver() -> Path:
    """Give the library of single system calls (tests/golden/evtchn_driver.c)."""
    return compiled(HERE.parent / "golden" / "evtchn_driver.c", "-shared", "-fPIC")
