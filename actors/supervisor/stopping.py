# SPDX-License-Identifier: Apache-2.0
"""The end of a machine: its children right to left, then the supervisor itself.

A child that is asked to stop is waited for until the fork server has reported its exit, or has not forked it in time. One that
takes longer than its specification allows is killed. Meanwhile nothing is started, and nothing that starts goes on.
"""

from __future__ import annotations

import contextlib
import signal
from typing import TYPE_CHECKING

from pvbus.actors.runtime.clock import NS_PER_S
from pvbus.actors.runtime.process import PeerGone, Stop
from pvbus.actors.runtime.supervision import Child, State
from pvbus.actors.supervisor.opening import ignore

if TYPE_CHECKING:
    from pvbus.actors.supervisor.process import Supervisor


def stop_next(supervisor: Supervisor) -> None:
    """Stop the next child, or the supervisor when all are down."""
    child = supervisor.table.next_to_stop()
    if child is None:
        if all(child.state is State.DOWN for child in supervisor.table):
            supervisor.stop()  # a message to ourselves: it also wakes the loop, if nobody else is left to do so
        return
    supervisor.table.stopping(child.spec.name)
    _kill_later(supervisor, child)
    with contextlib.suppress(PeerGone):
        supervisor.controls[child.spec.name].ask(Stop(), ignore, child.spec.stop_deadline_s)


def _kill_later(supervisor: Supervisor, child: Child) -> None:
    """Kill a child that has not ended in time. While its fork is under way there is nobody to kill, and a time-out for that."""

    def late() -> None:
        if child.state is not State.STOPPING:
            return
        if child.pid:
            supervisor.forkserver.kill(child.pid, signal.SIGKILL)
        else:
            _kill_later(supervisor, child)

    inbox = supervisor.inbox
    inbox.call_at(inbox.clock.now_ns() + round(child.spec.stop_deadline_s * NS_PER_S), late)
