# SPDX-License-Identifier: Apache-2.0
"""The guest kernel's irq layer, as far as the hypervisor process runs it for the domains: binding and unbinding handlers.

Where a port stands is its irq word, written here (bind, disable, unbind) and on the event path (shm/native/interrupt.c), each
step one compare-exchange. Synchronous and free of I/O: waiting for a handler is the caller's business (`disable` says
whether one runs).
"""

from __future__ import annotations

import errno
from typing import TYPE_CHECKING

from pvbus.actors.hypervisor.ports import VIRQS_PER_VCPU, HypercallError
from pvbus.shm.layout import PORTS_2L, Domain, Irq, Port, Vcpu

if TYPE_CHECKING:
    from collections.abc import Iterator

    from pvbus.actors.hypervisor.ports import EventChannels
    from pvbus.shm.memory import Memory


class IrqLayer:
    """bind_evtchn_to_irqhandler_lateeoi, disable_irq and unbind_from_irqhandler over the irq words of all domains."""

    def __init__(self, channels: EventChannels, *, spread: dict[int, bool] | None = None) -> None:
        self.channels = channels
        self.spread = spread or {}

    def _memory(self, domid: int) -> Memory:
        return self.channels.domains[domid].memory

    def word(self, domid: int, port: int) -> int:
        """Read an irq word."""
        return self._memory(domid).load64(Domain.table(Domain.IRQ_WORDS, port))

    def bind(self, domid: int, port: int, slot: int, *, static: bool) -> None:
        """Mirror X2, then unmask, so that a pending event fires now. ENOMEM beyond the ABI, EBUSY when the port has a handler."""
        if not 0 < port < PORTS_2L:
            raise HypercallError(errno.ENOMEM, f"port {port}: the ABI has {PORTS_2L}")
        memory = self._memory(domid)
        at = Domain.table(Domain.IRQ_WORDS, port)
        old = memory.load64(at)
        if old & (Irq.SLOT | Irq.KERNEL):
            raise HypercallError(errno.EBUSY, f"port {port} has a handler")
        served = old & ~0xFFFFFFFF  # the count of services goes on: it tells an heir's events apart
        memory.store64_release(at, served | (slot + 1) | Irq.ENABLED | (Irq.STATIC if static else 0))
        self.assign(domid, port, self._choose(domid, port))
        self.channels.unmask(domid, port)

    def _choose(self, domid: int, port: int) -> int:
        """New bindings are served by vCPU 0 (X2), or by the one with the fewest ports; what cannot move, where it is raised."""
        state, _, virq, raised_on = Port.unpack(self.channels.word(domid, port))
        if state not in (Port.UNBOUND, Port.INTERDOMAIN, Port.VIRQ) or (state == Port.VIRQ and virq in VIRQS_PER_VCPU):
            return raised_on
        if not self.spread.get(domid):
            return 0
        memory = self._memory(domid)
        vcpus = range(self.channels.domains[domid].vcpus)
        return min(vcpus, key=lambda vcpu: sum(_mask_word(memory, vcpu, word).bit_count() for word in range(64)))

    def assign(self, domid: int, port: int, vcpu: int) -> None:
        """Have `vcpu`, and no other, serve the port."""
        memory = self._memory(domid)
        for other in range(self.channels.domains[domid].vcpus):
            at = Domain.vcpu(other, Vcpu.EVTCHN_MASK) + port // 64 * 8
            if other == vcpu:
                memory.test_and_set_bit(at, port % 64)
            else:
                memory.test_and_clear_bit(at, port % 64)
        state, _, _, now = Port.unpack(self.channels.word(domid, port))
        if vcpu != now and state in (Port.UNBOUND, Port.INTERDOMAIN, Port.VIRQ):
            self.channels.bind_vcpu(domid, port, vcpu)

    def disable(self, domid: int, port: int) -> bool:
        """Mirror disable_irq without the wait: mask (EXPLICIT), so that nobody claims the port; True while a handler runs."""
        memory = self._memory(domid)
        memory.fetch_or64(Domain.table(Domain.IRQ_WORDS, port), Irq.EXPLICIT)
        memory.test_and_set_bit(Domain.EVTCHN_MASK + port // 64 * 8, port % 64)
        return bool(self.word(domid, port) & Irq.IN_SERVICE)

    def unbind(self, domid: int, port: int) -> None:
        """Mirror X5 after `disable` said False: forget the handler; close the port unless it was bound as static."""
        memory = self._memory(domid)
        at = Domain.table(Domain.IRQ_WORDS, port)
        word = memory.load64(at)
        memory.store64_release(at, word & ~0xFFFFFFFF)
        for vcpu in range(self.channels.domains[domid].vcpus):
            memory.test_and_clear_bit(Domain.vcpu(vcpu, Vcpu.EVTCHN_MASK) + port // 64 * 8, port % 64)
        if not word & Irq.STATIC and self.channels.word(domid, port) & 7 not in (Port.FREE, Port.RESERVED):
            self.channels.close(domid, port)

    def mark_lost(self, domid: int, port: int) -> None:
        """Note that nobody will close the port any more: its file has no record of it (H1, H3)."""
        self._memory(domid).fetch_or64(Domain.table(Domain.IRQ_WORDS, port), Irq.LOST)

    def abandon(self, domid: int, port: int) -> None:
        """Leave a lost port bound for good after `disable` said False: masked, and no file's, so no later one gets its events."""
        memory = self._memory(domid)
        at = Domain.table(Domain.IRQ_WORDS, port)
        memory.store64_release(at, memory.load64(at) & ~0xFFFFFFFF | Irq.KERNEL | Irq.LOST | Irq.EXPLICIT)
        for vcpu in range(self.channels.domains[domid].vcpus):
            memory.test_and_clear_bit(Domain.vcpu(vcpu, Vcpu.EVTCHN_MASK) + port // 64 * 8, port % 64)

    def ports_of(self, domid: int, slot: int) -> Iterator[int]:
        """Give the ports whose handler is this open file's."""
        memory = self._memory(domid)
        for port in range(1, PORTS_2L):
            if memory.load64(Domain.table(Domain.IRQ_WORDS, port)) & Irq.SLOT == slot + 1:
                yield port


def _mask_word(memory: Memory, vcpu: int, word: int) -> int:
    return memory.load64(Domain.vcpu(vcpu, Vcpu.EVTCHN_MASK) + word * 8)
