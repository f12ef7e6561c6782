# SPDX-License-Identifier: Apache-2.0
"""Measure the whole path beside multiprocessing.Pipe and pyzmq: `make bench`.

    benchmarks/run.py [--quick] [--json] [--seconds S] [--rounds N] [--ports-max N]

One machine whose domains 0 and 1 have the FIFO ABI and 2 and 3 the 2-level one, as they come, and 4 and 5 FIFO with
ports spread over two virtual CPUs; one pair of processes with a file on each side of all, no pinning. All rows are
run in each round, every second round backwards, so that whatever the computer does meanwhile falls on all of them; a
row's figure is the median of its rounds, a ratio the median of the ratios within each round. Nothing but figures of
this run is printed.
"""

from __future__ import annotations

import argparse
import importlib.util
import json
import os
import platform
import shlex
import statistics
import sys
import tempfile
import time
from collections.abc import Sequence
from contextlib import ExitStack, closing
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

if __name__ in {"__main__", "__mp_main__"}:  # started as a script: the checkout is the package pvbus
    sys.path.append(str(Path(__file__).resolve().parent.parent / ".dev"))

from pvbus.benchmarks.evtchn import ABIS, FIFO, MACHINE, SPREAD, TWO_LEVEL
from pvbus.benchmarks.machine_facts import MachineFigures, measure_machine
from pvbus.benchmarks.page import percentiles
from pvbus.benchmarks.pair import Pair
from pvbus.benchmarks.vmbus import TITLE, TRANSPORT
from pvbus.verify.launch import launched

SCHEMA = 3
EVENTS_RATIO_MIN = {"pipe": 5.0, "zmq": 2.0}  # what the shape of the data path lets one expect
PACKETS_RATIO_MIN = 5.0  # to Pipe, 64 B: packets are copied in batches, and few are signalled
PACKET_SIZES = (64, 4096)
TRIP_RATIO_MAX = 2.0  # to Pipe: two hops more, each a wake-up at worst
FIFO_SHARE_MIN = 0.7  # of the 2-level ABI's events: a word more is linked and taken out
PORTS = (1, 256, 4095, 65536)  # as far as --ports-max and the ABI allow
PEERS = {"pipe": "multiprocessing.Pipe", "zmq": "pyzmq PUSH/PULL ipc"}
TITLES = {**{abi.transport: abi.title for abi in ABIS}, TRANSPORT: TITLE, **PEERS}


@dataclass
class Row:
    """One line of the table: what is measured, and a figure a round."""

    kind: str  # "single", "batch", "packets" or "trip"
    transport: str
    ports: int = 1
    size: int = 0  # of a packet, in bytes
    rounds: list[tuple[float, ...]] = field(default_factory=list)

    @property
    def title(self) -> str:
        """What the row is called."""
        name = TITLES[self.transport]
        if self.size:
            return f"{name}, {self.size:,} B"
        return f"{name}, {self.ports:,} port{'s' * (self.ports != 1)}" if self.is_ours and self.kind != "trip" else name

    @property
    def is_ours(self) -> bool:
        """Whether it goes through the machine."""
        return self.transport == TRANSPORT or any(abi.transport == self.transport for abi in ABIS)

    def median(self, figure: int = 0) -> float:
        """Return the median over the rounds of one figure."""
        return statistics.median(values[figure] for values in self.rounds)

    def ratio(self, other: Row, figure: int = 0) -> float:
        """Return the median over the rounds of the ratio to another row."""
        both = zip(self.rounds, other.rounds, strict=True)
        return statistics.median(mine[figure] / (theirs[figure] or 1.0) for mine, theirs in both)


def make_rows(ports: dict[str, int], with_zmq: bool) -> list[Row]:
    """List what is measured, in the order of the table; `ports` says how many each ABI has bound."""
    peers = ["pipe", "zmq"] if with_zmq else ["pipe"]
    ours = [(abi.transport, count) for count in PORTS for abi in (FIFO, TWO_LEVEL) if count <= ports[abi.transport]]
    return [
        *(Row("single", transport, count) for transport, count in ours),
        Row("single", SPREAD.transport, ports[SPREAD.transport]),
        *(Row("single", peer) for peer in peers),
        *(Row("batch", transport, count) for transport, count in ours if count > 1),
        *(Row("batch", peer) for peer in peers),
        *(Row("packets", transport, size=size) for size in PACKET_SIZES for transport in (TRANSPORT, *peers)),
        *(Row("trip", abi.transport) for abi in (FIFO, TWO_LEVEL)),
        Row("trip", TRANSPORT),
        *(Row("trip", peer) for peer in peers),
    ]


