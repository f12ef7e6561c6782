# SPDX-License-Identifier: Apache-2.0
"""Zoo 27: an open is given up after five seconds, and its rings are freed while the host is about to open them."""

import errno
from typing import Any

from pvbus.actors.workqueue.channel import Channel, Lent
from pvbus.actors.workqueue.channels import Channels
from pvbus.actors.workqueue.waits import Steps
from pvbus.verify.scenarios.teardown import Teardown
from pvbus.verify.zoo import CAUGHT, Bug


class FreesAtTheTimeout(Channels):
    """Gives the rings up together with the wait."""

    def _open(self, channel: Channel, lent: Lent, target_vp: int, user_data: bytes) -> Steps[None]:
        try:
            yield from super()._open(channel, lent, target_vp, user_data)
        except OSError as error:
            if error.errno == errno.ETIMEDOUT:
                channel.late_open_id = 0
                self._take_back(channel, lent)
            raise


class Impatient(Teardown):
    """A guest to which no answer means that nothing happened."""

    def make_channels(self, *arguments: Any) -> Channels:
        """Make the guest's channels."""
        return FreesAtTheTimeout(*arguments)


BUG = Bug(
    number=27,
    name="frees-what-the-host-may-have",
    sentence="an open times out and frees its rings, and the host, which was slow, opens the channel and writes into them",
    scenario=Teardown,
    parameters={"ends": "", "ticks": 0, "timeouts": 1},
    handler=Impatient,
    expected={"sc": CAUGHT, "tso": CAUGHT, "arm": CAUGHT},
    story=(
        "The guest posts OPENCHANNEL and waits for five seconds. Then it frees the request, in 2012 without unlinking it "
        "from the list that the late answer walks, and the pages of the rings. But the message was delivered: the host opens "
        "the channel, maps pages that belong to somebody else by now, and writes. A time-out says that one does not know. "
        "What was lent stays lent, in limbo, until the host has said what became of it."
    ),
    citation="Live in the channel code of Linux 3.4 and of 2012.",
)
