# SPDX-License-Identifier: Apache-2.0
"""Zoo, shorter list: a driver that reads one packet each time that it is signalled."""

from typing import TYPE_CHECKING

from pvbus.verify.scenarios.channel_ring import ChannelRings
from pvbus.verify.zoo import CAUGHT, Bug

if TYPE_CHECKING:
    from pvbus.verify.explorer.model import Model


class OnePacket(ChannelRings):
    """Reads a packet, and goes back to sleep."""

    def read(self, model: "Model") -> None:
        """Read one."""
        packet = self.reader_ring.recv()
        if packet is not None:
            self.got.append(packet[1])
        if self.reader_ring.take_signal():
            model.ring(self.room, "room.signal")


BUG = Bug(
    number=43,
    name="one-packet-a-signal",
    sentence="two packets, one signal, and the driver reads one of them: the other lies there until the next signal",
    scenario=ChannelRings,
    parameters={"masked": False},
    handler=OnePacket,
    expected={"sc": CAUGHT, "tso": CAUGHT, "arm": CAUGHT},
    story=(
        "A signal says that a ring is no longer empty, not that one packet has come: the writer signals for the first and "
        "trusts that the reader takes what follows. A driver that takes one packet a signal is right as long as the host is "
        "slow, and one packet behind from the first time that two come together. A heartbeat that is one packet behind still "
        "beats, so it took years until somebody saw it. Read until there is nothing."
    ),
    citation="'do not lose pending heartbeat vmbus packets', Long Li, 2016.",
)
