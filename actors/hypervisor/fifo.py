# SPDX-License-Identifier: Apache-2.0
"""EVTCHNOP_init_control, expand_array and set_priority: how a domain comes to the FIFO ABI, and what it can change there.

The hypervisor's side. Raising ports on it is in shm/native/fifo.c, taking them out in shm/native/upcall.c; the domain's kernel,
which makes these calls, is kernel.py. Pure, as ports.py.
"""

from __future__ import annotations

import errno
from typing import TYPE_CHECKING

from pvbus.actors.hypervisor.errors import HypercallError
from pvbus.shm import channel
from pvbus.shm.layout import ABI_2L, ABI_FIFO, PORTS_2L, PORTS_FIFO, VCPUS_MAX, Domain, Fifo, Port, Vcpu

if TYPE_CHECKING:
    from pvbus.actors.hypervisor.ports import DomainState, EventChannels
    from pvbus.shm.memory import Memory

CONTROL_OFFSET_MAX = 4096 - Fifo.CONTROL_BYTES


def init_control(channels: EventChannels, caller: int, vcpu: int, gfn: int, offset: int) -> int:
    """Mirror EVTCHNOP_init_control; give the number of link bits. ENOENT, EINVAL (offset, set already, frame).

    The domain's first one takes it from the 2-level to the FIFO ABI; what was pending there is pending here.
    """
    domain = channels.domains[caller]
    if not 0 <= vcpu < domain.vcpus:
        raise HypercallError(errno.ENOENT, f"domain {caller} has no vCPU {vcpu}")
    if offset > CONTROL_OFFSET_MAX or offset % 8:
        raise HypercallError(errno.EINVAL, f"offset {offset}: a multiple of 8 up to {CONTROL_OFFSET_MAX}")
    memory = domain.memory
    at = Domain.vcpu(vcpu, Vcpu.CONTROL)
    if memory.load32(at):
        raise HypercallError(errno.EINVAL, f"vCPU {vcpu} has a control block")
    _check_frame(gfn)
    if not channel.is_fifo(memory):
        _enter(memory)
    memory.store32_release(at, Domain.guest_page(gfn) + offset)
    return Fifo.LINK_BITS


def _check_frame(gfn: int) -> None:
    if not 0 <= gfn < Domain.GUEST_PAGES:
        raise HypercallError(errno.EINVAL, f"frame {gfn}: the domain has {Domain.GUEST_PAGES}")


def _enter(memory: Memory) -> None:
    for port in range(1, min(memory.load32(Domain.VALID_EVTCHNS), PORTS_2L)):
        if channel.state(memory, port).pending:
            memory.fetch_or64(Domain.table(Domain.QUEUE_WORDS, port), Fifo.QUEUE_PENDING)
    memory.store32(Domain.PORTS_MAX, PORTS_FIFO)
    memory.store32_release(Domain.ABI, ABI_FIFO)


def expand_array(channels: EventChannels, caller: int, gfn: int) -> None:
    """Mirror EVTCHNOP_expand_array: EOPNOTSUPP on 2-level, ENOSPC after 128 pages, EINVAL. Early raises come now."""
    memory = channels.domains[caller].memory
    if not channel.is_fifo(memory):
        raise HypercallError(errno.EOPNOTSUPP, "the domain is on the 2-level ABI")
    page = memory.load32(Domain.ARRAY_PAGES)
    if page >= Fifo.PAGES_MAX:
        raise HypercallError(errno.ENOSPC, f"the event array has {Fifo.PAGES_MAX} pages")
    _check_frame(gfn)
    memory.store32(Domain.ARRAY + 4 * page, gfn + 1)
    memory.store32_release(Domain.ARRAY_PAGES, page + 1)
    for port in range(page * Fifo.WORDS_A_PAGE, (page + 1) * Fifo.WORDS_A_PAGE):
        at = Domain.table(Domain.QUEUE_WORDS, port)
        word = memory.load64(at)
        if word & Fifo.QUEUE_PENDING:
            memory.store64(at, word & ~Fifo.QUEUE_PENDING)
            channels.raise_port(caller, port)


def set_priority(channels: EventChannels, caller: int, port: int, priority: int) -> None:
    """Mirror EVTCHNOP_set_priority: EINVAL (port, priority), ENOSYS on 2-level, EACCES for a port that is not bound.

    A port that is linked stays in its queue until it is taken out.
    """
    if not 0 <= port < channels.ports_max(caller):
        raise HypercallError(errno.EINVAL, f"port {port} is out of range")
    if not 0 <= priority < Fifo.PRIORITIES:
        raise HypercallError(errno.EINVAL, f"priority {priority} is not in 0..{Fifo.PRIORITIES - 1}")
    memory = channels.domains[caller].memory
    if not channel.is_fifo(memory):
        raise HypercallError(errno.ENOSYS, "the 2-level ABI has no priorities")
    if channels.word(caller, port) & 7 in (Port.FREE, Port.RESERVED):
        raise HypercallError(errno.EACCES, f"port {port} is not bound")
    at = Domain.table(Domain.QUEUE_WORDS, port)
    memory.store64(at, Fifo.with_priority(memory.load64(at), priority))


def leave(domain: DomainState) -> None:
    """Take a domain whose ports are all closed back to the 2-level ABI (EVTCHNOP_reset)."""
    memory = domain.memory
    for port in range(memory.load32(Domain.VALID_EVTCHNS)):
        memory.store64(Domain.table(Domain.QUEUE_WORDS, port), 0)
    if not channel.is_fifo(memory):
        return
    memory.store32(Domain.PORTS_MAX, PORTS_2L)
    memory.store32_release(Domain.ABI, ABI_2L)
    for page in range(Fifo.PAGES_MAX):
        memory.store32(Domain.ARRAY + 4 * page, 0)
    memory.store32(Domain.ARRAY_PAGES, 0)
    for vcpu in range(VCPUS_MAX):
        memory.store32(Domain.vcpu(vcpu, Vcpu.CONTROL), 0)
        for priority in range(Fifo.PRIORITIES):
            memory.store32(Domain.vcpu(vcpu, Vcpu.FIFO_TAIL) + 4 * priority, 0)
