# SPDX-License-Identifier: Apache-2.0
"""What a scenario is: pages prepared once, contexts started for each execution, and what must hold at the
end.

A scenario is written against room logic and the explored core only, never against a process. Its parameters
are its constructor's arguments; it holds nothing that lives longer than one execution except its pages.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
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


class Scenario(ABC):
    """One situation to be searched."""

    name: str
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
