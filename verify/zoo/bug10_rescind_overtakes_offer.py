# SPDX-License-Identifier: Apache-2.0
"""Zoo 10: the offer is handed on to a queue of its channel, the rescind is handled at once."""

from typing import Any

from pvbus.actors.runtime.vmbus_facts import Kind
from pvbus.actors.runtime.vmbus_wire import kind_of
from pvbus.actors.workqueue.channels import Channels
from pvbus.actors.workqueue.waits import Steps, Synchronize
from pvbus.verify.scenarios.offers import Offers
from pvbus.verify.zoo import CAUGHT, Bug


class QueuedOffers(Channels):
    """Lists a channel when the channel's own queue has come to it."""

    def onmessage(self, payload: bytes) -> None:
        """Hand an offer on, handle all else."""
        if kind_of(payload, self.connection.version) is Kind.OFFERCHANNEL:
            self._spawn(self._later(payload))
        else:
            super().onmessage(payload)

    def _later(self, payload: bytes) -> Steps[None]:
        yield Synchronize()    # the work item waits for a thread
        super().onmessage(payload)


class TwoQueues(Offers):
    """A guest with a queue for the connection and one for each channel."""

    def make_channels(self, *arguments: Any) -> Channels:
        """Make the guest's channels."""
        return QueuedOffers(*arguments)


BUG = Bug(
    number=10,
    name="rescind-overtakes-offer",
    sentence="the rescind looks its relid up before the offer has been listed, and is dropped: a device that is gone stays",
    scenario=Offers,
    parameters={"opens": False},
    handler=TwoQueues,
    expected={"sc": CAUGHT, "tso": CAUGHT, "arm": CAUGHT},
    story=(
        "Messages go through one queue; an offer is handed on from there to a queue of its channel, because probing takes long. "
        "A rescind is handled in the first one. It comes behind its offer and is done before it: it finds no channel of that "
        "number and is dropped without a word. Then the offer is listed, and the guest drives a device that the host has taken "
        "away. The order of messages is kept only as far as they are handled in the same context; what takes long belongs "
        "behind the listing."
    ),
    citation=(
        "The driver of 2012 has two levels of work queues. 'Handle both rescind and offer messages in the same context', 2015; "
        "'Fix rescind handling', 2017, 54a66265d675."
    ),
)
