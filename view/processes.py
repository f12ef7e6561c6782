# SPDX-License-Identifier: Apache-2.0
"""Who runs, who is stopped, who is dead: the machine's processes and its users, as the kernel tells it.

Reads /proc and what `Machine.status()` says; owns nothing. A process may die between two lines of a report,
so everything here answers for a pid that is gone.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

RUNNING, STOPPED, DEAD = "running", "stopped", "dead"
_CONDITIONS = {"T": STOPPED, "t": STOPPED, "Z": DEAD, "X": DEAD}


class Process(NamedTuple):
    """A process of the machine; `restarts` counts its heirs."""

    name: str
    pid: int
    restarts: int
    condition: str

    @property
    def runs(self) -> bool:
        """Whether the kernel would let it run."""
        return self.condition == RUNNING

    @property
    def said(self) -> str:
        """What to tell a reader, as the end of "cpu/0.0 …"."""
        if self.condition == STOPPED:
            return f"is stopped by a signal or a debugger (pid {self.pid})"
        if self.condition == DEAD:
            return f"is dead (restarted {self.restarts} times so far)"
        return f"runs (pid {self.pid})"

    @property
    def remedy(self) -> str:
        """What would let it go on."""
        if self.condition == STOPPED:
            return f"continue it: kill -CONT {self.pid}"
        return f"its heir goes on where {self.name} died"


class User(NamedTuple):
    """A process that uses an open file."""

    pid: int
    comm: str
    condition: str

    def __str__(self) -> str:
        return f"pid {self.pid} ({self.comm or 'gone'})"


def letter_of(pid: int) -> str:
    """Return the state letter of a process; "X" if it is gone."""
    try:
        text = Path(f"/proc/{pid}/stat").read_text(encoding="utf-8", errors="replace") if pid > 0 else ""
    except OSError:
        return "X"
    fields = text.rpartition(")")[2].split()
    return fields[0] if fields else "X"


def condition_of(pid: int) -> str:
    """Return RUNNING (asleep counts), STOPPED or DEAD."""
    return _CONDITIONS.get(letter_of(pid), RUNNING)


def user_of(pid: int) -> User:
    """Look at a process that uses a file."""
    try:
        comm = Path(f"/proc/{pid}/comm").read_text(encoding="utf-8", errors="replace").strip()
    except OSError:
        comm = ""
    return User(pid, comm, condition_of(pid))


def of_machine(status: Mapping[str, Any]) -> dict[str, Process]:
    """Return the machine's processes by name."""
    found = {}
    for row in status["processes"]:
        pid = int(row["pid"] or 0)
        found[row["name"]] = Process(row["name"], pid, int(row["restarts"]), condition_of(pid))
    return found


def named(processes: Mapping[str, Process], name: str) -> Process:
    """Return a process of the machine; one that is not in its table is dead."""
    return processes.get(name, Process(name, 0, 0, DEAD))
