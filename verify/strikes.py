# SPDX-License-Identifier: Apache-2.0
"""kill -9 by plan: cpu processes of the machine, and users that hold ports.

The coordinator holds one file of its own, the far end of every victim's ports. After a strike it waits,
within a bound, for what must follow: a cpu that is back with one restart more, or ports that are free and
peers that are unbound. It kills only pids that `machine.status()` names as cpus, and children of its own.
"""

from __future__ import annotations

import os
import random
import signal
import time
from dataclasses import dataclass
from typing import Any, Literal

from pvbus.verify.crew import Crew
from pvbus.verify.fleet import START_S_MAX, VICTIM_PORTS, Fleet
from pvbus.verify.launch import Machine
from pvbus.verify.tally import DONE, LAST, Link, faults
from pvbus.verify.users import End

BACK_S_MAX = 5.0  # of a cpu: 30 ms is usual; this is a loaded machine with two cores
FREE_S_MAX = 5.0  # of a dead user's ports
CPU_GAP_S = 2.5  # between kills of cpus: below the machine's restart intensity, which is meant to stop it


@dataclass(frozen=True)
class Strike:
    """One kill of the plan; `pick` chooses among the cpus that there are."""

    at_s: float
    kind: Literal["cpu", "user"]
    pick: int


def plan_strikes(seconds: float, rng: random.Random) -> list[Strike]:
    """Draw a plan: at least one of each kind, none near the end, cpus not too often."""
    first: list[Literal["cpu", "user"]] = ["cpu", "user"]
    rng.shuffle(first)
    plan = [
        Strike(seconds * rng.uniform(0.15, 0.3), first[0], rng.getrandbits(16)),
        Strike(seconds * rng.uniform(0.4, 0.55), first[1], rng.getrandbits(16)),
    ]
    at = plan[-1].at_s
    last_cpu = next(strike.at_s for strike in plan if strike.kind == "cpu")
    while (at := at + rng.uniform(0.5, 1.5)) < seconds * 0.85:
        is_cpu = at - last_cpu >= CPU_GAP_S and rng.random() < 0.6
        last_cpu = at if is_cpu else last_cpu
        plan.append(Strike(at, "cpu" if is_cpu else "user", rng.getrandbits(16)))
    return plan


