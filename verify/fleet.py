# SPDX-License-Identifier: Apache-2.0
"""Who runs in a stress run: pairs, floods with their sink, churners; started, brought to rest, judged.

Owns the numbering of links in the tally and of the users' own words. The judge's arithmetic is in tally.py.
"""

from __future__ import annotations

import os
import random
import re
import subprocess
import sys
from dataclasses import dataclass
from typing import Any

from pvbus.verify.crew import Crew, CrewError, User
from pvbus.verify.launch import Machine
from pvbus.verify.tally import DONE, PHASE, SEEN, STOP, USERS_MAX, Link, Tally, faults

START_S_MAX = 20.0  # a Python start and some hundred binds, on a loaded machine
REST_S_MAX = 15.0  # above a user's own bound for one event, so that its own report comes first
DRAIN_ROUNDS_MAX = 10  # one drains, the next finds nothing; more only if events keep coming, which is a fault
EXPLAIN_MAX = 5
VICTIM_PORTS = 8
VICTIMS_PER_S = 4  # above what the plan of strikes can ask for


@dataclass(frozen=True)
class Load:
    """How many of each there are; the default keeps two cores busy and fits a two-level ABI many times."""

    pairs: int = 2
    pair_ports: int = 4
    floods: int = 2
    flood_ports: int = 64
    churns: int = 2

    def links_max(self, seconds: float) -> int:
        """Return how many links a run of that length can use."""
        standing = 2 * self.pairs * self.pair_ports + 2 * self.floods * self.flood_ports
        return standing + 2 * VICTIM_PORTS * (int(seconds * VICTIMS_PER_S) + 2)


