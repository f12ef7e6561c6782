# SPDX-License-Identifier: Apache-2.0
"""Zoo 2: a guest that looks whether the host waits for EOM before its freeing of the slot is visible."""

from pvbus.verify.scenarios.synic_slot import SynicSlot
from pvbus.verify.zoo import CAUGHT, CLEAN, Bug

BUG = Bug(
    number=2,
    name="eom-without-barrier",
    sentence="no full barrier between freeing the slot and reading msg_pending: the host waits for an EOM for ever",
    scenario=SynicSlot,
    parameters={"frees": "store"},
    drop=("syn_slot@guest",),
    expected={"sc": CLEAN, "tso": CAUGHT, "arm": CAUGHT},
    story=(
        "The guest frees the slot by a store, then reads msg_pending. The store may still sit in its store buffer when it reads "
        "0 there. The host meanwhile finds the slot busy, sets msg_pending and waits for an EOM, which the guest does not think "
        "it owes. No message is ever delivered again. It is the store-buffering shape, so x86 shows it, too; the barrier belongs "
        "between the two. Where the slot is freed by compare-exchange, as our tasklet does it, x86 needs no further barrier and "
        "arm64 still does."
    ),
    citation="The full barrier in the driver of 2012 is there for this reason; taking it away is a mutation of ours.",
)
