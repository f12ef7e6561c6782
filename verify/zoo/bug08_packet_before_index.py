# SPDX-License-Identifier: Apache-2.0
"""Zoo 8: a reader whose load of a packet may overtake its load of the index that covers it."""

from pvbus.verify.scenarios.channel_ring import ChannelRings
from pvbus.verify.zoo import CAUGHT, CLEAN, Bug

BUG = Bug(
    number=8,
    name="packet-before-index",
    sentence="write_index is read without acquire: the packet was read before it was written",
    scenario=ChannelRings,
    parameters={"masked": False},
    drop=("vmr_publish@reader",),
    expected={"sc": CLEAN, "tso": CLEAN, "arm": CAUGHT},
    story=(
        "The reader loads write_index and then the packet before it. Nothing in the second load depends on the value of the "
        "first, so an ARM64 processor may do it earlier, and get what lay in the ring a round ago, under an index that says "
        "that a packet is there. It was seen in the field as packets with stale contents. x86 does loads in their order, and "
        "years of tests there had shown nothing. The index has to be loaded with acquire."
    ),
    citation=(
        "'Prevent load re-ordering when reading ring buffer', Michael Kelley, March 2022, b6cae15b5710. The ring code of "
        "2012 has no barrier there."
    ),
)
