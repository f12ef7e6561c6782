# SPDX-License-Identifier: Apache-2.0
"""Zoo 6: a writer that looks whether its reader sleeps before its packet is visible."""

from pvbus.verify.scenarios.channel_ring import ChannelRings
from pvbus.verify.zoo import CAUGHT, CLEAN, Bug

BUG = Bug(
    number=6,
    name="signal-without-barrier",
    sentence="no full barrier between publishing a packet and reading the interrupt mask: the host sleeps over the packet",
    scenario=ChannelRings,
    parameters={"packets": 1},
    drop=("vmr_signal@writer",),
    expected={"sc": CLEAN, "tso": CAUGHT, "arm": CAUGHT},
    story=(
        "The writer stores write_index and loads interrupt_mask; the reader clears the mask and loads write_index. The "
        "writer's store may wait in its store buffer while it reads the old mask, which says that the reader is at work and "
        "needs no signal. The reader has cleared the mask meanwhile, sees the old index, and sleeps. Nobody signals it, and "
        "the packet lies there until the next one comes, which for a request and its answer is never. Each side needs a full "
        "barrier between its store and its load."
    ),
    citation=(
        "Live in the send path of 2012. 'Fix a Host signaling bug', 2015; 'Base host signaling strictly on the ring state', 2016."
    ),
)
