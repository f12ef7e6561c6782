# SPDX-License-Identifier: Apache-2.0
"""Hypothesis draws the shapes of scenarios, scripts and sizes; the explorer owns the schedule.

Each shape is searched for a while. Those that are claimed to be complete stand in the scenarios; these nobody thought of.
"""

from typing import Any

import pytest
from hypothesis import find, given, settings
from hypothesis import strategies as st

from pvbus.verify.explorer import MODELS, Scenario, explore
from pvbus.verify.scenarios.event_ring import EventRing
from pvbus.verify.scenarios.fifo_queue import FifoQueue
from pvbus.verify.scenarios.offers import Offers
from pvbus.verify.scenarios.port_life import PortLife
from pvbus.verify.scenarios.ring_growth import RingGrowth
from pvbus.verify.scenarios.teardown import Teardown
from pvbus.verify.zoo.bug29_link_by_a_store import LinkByStore

EXECUTIONS = 80
SEARCHES = ("dfs", "pct", "random")
A_FEW = settings(derandomize=True, deadline=None, max_examples=25, database=None)

PORTS = st.integers(1, 3)
ONE_SET_OF_PORTS = st.lists(PORTS, max_size=2, unique=True).map(tuple)


@st.composite
def fifo_scripts(draw: st.DrawFn) -> dict[str, Any]:
    """Draw what is raised before and meanwhile, and what is written back; what a user has cannot be raised before."""
    before = draw(ONE_SET_OF_PORTS)
    waiting = draw(ONE_SET_OF_PORTS.map(lambda ports: tuple(port for port in ports if port not in before)))
    raised = draw(st.lists(PORTS, min_size=1, max_size=3))
    script = [("raise", port) for port in raised] + [("eoi", port) for port in waiting]
    return {
        "script": tuple(draw(st.permutations(script))), "before": before, "waiting": waiting,
        "urgent": draw(ONE_SET_OF_PORTS), "upcall_budget": draw(st.sampled_from([1, 256])),
    }  # fmt: skip


@st.composite
def lives_of_ports(draw: st.DrawFn) -> dict[str, Any]:
    """Draw the steps of a hypervisor; it awaits only what cannot fail to come."""
    ports = st.integers(1, 2)
    steps = st.one_of(st.tuples(st.sampled_from(["raise", "eoi", "move"]), ports), st.just(("await", 1)))
    return {"script": (("raise", draw(ports)), *draw(st.lists(steps, max_size=4))), "cpus": draw(st.integers(1, 2))}


@st.composite
def offers(draw: st.DrawFn) -> dict[str, Any]:
    """Draw what the toolstack does: under the one relid it rescinds what is there, and offers what is not."""
    script, there = [], "a"
    for _ in range(draw(st.integers(1, 3))):
        if there:
            script.append(f"rescind {there}")
            there = ""
        else:
            there = draw(st.sampled_from("ab"))
            script.append(f"offer {there}")
        if draw(st.booleans()):
            script.append("again")
    return {"script": ", ".join(script), "opens": draw(st.booleans())}


TEARDOWNS = st.fixed_dictionaries({
    "ends": st.sampled_from(["close", "exit", "reopen", ""]), "rescind": st.booleans(), "ticks": st.integers(0, 2),
    "reads": st.booleans(), "timeouts": st.integers(0, 1),
})  # fmt: skip
EVENT_RINGS = st.fixed_dictionaries({
    "events": st.integers(1, 5), "cpus": st.integers(1, 2), "batch": st.integers(1, 4), "upcall_budget": st.integers(1, 4),
    "sender": st.booleans(), "heir": st.booleans(),
})  # fmt: skip
GROWTHS = st.sampled_from([2, 4]).flatmap(lambda entries: st.fixed_dictionaries({
    "entries": st.just(entries), "doublings": st.integers(1, 2), "at": st.integers(0, 2 * entries - 1),
    "unread": st.integers(0, entries - 1), "events": st.integers(0, 1),
}))  # fmt: skip
SHAPES: list[tuple[type[Scenario], Any, tuple[str, ...]]] = [
    (FifoQueue, fifo_scripts(), MODELS), (PortLife, lives_of_ports(), MODELS), (EventRing, EVENT_RINGS, MODELS),
    (RingGrowth, GROWTHS, MODELS), (Offers, offers(), ("sc",)), (Teardown, TEARDOWNS, ("sc",)),
]  # fmt: skip


@pytest.mark.parametrize(("kind", "shapes", "models"), SHAPES, ids=[kind.name for kind, _, _ in SHAPES])
def test_no_shape_of_a_scenario_fails_as_far_as_one_looks(kind: type[Scenario], shapes: Any, models: tuple[str, ...]) -> None:
    @A_FEW
    @given(shape=shapes, search=st.sampled_from(SEARCHES), model=st.sampled_from(models))
    def look(shape: dict[str, Any], search: str, model: str) -> None:
        result = explore(kind(**shape), model=model, search=search, executions=EXECUTIONS)

        assert result.failure is None, f"{kind.name} {shape} under {model}: {result.failure}"

    look()


def test_a_bug_of_the_zoo_is_found_by_the_shapes_alone_and_made_small() -> None:
    def fails(shape: dict[str, Any]) -> bool:
        return explore(LinkByStore(**shape), search="random", executions=EXECUTIONS).failure is not None

    shape = find(fifo_scripts(), fails, settings=settings(A_FEW, max_examples=200))

    assert len(shape["script"]) + len(shape["before"]) + len(shape["waiting"]) <= 3
