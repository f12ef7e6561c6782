# SPDX-License-Identifier: Apache-2.0
"""A monitor page between a guest that triggers and a host that does not look all the time: no trigger is lost."""

import pytest

from pvbus.verify.explorer import explore
from pvbus.verify.scenarios.monitor_page import LooksFirst, MonitorTrigger


@pytest.mark.parametrize("model", ["sc", "tso", "arm"])
@pytest.mark.parametrize("words", [1, 2])
def test_whatever_the_guest_triggers_is_seen(words: int, model: str) -> None:
    result = explore(MonitorTrigger(words), model=model)

    assert result.failure is None, str(result.failure)
    assert result.verdict == "complete"


def test_a_host_that_looks_before_it_disables_loses_a_trigger() -> None:
    failure = explore(MonitorTrigger(host=LooksFirst)).failure

    assert failure is not None
    assert "seen were 0" in failure.message


def test_a_guest_that_looks_before_it_triggers_loses_one() -> None:
    failure = explore(MonitorTrigger(late=True)).failure

    assert failure is not None
    assert "seen were 0" in failure.message


def test_behind_locked_exchanges_the_fences_are_redundant_under_tso() -> None:
    result = explore(MonitorTrigger(2), model="tso", drop=["mon_enable"])

    assert (result.verdict, result.sites_dropped) == ("complete", frozenset({"mon_enable"}))


def test_a_host_that_takes_a_trigger_without_a_fence_reads_an_old_ring_under_arm() -> None:
    failure = explore(MonitorTrigger(2), model="arm", drop=["mon_take"]).failure

    assert failure is not None
    assert "seen were 1" in failure.message
