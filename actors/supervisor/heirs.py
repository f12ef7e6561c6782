# SPDX-License-Identifier: Apache-2.0
"""What users ask of the hypervisor, across its deaths: what comes while there is none waits for its heir.

What a death has ended is done again if twice is as good as once. Which files and CPUs an heir is given is not decided here.
"""

from __future__ import annotations

import errno
from typing import TYPE_CHECKING

from pvbus.actors.runtime import messages as m
from pvbus.actors.runtime.process import failure_of
from pvbus.actors.runtime.wire import Failure

if TYPE_CHECKING:
    from collections.abc import Callable

    from pvbus.actors.runtime.process import Peer, Received
    from pvbus.actors.runtime.wire import Message
    from pvbus.actors.supervisor.process import Supervisor

CALL_DEADLINE_S = 20.0
WAITING_MAX = 1024  # calls of users that wait for a hypervisor's heir
TWICE_IS_ONCE = (m.Advance,)  # a VIRQ is not raised again, and no call of a kernel made again: it may have been


class Heirs:
    """Hands calls on to the hypervisor, or to its heir."""

    def __init__(self, supervisor: Supervisor) -> None:
        self.supervisor = supervisor
        self._waiting: list[Callable[[], None]] = []

    def forward(self, message: Message, received: Received) -> None:
        """Have the hypervisor answer a user's call."""
        hypervisor = self.supervisor.hypervisor()
        if hypervisor is None:
            self.wait(lambda: self.forward(message, received))
            return

        def answered(reply: Message, _fds: list[int]) -> None:
            died = isinstance(reply, Failure) and reply.errno == errno.EPIPE
            if died and isinstance(message, TWICE_IS_ONCE):
                self.ask_again(hypervisor, received, lambda: self.forward(message, received))
                return
            answer = Failure(errno=errno.EIO, text="the hypervisor died under this call; it may be done") if died else reply
            received.peer.reply(received.request, answer)

        hypervisor.ask(message, answered, CALL_DEADLINE_S)

    def ask_again(self, dead: Peer, received: Received, again: Callable[[], None]) -> None:
        """Do again, with the heir, what a hypervisor's death has ended."""
        try:
            if self.supervisor.hypervisor() in (None, dead):
                self.wait(again)
            else:
                again()
        except OSError as error:
            received.peer.reply(received.request, failure_of(error))

    def wait(self, again: Callable[[], None]) -> None:
        """What needs the hypervisor waits until its heir is up; users wait with a time limit of their own."""
        if self.supervisor.stopping or len(self._waiting) >= WAITING_MAX:
            raise OSError(errno.EAGAIN, "there is no hypervisor")
        self._waiting.append(again)

    def is_up(self) -> None:
        """Do what has waited."""
        waiting, self._waiting = self._waiting, []
        for again in waiting:
            again()