def measure(pair: Pair, rows: Sequence[Row], seconds: float, rounds: int) -> None:
    """Run all rows, round by round."""
    for turn in range(rounds):
        for row in reversed(rows) if turn % 2 else rows:
            name = f"{row.transport} {row.kind}"
            if row.kind == "trip":
                figures: tuple[float, ...] = percentiles(pair.trips(name, seconds / rounds))
            else:
                figures = (pair.rate(name, row.size or row.ports, seconds / rounds),)
            row.rounds.append((*figures, pair.signals()) if row.transport == TRANSPORT else figures)


def facts() -> dict[str, Any]:
    """Say what this was measured on."""
    cpu = platform.processor() or platform.machine()
    for line in Path("/proc/cpuinfo").read_text().splitlines():
        if line.startswith("model name"):
            cpu = line.partition(":")[2].strip()
            break
    python = f"{platform.python_implementation()} {platform.python_version()}"
    cores = len(os.sched_getaffinity(0))
    return {"cores": cores, "cpu": cpu, "kernel": platform.release(), "python": python}


def _ratios(row: Row, rows: Sequence[Row], figure: int = 0) -> dict[str, float]:
    if not row.is_ours:
        return {}
    others = [other for other in rows if (other.kind, other.size) == (row.kind, row.size) and not other.is_ours]
    if row.transport == FIFO.transport:
        others += [
            other for other in rows if (other.kind, other.transport, other.ports) == (row.kind, TWO_LEVEL.transport, row.ports)
        ]
    return {other.transport: row.ratio(other, figure) for other in others}


def as_json(rows: Sequence[Row], machine: MachineFigures, about: dict[str, Any]) -> dict[str, Any]:
    """Return all figures."""
    listed = []
    for row in rows:
        figures = {"trip": ("p50_us", "p99_us"), "packets": ("packets_per_s",)}.get(row.kind, ("events_per_s",))
        entry: dict[str, Any] = {"kind": row.kind, "transport": row.transport, "ports": row.ports}
        if row.transport == TRANSPORT:
            figures = (*figures, "signals_per_packet")
        entry |= {name: row.median(index) for index, name in enumerate(figures)}
        if row.size:
            entry |= {"size": row.size, "bytes_per_s": row.median() * row.size}
        entry["ratios"] = _ratios(row, rows)
        entry["rounds"] = row.rounds
        listed.append(entry)
    return {"schema": SCHEMA, **about, "rows": listed, "machine": machine.as_json()}


def _cell(ratios: dict[str, float], peer: str) -> str:
    return f"{ratios[peer]:8.2f} ×" if peer in ratios else " " * 10


def table(rows: Sequence[Row], machine: MachineFigures, about: dict[str, Any]) -> str:
    """Draw the table."""
    each_s = about["seconds"] / about["rounds"]
    lines = [
        f"{about['cores']} cores, {about['cpu']}, Linux {about['kernel']}, {about['python']}",
        f"{about['rounds']} interleaved rounds of {each_s:.2g} s a row, medians: {about['command']}",
    ]
    peers = ("pipe", "zmq", TWO_LEVEL.transport)
    heads = {
        "single": ("events a second, one call an event (read and written back)", "events/s", ""),
        "batch": ("events a second, batch forms (at most 256 ids a call)", "events/s", ""),
        "packets": ("packets a second (VMBus: there and back; the others: one way)", "packets/s", "MB/s"),
        "trip": ("round trip, blocking on both sides", "p50 µs", "p99 µs"),
    }
    for kind, (head, first, second) in heads.items():
        lines += ["", f"{head:<60}{first:>12}{second:>10}   to Pipe    to zmq   to 2-level"]
        for row in rows:
            if row.kind != kind:
                continue
            ratios = _ratios(row, rows)
            middle = f"{row.median():12,.0f}{'':10}"
            if kind == "trip":
                middle = f"{row.median():12.1f}{row.median(1):10.1f}"
            if kind == "packets":
                middle = f"{row.median():12,.0f}{row.median() * row.size / 1e6:10,.1f}"
            cells = "".join(_cell(ratios, peer) for peer in peers).rstrip()
            lines.append(f"  {row.title:<58}{middle}{cells}".rstrip())
    return "\n".join([*lines, "", signals_line(rows), "", *machine.lines()])


