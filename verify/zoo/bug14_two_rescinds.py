# SPDX-License-Identifier: Apache-2.0
"""Zoo 14: two rescinds of one relid both find the channel, and both release it."""

from typing import Any

from pvbus.actors.runtime.vmbus_wire import Rescind, decode
from pvbus.actors.workqueue.channel import Channel
from pvbus.actors.workqueue.channels import Channels
from pvbus.actors.workqueue.waits import Steps, Synchronize
from pvbus.verify.scenarios.offers import Offers
from pvbus.verify.zoo import CAUGHT, Bug


class LooksUpAndWaits(Channels):
    """Finds the channel of a rescind, and takes it off the list only when it comes to release it."""

    def onmessage(self, payload: bytes) -> None:
        """Look a rescind up, and handle it later."""
        message = decode(payload, self.connection.version)
        if not isinstance(message, Rescind):
            super().onmessage(payload)
        elif (channel := self.find(message.relid)) is not None:
            self._spawn(self._end(channel))

    def _end(self, channel: Channel) -> Steps[None]:
        yield Synchronize()    # its event handler may run still
        self._listed.pop(channel.relid, None)
        self._leaving[channel.relid] = channel
        self._take_away(channel)
        yield from self.release(channel)


class Unprotected(Offers):
    """A guest that does not protect what it has looked up."""

    def make_channels(self, *arguments: Any) -> Channels:
        """Make the guest's channels."""
        return LooksUpAndWaits(*arguments)


BUG = Bug(
    number=14,
    name="two-rescinds",
    sentence="two rescinds of one relid both look the channel up, and both release it",
    scenario=Offers,
    parameters={"script": "rescind a, again", "opens": False},
    handler=Unprotected,
    expected={"sc": CAUGHT, "tso": CAUGHT, "arm": CAUGHT},
    story=(
        "A rescind maps its relid to a channel and then does what takes time. A second one for the same relid, handled "
        "meanwhile, finds the channel still listed. Both release it: in a kernel the second touches freed memory, here the "
        "host is told twice that the relid is free, and by the second time it may be another channel's. Finding the channel "
        "and marking it as going have to be one step. A host that dies between saying and recording says a rescind twice, so "
        "this is no theory."
    ),
    citation="'Resolve race condition in vmbus_onoffer_rescind()', Andrea Parri, December 2020, e4d221b42354.",
)
