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
    "cpu_idle": "without it a CPU that has just taken an upcall looks idle, and a port is closed before its last event",
    "evr_lock": "without it two producers write one slot of an event ring, or use its size from before a growth",
    "evr_publish": "without it a reader gets a port number from an earlier round of the ring",
    "evr_room": "without it a producer overwrites an entry that a reader is still copying",
    "evr_grow": "without it a reader takes a slot of the upper half before it is filled",
    "evr_wake": "without it reader and producer miss each other: the reader sleeps on a non-empty ring",
    "irq_unmask": "without it a move, or an heir, leaves a port unmasked that a CPU has just claimed: its events come twice",
    "sub_publish": "without it the hypervisor executes what stood in a submission ring a round ago",
    "sub_room": "without it a user overwrites a submission that has not been read",
    "sub_kick": "without it the hypervisor sleeps, and an entry lies in a submission ring",
    "sub_resolve": "without it the heir of a hypervisor takes a notify that came out for one that did not",
    "work_publish": "without it the workqueue handles what lay in the entry a lap ago",
    "work_room": "without it a CPU overwrites a message that is still being copied",
    "syn_slot": "without it the hypervisor waits for an EOM that the guest does not owe",
    "syn_publish": "without it the guest copies what a message slot held before",
    "syn_taken": "without it the heir of a hypervisor delivers a message twice",
    "syn_irr": "without it a CPU takes the interrupt request, sees an empty slot, and nobody interrupts again",
    "vmr_publish": "without it the reader of a channel gets what lay there a round ago",
    "vmr_reuse": "without it the writer of a channel overwrites a packet that is still being copied",
    "vmr_signal": "without it the reader of a channel sleeps over a packet that nobody signals",
    "mon_enable": "without it a trigger comes in the moment in which the host stops looking, and nobody signals it",
    "mon_take": "without it the host reads a ring from before the trigger that it takes back, and the sender sends no other",
    "vmr_room": "without it the ring of a channel is empty, the writer waits for room, and both sleep",
}

# Accesses that are ordered by themselves (acquire, release) and have no label: their partner is an exchange, or a labelled one.
ORDERED: Final = {
    "evr.take.cons": "acquire, a reader's C: P and the entries are read behind it",
    "evr.state.cons": "acquire, the C of poll: P is read behind it",
    "evr.state.prod": "acquire, the P of poll: what follows a POLLIN sees the entry",
    "evr.lock": "acquire, an heir's look at the producer lock: the dead owner's words are read behind it",
    "vmr.pending": "release and acquire, pending_send_sz: the reader of a channel looks at write_index behind it",
    "vmr.claim": "release, the host's claim of packets that it answers: what it has given back before is behind it",
    "mon.group": "acquire, the host's look at the triggers of a group: what came before one is read behind it",
    "irq": "acquire, the irq word: what its last owner did is seen behind it",
    "irq.in_service": "acquire, the irq word of a port that is to be closed: its handler is over before",
    "2l.is_pending": "acquire, an heir's look at a pending bit: the count of services is read behind it",
    "fifo.word": "acquire, an heir's look at an event word: the count of services is read behind it",
    "fifo.queue": "acquire, an heir's look at a queue word: the count of services is read behind it",
    "2l.arrival.head": "release and acquire, the head of the log of arrivals: an entry is read before it is given back",
    "2l.scan.pending": "acquire, a word of pending bits: the log is read behind it",
    "work.tail": "acquire, the work ring's tail: the entry is claimed behind it",
    "work.state": "acquire, an heir's look at an entry of the work ring: the message is read behind it",
    "work.taken": "release and acquire, an entry that the workqueue has taken: an heir sees what was handled before",
    "work.handled": "release, the number of the message that was handled: before its entry is given back",
    "work.head": "release, the work ring's head: an heir goes on from there",
    "hv.slot.type": "acquire, the type of a message slot: the message is copied behind it",
    "hv.isr.type": "acquire, the interrupt handler's look at a slot",
    "hv.eom": "release, the count of EOMs: the slot is free before it",
    "syn.type": "acquire, the host's look at a slot that may be busy",
    "syn.type.again": "acquire, the host's second look, behind the full barrier of syn_slot",
    "port.set": "release, a port word: what belongs to the port before the word that announces it",
}


