# SPDX-License-Identifier: Apache-2.0
"""Zoo 24: the producer index is stored only when the ring was empty."""

from pvbus.shm.layout import FilePage
from pvbus.verify.scenarios.port_life import PortLife
from pvbus.verify.zoo import CAUGHT, Bug
from pvbus.verify.zoo.by_hand import ByHand, Handler


class OnlyWhenEmpty(Handler):
    """Publishes an entry together with the wake-up that it may need."""

    def publish(self, old: int, new: int) -> None:
        """Let the index cover the entry if a reader has to be woken for it."""
        if self.page.load64_acquire(FilePage.CONS, "evr_room") == old:
            super().publish(old, new)


class Burst(ByHand, PortLife):
    """A port's life with that handler."""

    handler = OnlyWhenEmpty


BUG = Bug(
    number=24,
    name="index-when-empty",
    sentence="the index is stored only when the ring was empty: every event of a burst but the first is overwritten",
    scenario=PortLife,
    handler=Burst,
    parameters={"script": (("raise", 1), ("raise", 2))},
    expected={"sc": CAUGHT, "tso": CAUGHT, "arm": CAUGHT},
    story=(
        "The handler has to wake a reader only when the ring was empty, so a version of the patch put the store of the "
        "producer index into the same branch. Any second event before a read is then written into the slot of the first "
        "unpublished one, and never seen. A reviewer caught it by reading; a search needs one execution. A good first "
        "mutation to try a tool with."
    ),
    citation="Version 2 of the patch of 2021 on the ring's indices; caught in review by Ross Lagerwall.",
)
