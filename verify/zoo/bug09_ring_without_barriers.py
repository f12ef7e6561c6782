# SPDX-License-Identifier: Apache-2.0
"""Zoo 9: the event ring without the barriers between its entries and the index that covers them."""

from pvbus.verify.scenarios.event_ring import EventRing
from pvbus.verify.zoo import CAUGHT, CLEAN, Bug

BUG = Bug(
    number=9,
    name="ring-without-barriers",
    sentence="entry and producer index are not ordered: a read gives a port number of an earlier round",
    scenario=EventRing,
    drop=("evr_publish",),
    expected={"sc": CLEAN, "tso": CLEAN, "arm": CAUGHT},
    story=(
        "The producer stores the entry, then the index that covers it; the reader loads the index, then the entry. Without "
        "a store barrier on one side or a load barrier on the other the reader may see the new index and the old entry: "
        "one event is reported twice or under number 0, and one is lost. x86 keeps both orders by itself, so nobody who "
        "tests there will ever see it; that is what the TSO model's verdict says."
    ),
    citation=(
        "A mutation of ours. In Linux the barriers were weakened to smp_wmb and smp_rmb by Juergen Gross, 2021, d56699594046."
    ),
)
