# SPDX-License-Identifier: Apache-2.0
"""Supervision as data and pure functions: which child comes next, and whether a dead one comes back.

The supervisor owns a `ChildTable` and feeds it what happened; it answers what to do. Modelled on Erlang/OTP:
children start left to right, stop right to left, and restarts are bounded. No process, socket or clock may be
touched here.
"""

from __future__ import annotations

import enum
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Literal, TypeVar

from pvbus.actors.runtime.clock import NS_PER_S

RESTART_INTENSITY = 10
"""Restarts of one child within the period. A stress run kills a cpu now and then, a crash loop does so at
once: ten in five seconds is a loop, and the machine stops with a clear error instead of hiding it.
"""

RESTART_PERIOD_S = 5.0
"""The period that `RESTART_INTENSITY` counts in; OTP's usual one."""

START_DEADLINE_S = 10.0
"""Until `Started`: 30 ms are usual, a loaded two-core CI host needs a second."""

STOP_DEADLINE_S = 5.0
"""Until the exit after `Stop`; then SIGKILL."""

T = TypeVar("T")


@dataclass(frozen=True)
class ChildSpec:
    """Describe a child: `permanent` comes back after any end not asked for, `temporary` never does."""

    name: str
    entry: str
    restart: Literal["permanent", "temporary"] = "permanent"
    start_deadline_s: float = START_DEADLINE_S
    stop_deadline_s: float = STOP_DEADLINE_S


def restart_allowed(
    history_ns: Sequence[int],
    now_ns: int,
    intensity: int = RESTART_INTENSITY,
    period_s: float = RESTART_PERIOD_S,
) -> bool:
    """Return whether one more restart now keeps to at most `intensity` restarts within `period_s`."""
    since_ns = now_ns - round(period_s * NS_PER_S)
    return sum(time_ns > since_ns for time_ns in history_ns) < intensity


def plan_start(specs: Iterable[ChildSpec]) -> tuple[ChildSpec, ...]:
    """Return the specs in the order of their start, left to right; ValueError for a name that comes twice."""
    order = tuple(specs)
    seen: set[str] = set()
    for spec in order:
        if spec.name in seen:
            raise ValueError(f"two children are named {spec.name}")
        seen.add(spec.name)
    return order


def plan_stop(running: Sequence[T]) -> tuple[T, ...]:
    """Return what runs (names or specs, in starting order) in stopping order: right to left."""
    return tuple(reversed(running))


class State(enum.Enum):
    """Tell where a child stands; a spare one is forked ahead and waits to become another one."""

    DOWN = "down"
    SPARE = "spare"
    STARTING = "starting"
    UP = "up"
    STOPPING = "stopping"


class Verdict(enum.Enum):
    """Tell what to do about a child that has ended."""

    RESTART = "restart"
    FORGET = "forget"
    GIVE_UP = "give up"


@dataclass
class Child:
    """Hold what is known of one child."""

    spec: ChildSpec
    state: State = State.DOWN
    pid: int = 0
    restarts: int = 0
    history_ns: list[int] = field(default_factory=list)


class ChildTable:
    """Keep the children of a machine in the order of their start."""

    def __init__(
        self,
        specs: Iterable[ChildSpec] = (),
        intensity: int = RESTART_INTENSITY,
        period_s: float = RESTART_PERIOD_S,
    ) -> None:
        self.intensity = intensity
        self.period_s = period_s
        self._children = {spec.name: Child(spec) for spec in plan_start(specs)}

    def __iter__(self) -> Iterator[Child]:
        return iter(tuple(self._children.values()))

    def __getitem__(self, name: str) -> Child:
        return self._children[name]

    def __contains__(self, name: str) -> bool:
        return name in self._children

    def add(self, spec: ChildSpec) -> Child:
        """Add a child behind all others; ValueError if its name is taken."""
        if spec.name in self._children:
            raise ValueError(f"two children are named {spec.name}")
        child = self._children[spec.name] = Child(spec)
        return child

    def by_pid(self, pid: int) -> Child | None:
        """Return the child that runs as `pid`."""
        return next((child for child in self._children.values() if child.pid == pid and pid), None)

    def next_to_start(self) -> Child | None:
        """Return the leftmost child that is down, None while one left of it starts or all are up."""
        for child in self._children.values():
            if child.state is State.STARTING:
                return None
            if child.state is State.DOWN:
                return child
        return None

    def next_to_stop(self) -> Child | None:
        """Return the rightmost child that runs, None while one right of it stops or all are down."""
        for child in reversed(self._children.values()):
            if child.state is State.STOPPING:
                return None
            if child.state is not State.DOWN:
                return child
        return None

    # A child that is being stopped stays so, whatever is heard of its start, until it has ended.

    def starting(self, name: str) -> None:
        """Note that the child is about to be forked."""
        child = self._children[name]
        child.state, child.pid = State.STARTING, 0

    def forked(self, name: str, pid: int) -> None:
        """Note that the child was forked."""
        self._children[name].pid = pid

    def not_forked(self, name: str) -> None:
        """Note that there is no such process: a temporary child is forgotten."""
        child = self._children[name]
        child.state = State.DOWN
        if child.spec.restart == "temporary":
            del self._children[name]

    def spare(self, name: str) -> None:
        """Note that the child was forked ahead: it waits to become another one."""
        self._goes_on(name, State.SPARE)

    def adopt(self, name: str, spec: ChildSpec) -> Child:
        """Turn a spare child into the one that `spec` describes, behind all others; ValueError if its name is taken."""
        spare = self._children[name]
        child = self.add(spec)
        child.state, child.pid = State.STARTING, spare.pid
        del self._children[name]
        return child

    def started(self, name: str) -> None:
        """Note that the child answered Start."""
        self._goes_on(name, State.UP)

    def _goes_on(self, name: str, state: State) -> None:
        child = self._children[name]
        if child.state is State.STARTING:
            child.state = state

    def stopping(self, name: str) -> None:
        """Note that the child was asked to stop: its end is no failure."""
        self._children[name].state = State.STOPPING

    def exited(self, name: str, now_ns: int) -> Verdict:
        """Note the child's end and return what to do; a restart is counted as done now."""
        child = self._children[name]
        wanted = child.state is State.STOPPING
        child.state, child.pid = State.DOWN, 0
        if wanted:
            return Verdict.FORGET
        if child.spec.restart == "temporary":
            del self._children[name]
            return Verdict.FORGET
        if not restart_allowed(child.history_ns, now_ns, self.intensity, self.period_s):
            return Verdict.GIVE_UP
        since_ns = now_ns - round(self.period_s * NS_PER_S)
        child.history_ns = [*(time_ns for time_ns in child.history_ns if time_ns > since_ns), now_ns]
        child.restarts += 1
        return Verdict.RESTART
