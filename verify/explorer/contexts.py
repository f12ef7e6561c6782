# SPDX-License-Identifier: Apache-2.0
"""Contexts: greenlets that run production code and stop before each access that another context could notice.

A context is one thread of control (a virtual CPU's process, a reader, the hypervisor). The model (model.py)
stops it in the middle of a C call-out; the search (search.py) decides who goes on. Nothing here knows of
memory or of properties.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Final

import greenlet as _greenlet  # type: ignore[import-untyped,unused-ignore]

LOAD, STORE, RMW, FENCE, SPIN, RING, TAKE, WAIT, CHOOSE, LOCK, UNLOCK, FREE, BURY, RECEIVE = range(14)
KINDS: Final = (
    "load", "store", "rmw", "fence", "spin", "ring", "take", "wait", "choose", "lock", "unlock", "free", "await", "receive",
)
PLACELESS: Final = frozenset({FENCE, SPIN, CHOOSE, FREE, BURY})  # they name no location

Operation = tuple[int, int, str]  # kind, location, site


class ContextDied(BaseException):
    """Thrown into a context that is dead or whose execution is over: its C call returns at once, and so does every later
    access. A dead context does not unwind while the others go on: it only never runs again, as after kill -9; that
    its stack is cleared away happens when the execution has been judged, behind a closed gate.
    """


class Context:
    """One thread of control. A `server` may sit in its wait when all is over."""

    __slots__ = (
        "bit", "buffer", "dead", "error", "finished", "greenlet", "mark",
        "name", "number", "operation", "seen", "server", "ways",
    )

    def __init__(self, number: int, name: str, run: Callable[[], object], *, server: bool) -> None:
        self.number = number
        self.name = name
        self.bit = 1 << number
        self.server = server
        self.operation: Operation | None = None  # what it is about to do
        self.ways = 1  # in how many ways it can do that
        self.finished = False
        self.dead = False  # it holds what it held, its buffered stores still become visible, and it never runs again
        self.error: BaseException | None = None
        self.buffer: list[tuple[int, int, str]] = []  # TSO: location, value, site; oldest first
        self.seen = number  # identity of the list of values it has observed
        self.mark: int | None = None  # version of memory when its turn of a spin loop began

        def body() -> None:
            try:
                run()
            except ContextDied:
                pass
            except Exception as error:  # a broken invariant of the code under test: the search reports it
                self.error = error
            self.operation = None
            self.finished = True

        self.greenlet: Any = _greenlet.greenlet(body)

    def resume(self) -> None:
        """Let it run up to its next scheduling point, or to its end."""
        self.greenlet.switch()

    def pause(self, operation: Operation) -> None:
        """Hand over to the search until this context is chosen. Called on the context's own stack only."""
        self.operation = operation
        self.greenlet.parent.switch()
        self.operation = None

    def abandon(self) -> None:
        """End it where it stands."""
        if self.greenlet:
            self.greenlet.throw(ContextDied)
