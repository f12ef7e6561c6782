# SPDX-License-Identifier: Apache-2.0
"""A machine for the life of a command: booted before it, stopped after it, and by itself if we are killed."""

from __future__ import annotations

import contextlib
import os
import select
import signal
import subprocess
import sys
import time
from typing import TYPE_CHECKING

from pvbus.view.fuse.mount import die_with_parent
from pvbus.view.run.room import EnvironmentLacksError

if TYPE_CHECKING:
    from collections.abc import Iterator

READY_S_MAX = 20.0  # a boot takes a fifth of a second; a loaded machine may take a hundred times that
STOP_S_MAX = 15.0
SAID_BYTES_MAX = 65536
CONFIG = """\
[[domain]]
id = 0
cpus = 2
platforms = ["xen", "hyperv"]
devices = ["heartbeat", "shutdown", "echo"]

[[domain]]
id = 1
cpus = 1
platforms = ["xen"]
"""
"""Both worlds, so that there is something to see in each."""


@contextlib.contextmanager
def booted(name: str, config: str = CONFIG) -> Iterator[str]:
    """Boot a machine, give its name, stop it at the end. EnvironmentLacksError says why it does not come up."""
    config_fd = os.memfd_create("pvbus-run-config")
    os.write(config_fd, config.encode())

    def in_child() -> None:
        die_with_parent(signal.SIGTERM)  # an ordered stop; nothing of it stays

    said_fd = os.memfd_create("pvbus-run-said")  # what its kernels say is not the command's output
    path = os.pathsep.join(entry for entry in sys.path if entry)
    process = subprocess.Popen(
        [sys.executable, "-P", "-m", "pvbus.supervisor", "up", "--name", name, "--config", f"/proc/self/fd/{config_fd}"],
        stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=said_fd, pass_fds=[config_fd], start_new_session=True,
        env={**os.environ, "PYTHONPATH": path}, preexec_fn=in_child,  # noqa: PLW1509 -- one system call
    )  # fmt: skip
    os.close(config_fd)
    assert process.stdout is not None
    try:
        try:
            with process.stdout:
                _await_ready(process, name)
        except EnvironmentLacksError as error:
            last = os.pread(said_fd, SAID_BYTES_MAX, 0).decode(errors="replace").strip().rpartition("\n")[2]
            raise EnvironmentLacksError(f"{error}: {last}" if last else str(error)) from None
        yield name
    finally:
        os.close(said_fd)
        process.terminate()
        try:
            process.wait(STOP_S_MAX)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()


def _await_ready(process: subprocess.Popen[bytes], name: str) -> None:
    assert process.stdout is not None
    deadline_s = time.monotonic() + READY_S_MAX
    said = b""
    while b"ready\n" not in said:  # the whole line: it may come in two pieces, and whoever writes the second needs a reader
        left_s = deadline_s - time.monotonic()
        if left_s <= 0 or not select.select([process.stdout], [], [], left_s)[0]:
            raise EnvironmentLacksError(f"machine {name!r} was not ready after {READY_S_MAX:.0f} s")
        piece = os.read(process.stdout.fileno(), 4096)
        if not piece:
            raise EnvironmentLacksError(f"machine {name!r} did not start (exit code {process.wait(STOP_S_MAX)})")
        said += piece
