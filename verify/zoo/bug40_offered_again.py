# SPDX-License-Identifier: Apache-2.0
"""Zoo, shorter list: every driver that registers requests all offers again, and the guest has to know which ones it has."""

from typing import Any

from pvbus.actors.runtime.vmbus_wire import OfferChannel, decode
from pvbus.actors.workqueue.channels import Channels
from pvbus.verify.scenarios.offers import Offers
from pvbus.verify.zoo import CAUGHT, Bug


class KnowsClasses(Channels):
    """Takes an offer for a repetition when it has a channel of the same class."""

    def onmessage(self, payload: bytes) -> None:
        """Drop such an offer, handle all else."""
        offer = decode(payload, self.connection.version)
        if not (isinstance(offer, OfferChannel) and any(channel.offer.class_id == offer.class_id for channel in self)):
            super().onmessage(payload)


class Inexact(Offers):
    """A guest with that lookup."""

    def make_channels(self, *arguments: Any) -> Channels:
        """Make the guest's channels."""
        return KnowsClasses(*arguments)


BUG = Bug(
    number=40,
    name="offered-again",
    sentence="offers are requested again with every driver, and a lookup that is not exact throws a new device away",
    scenario=Offers,
    parameters={"script": "offer b", "opens": False, "registers": True},
    handler=Inexact,
    expected={"sc": CAUGHT, "tso": CAUGHT, "arm": CAUGHT},
    story=(
        "The driver of 2012 requests all offers once more whenever a driver registers, so offers come twice, and race the "
        "first ones. What is known is freed as not new. That is harmless only as long as the lookup is exact, class and "
        "instance: compare less, and the second disk of a machine is taken for a repetition of the first."
    ),
    citation="Live in the driver of 2012, whose lookup is exact; the inexact one is a mutation of ours.",
)
