# SPDX-License-Identifier: Apache-2.0
"""The work ring under every interleaving of two CPUs and the workqueue; and the defect that the lap of a free entry prevents."""

from typing import Any, cast

import pytest

from pvbus.actors.workqueue.work import WorkRing
from pvbus.shm.hyperv import Work
from pvbus.verify.explorer import explore
from pvbus.verify.scenarios.work_ring import WorkRings


@pytest.mark.parametrize("model", ["sc", "tso"])
def test_every_message_is_handled_once(model: str) -> None:
    result = explore(WorkRings(), model=model)

    assert result.failure is None, str(result.failure)
    assert result.verdict == "complete"


class Lapless(WorkRing):
    """Frees an entry for any lap."""

    def _free(self, index: int) -> None:
        self._memory.store32_release(Work.at(index, Work.STATE), Work.FREE, "work_room")


class LaplessRings(WorkRings):
    """A consumer that knows no laps."""

    def ring(self) -> WorkRing:
        return Lapless(cast("Any", self.hv))


def test_without_the_lap_a_message_is_left_behind_the_head() -> None:
    failure = explore(LaplessRings()).failure

    assert failure is not None
    assert "filled entries [0]" in failure.message
