# SPDX-License-Identifier: Apache-2.0
"""Calls, one at a time: runs the generators of calls.py, each to its end before the next one starts.

Whose calls these are, and what a wait means, is handed in. No two calls are ever half done at once, so none needs a lock.
"""

from __future__ import annotations

import collections
import errno
from typing import TYPE_CHECKING, NamedTuple

from pvbus.actors.hypervisor import calls
from pvbus.actors.runtime.wire import Done, Failure, Message

if TYPE_CHECKING:
    from collections.abc import Callable, Generator


class _Call(NamedTuple):
    steps: Generator[calls.Wait, None, int]
    then: Callable[[Message], None]


class Executor:
    """A queue of calls and the one that runs. `prepare` is called before each, and may put others in front of it."""

    def __init__(
        self,
        soon: Callable[[Callable[[], None]], None],
        prepare: Callable[[], None],
        flush: Callable[[int], None],
    ) -> None:
        self._soon = soon
        self._prepare = prepare
        self._flush = flush
        self._queue: collections.deque[_Call] = collections.deque()
        self._active: _Call | None = None
        self._starting = False

    def start(self, steps: Generator[calls.Wait, None, int], then: Callable[[Message], None] | None = None) -> None:
        """Queue a call; `then` gets Done with its value, or a Failure."""
        self._queue.append(_Call(steps, then or _nobody))
        self._next()

    def start_first(self, steps: Generator[calls.Wait, None, int]) -> None:
        """Queue a call in front of all that wait."""
        self._queue.appendleft(_Call(steps, _nobody))
        self._next()

    def resume(self, error: OSError | None = None) -> None:
        """Go on with the call that waits; throw `error` into it if what it waited for failed."""
        call = self._active
        if call is None:
            return
        try:
            wait = call.steps.throw(error) if error is not None else next(call.steps)
        except StopIteration as stop:
            self._end(call, Done(value=stop.value))
        except OSError as failed:
            self._end(call, Failure(errno=failed.errno or errno.EIO, text=failed.strerror or ""))
        else:
            if isinstance(wait, calls.Flush):
                self._flush(wait.domid)
            else:
                self._soon(self.resume)

    def _end(self, call: _Call, reply: Message) -> None:
        self._active = None
        call.then(reply)
        self._next()

    def _next(self) -> None:
        if self._starting:  # from `prepare`, or from a call that ended at once: the loop below goes on
            return
        self._starting = True
        try:
            while self._active is None and self._queue:
                self._prepare()
                self._active = self._queue.popleft()
                self.resume()
        finally:
            self._starting = False


def _nobody(_reply: Message) -> None:
    """Take the result of a call that nobody asked for."""