class Fleet:
    """The standing users of a run."""

    def __init__(
        self, machine: Machine, name: str, crew: Crew, tally: Tally, rng: random.Random, load: Load
    ) -> None:
        self._machine = machine
        self._name = name
        self._crew = crew
        self._rng = rng
        self._load = load
        self.tally = tally
        self._links: list[Link] = []
        self._links_used = 0
        self._words_used = 0
        self._churn_words: list[int] = []
        domains = sorted(_domain_ids(machine.status()))
        if not domains:
            raise CrewError("the machine has no domain")
        self.near, self.far = domains[0], domains[min(1, len(domains) - 1)]

    def new_links(self, count: int) -> int:
        """Reserve links; return the first."""
        first = self._links_used
        self._links_used += count
        self.tally.at(self._links_used - 1)
        return first

    def _new_word(self) -> int:
        self._words_used += 1
        if self._words_used > USERS_MAX:
            raise CrewError(f"more than {USERS_MAX} users")
        return self._words_used

    def job(self, role: str, name: str, **more: object) -> dict[str, Any]:
        """Make the job of one user; every one gets a seed of its own."""
        common = {"role": role, "name": name, "machine": self._name, "seed": self._rng.getrandbits(32)}
        return {**common, "fd": self.tally.fd, "links": self.tally.links, **more}

    def offerer(self, job: dict[str, Any]) -> tuple[User, list[int]]:
        """Start a user that offers ports or binds to some; return it and its ports."""
        user = self._crew.start(job)
        return user, self._crew.answer(user, "ports", START_S_MAX)

    def _note(self, first: int, domain: int, ports: list[int], exact: list[bool], text: str) -> None:
        for index, (port, is_exact) in enumerate(zip(ports, exact, strict=True)):
            self._links.append(Link(first + index, domain, port, is_exact, text))

    def start(self) -> None:
        """Start all."""
        for number in range(self._load.pairs):
            self._start_pair(number)
        self._start_storm()
        for number in range(self._load.churns):
            word = self._new_word()
            self._churn_words.append(word)
            domains = [self.near, self.far]
            self._rng.shuffle(domains)
            self._crew.start(
                self.job("churn", f"churn {number}", own_word=word, domain=domains[0], peer_domain=domains[1])
            )

    def _start_pair(self, number: int) -> None:
        count = self._load.pair_ports
        to_pong, to_ping = self.new_links(count), self.new_links(count)
        word = self._new_word()
        ends: dict[str, Any]
        ends = {"domain": self.near, "peer_domain": self.far, "ports": count, "peer_word": word}
        name = f"pong {number}"
        _, offered = self.offerer(self.job("pong", name, first_in=to_pong, first_out=to_ping, **ends))
        self._note(to_pong, self.near, offered, [True] * count, name)
        ends = {"domain": self.far, "peer_domain": self.near, "peer_ports": offered, "own_word": word}
        name = f"ping {number}"
        _, bound = self.offerer(self.job("ping", name, first_in=to_ping, first_out=to_pong, **ends))
        self._note(to_ping, self.far, bound, [True] * count, name)

    def _start_storm(self) -> None:
        each = self._load.flood_ports
        total = each * self._load.floods
        if not total:
            return
        to_sink = self.new_links(total)
        ends = {"domain": self.near, "peer_domain": self.far, "ports": total}
        _, offered = self.offerer(self.job("sink", "sink", first_in=to_sink, **ends))
        for number in range(self._load.floods):
            exact = [index > 0 and self._rng.random() < 0.5 for index in range(each)]  # the first never is
            mine = slice(number * each, (number + 1) * each)
            first_in = self.new_links(each)
            name = f"flood {number}"
            links = {"first_in": first_in, "first_out": to_sink + number * each, "exact": exact}
            where = {"domain": self.far, "peer_domain": self.near, "peer_ports": offered[mine]}
            _, bound = self.offerer(self.job("flood", name, own_word=self._new_word(), **links, **where))
            self._note(to_sink + number * each, self.near, offered[mine], exact, f"sink, from {name}")
            self._note(first_in, self.far, bound, [True] * each, f"{name}, birth event")

    def bring_to_rest(self) -> None:
        """Stop the senders, let the machine settle, and have every receiver drain until nothing comes."""
        self.tally.words[PHASE] = STOP
        users = list(self._crew.users)
        self._crew.until(lambda: all(user.ended or user.has_said("idle") for user in users), REST_S_MAX)
        for user in users:
            if not user.has_said("idle"):
                why = f"did not stop within {REST_S_MAX:.0f} s: it waits for an event that does not come"
                self._crew.violations.append(f"{user.name} {why}")
                self._crew.dismiss(user)
        for _ in range(DRAIN_ROUNDS_MAX):
            self._machine.settle()
            for user in self._crew.users:
                user.tell("drain")
            if not sum(self._crew.answer(user, "drained", REST_S_MAX) for user in self._crew.users):
                return
        text = f"events still come after {DRAIN_ROUNDS_MAX} rounds of draining, with no sender left"
        self._crew.violations.append(text)

    def judge(self) -> list[str]:
        """Look at every standing link, at rest."""
        return [fault for link in self._links for fault in faults(self.tally, link)]

    def counts(self) -> tuple[int, int, int]:
        """Return notifies, events and churn cycles so far."""
        words = self.tally.words
        used = [self.tally.at(link) for link in range(self._links_used)]
        return (
            sum(words[at + DONE] for at in used),
            sum(words[at + SEEN] for at in used),
            sum(words[word] for word in self._churn_words),
        )

    def explain(self) -> list[str]:
        """Ask the machine about the first ports that violations name."""
        named = re.findall(r"\bport (\d+:\d+)", "\n".join(self._crew.violations))
        said = []
        for port in list(dict.fromkeys(named))[:EXPLAIN_MAX]:
            try:
                result = subprocess.run(
                    [sys.executable, "-m", "pvbus.supervisor", "explain", "port", port],
                    env={**os.environ, "PVBUS_MACHINE": self._name},
                    capture_output=True,
                    text=True,
                    check=False,
                    timeout=REST_S_MAX,
                )
            except subprocess.TimeoutExpired:
                said.append(f"{port}: no explanation within {REST_S_MAX:.0f} s")
                continue
            said.append(f"{port}: {(result.stdout or result.stderr).strip()}")
        return said


def _domain_ids(status: dict[str, Any]) -> set[int]:
    return {domain["id"] if isinstance(domain, dict) else int(domain) for domain in status["domains"]}
