# SPDX-License-Identifier: Apache-2.0
"""Zoo 31: a bind that fails because its port is there already makes the file forget all of its ports."""

from pvbus.shm.layout import Machine
from pvbus.verify.scenarios.binding_twice import BindingTwice
from pvbus.verify.zoo import CAUGHT, Bug


class ErasesWhatWasNotInserted(BindingTwice):
    """The file's own variant of this defect, switched on."""

    variants = Machine.VARIANT_DUPLICATE_DROPS


BUG = Bug(
    number=31,
    name="duplicate-drops-ports",
    sentence="after a bind that fails with EEXIST the file has forgotten its ports: their handlers stay, their user is gone",
    scenario=BindingTwice,
    handler=ErasesWhatWasNotInserted,
    expected={"sc": CAUGHT, "tso": CAUGHT, "arm": CAUGHT},
    story=(
        "The record of a port is inserted into a tree; if it is there already, the insertion fails, and the error path erases "
        "the new node, which was never linked. Erasing a zeroed node of a red-black tree empties the whole tree: the file has "
        "no ports any more, but their handlers stay bound, with a pointer to the file. When the file is released nothing is "
        "unbound, and the next event writes into freed memory. It takes a hypervisor that hands out a number twice."
    ),
    citation="drivers/xen/evtchn.c, add_evtchn and its caller's error path: latent.",
)