def check(site: str) -> str:
    """Give a site back; ValueError names those that there are."""
    if site.partition("@")[0] not in SITES | ORDERED:
        raise ValueError(f"no site {site!r}: {', '.join([*SITES, *ORDERED])}")
    return site


# Labels of which nothing can be left out: what shows that they are needed.
LOCKED: Final = {
    "fifo_upcall": "tests/verify/test_fifo_queue.py::test_another_order_loses_a_port",
    "fifo_link": "tests/verify/test_fifo_queue.py::test_another_order_loses_a_port",
    "irq_unmask": "tests/verify/test_xen_scenarios.py::test_who_looks_before_the_unmask_misses_a_claim",
    "syn_irr": "tests/verify/test_synic_slot.py::test_a_request_that_is_taken_too_late_is_lost",
}
# Labels whose accesses are left out under their own names.
ELSEWHERE: Final = {"sub_resolve": ("2l.is_pending", "fifo.word", "fifo.queue")}

# Why a site that no model of ours misses is kept; docs/barriers.md ends with it.
_LOAD_BEFORE_STORE: Final = (
    "orders a load before a store that gives the place away; only load buffering breaks it, which the models leave out, and "
    "which C11 and arm64 allow"
)
_EXCHANGE: Final = (
    "the label stands on locked operations, of which nothing can be left out; the test in its row puts a plain store in their "
    "place, or turns their order round, and sees it fail"
)
_BEHIND_EXCHANGE: Final = (
    "stands behind a locked operation, and what follows is one, too: it costs nothing on x86, and C11 promises the order only "
    "with it"
)
_OF_HEIRS: Final = "read by an heir, whose forerunner is dead; the search has one death, at which every store of the dead is seen"
STAYS: Final = {
    "2l_upcall": _BEHIND_EXCHANGE,
    "2l_arrival": "nobody has made it fail: locked operations lie between; it stays until it is proven away",
    "2l_unmask": "raise and unmask are both done by the hypervisor's process and never meet; with a second raiser they would",
    "fifo_upcall": _EXCHANGE,
    "fifo_ready": _BEHIND_EXCHANGE,
    "fifo_link": _EXCHANGE,
    "evr_room": _LOAD_BEFORE_STORE,
    "irq_unmask": _EXCHANGE,
    "sub_room": _LOAD_BEFORE_STORE,
    "sub_resolve": "its accesses have rows of their own; one of them is missed under arm",
    "work_room": _LOAD_BEFORE_STORE,
    "syn_taken": _OF_HEIRS,
    "syn_irr": _EXCHANGE,
    "vmr_reuse": _LOAD_BEFORE_STORE,
    "evr.state.cons": "poll only decides whether to sleep, and looks again behind the full barrier of evr_wake",
    "evr.state.prod": "poll only decides whether to sleep, and looks again behind the full barrier of evr_wake",
    "evr.lock": _OF_HEIRS,
    "vmr.pending": "the full barriers of vmr_room stand around it; it is what is left of the order without them",
    "vmr.claim": _OF_HEIRS,
    "mon.group": "what came before a trigger is read behind the exchange that takes the trigger back, not behind this look",
    "irq": "every decision made by it is a compare-exchange of the same word, which looks again",
    "fifo.word": _OF_HEIRS,
    "fifo.queue": _OF_HEIRS,
    "2l.arrival.head": _LOAD_BEFORE_STORE,
    "2l.scan.pending": "nobody has made it fail, as with 2l_arrival: it stays until it is proven away",
    "work.tail": "the claim of the entry by compare-exchange follows, and looks again",
    "work.state": _OF_HEIRS,
    "work.taken": _OF_HEIRS,
    "work.handled": _OF_HEIRS,
    "work.head": _OF_HEIRS,
    "hv.slot.type": "the tasklet has loaded the same word before, under syn_publish",
    "hv.isr.type": "only decides whether the tasklet is scheduled, which looks itself",
    "hv.eom": "a doorbell follows, a system call, which orders more; the count is for an heir",
    "syn.type": _LOAD_BEFORE_STORE,
    "syn.type.again": _LOAD_BEFORE_STORE,
    "port.set": "inspectors, which look meanwhile, decide nothing; an heir begins when every store of the dead is seen",
}
