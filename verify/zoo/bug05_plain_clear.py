# SPDX-License-Identifier: Apache-2.0
"""Zoo 5: the message slot is freed by a plain store, and somebody else looks into it."""

from typing import Any

from pvbus.verify.scenarios.synic_messages import SLOT, SynicMessages
from pvbus.verify.zoo import CAUGHT, Bug


class PlainClear(SynicMessages):
    """The crash path clears the type by a store, whatever stands there by now."""

    def frees(self, memory: Any, kind: int) -> bool:
        """Clear it."""
        memory.store32(SLOT, 0, "poll.free")
        return True


BUG = Bug(
    number=5,
    name="plain-clear",
    sentence="a second consumer clears a slot that holds the next message by now: that message is erased",
    scenario=SynicMessages,
    parameters={"messages": 2, "ahead": 2, "posters": 1, "poller": True},
    handler=PlainClear,
    expected={"sc": CAUGHT, "tso": CAUGHT, "arm": CAUGHT},
    story=(
        "The tasklet and a CPU that has crashed and polls both read message 1. The tasklet frees the slot and the host delivers "
        "message 2; then the poller's store of `empty` reaches the slot and erases it. What is lost may be the answer to UNLOAD, "
        "for which the crashed kernel waits. A compare-exchange of the type that was read frees message 1 or nothing, as long "
        "as the two differ in type; of two messages of one type only a number of their own can tell."
    ),
    citation=(
        "Live in the driver of 2012, hidden until a second consumer came. Fixed by 'handle various crash scenarios', Vitaly "
        "Kuznetsov, April 2016, cd95aad55793."
    ),
)
