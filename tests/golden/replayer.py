# SPDX-License-Identifier: Apache-2.0
"""Replay recorded scenarios against a machine and compare the answers.

    result = replay(steps, machine, cpus=1)
    assert not result.differences

Ports are symbolic, as in the recording. Steps that a Python client cannot make are in `NOT_EXPRESSIBLE`, each
with its reason, and are counted; nothing is left out silently.
"""

from __future__ import annotations

import time
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from types import MappingProxyType
from typing import Any

from pvbus.tests.golden.calls import CALLS, Call, call_raw_ioctl, execute
from pvbus.tests.golden.calls import REQUESTS as IOCTLS
from pvbus.tests.golden.children import CHILD_PLANS, Child, ChildPlan
from pvbus.tests.golden.hidden import BEFORE, HIDDEN_CALLS, write_back_growth
from pvbus.tests.golden.session import POLL_BITS, Answer, Session, Step, expand, load

RECORDING = Path(__file__).with_name("evtchn.jsonl")

_BAD_WRITE = "write() takes an object with a buffer: Python has no bad pointer to give"
_BAD_READ = "readinto() takes an object with a buffer: Python has no address outside of user space to give"
_READ_ONLY = "readinto() a buffer that cannot be written, for one that is not mapped or not as far as needed"
_NOT_A_DEVICE = "fileno() is one end of a socket pair: poll, epoll and SIGIO work by the kernel's own doing"

# Steps that are not made. Every one is about something that does not exist in a Python client.
NOT_EXPRESSIBLE: dict[tuple[str, int], str] = {
    ("write_efault", 8): _BAD_WRITE,
    ("write_efault", 9): _BAD_WRITE,
    ("write_efault", 10): _BAD_WRITE,
    ("read_efault", 4): _BAD_READ,
    ("read_efault", 13): "follows from the read before it: no buffer of two parts, so no partial copy into it",
    ("vfs_misc", 16): _NOT_A_DEVICE,
    ("vfs_misc", 17): _NOT_A_DEVICE,
}

# Steps that are made with something else in a place that the answer does not depend on.
SUBSTITUTED: dict[tuple[str, int], str] = {
    ("write_efault", 12): "a good buffer for NULL: a length below 4 returns before the buffer is looked at",
    ("write_efault", 13): "a good buffer for NULL: a length below 4 returns before the buffer is looked at",
    ("write_efault", 17): "three mapped bytes after the port for unmapped ones: they are rounded away",
    ("read_efault", 3): _READ_ONLY,
    ("read_efault", 10): _READ_ONLY,
    ("read_efault", 11): _READ_ONLY,
    ("read_efault", 12): _READ_ONLY,
    ("read_efault", 5): "the client's own buffer for NULL: a length below 4 returns before it is looked at",
    ("read_efault", 6): "the client's own buffer for NULL: a length below 4 returns before it is looked at",
    ("read_efault", 14): "the client's own buffer for NULL: a length below 4 returns before it is looked at",
    ("vfs_misc", 23): "isatty as the ioctl that it makes (TCGETS): on fileno() it would ask the socket",
}

NOT_COMPARED = {
    "info": "the recorder marked it as different from system to system",
    "fifo": "holds for the FIFO ABI only",
}


@dataclass
class Result:
    """What a replay found: differences, and how many steps were compared, made only, or not expressible."""

    compared: int = 0
    made_only: int = 0
    not_expressible: int = 0
    differences: list[str] = field(default_factory=list)


def scenarios() -> dict[str, list[Step]]:
    """Return the recorded scenarios by name."""
    return load(RECORDING)


def replay(
    steps: list[Step],
    machine: Any,
    cpus: int,
    abi: str = "2-level",
    *,
    raw: bool = False,
    calls: Mapping[str, Call] = MappingProxyType({}),
    left_out: Mapping[tuple[str, int], str] = NOT_EXPRESSIBLE,
) -> Result:
    """Replay a scenario on domain 0. With `raw`, ioctls go by number and structure, not by method.

    `calls` are made otherwise than by a Python client; `left_out` are the steps that are not made, with their reasons.
    """
    replay = _Replay(steps, machine, cpus, abi, raw=raw)
    replay.calls |= calls
    replay.left_out = left_out
    return replay.run()


