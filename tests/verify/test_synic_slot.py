# SPDX-License-Identifier: Apache-2.0
"""A message slot between Synic and consumers of the guest: nothing stays behind, and what makes it so."""

from typing import TYPE_CHECKING

import pytest

from pvbus.shm.hyperv import Vp
from pvbus.verify.explorer import Failure, explore
from pvbus.verify.scenarios.synic_slot import VECTOR, SynicSlot, SynicSlotLatePending

if TYPE_CHECKING:
    from pvbus.verify.explorer import Model


def failure_of(scenario: SynicSlot, **arguments: object) -> Failure:
    failure = explore(scenario, **arguments).failure  # type: ignore[arg-type]
    assert failure is not None
    return failure


@pytest.mark.checklist("B4.6")
@pytest.mark.parametrize("model", ["sc", "tso"])
@pytest.mark.parametrize("frees", ["store", "cas", "claim"])
def test_every_message_comes_out_once_and_in_order(frees: str, model: str) -> None:
    result = explore(SynicSlot(frees=frees), model=model)

    assert result.failure is None, str(result.failure)
    assert result.verdict == "complete"


def test_three_messages_and_a_bounded_search() -> None:
    result = explore(SynicSlot((1, 1, 1)), model="tso", executions=800)

    assert result.failure is None, str(result.failure)
    assert result.verdict == "bounded (800 executions)"


@pytest.mark.checklist("B4.6")
@pytest.mark.parametrize("site", ["syn_slot@guest", "syn_slot@host"])
def test_without_the_barrier_a_message_is_left_behind_under_tso(site: str) -> None:
    failure = failure_of(SynicSlot(frees="store"), model="tso", drop=[site])

    assert "messages [2] were posted and never came out" in failure.message


def test_under_sequential_consistency_the_barrier_is_not_missed() -> None:
    result = explore(SynicSlot(frees="store"), drop=["syn_slot"])

    assert (result.verdict, result.sites_dropped) == ("complete", frozenset({"syn_slot"}))


def test_behind_a_compare_exchange_the_guest_s_barrier_is_redundant_under_tso() -> None:
    result = explore(SynicSlot(frees="cas"), model="tso", drop=["syn_slot@guest"])

    assert (result.verdict, result.sites_dropped) == ("complete", frozenset({"syn_slot@guest"}))


def test_a_host_that_sets_pending_after_its_last_look_strands_a_message() -> None:
    assert "messages [2]" in failure_of(SynicSlotLatePending()).message


class TakesOnRequest(SynicSlot):
    """A guest that looks into the slot only if its interrupt was requested; `late`: and takes the request behind its look."""

    late = False

    def _serve(self, model: "Model") -> None:
        at = Vp.at(0, Vp.IRR + VECTOR // 64 * 8)
        while True:
            model.wait(self.irq, "wait for an interrupt")
            model.take(self.irq, "irq")
            requested = self.memory.load64(at, "look") if self.late else self.memory.exchange64(at, 0, "syn_irr")
            while requested and self._consume(model):
                pass
            if self.late:
                self.memory.exchange64(at, 0, "syn_irr")


class TakesTooLate(TakesOnRequest):
    """Such a one."""

    late = True


@pytest.mark.parametrize("model", ["sc", "tso"])
def test_a_request_that_is_taken_too_late_is_lost(model: str) -> None:
    assert explore(TakesOnRequest(), model=model).verdict == "complete"
    assert "messages [2]" in failure_of(TakesTooLate(), model=model).message


# ---- two consumers


def test_a_plain_store_erases_a_message_that_another_consumer_has_not_seen() -> None:
    assert "messages [2]" in failure_of(SynicSlot((1, 2), frees="store", consumers=2)).message


def test_a_compare_exchange_of_the_type_protects_a_message_of_another_type() -> None:
    result = explore(SynicSlot((1, 2), frees="cas", consumers=2))

    assert result.failure is None, str(result.failure)
    assert result.verdict == "complete"


def test_a_compare_exchange_of_the_type_does_not_tell_two_messages_of_one_type_apart() -> None:
    assert "messages [2]" in failure_of(SynicSlot((1, 1), frees="cas", consumers=2)).message


@pytest.mark.parametrize("model", ["sc", "tso"])
def test_a_claim_by_number_does(model: str) -> None:
    result = explore(SynicSlot((1, 1), frees="claim", consumers=2), model=model)

    assert result.failure is None, str(result.failure)
    assert result.verdict == "complete"
