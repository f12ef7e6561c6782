# SPDX-License-Identifier: Apache-2.0
"""What a scenario is: pages prepared once, contexts started for each execution, and what must hold at the
end.

What a scenario finds in its model, beside the Memory objects that it makes over it (each a scheduling point):

    in prepare()                                    in contexts
    bell = model.bell("door")                       model.ring(bell, site), model.take(bell, site), model.wait(bell, site)
    box = model.mailbox("host to guest")            model.post(box, message, site), model.receive(box, site)
    lock = model.lock("file")                       model.acquire(lock, site), model.release(lock, site), model.inherit(lock)
    model.ticks(5_000_000_000, at_most=1)           model.clock(site): stands still or moves on by a tick, a choice
    model.allocate(memory)                          model.allocate(memory, site, may_fail=True), model.free(memory, site)
    mortal = ("cpu0",)                              model.await_death("cpu0"), how its heir begins; explore(deaths=1)
                                                    model.choose(n, site): a number from 0 to n - 1

Every access to a Memory that has been freed is a failure; an object of Python logic that may be freed is represented by a
Memory of 8 bytes, which who uses the object reads. A dead context holds its locks, and its buffered stores still become
visible; it never runs again, and does not unwind. Who may die may do so before its first step.

A scenario is written against room logic and the explored core only, never against a process. Its parameters
are its constructor's arguments; it holds nothing that lives longer than one execution except its pages.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from types import MappingProxyType
from typing import TYPE_CHECKING, Any, ClassVar

if TYPE_CHECKING:
    from pvbus.verify.explorer.model import Model

Start = tuple[str, Callable[[], object], bool]  # name, what it runs, is it a server


@dataclass(frozen=True)
class Claim:
    """What is claimed of a scenario: with these parameters, and within these bounds, its search under `model` ends and
    nothing fails. `pvbus explore --all` searches each. `bounds` are further arguments of explore(), such as deaths.
    """

    model: str
    parameters: Mapping[str, Any] = field(default_factory=dict)
    bounds: Mapping[str, Any] = field(default_factory=dict)


def claimed(models: str, *parameters: Mapping[str, Any], **bounds: Any) -> tuple[Claim, ...]:
    """Make claims: each of the parameters under each of the models, which are words."""
    return tuple(Claim(model, each, bounds) for each in parameters for model in models.split())


def within(**ranges: tuple[int, int]) -> Mapping[str, tuple[int, int]]:
    """Say from where to where numbers make sense: parameters by name, or what is in their lists."""
    return MappingProxyType(ranges)


class Scenario(ABC):
    """One situation to be searched."""

    name: str
    ranges: ClassVar[Mapping[str, tuple[int, int]]] = within()  # of its parameters; none named: 0 to 1024
    mortal: tuple[str, ...] = ()  # the contexts that may die, when deaths are asked for; none named: all
    claims: ClassVar[tuple[Claim, ...]] = ()  # none: its defaults under sc and tso

    @abstractmethod
    def prepare(self, model: Model, variants: int) -> None:
        """Make the pages and write their first contents; called once a search."""

    @abstractmethod
    def start(self, model: Model) -> Iterable[Start]:
        """Give the contexts of one execution, all of their state fresh."""

    @abstractmethod
    def broken(self, model: Model, stuck: list[str]) -> str | None:
        """Say what does not hold when nobody can go on, or None. `stuck` are the contexts that wait
        (servers excepted).
        """
