# SPDX-License-Identifier: Apache-2.0
"""The memory models that answer the call-outs of pvbus.shm._core_explored: `sc`, `tso` and `arm`.

The engine is C (native/): `sc` executes each access where it stands; `tso` keeps a FIFO store buffer for each context, whose
flush is a choice of the search (native/access.c); `arm` reorders what no barrier and no coherence orders (native/weak.c says
what it covers and what it does not). System calls on a doorbell do not drain the buffer under `tso`, which allows more than
x86 does.

A location that only one context has ever touched, or that none has ever written, is no scheduling point.
That is not declared but found out: the engine notes who touches what, and when a location turns out to be
shared, the search starts anew knowing it. So a search that ends has never passed over a
location that two contexts could quarrel about.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any, Final

from pvbus.verify.explorer._engine import Engine

MODELS: Final = ("sc", "tso", "arm")


class Model(Engine):
    """What scenarios make their Memory objects over, and what else they find there: see scenario.py."""

    def __init__(self, kind: str, dropped: Iterable[str] = ()) -> None:
        if kind not in MODELS:
            raise ValueError(f"no memory model {kind!r}: {', '.join(MODELS)}")
        super().__init__(MODELS.index(kind), tuple(dropped))
        self.kind = kind
        self.locks: dict[int, str] = {}

    def lock(self, name: str) -> int:
        """Make a lock with an owner: who dies with it leaves it behind, and that is a failure (`lock left by the dead`)
        unless an heir has taken it over (`inherit`).
        """
        key = self.bell(name)
        self.locks[key] = name
        return key

    def mailbox(self, name: str) -> int:
        """Make a queue of messages (any objects), first in, first out."""
        return self.bell(name)

    def ticks(self, *steps: int, at_most: int = 1) -> None:
        """Let a read of the clock find it moved on by one of `steps` (ns), up to `at_most` times in an execution."""
        self._ticks(steps, at_most)


class FilePort:
    """The model as an open file's page sees it: the same memory, and the two doorbells that user_file.c
    touches.
    """

    def __init__(self, model: Model, door: int, kick: int) -> None:
        self.native: Any = model.native
        self._model, self._door, self._kick = model, door, kick

    def door_take(self) -> int:
        """Take the bytes out of the file's doorbell."""
        return self._model.take(self._door, "door.take")

    def door_wait(self) -> int:
        """Block until a byte lies in the file's doorbell."""
        return self._model.wait(self._door, "door.wait")

    def kick(self) -> int:
        """Ring the hypervisor's doorbell."""
        self._model.ring(self._kick, "kick")
        return 0
