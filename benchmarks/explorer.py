# SPDX-License-Identifier: Apache-2.0
"""Measure the explorer on one core, tracing off: part of `make bench`.

    benchmarks/explorer.py [--quick] [--json]

Steps a second in each memory model, executions a second of a scenario of some 50 steps, and how long the exhaustive search
of E1 (event ring, 4 events, tso) takes; --quick leaves the last one out. Seconds are those of the processor, so that what
the computer does meanwhile falls on nobody; the time on the wall stands beside them.
"""

from __future__ import annotations

import argparse
import json
import sys
import time
from dataclasses import asdict, dataclass
from pathlib import Path

if __name__ == "__main__":  # started as a script: the checkout is the package pvbus
    sys.path.append(str(Path(__file__).resolve().parent.parent / ".dev"))

from pvbus.verify.explorer import explore
from pvbus.verify.scenarios.event_ring import EventRing

SECONDS_EACH = 5.0
ROWS = (
    # what, model, search, events, steps a second at least, executions a second at least, seconds at most
    ("E1, 3 events", "sc", "dfs", 3, 250_000, None, None),
    ("E1, 3 events", "tso", "dfs", 3, 250_000, None, None),
    ("E1, 3 events", "arm", "dfs", 3, 80_000, None, None),
    ("E1, 2 events, some 50 steps", "sc", "random", 2, None, 5_000, None),
    ("E1, 4 events, to its end", "tso", "dfs", 4, None, None, 60),
)


@dataclass(frozen=True)
class Row:
    """A search: what it was, how far it came, and how long it took."""

    what: str
    model: str
    search: str
    verdict: str
    executions: int
    steps: int
    cpu_s: float
    wall_s: float
    steps_per_s: float
    executions_per_s: float
    holds: bool


def measure(
    what: str, model: str, search: str, events: int, steps_min: int | None, executions_min: int | None, seconds_max: int | None
) -> Row:
    """Run one search."""
    wall, cpu = time.monotonic(), time.process_time()
    result = explore(EventRing(events=events), model=model, search=search, seconds=None if seconds_max else SECONDS_EACH)
    cpu, wall = time.process_time() - cpu, time.monotonic() - wall
    holds = (
        result.failure is None
        and result.steps / cpu >= (steps_min or 0)
        and result.executions / cpu >= (executions_min or 0)
        and (seconds_max is None or (cpu <= seconds_max and result.verdict == "complete"))
    )
    return Row(
        what, model, search, result.verdict, result.executions, result.steps, cpu, wall,
        result.steps / cpu, result.executions / cpu, holds,
    )  # fmt: skip


def asked(row: tuple[object, ...]) -> str:
    """Say what is asked of a row."""
    for figure, text in ((row[4], "≥ {:,} steps/s"), (row[5], "≥ {:,} executions/s"), (row[6], "≤ {} s, complete")):
        if figure is not None:
            return text.format(figure)
    raise ValueError(row)


def main() -> int:
    """Measure and print; 1 if less than what is asked for was reached."""
    parser = argparse.ArgumentParser(description="Measure the explorer.")
    parser.add_argument("--quick", action="store_true", help="without the search to the end")
    parser.add_argument("--json", action="store_true")
    options = parser.parse_args()
    asked_for = [row for row in ROWS if row[6] is None or not options.quick]
    rows = []
    if not options.json:
        print(f"{'':30}{'model':<6}{'search':<8}{'steps/s':>11}{'exec./s':>9}{'CPU s':>8}{'wall s':>8}  verdict")
    for line in asked_for:
        row = measure(*line)
        rows.append(row)
        if not options.json:
            print(
                f"{row.what:<30}{row.model:<6}{row.search:<8}{row.steps_per_s:11,.0f}{row.executions_per_s:9,.0f}"
                f"{row.cpu_s:8.1f}{row.wall_s:8.1f}  {row.verdict}; asked: {asked(line)}: {'yes' if row.holds else 'NO'}",
                flush=True,
            )
    if options.json:
        print(json.dumps([asdict(row) for row in rows], indent=2))
    return 0 if all(row.holds for row in rows) else 1


if __name__ == "__main__":
    sys.exit(main())
