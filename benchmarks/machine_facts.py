# SPDX-License-Identifier: Apache-2.0
"""What a machine costs before the first event: boot, open, memory.

Of the default machine, which boots without a configuration: what is measured beside it has a machine of its own. Reads
/proc through psutil for the processes that `machine.status()` names and the supervisor; changes nothing.
"""

from __future__ import annotations

import statistics
import time
from contextlib import ExitStack
from dataclasses import asdict, dataclass
from typing import Any

import psutil

from pvbus.actors.client import attach
from pvbus.actors.client.machine import Machine
from pvbus.actors.supervisor.pool import SPARES
from pvbus.verify.launch import launched

OPENS = 101
BURST = 50  # far more than there are spare processes
FULL_S_MAX = 5.0
DEFAULT_MACHINE = ""


@dataclass(frozen=True)
class MachineFigures:
    """Medians, and each process's proportional share of memory."""

    boot_ms: float
    open_p50_us: float
    open_p99_us: float
    burst_p50_us: float
    pss_kib: dict[str, int]

    def as_json(self) -> dict[str, Any]:
        """Return plain figures."""
        return asdict(self)

    def lines(self) -> list[str]:
        """Say it."""
        total = sum(self.pss_kib.values())
        each = ", ".join(f"{name} {kib / 1024:.1f}" for name, kib in self.pss_kib.items())
        opens = f"p50 {self.open_p50_us / 1000:.1f} ms, p99 {self.open_p99_us / 1000:.1f} ms"
        return [
            f"boot to ready {self.boot_ms:.0f} ms; open_evtchn {opens}; {BURST} in a row: p50 {self.burst_p50_us / 1000:.1f} ms",
            f"PSS {total / 1024:.1f} MiB in {len(self.pss_kib)} processes (MiB): {each}",
        ]


def measure_machine(name: str, boots: int) -> MachineFigures:
    """Boot and stop machines, the interpreter's start included in the time; look at the last one while it runs."""
    times = []
    for boot in range(boots):
        with launched(name, DEFAULT_MACHINE) as machine:
            times.append(machine.boot_s * 1000)
            if boot == boots - 1:
                figures = _look(name, statistics.median(times), machine.process.pid)
    return figures


def time_opens(machine: Machine, count: int) -> list[float]:
    """Open so many files, then close them; return how long each open took, in µs."""
    times, files = [], []
    for _ in range(count):
        begin = time.perf_counter()
        files.append(machine.open_evtchn(domain=0, nonblock=True))
        times.append((time.perf_counter() - begin) * 1e6)
    for file in files:
        file.close()
    return times


def _await_full_pool(machine: Machine) -> None:
    deadline = time.monotonic() + FULL_S_MAX
    while sum(row["state"] == "spare" for row in machine.status()["processes"]) < SPARES and time.monotonic() < deadline:
        time.sleep(0.01)


def _look(name: str, boot_ms: float, supervisor_pid: int) -> MachineFigures:
    """Open and close files, and weigh the processes while each domain has one open."""
    with attach(name=name) as machine, ExitStack() as stack:
        times = [time_us for _ in range(OPENS) for time_us in time_opens(machine, 1)]
        burst = time_opens(machine, BURST)
        for domain in (0, 1):
            stack.callback(machine.open_evtchn(domain=domain).close)
        machine.settle()
        _await_full_pool(machine)
        pids = {row["name"]: row["pid"] for row in machine.status()["processes"] if row["pid"]}
        if supervisor_pid not in pids.values():
            pids["supervisor"] = supervisor_pid
        weights: dict[str, int] = {}
        for process, pid in pids.items():
            try:
                weights[process] = psutil.Process(pid).memory_full_info().pss // 1024
            except psutil.NoSuchProcess:  # a file that was being closed
                continue
    p99 = statistics.quantiles(times, n=100, method="inclusive")[-1]
    return MachineFigures(boot_ms, statistics.median(times), p99, statistics.median(burst), weights)
