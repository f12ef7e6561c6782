# SPDX-License-Identifier: Apache-2.0
"""Runs the waiting functions of this room, several at a time, in the order in which their answers come.

One thread, no recursion: `pump` resumes whoever can go on until nobody can. What leaves the room goes through `Outside`; the
process sends messages, a test answers at once.
"""

from __future__ import annotations

from collections import deque
from functools import partial
from typing import TYPE_CHECKING, Any, Protocol

from pvbus.actors.runtime.clock import NS_PER_S, Clock, Timer
from pvbus.actors.runtime.inbox import InvariantError
from pvbus.actors.workqueue.waits import Reply, Sleep, Steps, Until, Wait

if TYPE_CHECKING:
    from collections.abc import Callable

RESUMPTIONS_MAX = 1_000_000
"""In one pump: a waiting function ends after some hundred steps, so this many are a livelock."""


class Outside(Protocol):
    """What answers waits for something that is not in this process."""

    def ask(self, wait: Wait, answer: Callable[[Any], None]) -> None:
        """Have `answer` called once, now or later; with an OSError: it is raised where the wait stands."""


class Task:
    """One function that waits."""

    __slots__ = ("ended", "steps", "timer", "turn", "wait")

    def __init__(self, steps: Steps[Any], ended: Callable[[Any], None]) -> None:
        self.steps, self.ended = steps, ended
        self.wait: Wait | None = None
        self.timer: Timer | None = None
        self.turn = 0   # an answer to an earlier wait is nobody's


class Tasks:
    """All of them."""

    def __init__(self, outside: Outside, clock: Clock, call_at: Callable[[int, Callable[[], None]], Timer]) -> None:
        self._outside, self._clock, self._call_at = outside, clock, call_at
        self._ready: deque[tuple[Task, Any]] = deque()
        self._watching: list[Task] = []     # for something of our own: Reply, Until
        self._pumping = False
        self.running = 0
        self._abroad = 0     # answers that will come from outside, or with time
        self.progress = 0   # waits that have ended, but for `Until`

    def start(self, steps: Steps[Any], ended: Callable[[Any], None]) -> None:
        """Begin; `ended` gets the value, or the OSError. Any other exception is a broken invariant and leaves `pump`."""
        self.running += 1
        self._ready.append((Task(steps, ended), None))
        self.pump()

    def is_quiet(self) -> bool:
        """Whether nobody can go on, and nobody waits for an answer that is certain to come. A `Reply` is the host's to give."""
        return not self._ready and self._abroad == 0

    def pump(self) -> None:
        """Resume everybody who can go on. Call it after anything that may have ended a wait."""
        if self._pumping:
            return
        self._pumping = True
        try:
            for _ in range(RESUMPTIONS_MAX):
                if not self._ready and not self._look():
                    return
                task, answer = self._ready.popleft()
                self._resume(task, answer)
            raise InvariantError(f"{RESUMPTIONS_MAX} steps, and {self.running} functions still go on")
        finally:
            self._pumping = False

    def _look(self) -> bool:
        for task in self._watching:
            wait = task.wait
            if isinstance(wait, Reply) and wait.request.ended:
                self._answered(task, task.turn, wait.request.answer)
            elif isinstance(wait, Until) and wait.holds():
                self._answered(task, task.turn, None)
        self._watching = [task for task in self._watching if isinstance(task.wait, Reply | Until)]
        return bool(self._ready)

    def _answered(self, task: Task, turn: int, answer: Any) -> None:
        if task.turn != turn or task.wait is None:
            return
        self.progress += not isinstance(task.wait, Until)
        self._abroad -= not isinstance(task.wait, Reply | Until)
        task.wait = None
        if task.timer is not None:
            task.timer.cancel()
            task.timer = None
        self._ready.append((task, answer))

    def _from_outside(self, task: Task, turn: int, answer: Any) -> None:
        self._answered(task, turn, answer)
        self.pump()

    def _resume(self, task: Task, answer: Any) -> None:
        try:
            wait = task.steps.throw(answer) if isinstance(answer, OSError) else task.steps.send(answer)
        except StopIteration as stop:
            self.running -= 1
            task.ended(stop.value)
        except OSError as error:
            self.running -= 1
            task.ended(error)
        else:
            task.wait = wait
            task.turn += 1
            self._begin(task, wait)

    def _begin(self, task: Task, wait: Wait) -> None:
        done = partial(self._from_outside, task, task.turn, None)
        self._abroad += not isinstance(wait, Reply | Until)
        if isinstance(wait, Reply):
            self._watching.append(task)
            task.timer = self._call_at(self._clock.now_ns() + round(wait.deadline_s * NS_PER_S), done)
        elif isinstance(wait, Until):
            self._watching.append(task)
        elif isinstance(wait, Sleep):
            task.timer = self._call_at(self._clock.now_ns() + round(wait.seconds * NS_PER_S), done)
        else:
            self._outside.ask(wait, partial(self._from_outside, task, task.turn))
