# SPDX-License-Identifier: Apache-2.0
"""The warm pool: file processes that are forked ahead, so that an open does not wait for a fork.

A spare child has made its inbox and waits for a Start; an open hands it that and gives it the file's name. The pool fills
itself when the supervisor has answered and nobody asks for anything; boot does not wait for it. What goes wrong with a
spare costs no open: that takes a fork of its own. Everything else about children (status, stop, exits) is the supervisor's.
"""

from __future__ import annotations

import socket
import sys
from typing import TYPE_CHECKING

from pvbus.actors.runtime.clock import NS_PER_S
from pvbus.actors.runtime.forkserver import Spawned
from pvbus.actors.runtime.supervision import RESTART_PERIOD_S, ChildSpec, State, restart_allowed
from pvbus.actors.supervisor import limits

if TYPE_CHECKING:
    from pvbus.actors.runtime.clock import Timer
    from pvbus.actors.runtime.supervision import Child
    from pvbus.actors.runtime.wire import Message
    from pvbus.actors.supervisor.process import Supervisor

SPARES = 4
"""Two users that open an end each twice in a row, without a fork in between. A spare one costs 3 MiB of its own; more of
them would pay only for bursts, and a burst is as fast as forks are, however many lie ready at its beginning.
"""
QUIET_NS = 300_000
"""So long after an answer a spare is forked: its user is busy with the reply then, and in a burst the next open meets a
fork that is half done instead of none.
"""
FILE_ENTRY = "pvbus.actors.file.process:FileProcess"
PREFIX = "file/spare."


class Pool:
    """Keeps up to `SPARES` children ready."""

    def __init__(self, supervisor: Supervisor) -> None:
        self.supervisor = supervisor
        self.restarts = dict.fromkeys((f"{PREFIX}{place}" for place in range(SPARES)), 0)
        self.deaths_ns: list[int] = []
        self._timer: Timer | None = None
        self._rests_until_ns = 0

    def take(self, spec: ChildSpec) -> Child | None:
        """Make a spare child the one that `spec` describes; None if there is none."""
        table, controls = self.supervisor.table, self.supervisor.controls
        spare = next((child.spec.name for child in table if child.state is State.SPARE), None)
        if spare is None:
            return None
        child = table.adopt(spare, spec)
        control = controls[spec.name] = controls.pop(spare)
        control.name = spec.name
        return child

    def refill_later(self) -> None:
        """Fill up, one child at a time, when it has been quiet for a while; a call meanwhile begins that anew."""
        if self._timer is not None:
            self._timer.cancel()
        at_ns = max(self.supervisor.inbox.clock.now_ns() + QUIET_NS, self._rests_until_ns)
        self._timer = self.supervisor.inbox.call_at(at_ns, self._refill)

    def _refill(self) -> None:
        self._timer = None
        supervisor = self.supervisor
        if supervisor.stopping or supervisor.openings:  # the answer of an open comes back here
            return
        name = next((name for name in self.restarts if name not in supervisor.table), None)
        if name is None:
            return
        try:
            ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
            limits.check_reserve(limits.RESERVE_FOR_SPARES, ours.fileno())
        except OSError:  # the last descriptors are for files; the next close or open comes back here
            return
        child = supervisor.table.add(ChildSpec(name, FILE_ENTRY, "temporary"))
        child.restarts = self.restarts[name]
        supervisor.table.starting(name)
        supervisor.controls[name] = supervisor.inbox.add_peer(ours, name)
        supervisor.forkserver.spawn(name, theirs, lambda reply, _fds: self._spawned(name, reply), entry=FILE_ENTRY)
        theirs.close()

    def _spawned(self, name: str, reply: Message) -> None:
        if isinstance(reply, Spawned):
            self.supervisor.table.forked(name, reply.pid)
            self.supervisor.table.spare(name)
            self.refill_later()
        else:
            self.supervisor.not_forked(name)
            self.died(name)

    def died(self, name: str) -> None:
        """Replace a spare child, unless too many have died lately: then opens fork until the period is over."""
        if self.supervisor.stopping:
            return
        now_ns = self.supervisor.inbox.clock.now_ns()
        period_ns = round(RESTART_PERIOD_S * NS_PER_S)
        allowed = restart_allowed(self.deaths_ns, now_ns)
        self.deaths_ns = [*(time_ns for time_ns in self.deaths_ns if time_ns > now_ns - period_ns), now_ns]
        self.restarts[name] += 1
        if not allowed:
            print(f"pvbus: spare file processes die too often: none for {RESTART_PERIOD_S:.0f} s", file=sys.stderr, flush=True)
            self._rests_until_ns = now_ns + period_ns
        self.refill_later()
