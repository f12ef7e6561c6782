# SPDX-License-Identifier: Apache-2.0
"""The user processes of a stress run: ping and pong, flood and sink, churn, victim.

Started as `python -m pvbus.verify.users '{"role": …}'` by the coordinator (stress.py), which reads one JSON
object a line from its standard output and writes one word a line to its standard input. Each maps the
tally, writes its own words of it, and owns its open files. A user reports what it saw; it never decides
whether the run has held.
"""

from __future__ import annotations

import json
import random
import select
import struct
import sys
import time
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from typing import Any

from pvbus.actors.client import attach
from pvbus.verify.launch import Machine, OpenFile
from pvbus.verify.tally import DONE, LAST, PHASE, RAISED, RUN, SEEN, Tally

WAIT_S_MAX = 10.0  # one event, across a processor that was killed and comes back
VIOLATIONS_MAX = 20  # of one user: enough to see a pattern
BURST_PAUSE_S = 0.0005  # of a flood: its receiver falls asleep now and then, and must be woken


def say(**message: object) -> None:
    """Tell the coordinator."""
    sys.stdout.write(json.dumps(message) + "\n")
    sys.stdout.flush()


def say_violation(text: str) -> None:
    """Tell the coordinator of something that must not be."""
    say(violation=text)


class End:
    """One user's side of its links: counts what it raises and what it reads."""

    def __init__(
        self, file: OpenFile, tally: Tally, name: str, domain: int, report: Callable[[str], None]
    ) -> None:
        self.file = file
        self.name = name
        self._domain = domain
        self._report = report
        self._tally = tally
        self._words = tally.words
        self._in: dict[int, int] = {}
        self._violations = 0

    def receives(self, port: int, link: int, born_pending: bool) -> None:
        """Count events of `port` in `link`; a port born pending was raised once by nobody."""
        self._in[port] = self._tally.at(link)
        if born_pending:
            self._words[self._in[port] + RAISED] += 1
            self._words[self._in[port] + DONE] += 1

    def violation(self, text: str) -> None:
        """Report, up to a bound."""
        self._violations += 1
        if self._violations <= VIOLATIONS_MAX:
            self._report(f"{self.name}: {text}")

    def raise_event(self, port: int, link: int) -> None:
        """Notify, with the count before and after."""
        at = self._tally.at(link)
        self._words[at + RAISED] += 1
        self.file.notify(port)
        self._words[at + DONE] += 1

    def seen_all(self, link: int) -> bool:
        """Whether what was raised over `link` has been seen."""
        at = self._tally.at(link)
        return self._words[at + SEEN] == self._words[at + RAISED]

    def took(self, ports: Sequence[int]) -> None:
        """Count events just read, and check that they had been raised."""
        words = self._words
        for port in ports:
            at = self._in.get(port)
            if at is None:
                self.violation(f"port {self._domain}:{port} was read and never bound")
                continue
            raised = words[at + RAISED]
            seen = words[at + SEEN] + 1
            words[at + LAST] = raised
            words[at + SEEN] = seen
            if seen > raised:
                where = f"{self._domain}:{port}"
                self.violation(f"port {where}: event {seen} came and only {raised} had been raised")

    def read(self, length: int = 4096) -> list[int]:
        """Read, count, write back."""
        data = self.file.read(length)
        ports = list(struct.unpack(f"={len(data) // 4}I", data))
        self.took(ports)
        self.file.write(data)
        return ports

    def drain(self) -> int:
        """Read until nothing is left; return how many events there were."""
        total = 0
        while self.file.poll(select.POLLIN, timeout_ms=0) & select.POLLIN:
            total += len(self.read())
        return total


def await_event(end: End) -> list[int]:
    """Wait for events and take them; an empty list, and a violation, after WAIT_S_MAX."""
    if not end.file.poll(select.POLLIN, timeout_ms=int(WAIT_S_MAX * 1000)) & select.POLLIN:
        end.violation(f"no event within {WAIT_S_MAX:.0f} s")
        return []
    return end.read()


def at_rest(ends: Sequence[End]) -> None:
    """Obey the coordinator, once the hot loop is over: drain on demand, until it says finish or hangs up."""
    say(idle=True)
    for line in sys.stdin:
        if line.strip() != "drain":
            return
        say(drained=sum(end.drain() for end in ends))


