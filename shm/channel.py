# SPDX-License-Identifier: Apache-2.0
"""Pending and mask of a port as they lie in a domain's pages, whatever its ABI: for views, tests and the kernel's own look;
and whether a CPU has nothing to do.

Reads only. What changes them is in shm/native/channel.c.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, NamedTuple

from pvbus.shm.layout import ABI_FIFO, PORTS_2L, Domain, Fifo, Vcpu

if TYPE_CHECKING:
    from pvbus.shm.memory import Memory


class EventState(NamedTuple):
    """The bits of a port. `linked` and `word` (its event word) only on the FIFO ABI."""

    pending: bool
    masked: bool
    linked: bool = False
    word: int | None = None


def is_fifo(memory: Memory) -> bool:
    """Tell whether the domain is on the FIFO ABI now."""
    return memory.load32(Domain.ABI) == ABI_FIFO


def nr_channels(memory: Memory) -> int:
    """Mirror xen_evtchn_nr_channels (X8): 4096 on 2-level; on FIFO what the event array has room for so far."""
    return memory.load32(Domain.ARRAY_PAGES) * Fifo.WORDS_A_PAGE if is_fifo(memory) else PORTS_2L


def event_word_at(memory: Memory, port: int) -> int:
    """Give the offset of a port's event word; 0 while the event array has none for it."""
    page = memory.load32(Domain.ARRAY + port // Fifo.WORDS_A_PAGE * 4)
    return Domain.guest_page(page - 1) + port % Fifo.WORDS_A_PAGE * 4 if page else 0


def state(memory: Memory, port: int) -> EventState:
    """Read a port's bits. Without a word, a port counts as masked; raised early, it is pending."""
    if is_fifo(memory):
        at = event_word_at(memory, port)
        if not at:
            early = memory.load64(Domain.table(Domain.QUEUE_WORDS, port)) & Fifo.QUEUE_PENDING
            return EventState(pending=bool(early), masked=True)
        word = memory.load32(at)
        return EventState(bool(word & Fifo.PENDING), bool(word & Fifo.MASKED), bool(word & Fifo.LINKED), word)
    if port >= PORTS_2L:
        return EventState(pending=False, masked=True)
    pending = memory.load64(Domain.EVTCHN_PENDING + port // 64 * 8) >> port % 64 & 1
    masked = memory.load64(Domain.EVTCHN_MASK + port // 64 * 8) >> port % 64 & 1
    return EventState(bool(pending), bool(masked))


def cpu_is_idle(memory: Memory, vcpu: int) -> bool:
    """Tell whether a CPU has delivered all that was raised before: no upcall is pending, and it sleeps. For who alone raises.

    In this order. A CPU that finds an upcall behind its announcement takes the announcement back, and then the flag: who
    looked at the announcement first could see it still, and the flag no more, and think the CPU done that just begins.
    """
    if memory.load8(Domain.vcpu_info(vcpu, Domain.UPCALL_PENDING), "idle.flag"):
        return False
    memory.smp_rmb("cpu_idle")  # SYNC(cpu_idle): the flag before the announcement; the CPU is awake before it takes the flag
    return memory.load32(Domain.vcpu(vcpu, Vcpu.SLEEPING), "idle.sleeping") == 1
