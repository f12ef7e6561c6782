# SPDX-License-Identifier: Apache-2.0
"""The FIFO queue under every interleaving of the hypervisor that links and the CPU that takes out; and each order that its labels
keep, turned round: the search sees it.
"""

import pytest

from pvbus.shm.layout import Domain, Fifo, Vcpu
from pvbus.verify.explorer import Failure, explore, replay
from pvbus.verify.scenarios.fifo_queue import CONTROL, FifoQueue, word_at

RAISE_1, RAISE_2, EOI_1 = ("raise", 1), ("raise", 2), ("eoi", 1)
QUEUE = Fifo.PRIORITY_DEFAULT
TAIL = Domain.vcpu(0, Vcpu.FIFO_TAIL) + 4 * QUEUE


def failure_of(scenario: FifoQueue, **arguments: object) -> Failure:
    failure = explore(scenario, **arguments).failure  # type: ignore[arg-type]
    assert failure is not None
    return failure


@pytest.mark.checklist("A11.3", "A12.12")
@pytest.mark.parametrize("model", ["sc", "tso"])
@pytest.mark.parametrize(
    "scenario",
    [
        FifoQueue(RAISE_1),
        FifoQueue(RAISE_2, before=(1,)),
        FifoQueue(RAISE_2, before=(1,), urgent=(2,)),
        FifoQueue(EOI_1, RAISE_1, before=(1,)),
        FifoQueue(RAISE_1, before=(1,)),
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
    failure = failure_of(FifoQueue(RAISE_1), model="tso", drop=["cpu_sleep@cpu0"])

    assert "and the CPU sleeps" in failure.message


@pytest.mark.parametrize("site", ["fifo_ready", "2l_upcall"])
def test_the_fences_of_the_fifo_labels_are_redundant_on_x86(site: str) -> None:
    """Each stands behind a locked instruction; arm64 needs them, and no model here is that weak."""
    result = explore(FifoQueue(RAISE_1, before=(1,)), model="tso", drop=[site])

    assert (result.verdict, result.sites_dropped) == ("complete", frozenset({site}))


# ---- the orders that the labels keep, turned round


class ByHand(FifoQueue):
    """pv_fifo_set_pending once more, access by access, so that its order can be changed. `wrong` names the change."""

    def __init__(self, *script: tuple[str, int], before: tuple[int, ...] = (), wrong: str = "") -> None:
        super().__init__(*script, before=before)
        self.wrong = wrong

    def _or(self, at: int, bits: int) -> int:
        old = self.domain.load32(at, "by hand")
        while (seen := self.domain.compare_exchange32(at, old, old | bits, "by hand")) != old:
            old = seen
        return old

    def set_pending(self, port: int) -> int:
        at = word_at(port)
        if self._or(at, Fifo.PENDING) & (Fifo.MASKED | Fifo.LINKED) or self._or(at, Fifo.LINKED) & Fifo.LINKED:
            return -1
        if self.domain.load32(TAIL) == port:
            self.domain.store32(TAIL, 0)
        tail = self.domain.load32(TAIL)
        if tail and self._link(tail, port):
            self.domain.store32(TAIL, port)
            return -1
        return self._announce(port)

    def _link(self, tail: int, port: int) -> bool:
        at = word_at(tail)
        word = self.domain.load32(at, "by hand")
        while word & Fifo.LINKED:
            if self.wrong == "link by a store":
                self.domain.store32(at, word | port, "by hand")
                return True
            seen = self.domain.compare_exchange32(at, word, word & ~Fifo.LINK | port, "by hand")
            if seen == word:
                return True
            word = seen
        return False

    def _announce(self, port: int) -> int:
        domain = self.domain
        upcall = Domain.vcpu_info(0, Domain.UPCALL_PENDING)
        marked = self.wrong == "flag before ready" and not domain.exchange8(upcall, 1, "by hand")
        if self.wrong != "ready before head":
            domain.store32(CONTROL + Fifo.HEAD + 4 * QUEUE, port, "by hand")
        domain.store32(TAIL, port, "by hand")
        announced = self._or(CONTROL + Fifo.READY, 1 << QUEUE) & 1 << QUEUE
        if self.wrong == "ready before head":
            domain.store32(CONTROL + Fifo.HEAD + 4 * QUEUE, port, "by hand")
        if self.wrong != "flag before ready":
            marked = not announced and not domain.exchange8(upcall, 1, "by hand")
        if not marked or not domain.load32(Domain.vcpu(0, Vcpu.SLEEPING), "by hand"):
            return -1
        domain.exchange32(Domain.vcpu(0, Vcpu.SLEEPING), 0, "by hand")
        return 0


@pytest.mark.parametrize("model", ["sc", "tso"])
def test_by_hand_and_in_the_right_order_nothing_is_lost(model: str) -> None:
    result = explore(ByHand(RAISE_2, before=(1,)), model=model)

    assert (result.verdict, str(result.failure)) == ("complete", "None")


@pytest.mark.checklist("A11.3")
@pytest.mark.parametrize("model", ["sc", "tso"])
@pytest.mark.parametrize(
    ("wrong", "before"),
    [("ready before head", (1,)), ("link by a store", (1,)), ("flag before ready", ())],
)
def test_another_order_loses_a_port(wrong: str, before: tuple[int, ...], model: str) -> None:
    scenario = ByHand(RAISE_2, before=before, wrong=wrong)
    failure = failure_of(scenario, model=model)

    assert "was raised, and the CPU sleeps" in failure.message or "livelock" in failure.kind
    assert replay(ByHand(RAISE_2, before=before, wrong=wrong), failure, model=model) == failure
