# SPDX-License-Identifier: Apache-2.0
"""Settling a machine: hypervisor and workqueues are asked in turn until a whole round finds that nobody has done anything.

The hypervisor answers when its rings are drained and its CPUs idle, a workqueue when nothing waits there that will end by itself.
What one does may be work for the other; so a round counts only if neither has moved since the last one. Nobody is held up while
a driver's call is waited for, and a machine without VMBus needs one question.
"""

from __future__ import annotations

import contextlib
import errno
import functools
from typing import TYPE_CHECKING

from pvbus.actors.runtime import messages as m
from pvbus.actors.runtime import vmbus_messages as vm
from pvbus.actors.runtime.process import PeerGone
from pvbus.actors.runtime.wire import Done, Failure, Message

if TYPE_CHECKING:
    from pvbus.actors.runtime.process import Received
    from pvbus.actors.supervisor.process import Supervisor

ROUNDS_MAX = 10_000
PAUSE_NS = 1_000_000  # until somebody who is being restarted is looked for again
PAUSES_MAX = 20_000
DEADLINE_S = 20.0


class Settling:
    """One caller's wish. EAGAIN for one who has too many."""

    def __init__(self, supervisor: Supervisor, message: m.Settle, received: Received) -> None:
        self._supervisor, self._message, self._received = supervisor, message, received
        supervisor.workqueues.settles.take(received.peer)
        self._rounds = self._pauses = 0
        self._progress: list[int] | None = None

    def begin(self) -> None:
        """Ask the hypervisor."""
        self._rounds += 1
        hypervisor = self._supervisor.hypervisor()
        if hypervisor is None:
            self._pause()
        elif self._rounds > ROUNDS_MAX:
            self._answer(Failure(errno=errno.ETIMEDOUT, text="messages keep coming"))
        else:
            hypervisor.ask(self._message, lambda reply, _fds: self._idle(reply), DEADLINE_S)

    def _idle(self, reply: Message) -> None:
        if isinstance(reply, Failure):
            self._failed(reply)
            return
        controls = self._supervisor.workqueues.controls()
        progress: dict[int, int] = {}
        failed: list[Failure] = []

        def quiet(index: int, answer: Message, _fds: list[int]) -> None:
            if isinstance(answer, Failure):
                progress[index] = -1
                failed.append(answer)
            else:
                progress[index] = getattr(answer, "value", 0)
            if len(progress) == len(controls):
                self._compare([progress[at] for at in range(len(controls))], getattr(reply, "value", 0), failed)

        if not controls:
            self._answer(reply)
        elif any(control is None for control in controls):
            self._pause()
        else:
            for index, control in enumerate(controls):
                assert control is not None
                control.ask(vm.SettleBus(), functools.partial(quiet, index), DEADLINE_S)

    def _compare(self, progress: list[int], rounds: int, failed: list[Failure]) -> None:
        if failed:
            self._failed(failed[0])
        elif rounds == 0 and progress == self._progress:
            self._answer(Done())
        else:
            self._progress = progress
            self.begin()

    def _failed(self, failure: Failure) -> None:
        """Whoever has died has an heir soon."""
        if failure.errno == errno.EPIPE:
            self._pause()
        else:
            self._answer(failure)

    def _pause(self) -> None:
        self._pauses += 1
        if self._supervisor.stopping or self._pauses > PAUSES_MAX:
            self._answer(Failure(errno=errno.EAGAIN, text="there is no hypervisor, or no workqueue"))
            return
        self._progress = None
        inbox = self._supervisor.inbox
        inbox.call_at(inbox.clock.now_ns() + PAUSE_NS, self.begin)

    def _answer(self, reply: Message) -> None:
        self._supervisor.workqueues.settles.give(self._received.peer)
        with contextlib.suppress(PeerGone):  # nobody waits for it any more
            self._received.peer.reply(self._received.request, reply)