class _Replay:
    def __init__(self, steps: list[Step], machine: Any, cpus: int, abi: str, *, raw: bool) -> None:
        self.steps = steps
        self.abi = abi
        self.session = Session(machine, cpus)
        self.result = Result()
        self.calls: dict[str, Call] = CALLS | HIDDEN_CALLS
        if raw:
            self.calls |= dict.fromkeys(IOCTLS, _raw_or_null)
        self.left_out: Mapping[tuple[str, int], str] = NOT_EXPRESSIBLE
        self.children: dict[ChildPlan, Child] = {}

    def run(self) -> Result:
        """Make every step; a difference does not end the replay, since later steps may explain it."""
        try:
            for step in self.steps:
                self._run_step(step)
        except Exception as problem:
            if not self.result.differences:
                raise
            self.result.differences.append(f"and then the replay broke: {problem!r}")
        finally:
            for plan in list(self.children):
                self.children.pop(plan).reap()
            leftovers = self.session.close_leftovers()
            self.session.after_scenario.close()
        if leftovers:
            self.result.differences.append(f"files left open: {leftovers}")
        return self.result

    def _run_step(self, step: Step) -> None:
        self._reap_and_fork(step)
        if step.key in self.left_out:
            self.result.not_expressible += 1
            return
        with self.session.after_step:
            if before := BEFORE.get(step.key):
                before(self.session)
            started = time.monotonic()
            answer = self._make(step)
            elapsed_s = time.monotonic() - started
        if "info" not in step.line:
            self.session.elapsed_s = elapsed_s
        for port in answer.handed_out():
            self.session.symbols.hand_out(port)
        if step.cmp == "info" or (step.cmp == "fifo" and self.abi != "fifo"):
            self.result.made_only += 1
        else:
            self.result.compared += 1
            self._compare(step, answer)
        if step.scenario == "ring_growth" and step.call == "drain":
            write_back_growth(self.session, step)

    def _make(self, step: Step) -> Answer:
        for plan, child in self.children.items():
            if step.number in plan.steps:
                return child.make(step)
        return execute(self.session, step, self.calls)

    def _reap_and_fork(self, step: Step) -> None:
        for plan in CHILD_PLANS.get(step.scenario, []):
            if plan.reap_before == step.number:
                self.session.facts["child_status"] = self.children.pop(plan).reap()
            if plan.fork_before == step.number:
                self.children[plan] = Child(self.session, self.steps, self._make_in_child)

    def _make_in_child(self, session: Session, step: Step) -> Answer:
        answer = execute(session, step, self.calls)
        for port in answer.handed_out():
            session.symbols.hand_out(port)
        return answer

    def _compare(self, step: Step, answer: Answer) -> None:
        line = step.line
        loose = step.cmp == "order" and self.session.cpus > 1
        expected = {name: line[name] for name in _COMPARED_FIELDS if line.get(name) is not None}
        if "errno" in line:
            expected["errno"] = line["errno"]
        found = {name: self._found(name, step, answer) for name in expected}
        for name in ("data", "rx_ports", "tx_ports"):
            if name in expected:
                expected[name] = expand(expected[name])
        if "poll" in expected:
            expected["poll"] = sorted(bit for bit in expected["poll"].split("|") if bit)
        if "data" in expected:
            if loose:
                expected["data"], found["data"] = len(expected["data"]), len(found["data"])
            elif step.cmp == "set":
                expected["data"], found["data"] = sorted(expected["data"]), sorted(found["data"])
        if expected != found:
            wrong = [name for name in expected if expected[name] != found[name]]
            text = "; ".join(f"{name} {found[name]!r}, golden {expected[name]!r}" for name in wrong)
            where = f"{step.scenario} step {step.number}: {step.file} {step.call} {step.args or ''}"
            self.result.differences.append(f"{where}: {text}")

    def _found(self, name: str, step: Step, answer: Answer) -> Any:
        symbols = self.session.symbols
        if name == "ret":
            return symbols.name(answer.ret) if answer.port and isinstance(answer.ret, int) else answer.ret
        if name == "poll":
            return sorted(bit for bit, value in POLL_BITS.items() if answer.poll & value)
        if name in {"data", "rx_ports", "tx_ports"}:
            return [symbols.name(port) for port in getattr(answer, name) or []]
        return getattr(answer, name)


_COMPARED_FIELDS = ("ret", "data", "poll", "info", "rx_ports", "tx_ports")


def _raw_or_null(session: Session, step: Step) -> Answer:
    call = CALLS[step.call] if step.args.get("arg") == "NULL" else call_raw_ioctl
    return call(session, step)
