# SPDX-License-Identifier: Apache-2.0
"""Zoo, shorter list: what the messages ask for is passed on before what the events ask for."""

from typing import TYPE_CHECKING

from pvbus.verify.scenarios import loops
from pvbus.verify.scenarios.last_packet import LastPacket
from pvbus.verify.zoo import CAUGHT, Bug

if TYPE_CHECKING:
    from pvbus.verify.explorer.model import Model


class MessagesFirst(LastPacket):
    """A CPU that wakes the workqueue, and only then the drivers."""

    def cpu(self, model: "Model") -> None:
        """Run the CPU's loop in that order."""
        done = 1
        while done:
            done, channels, has_work, _ = self.path.hv_run(0, 0)
            if has_work:
                loops.ring_eventfd(model, self.hv, self.work, "work")
            for relid in channels:
                self.ring(model, relid)


BUG = Bug(
    number=42,
    name="message-before-event",
    sentence="a rescind is passed on before the event that came with it: the channel goes, and its last packet was not looked at",
    scenario=LastPacket,
    handler=MessagesFirst,
    expected={"sc": CAUGHT, "tso": CAUGHT, "arm": CAUGHT},
    story=(
        "One interrupt stands for events and messages alike, and the host sends a device's last data before it sends the "
        "rescind. So the handler looks at events first and runs their tasklet first, in Windows guests as in Linux. Turned "
        "round, the work item of the rescind can be on its way while the channel's callback has not run: the channel is closed "
        "and its rings are freed with the last packet in them, or the callback runs then, in freed memory. Ours rings the "
        "drivers' doorbells before that of the workqueue, for the same reason."
    ),
    citation=(
        "The driver of 2012 is right, and says why: it is the order of Windows guests. Turned round, it is a mutation of ours."
    ),
)
