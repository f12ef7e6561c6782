# SPDX-License-Identifier: Apache-2.0
"""Zoo 1: the interrupt handler looks at the consumer index before it publishes its entry."""

from pvbus.verify.scenarios.event_ring import EventRing
from pvbus.verify.zoo import CAUGHT, Bug

BUG = Bug(
    number=1,
    name="lost-wakeup",
    sentence="the handler decides on the wake-up before it publishes: a reader sleeps for ever on a non-empty ring",
    scenario=EventRing,
    variant="driver-wakeup-order",
    expected={"sc": CAUGHT, "tso": CAUGHT, "arm": CAUGHT},
    story=(
        "The handler samples the consumer index, publishes its entry, and wakes the reader only if the ring was empty by "
        "that old sample. The reader takes no lock. It may take the last entry, find the ring empty and go to sleep between "
        "the sample and the publication; the handler then sees two unequal old indices and wakes nobody, and so does every "
        "handler after it. A hardening patch made it visible on any machine: it moved the read of the consumer index from "
        "behind the publication to before it. The older order needs a store buffer to fail. Right is: publish, full "
        "barrier, then look."
    ),
    citation=(
        "Live in Linux: 'xen/evtchn: use READ/WRITE_ONCE() for accessing ring indices', Juergen Gross, February 2021, "
        "6977c0b560f1. Seen on Linux 6.12 as dom0 of Xen 4.17: up to 4 wake-ups lost in 36,726 events."
    ),
)
