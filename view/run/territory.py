# SPDX-License-Identifier: Apache-2.0
"""Which processes belong to a run, and their end.

A process of a run may leave the run's namespaces for others of its own: a container does, `unshare` does, and so does a run
within the run. It takes the mounts along, or the network; that is how it is found. Nothing here believes what the command may
have mounted over /proc meanwhile.
"""

from __future__ import annotations

import contextlib
import os
import signal
import time
from pathlib import Path

SWEEP_S_MAX = 5.0  # from SIGKILL to the end of a process; longer only in uninterruptible sleep
MACHINES_S_MAX = 5.0  # an ordered stop takes a fifth of a second; a killed machine would leave its segments behind
SWEEP_LOOK_S = 0.005
SUPERVISOR = b"pvbus: supervisor/"


class Territory:
    """The namespaces and the /dev of a run. Make it in the process that has made those, before the command starts."""

    def __init__(self) -> None:
        self._proc = os.open("/proc", os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
        self._mounts, self._network = self._namespace("self", "mnt"), self._namespace("self", "net")
        device = Path("/dev").stat().st_dev
        self._dev = f" {os.major(device)}:{os.minor(device)} ".encode()

    def sweep(self, spared: frozenset[int] = frozenset()) -> None:
        """Kill every process of the run but ourselves and those spared, and wait until they are gone.

        Machines that were booted within are told to stop, and are killed if they do not. TimeoutError.
        """
        now_s = time.monotonic()
        machines_until_s, deadline_s = now_s + MACHINES_S_MAX, now_s + MACHINES_S_MAX + SWEEP_S_MAX
        told: set[int] = set()
        while left := self._others({os.getpid(), *spared}):
            if time.monotonic() > deadline_s:
                raise TimeoutError(f"processes {left} do not end")
            stopping = self._machines(left) if time.monotonic() < machines_until_s else {}
            for pid in left:
                if pid in told or (pid in stopping and not stopping[pid]):
                    continue
                with contextlib.suppress(ProcessLookupError):
                    os.kill(pid, signal.SIGTERM if pid in stopping else signal.SIGKILL)
                told |= {pid} & set(stopping)
            told &= set(stopping)
            with contextlib.suppress(ChildProcessError):
                while os.waitpid(-1, os.WNOHANG)[0]:
                    pass
            time.sleep(SWEEP_LOOK_S)  # most are nobody's children that we could wait for

    def _others(self, spared: set[int]) -> list[int]:
        """Give the processes of the run."""
        known = {self._mounts: True}
        return [
            int(name) for name in os.listdir(self._proc)  # noqa: PTH208 -- by its descriptor
            if name.isdecimal() and int(name) not in spared and self._is_ours(name, known)
        ]  # fmt: skip

    def _is_ours(self, pid: str, known: dict[int, bool]) -> bool:
        with contextlib.suppress(OSError):  # not ours to look at, or gone; a zombie has no namespaces any more
            mounts = self._namespace(pid, "mnt")
            if mounts not in known:
                known[mounts] = self._dev in self._read(pid, "mountinfo")
            return known[mounts] or self._namespace(pid, "net") == self._network
        return False

    def _machines(self, left: list[int]) -> dict[int, bool]:
        """Give the processes of machines, and whether each is the supervisor, which stops the others."""
        parents, supervisors = {}, set()
        for pid in left:
            with contextlib.suppress(OSError):
                parents[pid] = int(self._read(str(pid), "stat").rpartition(b")")[2].split()[1])
                if self._read(str(pid), "cmdline").startswith(SUPERVISOR):
                    supervisors.add(pid)
        found = dict.fromkeys(supervisors, True)
        for pid in parents:
            above = pid
            while above in parents and above not in supervisors:
                above = parents[above]
            if above in supervisors:
                found.setdefault(pid, False)
        return found

    def _namespace(self, pid: str, kind: str) -> int:
        return os.stat(f"{pid}/ns/{kind}", dir_fd=self._proc).st_ino

    def _read(self, pid: str, name: str) -> bytes:
        fd = os.open(f"{pid}/{name}", os.O_RDONLY | os.O_CLOEXEC, dir_fd=self._proc)
        with os.fdopen(fd, "rb") as file:
            return file.read()
