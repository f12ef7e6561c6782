# SPDX-License-Identifier: Apache-2.0
"""Zoo 11: who waits for an answer sits in the queue through which the answer has to come."""

from typing import TYPE_CHECKING, Any

from pvbus.verify.scenarios.offers import Offers
from pvbus.verify.scenarios.vmbus_sides import GuestSide
from pvbus.verify.zoo import CAUGHT, Bug

if TYPE_CHECKING:
    from pvbus.verify.explorer.model import Model


class OneAfterTheOther(GuestSide):
    """Takes the next message of the host when everything that the last one has begun is over."""

    backlog: list[tuple[Any, ...]]

    def take(self, item: tuple[Any, ...]) -> None:
        """Handle what comes; messages when nobody waits."""
        self.backlog = [*getattr(self, "backlog", []), *([item] if item[0] == "message" else [])]
        if item[0] != "message":
            super().take(item)
        while self.backlog and not self.tasks.running:
            super().take(self.backlog.pop(0))


class OneQueue(Offers):
    """A guest that handles a message to its end before it takes the next."""

    def make_guest(self, model: "Model") -> GuestSide:
        """Make the guest."""
        return OneAfterTheOther(self, model)


BUG = Bug(
    number=11,
    name="waits-in-the-queue-of-its-answer",
    sentence="a work item opens a channel and waits for the result, which is queued behind it",
    scenario=Offers,
    parameters={"script": ""},
    handler=OneQueue,
    expected={"sc": CAUGHT, "tso": CAUGHT, "arm": CAUGHT},
    story=(
        "Handling an offer means probing its driver, and that opens the channel: it posts a message and waits for the "
        "answer. The answer is a message, too, and waits in the queue for its turn behind the offer. Every open takes the "
        "five seconds of its time-out and fails, or, without one, nothing goes on any more; a rescind, which would end the "
        "wait, waits in the same queue. Answers must not queue behind those who wait for them: handling a message may not "
        "wait for another."
    ),
    citation=(
        "'run non-blocking message handlers in the dispatch tasklet', Dexuan Cui, 2015; 'Offload the handling of channels to two "
        "workqueues', Dexuan Cui, December 2018, 37c2578c0c40. The driver of 2012 avoids the simple case."
    ),
)
