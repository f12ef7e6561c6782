# SPDX-License-Identifier: Apache-2.0
"""The FIFO queue under every interleaving of the hypervisor that links and the CPU that takes out; and each order that its labels
keep, turned round: the search sees it.
"""

import pytest

from pvbus.verify.explorer import Failure, explore, replay
from pvbus.verify.scenarios.fifo_queue import FifoQueue
from pvbus.verify.zoo.bug29_link_by_a_store import LinkByStore
from pvbus.verify.zoo.bug29_ready_without_head import ReadyFirst
from pvbus.verify.zoo.by_hand_fifo import FifoByHand

RAISE_1, RAISE_2, EOI_1 = ("raise", 1), ("raise", 2), ("eoi", 1)


def failure_of(scenario: FifoQueue, **arguments: object) -> Failure:
    failure = explore(scenario, **arguments).failure  # type: ignore[arg-type]
    assert failure is not None
    return failure


@pytest.mark.checklist("A11.3", "A12.12")
@pytest.mark.parametrize("model", ["sc", "tso"])
@pytest.mark.parametrize(
    "scenario",
    [
        FifoQueue((RAISE_1,)),
        FifoQueue((RAISE_2,), before=(1,)),
        FifoQueue((RAISE_2,), before=(1,), urgent=(2,)),
        FifoQueue((EOI_1, RAISE_1), before=(1,)),
        FifoQueue((RAISE_1,), before=(1,)),
    ],
    ids=["one", "one behind another", "one more urgent", "written back", "the tail again"],
)
def test_every_port_raised_comes_in_any_interleaving(scenario: FifoQueue, model: str) -> None:
    result = explore(scenario, model=model)

    assert result.failure is None, str(result.failure)
    assert result.verdict == "complete"


@pytest.mark.checklist("A11.3", "A12.12")
def test_two_ports_raised_while_the_cpu_wakes_and_serves_come_in_any_interleaving() -> None:
    """Under TSO, which allows every sequentially consistent execution, too: each store flushed at once."""
    result = explore(FifoQueue(), model="tso")

    assert result.failure is None, str(result.failure)
    assert result.verdict == "complete"


# ---- barriers


def test_without_the_barrier_of_the_cpu_s_sleep_a_kick_is_lost_under_tso() -> None:
    failure = failure_of(FifoQueue((RAISE_1,)), model="tso", drop=["cpu_sleep@cpu0"])

    assert "and the CPU sleeps" in failure.message


@pytest.mark.parametrize("site", ["fifo_ready", "2l_upcall"])
def test_the_fences_of_the_fifo_labels_are_redundant_on_x86(site: str) -> None:
    """Each stands behind a locked instruction; arm64 needs them, and no model here is that weak."""
    result = explore(FifoQueue((RAISE_1,), before=(1,)), model="tso", drop=[site])

    assert (result.verdict, result.sites_dropped) == ("complete", frozenset({site}))


# ---- the orders that the labels keep, turned round


class FlagFirst(FifoByHand):
    """Sets the upcall flag before the ready bit."""

    def begin(self, port: int) -> int:
        priority = self.priority_of(port)
        self.set_head(port, priority)
        vcpu = self.mark()
        self.announce(priority)
        return vcpu


@pytest.mark.parametrize("model", ["sc", "tso"])
def test_by_hand_and_in_the_right_order_nothing_is_lost(model: str) -> None:
    result = explore(FifoByHand((RAISE_2,), before=(1,)), model=model)

    assert (result.verdict, str(result.failure)) == ("complete", "None")


@pytest.mark.checklist("A11.3")
@pytest.mark.parametrize("model", ["sc", "tso"])
@pytest.mark.parametrize(
    ("order", "before"),
    [(ReadyFirst, (1,)), (LinkByStore, (1,)), (FlagFirst, ())],
)
def test_another_order_loses_a_port(order: type[FifoByHand], before: tuple[int, ...], model: str) -> None:
    failure = failure_of(order((RAISE_2,), before=before), model=model)

    assert "was raised, and the CPU sleeps" in failure.message or "livelock" in failure.kind
    assert replay(order((RAISE_2,), before=before), failure, model=model) == failure
