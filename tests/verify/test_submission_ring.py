# SPDX-License-Identifier: Apache-2.0
"""The hypervisor's sleep against users who submit: nothing stays behind, and the barriers are what makes it
so.
"""

import pytest

from pvbus.shm._core_explored import Memory
from pvbus.shm.layout import PublicPage
from pvbus.verify.explorer import Model, explore
from pvbus.verify.scenarios import loops
from pvbus.verify.scenarios.submission_ring import SubmissionRings


@pytest.mark.parametrize("model", ["sc", "tso"])
@pytest.mark.parametrize("scenario", [SubmissionRings(notifies=3), SubmissionRings(users=2, notifies=1)])
def test_every_notify_is_taken(scenario: SubmissionRings, model: str) -> None:
    result = explore(scenario, model=model)

    assert result.failure is None, str(result.failure)
    assert result.verdict == "complete"


@pytest.mark.parametrize("site", ["sub_kick", "sub_kick@user0", "sub_kick@hypervisor"])
def test_without_the_barrier_a_notify_is_left_behind_under_tso(site: str) -> None:
    failure = explore(SubmissionRings(notifies=3), model="tso", drop=[site]).failure

    assert failure is not None
    assert "lie in a submission ring" in failure.message


class OneNumber(SubmissionRings):
    """Announces every sleep with the same number, as if a flag were enough."""

    def hypervisor(self, model: Model) -> None:
        def wake(public: Memory) -> None:
            public.store32(PublicPage.HYPERVISOR_SLEEPING, 0)

        loops.hypervisor(model, self.path, self.public, self.kick, self.door, wake)


def test_an_announcement_that_does_not_count_is_caught() -> None:
    failure = explore(OneNumber()).failure

    assert failure is not None
    assert "notifies of [2] lie" in failure.message
