# SPDX-License-Identifier: Apache-2.0
"""Zoo 12: the message tasklet finds no memory for its work item, and tries again."""

from pvbus.verify.scenarios.work_ring_full import WorkRingFull
from pvbus.verify.zoo import CAUGHT, Bug

BUG = Bug(
    number=12,
    name="retries-for-ever",
    sentence="the tasklet has no room for its work item and tries again at once: who would make room never runs",
    scenario=WorkRingFull,
    variant="work-allocation-retries",
    expected={"sc": CAUGHT, "tso": CAUGHT, "arm": CAUGHT},
    story=(
        "The tasklet needs memory for a work item, may not sleep, and gets none. It goes round its loop: the message is still in "
        "the slot, so it asks again, and again. It runs above everything else on its processor, the work queue among it, which "
        "is the one that gives memory back. Later kernels return instead, and so have the other half of the bug: the slot stays "
        "full, no EOM is written, and nobody comes back. Right is to have the memory beforehand, or to leave the slot full, stay "
        "scheduled, and give way: ours looks again after a millisecond."
    ),
    citation="Live in the driver of 2012.",
)
