# SPDX-License-Identifier: Apache-2.0
"""The labelled barriers and ordered accesses of the code base, and what happens without each.

`docs/memory-model.md` says where each stands; tests hold both against the labels in the code. A label can be left out of a
search by its name (`evr_wake`), or in one context (`evr_wake@reader`).
"""

from __future__ import annotations

from typing import Final

SITES: Final = {
    "2l_upcall": "without it a selector bit stands behind a flag that is down: the event waits for the next one",
    "2l_arrival": "without it a CPU serves ports in another order than they were raised, or reads an old entry of the log",
    "2l_unmask": "without it raise and unmask both see the old word: pending, unmasked, and nobody marks the CPU",
    "fifo_upcall": "without it a FIFO queue is ready behind a flag that is down: its events wait for the next one",
    "fifo_ready": "without it the CPU starts at an old head and leaves a whole queue unread",
    "fifo_link": "without it a sender links behind a word that has just left its queue: what follows is lost",
    "cpu_sleep": "without it a CPU sleeps with an upcall pending, and nobody rings",
    "evr_lock": "without it two producers write one slot of an event ring, or use its size from before a growth",
    "evr_publish": "without it a reader gets a port number from an earlier round of the ring",
    "evr_room": "without it a producer overwrites an entry that a reader is still copying",
    "evr_grow": "without it a reader takes a slot of the upper half before it is filled",
    "evr_wake": "without it reader and producer miss each other: the reader sleeps on a non-empty ring",
    "sub_publish": "without it the hypervisor executes what stood in a submission ring a round ago",
    "sub_room": "without it a user overwrites a submission that has not been read",
    "sub_kick": "without it the hypervisor sleeps, and an entry lies in a submission ring",
    "work_publish": "without it the workqueue handles what lay in the entry a lap ago",
    "work_room": "without it a CPU overwrites a message that is still being copied",
    "syn_slot": "without it the hypervisor waits for an EOM that the guest does not owe",
    "syn_publish": "without it the guest copies what a message slot held before",
    "syn_taken": "without it the heir of a hypervisor delivers a message twice",
    "syn_irr": "without it a CPU takes the interrupt request, sees an empty slot, and nobody interrupts again",
    "vmr_publish": "without it the reader of a channel gets what lay there a round ago",
    "vmr_reuse": "without it the writer of a channel overwrites a packet that is still being copied",
    "vmr_signal": "without it the reader of a channel sleeps over a packet that nobody signals",
    "vmr_room": "without it the ring of a channel is empty, the writer waits for room, and both sleep",
}


def check(site: str) -> str:
    """Give a site back; ValueError names those that there are."""
    if site.partition("@")[0] not in SITES:
        raise ValueError(f"no site {site!r}: {', '.join(SITES)}")
    return site
