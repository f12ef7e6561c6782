# SPDX-License-Identifier: Apache-2.0
"""Zoo, shorter list: the flag that says `look` is set before the bit that there is to see."""

from typing import TYPE_CHECKING

from pvbus.actors.hypervisor.vmbus.server import Server
from pvbus.verify.scenarios.event_flags import EventFlags
from pvbus.verify.zoo import CAUGHT, Bug

if TYPE_CHECKING:
    from pvbus.actors.hypervisor.vmbus.channel import Channel


class TriggersFirst(Server):
    """Signals a guest from before 2.4 in the wrong order."""

    def signal_guest(self, channel: "Channel") -> None:
        """Raise flag 0, then say which channel it was for."""
        self._raise_flag(0, 0)
        self._connection.set_signal(self.link, channel.relid)


class WrongOrder(EventFlags):
    """With that host."""

    server_type = TriggersFirst


BUG = Bug(
    number=46,
    name="trigger-before-bit",
    sentence="the interrupt comes before the channel's bit is in the page: the scan finds nothing, and the bit lies there",
    scenario=EventFlags,
    parameters={"page": True, "signals": 1, "channels": 1},
    handler=WrongOrder,
    expected={"sc": CAUGHT, "tso": CAUGHT, "arm": CAUGHT},
    story=(
        "Signals have two steps where one word stands for many channels: a bit for the channel, and a trigger that makes the "
        "other side scan the bits. Triggered first, the other side can have scanned, and slept again, before the bit is "
        "there. The next trigger finds it, so it looks like an occasional delay. The bit comes first, and the scan takes it "
        "only after it has taken the trigger."
    ),
    citation="The order that the monitor page's send path keeps in Linux 3.4; turning it round is a mutation of ours.",
)
