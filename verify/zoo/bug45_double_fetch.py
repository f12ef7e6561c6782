# SPDX-License-Identifier: Apache-2.0
"""Zoo, shorter list: what the other side has written is looked at twice, and changes in between."""

from pvbus.shm.channel_ring import ChannelControl
from pvbus.verify.scenarios.hostile_ring import HostileRing
from pvbus.verify.zoo import CAUGHT, Bug


class LooksTwice(HostileRing):
    """A reader that checks the descriptor in the ring, and takes the length from there."""

    def take(self) -> int:
        """Check, then use."""
        held = self.memory.load32_acquire(ChannelControl.WRITE_INDEX, "vmr_publish")
        if (self.memory.load64(ChannelControl.BYTES, "vmr.packet") >> 32 & 0xFFFF) * 8 + 8 > held:
            return 0
        descriptor = self.memory.load64(ChannelControl.BYTES, "vmr.packet.again")
        return int((descriptor >> 32 & 0xFFFF) - (descriptor >> 16 & 0xFFFF)) * 8


BUG = Bug(
    number=45,
    name="double-fetch",
    sentence="a length is checked in shared memory and read again for use: the other side changes it in between",
    scenario=HostileRing,
    handler=LooksTwice,
    expected={"sc": CAUGHT, "tso": CAUGHT, "arm": CAUGHT},
    story=(
        "Memory that somebody else can write has no contents, only values that were read from it. Check one and read the "
        "other, and the check was for nothing: a host that the guest should not have to trust makes it copy whatever lies "
        "behind the ring. In C one `if` and one `memcpy` are enough, and the compiler may make two loads of one. Copy first, "
        "into memory of one's own, then look at the copy."
    ),
    citation=(
        "'Copy the hv_message object', Andrea Parri, December 2020, fe8c1b18a27d. The driver of 2012 tests the message in "
        "its slot and copies it later."
    ),
)