class Striker:
    """Carries out a plan, with one victim at a time."""

    def __init__(self, machine: Machine, fleet: Fleet, crew: Crew, violations: list[str]) -> None:
        self._machine = machine
        self._fleet = fleet
        self._crew = crew
        self._violations = violations
        self.cpu_kills = self.user_kills = 0
        self.cpu_back_ms_max = self.user_free_ms_max = 0.0
        self._file = machine.open_evtchn(domain=fleet.near, nonblock=True)
        self._end = End(self._file, fleet.tally, "watcher", fleet.near, violations.append)
        self._victims = 0
        self._new_victim()

    def _new_victim(self) -> None:
        fleet = self._fleet
        self._victims += 1
        to_watcher, to_victim = fleet.new_links(VICTIM_PORTS), fleet.new_links(VICTIM_PORTS)
        name = f"victim {self._victims}"
        ends = {"domain": fleet.far, "peer_domain": fleet.near, "ports": VICTIM_PORTS}
        job = fleet.job("victim", name, first_in=to_victim, first_out=to_watcher, **ends)
        self._victim, offered = fleet.offerer(job)
        self._spare = self._crew.answer(self._victim, "spare", START_S_MAX)
        self._bound: dict[int, tuple[int, Link]] = {}
        self._out: dict[int, int] = {}
        for index, theirs in enumerate(offered):
            mine = self._file.bind_interdomain(fleet.far, theirs)
            self._end.receives(mine, to_watcher + index, born_pending=True)
            link = Link(to_watcher + index, fleet.near, mine, exact=False, text=f"watcher, from {name}")
            self._bound[mine] = theirs, link
            self._out[mine] = to_victim + index
        self._victim.tell("go")

    def run(self, plan: list[Strike], seconds: float, violations_max: int) -> None:
        """Strike as planned; in between serve the watcher's file and the users' pipes."""
        begin = time.monotonic()
        for strike in plan:
            self._idle_until(begin + strike.at_s, violations_max)
            if len(self._violations) >= violations_max:
                return
            if strike.kind == "cpu":
                self._strike_cpu(strike.pick)
            else:
                self._strike_user()
                self._new_victim()
        self._idle_until(begin + seconds, violations_max)
        self._strike_user()

    def _idle_until(self, deadline: float, violations_max: int) -> None:
        while (left := deadline - time.monotonic()) > 0 and len(self._violations) < violations_max:
            self._serve()
            self._crew.pump(min(left, 0.02))

    def _serve(self) -> bool:
        self._end.drain()
        for port, link in self._out.items():
            self._end.raise_event(port, link)
        return True

    def _cpus(self) -> list[dict[str, Any]]:
        processes: list[dict[str, Any]] = self._machine.status()["processes"]
        cpus = (row for row in processes if row["name"].startswith("cpu/"))
        return sorted(cpus, key=lambda row: str(row["name"]))

    def _strike_cpu(self, pick: int) -> None:
        cpus = self._cpus()
        chosen = cpus[pick % len(cpus)]
        begin = time.monotonic()
        os.kill(chosen["pid"], signal.SIGKILL)
        self.cpu_kills += 1

        def is_back() -> bool:
            return self._serve() and any(
                row["name"] == chosen["name"]
                and row["restarts"] > chosen["restarts"]
                and row["pid"] not in (0, None, chosen["pid"])
                for row in self._cpus()
            )

        if self._crew.until(is_back, BACK_S_MAX):
            self.cpu_back_ms_max = max(self.cpu_back_ms_max, (time.monotonic() - begin) * 1000)
        else:
            self._violations.append(f"{chosen['name']} was killed and not back within {BACK_S_MAX:.0f} s")

    def _left_behind(self, holder: object) -> list[str]:
        """Say which ports of the dead are still theirs, and which of ours still have a peer."""
        near, far = self._fleet.near, self._fleet.far
        theirs = {port for port, _ in self._bound.values()} | {self._spare}
        left = []
        for row in self._machine.ports():
            where = row["domain"], row["port"]
            if row["domain"] == far and row["port"] in theirs and row["file"] == holder:
                left.append(f"port {where[0]}:{where[1]} is still the dead user's")
            if row["domain"] == near and row["port"] in self._bound and row["state"] != "unbound":
                left.append(f"port {where[0]}:{where[1]} is {row['state']}, its peer is dead")
        return left

    def _strike_user(self) -> None:
        spare = self._fleet.far, self._spare
        holders = [row["file"] for row in self._machine.ports() if (row["domain"], row["port"]) == spare]
        if not holders:
            self._violations.append(f"port {self._fleet.far}:{self._spare} of a living user is not listed")
            return
        begin = time.monotonic()
        self._crew.dismiss(self._victim)
        self.user_kills += 1
        left: list[str] = []

        def is_free() -> bool:
            left[:] = self._left_behind(holders[0])
            return not left

        if self._crew.until(is_free, FREE_S_MAX):
            self.user_free_ms_max = max(self.user_free_ms_max, (time.monotonic() - begin) * 1000)
        else:
            self._violations += [f"{text} after {FREE_S_MAX:.0f} s" for text in left]
        self._judge_victim()
        # What its last notifies still set in motion must not wait in our ring for the next victim with the same port (H13).
        self._machine.settle()
        self._end.drain()
        for port in self._bound:
            self._file.notify(port)  # its peer is gone: accepted, and no effect
            self._file.unbind(port)
        self._bound, self._out = {}, {}

    def _judge_victim(self) -> None:
        """What a dead user had raised must still arrive."""
        tally = self._fleet.tally
        words = tally.words
        links = [link for _, link in self._bound.values()]
        starts = [tally.at(link.index) for link in links]

        def all_arrived() -> bool:
            self._end.drain()
            return all(words[at + LAST] >= words[at + DONE] for at in starts)

        self._crew.until(all_arrived, FREE_S_MAX)
        for link in links:
            self._violations += faults(tally, link, sender_alive=False)

    def close(self) -> None:
        """Let go of the file, and of the victim."""
        if self._victim in self._crew.users:
            self._crew.dismiss(self._victim)
        self._file.close()
