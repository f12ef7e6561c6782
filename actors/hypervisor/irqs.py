# SPDX-License-Identifier: Apache-2.0
"""The guest kernel's irq layer, as far as the hypervisor process runs it for the domains: binding and unbinding handlers.

Where a port stands is its irq word, written here (bind, disable, unbind) and on the event path (shm/native/interrupt.c), each
step one compare-exchange. Synchronous and free of I/O: waiting for a handler is the caller's business (`disable` says
whether one runs).
"""

from __future__ import annotations

import errno
from typing import TYPE_CHECKING

from pvbus.actors.hypervisor import kernel
from pvbus.actors.hypervisor.errors import HypercallError
from pvbus.actors.hypervisor.ports import VIRQS_PER_VCPU
from pvbus.shm import channel
from pvbus.shm.layout import Domain, Irq, Port

if TYPE_CHECKING:
    from collections.abc import Iterator

    from pvbus.actors.hypervisor.ports import EventChannels
    from pvbus.shm.memory import Memory


class IrqLayer:
    """bind_evtchn_to_irqhandler_lateeoi, disable_irq and unbind_from_irqhandler over the irq words of all domains."""

    def __init__(self, channels: EventChannels, *, spread: dict[int, bool] | None = None) -> None:
        self.channels = channels
        self.spread = spread or {}
        self._load: dict[int, list[int]] = {}  # with spread: how many handlers each vCPU serves; counted when first asked

    def _memory(self, domid: int) -> Memory:
        return self.channels.domains[domid].memory

    def word(self, domid: int, port: int) -> int:
        """Read an irq word."""
        return self._memory(domid).load64(Domain.table(Domain.IRQ_WORDS, port))

    def irq_from_evtchn(self, domid: int, port: int) -> int:
        """Mirror X10: the irq of a port, or -1 when it has no handler. An irq has its port's number here."""
        if not 0 < port < self.channels.ports_max(domid):
            return -1
        return port if self.word(domid, port) & (Irq.SLOT | Irq.KERNEL) else -1

    def bind(self, domid: int, port: int, slot: int, *, static: bool) -> None:
        """Mirror X2 and X4, then unmask, so that a pending event fires now. ENOMEM beyond the ABI, EBUSY with a handler.

        Handler, its one reference and `static` are one store: there is no failure between them to return (A7.4).
        """
        if not 0 < port < self.channels.ports_max(domid):
            raise HypercallError(errno.ENOMEM, f"port {port}: the ABI has {self.channels.ports_max(domid)}")
        memory = self._memory(domid)
        at = Domain.table(Domain.IRQ_WORDS, port)
        if self.irq_from_evtchn(domid, port) >= 0:
            raise HypercallError(errno.EBUSY, f"port {port} has a handler")
        kernel.give_word(self.channels, domid, port)
        vcpu = self._choose(domid, port)
        if memory.load32(Domain.VALID_EVTCHNS) <= port:  # a static number that Xen has not handed out
            memory.store32_release(Domain.VALID_EVTCHNS, port + 1)
        memory.store64(Domain.table(Domain.EOI_WORDS, port), 0)
        served = memory.load64(at) & ~0xFFFFFFFF  # the count of services goes on: it tells an heir's events apart
        memory.store64_release(at, served | (slot + 1) | Irq.ENABLED | (Irq.STATIC if static else 0))
        self._count(domid, vcpu, 1)
        self.assign(domid, port, vcpu)
        self.channels.unmask(domid, port)

    def _choose(self, domid: int, port: int) -> int:
        """New bindings are served by vCPU 0 (X2), or by the one with the fewest ports; what cannot move, where it is raised."""
        state, _, virq, raised_on = Port.unpack(self.channels.word(domid, port))
        if state not in (Port.UNBOUND, Port.INTERDOMAIN, Port.VIRQ) or (state == Port.VIRQ and virq in VIRQS_PER_VCPU):
            return raised_on
        if not self.spread.get(domid):
            return 0
        load = self._loads(domid)
        return load.index(min(load))

    def _loads(self, domid: int) -> list[int]:
        if domid not in self._load:
            self._load[domid] = [0] * self.channels.domains[domid].vcpus
            for port in self._handled(domid):
                self._count(domid, Port.unpack(self.channels.word(domid, port))[3], 1)
        return self._load[domid]

    def _count(self, domid: int, vcpu: int, change: int) -> None:
        load = self._load.get(domid)
        if load is not None and vcpu < len(load):
            load[vcpu] += change

    def assign(self, domid: int, port: int, vcpu: int) -> None:
        """Have `vcpu`, and no other, serve the port."""
        kernel.serve_on(self._memory(domid), port, vcpu, range(self.channels.domains[domid].vcpus))
        state, _, _, now = Port.unpack(self.channels.word(domid, port))
        if vcpu != now and state in (Port.UNBOUND, Port.INTERDOMAIN, Port.VIRQ):
            self.channels.bind_vcpu(domid, port, vcpu)

    def set_affinity(self, domid: int, port: int, vcpu: int) -> None:
        """Mirror a write to smp_affinity: mask (TEMPORARY), bind_vcpu, unmask, so that a pending event is raised there.

        ESRCH, ENOENT without the vCPU, EINVAL for a port without a handler and for one that cannot move (per-vCPU VIRQ, IPI).
        """
        if domid not in self.channels.domains:
            raise HypercallError(errno.ESRCH, f"no domain {domid}")
        if not 0 < port < self.channels.ports_max(domid) or not self.word(domid, port) & (Irq.SLOT | Irq.KERNEL):
            raise HypercallError(errno.EINVAL, f"port {port} has no handler")
        memory = self._memory(domid)
        before = Port.unpack(self.channels.word(domid, port))[3]
        at = Domain.table(Domain.IRQ_WORDS, port)
        memory.fetch_or64(at, Irq.TEMPORARY)
        self.channels.path.mask(domid, port)
        try:
            self.channels.bind_vcpu(domid, port, vcpu)
            kernel.serve_on(memory, port, vcpu, range(self.channels.domains[domid].vcpus))
            self._count(domid, before, -1)
            self._count(domid, vcpu, 1)
        finally:
            left = memory.fetch_and64(at, ~Irq.TEMPORARY & 2**64 - 1) & ~Irq.TEMPORARY
            if not left & Irq.REASONS:
                self.unmask(domid, port)

    def unmask(self, domid: int, port: int) -> None:
        """Unmask a port that was seen without a reason to be masked, and raise it if it is pending.

        A CPU may have claimed it since, and our unmask come behind its mask.
        """
        self.channels.unmask_and_raise(domid, port)
        # SYNC(irq_unmask): the unmask, then the look at the irq word, both locked. The CPU claims before it masks: we see its
        # claim, or it masks behind us.
        if self._memory(domid).fetch_or64(Domain.table(Domain.IRQ_WORDS, port), 0) & Irq.REASONS:
            self.channels.path.mask(domid, port)

    def disable(self, domid: int, port: int) -> bool:
        """Mirror disable_irq without the wait: mask (EXPLICIT), so that nobody claims the port; True while a handler runs.

        False comes with acquire: what the last handler has written is there, and nothing that it still will.
        """
        memory, at = self._memory(domid), Domain.table(Domain.IRQ_WORDS, port)
        memory.fetch_or64(at, Irq.EXPLICIT)
        self.channels.path.mask(domid, port)
        return bool(memory.load64_acquire(at, "irq.in_service") & Irq.IN_SERVICE)

    def is_linked(self, domid: int, port: int) -> bool:
        """Tell whether the port's word is in a FIFO queue: its number cannot be handed out until a CPU takes it out."""
        return channel.state(self._memory(domid), port).linked

    def unbind(self, domid: int, port: int) -> None:
        """Mirror X5 after `disable` said False: forget the handler; close the port (X6) unless it was bound as static.

        The port is closed once: one that the guest has closed itself is left alone.
        """
        memory = self._memory(domid)
        at = Domain.table(Domain.IRQ_WORDS, port)
        word = memory.load64(at)
        memory.store64_release(at, word & ~0xFFFFFFFF)
        kernel.serve_on(memory, port, -1, range(self.channels.domains[domid].vcpus))
        self._count(domid, Port.unpack(self.channels.word(domid, port))[3], -1)
        if not word & Irq.STATIC and self.channels.word(domid, port) & 7 not in (Port.FREE, Port.RESERVED):
            self.channels.close(domid, port)

    def mark_lost(self, domid: int, port: int) -> None:
        """Note that nobody will close the port any more: its file has no record of it (H1, H3)."""
        self._memory(domid).fetch_or64(Domain.table(Domain.IRQ_WORDS, port), Irq.LOST)

    def is_lost(self, domid: int, port: int) -> bool:
        """Tell whether nobody will close the port any more."""
        return bool(self.word(domid, port) & Irq.LOST)

    def abandon(self, domid: int, port: int) -> None:
        """Leave a lost port bound for good after `disable` said False: masked, and no file's, so no later one gets its events."""
        memory = self._memory(domid)
        at = Domain.table(Domain.IRQ_WORDS, port)
        memory.store64_release(at, memory.load64(at) & ~0xFFFFFFFF | Irq.KERNEL | Irq.LOST | Irq.EXPLICIT)
        kernel.serve_on(memory, port, -1, range(self.channels.domains[domid].vcpus))

    def forget(self, domid: int) -> None:
        """The domain's kernel is gone, and with it every handler; counts of services go on."""
        memory = self._memory(domid)
        self._load.pop(domid, None)
        for port in range(1, memory.load32(Domain.VALID_EVTCHNS)):
            at = Domain.table(Domain.IRQ_WORDS, port)
            memory.store64_release(at, memory.load64(at) & ~0xFFFFFFFF)
            kernel.serve_on(memory, port, -1, range(self.channels.domains[domid].vcpus))

    def _handled(self, domid: int) -> Iterator[int]:
        memory = self._memory(domid)
        for port in range(1, memory.load32(Domain.VALID_EVTCHNS)):
            if memory.load64(Domain.table(Domain.IRQ_WORDS, port)) & Irq.SLOT:
                yield port

    def ports_of(self, domid: int, slot: int) -> Iterator[int]:
        """Give the ports whose handler is this open file's."""
        memory = self._memory(domid)
        for port in range(1, memory.load32(Domain.VALID_EVTCHNS)):
            if memory.load64(Domain.table(Domain.IRQ_WORDS, port)) & Irq.SLOT == slot + 1:
                yield port
