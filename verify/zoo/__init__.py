# SPDX-License-Identifier: Apache-2.0
"""The zoo: known concurrency bugs of the two drivers and their hypervisors, each put back into *our* handlers.

One file a bug, `bug<number>_<name>.py`, with a `BUG`: the scenario that shows it, what is changed (a variant that the
machine has too, a barrier that is left out, or a handler written anew with the mistake in it), and what each memory
model must say. A file that is put here is found; nothing else lists them.

    from pvbus.verify import zoo
    from pvbus.verify.explorer import explore

    bug = zoo.find("lost-wakeup")
    explore(bug.broken(), model="sc", **bug.arguments()).verdict      # 'failed'
    explore(bug.production(), model="sc").verdict                     # 'complete'

A bug is `caught` in a model when its search fails within EXECUTIONS_MAX executions, and `clean` when that model cannot
show it: an honest statement about the model, not about the bug. No code of a kernel or a hypervisor stands here.
"""

from __future__ import annotations

import importlib
import pkgutil
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any, Final

from pvbus.verify.explorer.scenario import Scenario

EXECUTIONS_MAX: Final = 1_000  # within so many a bug is caught
NOT_HERE: Final = {  # rows of the catalogue that our handlers cannot have, and why
    13: "a slot carries the messages of VMBus only: there are no timers of SynIC, and no message is for the interrupt handler",
    18: "no lock is held around the upcall loop, so none can be waited for inside it",
    30: "the hypervisor is one process: what it publishes for itself needs no order",
    33: "no mutex is held over a bind: the file process executes one call at a time, and a user's fault never waits for it",
    34: "that RESET leaves ports masked is the driver's contract, and ours",
    37: "unmask and raise run in one process, and both are locked operations",
    38: "a port's record is a word of a table that is always there",
    39: "a driver's answer to its interrupt: spurious is what it says is spurious",
    41: "an interrupt whose message has been taken already is counted as nobody's, and no line is switched off for it",
    44: "a hypercall is a call that carries its argument: there is no page of a CPU that two could fill",
}
CAUGHT: Final = "caught"
CLEAN: Final = "clean"


@dataclass(frozen=True)
class Bug:
    """One bug: where it shows, how it is put back, what each model must say of it, and where it comes from.

    `number` is its place in the catalogue: 1–30 are the ranked ones, from 31 on those of the shorter list, in its order;
    from 47 on bugs of our own. A row of several bugs has several files.
    `scenario(**parameters)` is the production code. What is wrong is one of: `variant` (a defect that can be switched on
    in the machine), `drop` (barriers left out), or `handler(**parameters)`, the scenario with a handler of ours that
    makes the mistake. `search` holds further arguments of explore(), for both, such as a bound on deaths.
    """

    number: int
    name: str
    sentence: str  # what goes wrong, for a list
    scenario: Callable[..., Scenario]
    expected: Mapping[str, str]  # model: CAUGHT or CLEAN; a model that is not here has not been asked
    story: str
    citation: str
    parameters: Mapping[str, Any] = field(default_factory=dict)
    variant: str | None = None
    drop: tuple[str, ...] = ()
    handler: Callable[..., Scenario] | None = None
    search: Mapping[str, Any] = field(default_factory=dict)

    def broken(self) -> Scenario:
        """Give the scenario to search for the bug, with arguments()."""
        return (self.handler or self.scenario)(**self.parameters)

    def production(self) -> Scenario:
        """Give the same scenario over the production code; to be searched with `search` only."""
        return self.scenario(**self.parameters)

    def arguments(self) -> dict[str, Any]:
        """Give what explore() needs to know besides the scenario and the model."""
        return {"variant": self.variant, "drop": self.drop, **self.search}


def bugs() -> tuple[Bug, ...]:
    """Give every bug, by number."""
    found = [
        importlib.import_module(f"{__name__}.{module.name}").BUG
        for module in pkgutil.iter_modules(__path__)
        if module.name.startswith("bug")
    ]
    return tuple(sorted(found, key=lambda bug: (bug.number, bug.name)))


def find(name: str) -> Bug:
    """Give the bug of this name or number; KeyError names those that there are."""
    for bug in bugs():
        if name in (bug.name, str(bug.number)):
            return bug
    raise KeyError(f"no bug {name!r}: {', '.join(bug.name for bug in bugs())}")
