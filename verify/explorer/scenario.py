# SPDX-License-Identifier: Apache-2.0
"""What a scenario is: pages prepared once, contexts started for each execution, and what must hold at the
end.

A scenario is written against room logic and the explored core only, never against a process. Its parameters
are its constructor's arguments; it holds nothing that lives longer than one execution except its pages.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from pvbus.verify.explorer.model import Model

Start = tuple[str, Callable[[], object], bool]  # name, what it runs, is it a server


class Scenario(ABC):
    """One situation to be searched."""

    name: str

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
