# SPDX-License-Identifier: Apache-2.0
"""Zoo 3: a hypervisor that sets msg_pending after its last look at the slot."""

from pvbus.verify.scenarios.synic_slot import SynicSlot, SynicSlotLatePending
from pvbus.verify.zoo import CAUGHT, Bug

BUG = Bug(
    number=3,
    name="pending-set-too-late",
    sentence="the host finds the slot busy, and sets msg_pending when the guest has already looked: the message is stuck",
    scenario=SynicSlot,
    handler=SynicSlotLatePending,
    expected={"sc": CAUGHT, "tso": CAUGHT, "arm": CAUGHT},
    story=(
        "The host tries the slot and finds it busy. Before it can set msg_pending the guest frees the slot, sees the flag clear "
        "and owes nothing. Then the host sets it, and waits. The guest has done everything right, and every order of memory "
        "accesses shows it. The host has to set the flag first and look at the slot once more behind a full barrier: either it "
        "finds the slot free, or the guest has yet to look at the flag."
    ),
    citation="KVM until 2018: 'x86: kvm: hyperv: simplify SynIC message delivery', Roman Kagan, 3a0e7731724f.",
)
