# SPDX-License-Identifier: Apache-2.0
"""Zoo 26: reading an attribute follows a pointer to rings that close has freed."""

from pvbus.actors.workqueue import attributes
from pvbus.actors.workqueue.bus import Device
from pvbus.verify.scenarios.teardown import Teardown
from pvbus.verify.scenarios.vmbus_sides import GuestSide
from pvbus.verify.zoo import CAUGHT, Bug


class KeepsThePointer(Teardown):
    """A guest that looks at the rings that a channel had last, open or not."""

    def read(self, guest: GuestSide, device: Device) -> None:
        """Read a device's attributes."""
        if guest.rings:
            guest.rings[-1].states()
        attributes.all_of(device, self.hv, None)


BUG = Bug(
    number=26,
    name="attributes-of-freed-rings",
    sentence="an attribute is read while its channel closes: the read follows a pointer to freed rings",
    scenario=Teardown,
    parameters={"reads": True, "ticks": 0},
    handler=KeepsThePointer,
    expected={"sc": CAUGHT, "tso": CAUGHT, "arm": CAUGHT},
    story=(
        "The attributes of a device show the indices of its rings. In 2012 tearing a ring down did nothing to the record that "
        "points to it, and reading takes no lock: whoever reads while the channel closes, or ever after, reads memory that is "
        "somebody else's by now. An attribute is a reader like any other: it looks whether the channel is open, and what it "
        "holds on to is not freed meanwhile."
    ),
    citation="Live in the driver of 2012. 'Fix race condition with new ring_buffer_info mutex', K. Brown, 2019, 14948e39445d.",
)