class User:
    """What every role has: its job, the tally, its machine."""

    def __init__(self, job: dict[str, Any], machine: Machine, stack: ExitStack) -> None:
        self.job = job
        self.machine = machine
        self.tally = Tally(job["fd"], job["links"])
        stack.callback(self.tally.close)
        self.words = self.tally.words
        self.rng = random.Random(job["seed"])
        self._stack = stack

    def running(self) -> bool:
        """Whether the coordinator still wants events."""
        return self.words[PHASE] == RUN

    def end(self, nonblock: bool) -> End:
        """Open a file in the job's domain."""
        file = self.machine.open_evtchn(domain=self.job["domain"], nonblock=nonblock)
        self._stack.callback(file.close)
        return End(file, self.tally, self.job["name"], self.job["domain"], say_violation)

    def offer(self, end: End) -> list[int]:
        """Offer `ports` ports to the peer's domain; events arrive on links from `first_in`."""
        first = self.job["first_in"]
        ports = [end.file.bind_unbound_port(self.job["peer_domain"]) for _ in range(self.job["ports"])]
        for index, port in enumerate(ports):
            end.receives(port, first + index, born_pending=False)
        say(ports=ports)
        return ports

    def accept(self, end: End) -> list[int]:
        """Bind to the peer's ports, and take the event that each local end is born with."""
        first = self.job["first_in"]
        ports = []
        for index, remote in enumerate(self.job["peer_ports"]):
            port = end.file.bind_interdomain(self.job["peer_domain"], remote)
            end.receives(port, first + index, born_pending=True)
            ports.append(port)
        say(ports=ports)
        born = 0
        while born < len(ports):
            events = await_event(end)
            if not events:
                break
            born += len(events)
        return ports


def ping(user: User) -> None:
    """Raise all ports, wait for all answers, again. All reads block: a lost wake-up shows as a standstill."""
    end = user.end(nonblock=False)
    ports = user.accept(end)
    out = user.job["first_out"]
    own = user.job["own_word"]
    while user.running():
        for index, port in enumerate(ports):
            end.raise_event(port, out + index)
        answers = 0
        while answers < len(ports):
            answers += len(end.read())
    user.words[own] = 1  # before the last tokens, so that pong, which they wake, sees it and does not answer
    for index, port in enumerate(ports):
        end.raise_event(port, out + index)
    at_rest([end])


def pong(user: User) -> None:
    """Answer every event on its own port."""
    end = user.end(nonblock=False)
    links = {port: user.job["first_out"] + index for index, port in enumerate(user.offer(end))}
    while True:
        ports = end.read()
        if user.words[user.job["peer_word"]]:
            break
        for port in ports:
            if port in links:
                end.raise_event(port, links[port])
    at_rest([end])


def flood(user: User) -> None:
    """Notify many ports. Exact ones only when the last event was seen; the others as often as it goes."""
    end = user.end(nonblock=True)
    ports = user.accept(end)
    out = user.job["first_out"]
    exact = user.job["exact"]
    order = list(range(len(ports)))
    while user.running():
        user.rng.shuffle(order)
        for index in order:
            if not exact[index] or end.seen_all(out + index):
                end.raise_event(ports[index], out + index)
        user.words[user.job["own_word"]] += 1
        if user.rng.random() < 0.25:
            time.sleep(BURST_PAUSE_S)
    for index, port in enumerate(ports):  # wakes a receiver that is blocked in read
        if not exact[index]:
            end.raise_event(port, out + index)
    at_rest([end])


def sink(user: User) -> None:
    """Receive from all floods, in a mixture of every way there is to read."""
    end = user.end(nonblock=False)
    user.offer(end)
    while user.running():
        way = user.rng.randrange(4)
        if way == 0:
            end.read(4)
        elif way == 1:
            end.read(4096)
        elif way == 2:
            if end.file.poll(select.POLLIN, timeout_ms=100) & select.POLLIN:
                end.read(64)
        else:
            ports = end.file.read_ports(256)
            end.took(ports)
            end.file.enable(ports)
    at_rest([end])


def victim(user: User) -> None:
    """Notify and receive until killed. One port more is offered and never taken: it must be freed as well."""
    end = user.end(nonblock=True)
    spare = end.file.bind_unbound_port(user.job["peer_domain"])
    say(spare=spare)
    ports = user.offer(end)
    sys.stdin.readline()
    while user.running():
        for index, port in enumerate(ports):
            end.raise_event(port, user.job["first_out"] + index)
        end.drain()


def main() -> int:
    """Run one role until it is over."""
    from pvbus.verify.churn import churn  # it builds on End and User

    job: dict[str, Any] = json.loads(sys.argv[1])
    roles = {"ping": ping, "pong": pong, "flood": flood, "sink": sink, "victim": victim, "churn": churn}
    with ExitStack() as stack:
        machine = stack.enter_context(attach(name=job["machine"]))
        roles[job["role"]](User(job, machine, stack))
    return 0


if __name__ == "__main__":
    sys.exit(main())
