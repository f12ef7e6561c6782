# SPDX-License-Identifier: Apache-2.0
"""What may interrupt a search: the user, and a context that has run for long without coming by a scheduling point.

A signal is handled wherever the process happens to be, and that is mostly inside a context. An interrupt raised there would end
as what the code under test has done; so it is kept until the execution is over, but not for long: a context may sleep, or wait
for something outside, and then it is interrupted there, and the execution thrown away. The other way round for a context that
never stops: only an exception inside it ends its loop, and then it is its failure. Time is that of the processor, which a machine
that is busy or asleep does not spend. Signals belong to the main thread: elsewhere nothing is guarded.
"""

from __future__ import annotations

import contextlib
import signal
import threading
from collections.abc import Iterator
from types import FrameType
from typing import TYPE_CHECKING, Final

if TYPE_CHECKING:
    from pvbus.verify.explorer.execution import Executions

STILL_S: Final = 1.0  # of the processor, between two looks
LOOKS_MAX: Final = 2  # that see no step in between: our contexts stop every few microseconds
PATIENCE_S: Final = 1.0  # with an execution that goes on behind an interrupt


class RunsForEverError(BaseException):
    """Raised in a context that does not stop; no handler of the code under test is meant to catch it."""


class Guard:
    """The signals of one search."""

    def __init__(self, executions: Executions) -> None:
        self.executions = executions
        self.interrupted = False
        self._steps = -1
        self._looks = 0

    def check(self) -> None:
        """Between two executions: let an interrupt through that came during the last one."""
        if self.interrupted:
            self.interrupted = False
            signal.setitimer(signal.ITIMER_REAL, 0)
            raise KeyboardInterrupt

    @contextlib.contextmanager
    def on(self) -> Iterator[Guard]:
        """Take the signals over, for as long as the search lasts."""
        if threading.current_thread() is not threading.main_thread():
            yield self
            return
        wanted = {signal.SIGVTALRM: self._look}
        if signal.getsignal(signal.SIGINT) is signal.default_int_handler:
            wanted |= {signal.SIGINT: self._interrupt, signal.SIGALRM: self._enough}
        before = {number: signal.signal(number, handler) for number, handler in wanted.items()}
        timer = signal.setitimer(signal.ITIMER_VIRTUAL, STILL_S, STILL_S)
        try:
            yield self
        finally:
            signal.setitimer(signal.ITIMER_VIRTUAL, *timer)
            if self.interrupted:
                signal.setitimer(signal.ITIMER_REAL, 0)
            for number, handler in before.items():
                signal.signal(number, handler)
        self.check()  # an interrupt that came behind the last execution

    def _interrupt(self, number: int, frame: FrameType | None) -> None:
        del number, frame
        self.interrupted = True
        signal.setitimer(signal.ITIMER_REAL, PATIENCE_S, PATIENCE_S)

    def _enough(self, number: int, frame: FrameType | None) -> None:
        del number, frame
        if self.interrupted and self.executions.running:
            raise KeyboardInterrupt

    def _look(self, number: int, frame: FrameType | None) -> None:
        del number, frame
        steps = self.executions.model.steps
        self._looks = self._looks + 1 if steps == self._steps and self.executions.running else 0
        self._steps = steps
        if self._looks >= LOOKS_MAX:
            self._looks = 0
            raise RunsForEverError(f"it has run for {LOOKS_MAX * STILL_S:.0f} s, and has not come by a scheduling point")
