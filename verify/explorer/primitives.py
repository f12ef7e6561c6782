# SPDX-License-Identifier: Apache-2.0
"""What a scenario finds beside memory: choices, a clock, locks with owners, a shadow heap, deaths, mailboxes.

Each is a scheduling point of the context that calls it. They are sequentially consistent under every model: they stand
for things that the kernel or the C library orders. What depends on the order of memory accesses belongs into a Memory.
"""

from __future__ import annotations

from collections import deque
from typing import TYPE_CHECKING, Any, Final

from pvbus.verify.explorer.contexts import BURY, CHOOSE, FREE, LOCK, RECEIVE, RING, UNLOCK, Context

if TYPE_CHECKING:
    from pvbus.verify.explorer.model import Model

_PASSED: Final = -1


class UseAfterFree(AssertionError):
    """An access to memory of the shadow heap that is not allocated."""


class LockError(AssertionError):
    """A lock released by somebody who does not hold it, or taken twice."""


class Primitives:
    """The half of a model that is not memory."""

    def __init__(self: Model) -> None:
        self._locks: dict[int, str] = {}
        self._boxes: dict[int, deque[tuple[int, Any]]] = {}
        self._ticks: tuple[int, ...] = ()
        self._ticks_max = 0
        self._now = self._ticked = 0
        self.dead = 0  # a bit a context

    # ---- preparation

    def ticks(self: Model, *steps: int, at_most: int = 1) -> None:
        """Let a read of the clock find it moved on by one of `steps` (ns), up to `at_most` times in an execution."""
        self._ticks, self._ticks_max = steps, at_most

    def lock(self: Model, name: str) -> int:
        """Make a lock with an owner: who dies with it leaves it behind, and that is a failure (`lock left by the dead`)
        unless an heir has taken it over (`inherit`).
        """
        key = self.bell(name)
        self._locks[key] = name
        return key

    def mailbox(self: Model, name: str) -> int:
        """Make a queue of messages (any objects), first in, first out."""
        key = self.bell(name)
        self._boxes[key] = deque()
        return key

    # ---- choices and time

    def choose(self: Model, ways: int, site: str = "choose") -> int:
        """Give a number from 0 to `ways` - 1: the search tries each."""
        context = self._at_point()
        self._stop(context, CHOOSE, 0, site, ways)
        self._observe(context, self.way)
        self._note(context, f"? {site} = {self.way} of {ways}")
        return self.way

    def clock(self: Model, site: str = "clock") -> int:
        """Read the clock (ns from 0): it stands still, or has moved on by one of the `ticks`. It never goes back."""
        context = self._at_point()
        left = self._ticked < self._ticks_max
        self._stop(context, CHOOSE, 0, site, 1 + len(self._ticks) * left)
        if self.way:
            self._now += self._ticks[self.way - 1]
            self._ticked += 1
            self.version += 1
        self._observe(context, self._now)
        self._note(context, f"? {site} = {self._now} ns")
        return self._now

    # ---- locks

    def acquire(self: Model, lock: int, site: str = "lock") -> None:
        """Wait until nobody holds a lock, and take it."""
        context = self._at_point()
        if self.cells[lock] == context.number + 1:
            raise LockError(f"{context.name} takes {self._locks[lock]} a second time ({site})")
        self._stop(context, LOCK, lock, site)
        self._observe(context, _PASSED)
        self._set(lock, context.number + 1)
        self._note(context, f"[ {site} {self._locks[lock]}")

    def release(self: Model, lock: int, site: str = "unlock") -> None:
        """Give a lock back."""
        context = self._at_point()
        self._stop(context, UNLOCK, lock, site)
        if self.cells[lock] != context.number + 1:
            raise LockError(f"{context.name} releases {self._locks[lock]} and does not hold it ({site})")
        self._observe(context, _PASSED)
        self._set(lock, 0)
        self._note(context, f"] {site} {self._locks[lock]}")

    def inherit(self: Model, lock: int, site: str = "inherit") -> bool:
        """Take a lock over if its owner is dead; give whether it was so. Never waits."""
        context = self._at_point()
        self._stop(context, UNLOCK, lock, site)
        owner = self.cells[lock]
        gone = owner > 0 and bool(self.dead >> (owner - 1) & 1)
        self._observe(context, gone)
        if gone:
            self._set(lock, context.number + 1)
        self._note(context, f"[ {site} {self._locks[lock]} {'from the dead' if gone else '(not left)'}")
        return gone

    # ---- the shadow heap: whole Memory objects

    def allocate(self: Model, memory: Any, site: str = "allocate", *, may_fail: bool = False) -> bool:
        """Take a Memory from the shadow heap; False if there is none (a choice, with `may_fail`). From the first call for it
        on, an access while it is not allocated is a failure: `use after free`. In preparation it is allocated before
        every execution.
        """
        number = self._numbers[memory]
        context = self.running
        if context is None:
            self._heap[number] = True
            return True
        self._shadow(number)
        self._stop(context, CHOOSE, 0, site, 1 + may_fail)
        self._observe(context, self.way)
        self._note(context, f"+ {site} {self._names[number]}" + (" fails" if self.way else ""))
        if self.way:
            return False
        if self._set_heap(number, live=True):
            raise UseAfterFree(f"{context.name} allocates {self._names[number]} twice ({site})")
        return True

    def free(self: Model, memory: Any, site: str = "free") -> None:
        """Give a Memory back to the shadow heap; freeing twice is a failure."""
        context = self._at_point()
        number = self._numbers[memory]
        self._shadow(number)
        self._stop(context, FREE, 0, site)
        self._observe(context, _PASSED)
        self._note(context, f"- {site} {self._names[number]}")
        if not self._set_heap(number, live=False):
            raise UseAfterFree(f"{context.name} frees {self._names[number]} twice ({site})")

    # ---- deaths

    def await_death(self: Model, name: str, site: str = "await death") -> None:
        """Wait until a context has died: how an heir begins."""
        context = self._at_point()
        number = next((c.number for c in self.contexts if c.name == name), None)
        if number is None:
            raise ValueError(f"no context {name!r}")
        self._stop(context, BURY, number, site)
        self._observe(context, _PASSED)
        self._note(context, f"* {name} is dead")

    # ---- messages

    def post(self: Model, box: int, message: Any, site: str = "post") -> None:
        """Put a message into a mailbox; never waits."""
        context = self._at_point()
        self._stop(context, RING, box, site)
        self._boxes[box].append((context.seen, message))
        self._observe(context, _PASSED)
        self._set(box, self.cells[box] + 1)
        self._note(context, f"> {site} {self.where(box)}: {message!r}")

    def receive(self: Model, box: int, site: str = "receive") -> Any:
        """Wait for a message and take it."""
        context = self._at_point()
        self._stop(context, RECEIVE, box, site)
        identity, message = self._boxes[box].popleft()
        self._observe(context, identity)
        self._set(box, self.cells[box] - 1)
        self._note(context, f"< {site} {self.where(box)}: {message!r}")
        return message

    # ---- inside

    def _at_point(self: Model) -> Context:
        if self.running is None:
            raise RuntimeError("only a running context can do this")
        return self.running

    def _note(self: Model, context: Context, text: str) -> None:
        if self.trace is not None:
            self.trace.append((context.name, text))
