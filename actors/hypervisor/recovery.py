# SPDX-License-Identifier: Apache-2.0
"""What the heir of a dead hypervisor makes of the pages that it finds. Pure: a test leaves any half-done state and calls it.

Submission rings are not here: an entry that the forerunner had claimed is resolved when its ring is attached
(pv_resolve_claim in shm/native/drain.c). Calls in flight are undone here and made again by the file's process.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from pvbus.shm import channel
from pvbus.shm.layout import Domain, Fifo, Irq, Port

if TYPE_CHECKING:
    from pvbus.actors.hypervisor.irqs import IrqLayer
    from pvbus.actors.hypervisor.ports import EventChannels


def repair(channels: EventChannels, irqs: IrqLayer) -> int:
    """Free event words, close ports that were handed out and never bound, finish unmasks; give the number of ports closed."""
    closed = 0
    for domid in channels.domains:
        _idle(channels, domid)
        for port, word in list(channels.ports(domid)):
            state = word & 7
            # Somebody's, or nobody's for good.
            kept = irqs.irq_from_evtchn(domid, port) >= 0 or irqs.is_lost(domid, port) or word & Port.KEPT
            if state in (Port.UNBOUND, Port.INTERDOMAIN, Port.VIRQ, Port.IPI) and not kept:
                channels.close(domid, port)
                closed += 1
        _finish_unmasks(channels, irqs, domid)
    return closed


def _idle(channels: EventChannels, domid: int) -> None:
    """Take BUSY off every event word: who was linking behind it is dead, and a BUSY word is neither unmasked nor handed out."""
    memory = channels.domains[domid].memory
    if not channel.is_fifo(memory):
        return
    for port in range(1, memory.load32(Domain.VALID_EVTCHNS)):
        at = channel.event_word_at(memory, port)
        if at and memory.load32(at) & Fifo.BUSY:
            memory.fetch_and64(at & ~7, ~(Fifo.BUSY << (32 if at & 4 else 0)) & 2**64 - 1, "fifo.idle")


def _finish_unmasks(channels: EventChannels, irqs: IrqLayer, domid: int) -> None:
    """A port with a handler and no reason to be masked is unmasked, and raised again if it is pending."""
    memory = channels.domains[domid].memory
    for port in range(1, memory.load32(Domain.VALID_EVTCHNS)):
        irq = memory.load64(Domain.table(Domain.IRQ_WORDS, port))
        if irq & Irq.SLOT and not irq & (Irq.REASONS | Irq.IN_SERVICE):
            irqs.assign(domid, port, Port.unpack(channels.word(domid, port))[3])
            irqs.unmask(domid, port)
