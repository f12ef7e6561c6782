# SPDX-License-Identifier: Apache-2.0
"""A domain's own kernel, as far as event channels are its business: choosing the ABI at boot, and the ports it keeps for itself.

It makes hypercalls and writes guest memory, as any kernel. Runs where the machine is made (supervisor, before anything else
does) and in the hypervisor process (a port that needs another page of the event array; a domain that boots again).
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from pvbus.actors.hypervisor import fifo
from pvbus.shm import channel
from pvbus.shm.layout import PORTS_2L, VCPUS_MAX, Domain, Fifo, Irq, Vcpu

if TYPE_CHECKING:
    from collections.abc import Iterable

    from pvbus.actors.hypervisor.ports import EventChannels
    from pvbus.shm.memory import Memory

ABIS = ("fifo", "2-level")
VIRQ_TIMER = 0


def boot(
    channels: EventChannels, domid: int, *, abi: str = "2-level", kernel_ports: int = 0, kernel_virqs: Iterable[int] = ()
) -> None:
    """Mask every port, go to the FIFO ABI if asked, then bind VIRQs on the lowest ports and IPIs up to `kernel_ports`."""
    domain = channels.domains[domid]
    for word in range(PORTS_2L // 64):
        domain.memory.store64(Domain.EVTCHN_MASK + 8 * word, 2**64 - 1)
    if abi == "fifo":
        for vcpu in range(domain.vcpus):
            _init_control(channels, domid, vcpu)
    for virq in kernel_virqs:
        port = channels.bind_virq(domid, virq, 0)
        _take(channels, domid, port)
        if virq == VIRQ_TIMER and channel.is_fifo(domain.memory):
            fifo.set_priority(channels, domid, port, 0)
    taken = sum(port <= kernel_ports for port, _ in channels.ports(domid))
    for _ in range(kernel_ports - taken):
        _take(channels, domid, channels.bind_ipi(domid, 0))


def _init_control(channels: EventChannels, domid: int, vcpu: int) -> None:
    memory = channels.domains[domid].memory
    for at in range(0, Fifo.CONTROL_BYTES, 4):
        memory.store32(Domain.guest_page(vcpu) + at, 0)
    memory.store32(Domain.vcpu(vcpu, Vcpu.FIFO_READY), 0)
    for priority in range(Fifo.PRIORITIES):
        memory.store32(Domain.vcpu(vcpu, Vcpu.FIFO_HEAD) + 4 * priority, 0)
    fifo.init_control(channels, domid, vcpu, vcpu, 0)


def give_word(channels: EventChannels, domid: int, port: int) -> None:
    """Mirror what a FIFO kernel does before it uses a port: expand the event array until it has a word for it, masked."""
    memory = channels.domains[domid].memory
    while channel.is_fifo(memory) and channel.nr_channels(memory) <= port:
        gfn = VCPUS_MAX + memory.load32(Domain.ARRAY_PAGES)
        for at in range(0, Fifo.WORDS_A_PAGE * 4, 8):  # two words at a time
            memory.store64(Domain.guest_page(gfn) + at, Fifo.MASKED << 32 | Fifo.MASKED)
        fifo.expand_array(channels, domid, gfn)


def _take(channels: EventChannels, domid: int, port: int) -> None:
    """Bind a port to the kernel's own handler, on vCPU 0."""
    memory = channels.domains[domid].memory
    give_word(channels, domid, port)
    memory.store64(Domain.table(Domain.IRQ_WORDS, port), Irq.KERNEL)
    serve_on(memory, port, 0, range(1))
    channels.path.unmask(domid, port)


def serve_on(memory: Memory, port: int, vcpu: int, vcpus: range) -> None:
    """2-level: have `vcpu`, and no other, look at the port's bit. On FIFO a queue belongs to a vCPU."""
    if channel.is_fifo(memory) or port >= PORTS_2L:
        return
    for other in vcpus:
        at = Domain.vcpu(other, Vcpu.EVTCHN_MASK) + port // 64 * 8
        if other == vcpu:
            memory.test_and_set_bit(at, port % 64)
        else:
            memory.test_and_clear_bit(at, port % 64)