def signals_line(rows: Sequence[Row]) -> str:
    """Say how often the driver signals its host: alone on the channel, and under load."""
    said = [f"{'idle' if row.kind == 'trip' else f'{row.size:,} B under load'} {row.median(-1):.4g}"
            for row in reversed(rows) if row.transport == TRANSPORT]  # fmt: skip
    return f"VMBus signals a packet, driver to host: {', '.join(said)}"


def verdicts(rows: Sequence[Row]) -> list[str]:
    """Compare with what the shape of the data path lets one expect."""
    said = []
    for row in rows:
        ratios = _ratios(row, rows) if row.kind == "single" else {}
        for peer, least in EVENTS_RATIO_MIN.items():
            if peer in ratios:
                said.append(f"{row.title}: {ratios[peer]:.2f} × {peer} in events/s, expected ≥ {least:g}")
    said += [
        f"{row.title}: {_ratios(row, rows)['pipe']:.2f} × pipe in packets/s, expected ≥ {PACKETS_RATIO_MIN:g}"
        for row in rows
        if row.transport == TRANSPORT and row.size == PACKET_SIZES[0]
    ]
    said += [
        f"{row.title}, round trip p50: {_ratios(row, rows)['pipe']:.2f} × pipe, expected ≤ {TRIP_RATIO_MAX:g}"
        for row in rows
        if row.kind == "trip" and row.is_ours
    ]
    return [*said, between_abis(rows)]


def between_abis(rows: Sequence[Row]) -> str:
    """Say whether the FIFO ABI keeps up with the 2-level one: events a second, and round trips."""
    shares = []
    for row in rows:
        ratio = _ratios(row, rows).get(TWO_LEVEL.transport)
        if ratio is not None:  # a round trip is the better the shorter it is
            what = "round trip" if row.kind == "trip" else f"{row.kind} {row.ports:,}"
            shares.append((1 / ratio if row.kind == "trip" else ratio, f"{what} {ratio:.2f} ×"))
    holds = all(share >= FIFO_SHARE_MIN for share, _ in shares)
    within = f"{1 - FIFO_SHARE_MIN:.0%}".replace("%", " %")
    return f"FIFO within {within} of 2-level: {'yes' if holds else 'NO'} ({', '.join(text for _, text in shares)})"


def main() -> int:
    """Measure and print."""
    parser = argparse.ArgumentParser(description="Measure pvbus beside Pipe and pyzmq.")
    parser.add_argument("--quick", action="store_true", help="half a second a row, two rounds")
    parser.add_argument("--json", action="store_true")
    parser.add_argument("--seconds", type=float, help="a row, all rounds together (default 2)")
    parser.add_argument("--rounds", type=int, help="(default 5)")
    parser.add_argument("--ports-max", type=int, default=4095, help="65536 adds a row for FIFO; binding them takes long")
    options = parser.parse_args()
    seconds = options.seconds or (0.5 if options.quick else 2.0)
    rounds = options.rounds or (2 if options.quick else 5)
    if not 0 < seconds <= 600 or not 0 < rounds <= 100:
        parser.error("--seconds must be within 0 … 600 and --rounds within 1 … 100")
    if not 1 <= options.ports_max <= FIFO.ports_max:
        parser.error(f"--ports-max must be within 1 … {FIFO.ports_max}")
    with_zmq = importlib.util.find_spec("zmq") is not None
    if not with_zmq:
        print("pyzmq is not installed, its rows are left out: pip install pyzmq", file=sys.stderr)
    command = shlex.join(["python", *sys.argv])
    about = {**facts(), "seconds": seconds, "rounds": rounds, "command": command}
    begin = time.monotonic()
    name = f"bench-{os.getpid()}"
    figures = measure_machine(name, 2 if options.quick else 5)
    with ExitStack() as stack:
        directory = stack.enter_context(tempfile.TemporaryDirectory(prefix="pvbus-bench-"))
        stack.enter_context(launched(name, MACHINE))
        pair = stack.enter_context(closing(Pair(name, options.ports_max, directory, with_zmq)))
        rows = make_rows(pair.ports, with_zmq)
        measure(pair, rows, seconds, rounds)
    about["took_s"] = round(time.monotonic() - begin, 1)
    if options.json:
        print(json.dumps(as_json(rows, figures, about), indent=2))
    else:
        print(table(rows, figures, about))
        print("\n".join(["", *verdicts(rows)]))
    return 0


if __name__ == "__main__":
    sys.exit(main())
