# SPDX-License-Identifier: Apache-2.0
"""What `pvbus demo` draws: a table that redraws itself on a terminal, a line a second elsewhere.

Draws what it is given and reads, of the machine, nothing but the wake-up counts of its processes in /proc.
"""

from __future__ import annotations

from collections import deque
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TextIO

HISTORY = 48  # frames in the sparkline
PORTS_SHOWN = 5
BARS = "▁▂▃▄▅▆▇█"
HOME, BOLD, DIM, PLAIN = "\x1b[H\x1b[J", "\x1b[1m", "\x1b[2m", "\x1b[0m"


@dataclass(frozen=True)
class Frame:
    """All counts at one moment."""

    at_s: float
    processes: list[dict[str, Any]]
    users: list[tuple[str, int]]
    files: int
    trips: int
    trip_p50_us: float
    sent: int
    seen: int
    storm_ports: dict[int, int]
    ports: int
    packets: int
    device: str
    heartbeat: int
    note: str


def wake_ups(pid: int) -> int | None:
    """Return how often a process has slept and been woken; None if it is gone."""
    try:
        text = Path(f"/proc/{pid}/status").read_text()
    except OSError:
        return None
    return next(int(line.split()[1]) for line in text.splitlines() if line.startswith("voluntary_ctxt"))


def sparkline(values: list[float]) -> str:
    """Draw values as bars, the highest full."""
    top = max(values, default=0.0) or 1.0
    return "".join(BARS[min(len(BARS) - 1, int(value / top * len(BARS)))] for value in values)


class Screen:
    """Where frames go."""

    def __init__(self, out: TextIO, silent: bool = False) -> None:
        self._out = out
        self._silent = silent
        self._live = out.isatty()
        self._last: Frame | None = None
        self._wakes: dict[int, int] = {}
        self._rates: deque[float] = deque(maxlen=HISTORY)

    def line(self, text: str) -> None:
        """Say one thing; on a live screen it stands until the next frame, which carries it as its note."""
        if not self._silent:
            print(text, file=self._out, flush=True)

    def show(self, frame: Frame, elapsed_s: float) -> None:
        """Draw a frame, or once a second a line."""
        if self._silent:
            return
        last = self._last
        if last is None:
            self._remember(frame)
            return
        span = frame.at_s - last.at_s
        if span < (0.2 if self._live else 0.95):
            return
        counts = ((frame.trips, last.trips), (frame.sent, last.sent), (frame.seen, last.seen), (frame.packets, last.packets))
        trips, sent, seen, packets = ((new - old) / span for new, old in counts)
        self._rates.append(seen)
        woken = self._woken(frame, span)
        if self._live:
            table = self._table(frame, last, span, (trips, sent, seen, packets), woken)
            print(HOME + "\n".join(table), file=self._out, flush=True)
        else:
            merged = sent / seen if seen else 0.0
            machine = ("hypervisor", "cpu/")
            wakes = " ".join(f"{name} {rate:.0f}" for name, rate in woken.items() if name.startswith(machine))
            pair = f"ping-pong {trips:,.0f}/s p50 {frame.trip_p50_us:.0f} µs"
            storm = f"storm {sent:,.0f} notifies/s, {seen:,.0f} events/s ({merged:.1f} in one)"
            bus = f"VMBus echo {packets:,.0f} packets/s, heartbeat {frame.heartbeat}"
            self.line(f"{elapsed_s:4.1f} s  {pair} | {storm} | {bus} | wake-ups/s {wakes}")
        self._remember(frame)

    def _pids(self, frame: Frame) -> list[tuple[str, int]]:
        ours = [(row["name"], row["pid"]) for row in frame.processes if row["pid"]]
        return ours + frame.users

    def _remember(self, frame: Frame) -> None:
        self._last = frame
        counted = ((pid, wake_ups(pid)) for _, pid in self._pids(frame))
        self._wakes = {pid: count for pid, count in counted if count is not None}

    def _woken(self, frame: Frame, span: float) -> dict[str, float]:
        """Return wake-ups a second by name; a process that was not there before starts at zero."""
        return {
            name: (count - self._wakes.get(pid, 0)) / span
            for name, pid in self._pids(frame)
            if (count := wake_ups(pid)) is not None
        }

    def _table(
        self,
        frame: Frame,
        last: Frame,
        span: float,
        rates: tuple[float, float, float, float],
        woken: dict[str, float],
    ) -> list[str]:
        trips, sent, seen, packets = rates
        lines = [f"{BOLD}{'process':<16}{'pid':>8}{'restarts':>10}{'wake-ups/s':>12}{PLAIN}"]
        for row in frame.processes:
            restarts = f"{BOLD}{row['restarts']:>10}{PLAIN}" if row["restarts"] else f"{0:>10}"
            rate = f"{woken.get(row['name'], 0):>12,.0f}"
            lines.append(f"{row['name']:<16}{row['pid'] or '-':>8}{restarts}{rate}")
        lines.append(f"{DIM}users{PLAIN}")
        lines += [f"{name:<16}{pid:>8}{'':>10}{woken.get(name, 0):>12,.0f}" for name, pid in frame.users]
        merged = sent / seen if seen else 0.0
        lines += [
            "",
            f"{BOLD}ping-pong{PLAIN}  {trips:>10,.0f} round trips/s   p50 {frame.trip_p50_us:.0f} µs",
            f"{BOLD}storm{PLAIN}      {sent:>10,.0f} notifies/s, {seen:,.0f} events/s  {merged:.1f} in one",
            f"           {sparkline(list(self._rates))}",
            f"{BOLD}echo{PLAIN}       {packets:>10,.0f} packets/s there and back   {frame.device}",
            f"{BOLD}heartbeat{PLAIN}  {frame.heartbeat:>10}",
            "",
            f"{frame.files} open files, {frame.ports} ports; of the storm's, the busiest:",
        ]
        counts = frame.storm_ports.items()
        by_rate = sorted(((count - last.storm_ports.get(port, 0)) / span, port) for port, count in counts)
        busiest = by_rate[: -PORTS_SHOWN - 1 : -1]
        lines += [f"  port 0:{port:<6}{rate:>10,.0f} events/s" for rate, port in busiest]
        return [*lines, "", frame.note]
