# SPDX-License-Identifier: Apache-2.0
"""The hypervisor's event channels: domains, the port state machine, and the EVTCHNOP operations on it.

All state lies in the domains' segments (port words, VIRQ map, pending and mask bits), so that an heir finds it; only the
hypervisor writes it. Everything here is synchronous and free of I/O: a unit test calls it without any process, the explorer
too. Doorbells leave through `kick`.

Errors are raised as `HypercallError` in the order in which Xen tests for them (wire facts X2).
"""

from __future__ import annotations

import errno
from typing import TYPE_CHECKING, NamedTuple

from pvbus.actors.hypervisor import fifo
from pvbus.actors.hypervisor.errors import HypercallError
from pvbus.shm import channel
from pvbus.shm.layout import NR_VIRQS, Domain, Fifo, Machine, Port

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Mapping

    from pvbus.shm.memory import EventPath, Memory

DOMID_FIRST_RESERVED = 0x7FF0
DOMID_SELF = 0x7FF0
NR_PIRQS = 256  # interrupt lines a domain may name; none of them is there, and no domain has access to one
VALID_STEP = 64  # valid_evtchns grows by so many, as Xen's grows by a bucket

VIRQS_PER_VCPU = frozenset({0, 1, 7, 13})  # TIMER, DEBUG, XENOPROF, XENPMU
VIRQS_PER_DOMAIN = frozenset({11})  # ARGO; all others are global: delivered to their handler domain


class PortStatus(NamedTuple):
    """What EVTCHNOP_status tells: `status` 0 closed, 1 unbound, 2 interdomain, 3 pirq, 4 virq, 5 ipi."""

    status: int
    vcpu: int
    remote_domain: int
    remote_port: int


def is_global(virq: int) -> bool:
    """Tell whether a VIRQ is delivered to its one handler domain."""
    return virq not in VIRQS_PER_VCPU | VIRQS_PER_DOMAIN


class DomainState(NamedTuple):
    """A domain as the hypervisor knows it."""

    domid: int
    vcpus: int
    memory: Memory


_STATUS = {
    Port.FREE: 0, Port.RESERVED: 0, Port.UNBOUND: 1, Port.INTERDOMAIN: 2, Port.PIRQ: 3, Port.VIRQ: 4, Port.IPI: 5,
}  # fmt: skip


class EventChannels:
    """The EVTCHNOP operations. `hardware_domain` is privileged, and handles the global VIRQs that nobody else was given.

    `limits` {domain id: highest port} is the toolstack's max_event_channels; without one the ABI is the limit.
    """

    def __init__(
        self,
        domains: Mapping[int, DomainState],
        path: EventPath,
        kick: Callable[[int, int], None],
        hardware_domain: int = 0,
        machine: Memory | None = None,
        limits: Mapping[int, int] | None = None,
    ) -> None:
        self.domains = dict(domains)
        self.path = path
        self.kick = kick
        self.hardware_domain = hardware_domain
        self.machine = machine
        self.limits = dict(limits or {})
        self._lowest_free = dict.fromkeys(self.domains, 1)

    # ---- words

    def word(self, domid: int, port: int) -> int:
        """Read a port word."""
        return self.domains[domid].memory.load64(Domain.table(Domain.PORT_WORDS, port))

    def ports_max(self, domid: int) -> int:
        """Give the number of ports of the ABI that the domain has now; port 0 is none."""
        return self.domains[domid].memory.load32(Domain.PORTS_MAX)

    def _set_word(self, domid: int, port: int, word: int) -> None:
        memory = self.domains[domid].memory
        if port >= memory.load32(Domain.VALID_EVTCHNS):  # before the port: whoever looks at all ports must not miss it
            valid = (port // VALID_STEP + 1) * VALID_STEP
            memory.store32_release(Domain.VALID_EVTCHNS, valid)
        memory.store64_release(Domain.table(Domain.PORT_WORDS, port), word, "port.set")

    def ports(self, domid: int) -> Iterator[tuple[int, int]]:
        """Give (port, word) of every port that is not free."""
        memory = self.domains[domid].memory
        for port in range(1, memory.load32(Domain.VALID_EVTCHNS)):
            word = memory.load64(Domain.table(Domain.PORT_WORDS, port))
            if word & 7 != Port.FREE:
                yield port, word

    def _domain(self, caller: int, domid: int) -> DomainState:
        found = self.domains.get(caller if domid == DOMID_SELF else domid)
        if found is None:
            raise HypercallError(errno.ESRCH, f"no domain {domid}")
        return found

    def _allocate(self, domid: int) -> int:
        """Find the lowest free port (A12.14); ENOSPC without one. Ports that are still linked in a FIFO queue are passed over."""
        memory = self.domains[domid].memory
        end = min(self.ports_max(domid), self.limits.get(domid, self.ports_max(domid)) + 1)
        fifo = channel.is_fifo(memory)
        first_free = 0
        for port in range(self._lowest_free[domid], end):
            if memory.load64(Domain.table(Domain.PORT_WORDS, port)) & 7 != Port.FREE:
                continue
            first_free = first_free or port
            if fifo and self._is_linked(memory, port):
                continue
            self._lowest_free[domid] = first_free
            self._forget_queue(memory, port)
            return port
        self._lowest_free[domid] = first_free or end
        raise HypercallError(errno.ENOSPC, f"domain {domid} has no free port")

    @staticmethod
    def _is_linked(memory: Memory, port: int) -> bool:
        at = channel.event_word_at(memory, port)
        return bool(at and memory.load32(at) & (Fifo.LINKED | Fifo.BUSY))

    @staticmethod
    def _forget_queue(memory: Memory, port: int) -> None:
        """A port that is handed out has the default priority, and is not pending; which queue it was linked on last stays."""
        at = Domain.table(Domain.QUEUE_WORDS, port)
        word = memory.load64(at)
        if word:
            memory.store64(at, word & (Fifo.QUEUE_LINKED | 0xFFF))

    def _virq_row(self, virq: int, vcpu: int) -> int:
        return vcpu if virq in VIRQS_PER_VCPU else 0

    def virq_handler(self, virq: int) -> int:
        """Give the domain that handles a global VIRQ."""
        word = self.machine.load32(Machine.VIRQ_HANDLER + 4 * virq) if self.machine is not None else 0
        return word - 1 if word else self.hardware_domain

    def set_virq_handler(self, virq: int, domid: int) -> None:
        """Mirror XEN_DOMCTL_set_virq_handler: EINVAL for a VIRQ that is not global, ESRCH. A port bound elsewhere is silent."""
        if not 0 <= virq < NR_VIRQS or not is_global(virq):
            raise HypercallError(errno.EINVAL, f"VIRQ {virq} is not a global one")
        if domid not in self.domains:
            raise HypercallError(errno.ESRCH, f"no domain {domid}")
        if self.machine is None:
            raise HypercallError(errno.ENODEV, "these event channels have no machine")
        self.machine.store32(Machine.VIRQ_HANDLER + 4 * virq, domid + 1)

    # ---- operations

    def alloc_unbound(self, caller: int, dom: int, remote_dom: int) -> int:
        """Mirror EVTCHNOP_alloc_unbound. ESRCH, EPERM (another domain, unless the hardware domain asks), ENOSPC."""
        domain = self._domain(caller, dom)
        if caller not in (domain.domid, self.hardware_domain):
            raise HypercallError(errno.EPERM)
        port = self._allocate(domain.domid)
        remote = caller if remote_dom == DOMID_SELF else remote_dom
        self._set_word(domain.domid, port, Port.pack(Port.UNBOUND, remote_domain=remote))
        return port

    def bind_interdomain(self, caller: int, remote_dom: int, remote_port: int) -> int:
        """Mirror EVTCHNOP_bind_interdomain: ESRCH, ENOSPC, EINVAL. The local port is born pending (sends may have been lost)."""
        remote = self._domain(caller, remote_dom)
        port = self._allocate(caller)
        if not 0 < remote_port < self.ports_max(remote.domid):
            raise HypercallError(errno.EINVAL, f"remote port {remote_port} is none")
        state, reserved_for, _, vcpu = Port.unpack(self.word(remote.domid, remote_port))
        if state != Port.UNBOUND or reserved_for != caller:
            raise HypercallError(errno.EINVAL, f"remote port {remote_port} is not unbound, or for domain {reserved_for}")
        # The local end first: until the remote word names it nobody can send to it, so an heir that finds it alone frees it.
        self._set_word(caller, port, Port.pack(Port.INTERDOMAIN, remote_domain=remote.domid, remote_port=remote_port))
        peer = Port.pack(Port.INTERDOMAIN, remote_domain=caller, remote_port=port, vcpu=vcpu)
        self._set_word(remote.domid, remote_port, peer | self.word(remote.domid, remote_port) & Port.KEPT)
        self.raise_port(caller, port)
        return port

    def bind_virq(self, caller: int, virq: int, vcpu: int) -> int:
        """Mirror EVTCHNOP_bind_virq: EINVAL range, EINVAL global or per-domain off vCPU 0, ENOENT, EBUSY, EEXIST, ENOSPC."""
        domain = self.domains[caller]
        if not 0 <= virq < NR_VIRQS:
            raise HypercallError(errno.EINVAL, f"VIRQ {virq}: there are {NR_VIRQS}")
        if virq not in VIRQS_PER_VCPU and vcpu != 0:
            raise HypercallError(errno.EINVAL, f"VIRQ {virq} is not per vCPU: bind it on vCPU 0")
        if not 0 <= vcpu < domain.vcpus:
            raise HypercallError(errno.ENOENT, f"domain {caller} has no vCPU {vcpu}")
        if is_global(virq) and caller != self.virq_handler(virq):
            raise HypercallError(errno.EBUSY, f"global VIRQ {virq} is handled by domain {self.virq_handler(virq)}")
        at = Domain.virq(self._virq_row(virq, vcpu), virq)
        if domain.memory.load32(at) != 0:
            raise HypercallError(errno.EEXIST, f"VIRQ {virq} is bound")
        port = self._allocate(caller)
        self._set_word(caller, port, Port.pack(Port.VIRQ, remote_port=virq, vcpu=vcpu))
        domain.memory.store32(at, port)
        return port

    def bind_ipi(self, caller: int, vcpu: int) -> int:
        """Mirror EVTCHNOP_bind_ipi: ENOENT, ENOSPC."""
        if not 0 <= vcpu < self.domains[caller].vcpus:
            raise HypercallError(errno.ENOENT, f"domain {caller} has no vCPU {vcpu}")
        port = self._allocate(caller)
        self._set_word(caller, port, Port.pack(Port.IPI, vcpu=vcpu))
        return port

    def bind_pirq(self, caller: int, pirq: int) -> int:
        """Mirror EVTCHNOP_bind_pirq on a domain without hardware: EINVAL beyond the lines that there may be, else EPERM."""
        if not 0 <= pirq < NR_PIRQS:
            raise HypercallError(errno.EINVAL, f"pirq {pirq}: there are {NR_PIRQS}")
        raise HypercallError(errno.EPERM, f"domain {caller} has no access to pirq {pirq}")

    def bind_vcpu(self, caller: int, port: int, vcpu: int) -> None:
        """Mirror EVTCHNOP_bind_vcpu: ENOENT, EINVAL (range, free, per-vCPU VIRQ, IPI). A pending port is not raised again."""
        if not 0 <= vcpu < self.domains[caller].vcpus:
            raise HypercallError(errno.ENOENT, f"domain {caller} has no vCPU {vcpu}")
        if not 0 < port < self.ports_max(caller):
            raise HypercallError(errno.EINVAL, f"port {port} is out of range")
        state, remote_domain, remote_port, _ = Port.unpack(self.word(caller, port))
        if state in (Port.FREE, Port.RESERVED, Port.IPI) or (state == Port.VIRQ and remote_port in VIRQS_PER_VCPU):
            raise HypercallError(errno.EINVAL, f"port {port} cannot move")
        moved = Port.pack(state, remote_domain=remote_domain, remote_port=remote_port, vcpu=vcpu)
        self._set_word(caller, port, moved | self.word(caller, port) & (Port.PEER_CLOSED | Port.KEPT))

    def close(self, caller: int, port: int) -> None:
        """Mirror EVTCHNOP_close: EINVAL for a port out of range, free or reserved. The peer becomes unbound, without an event."""
        if not 0 < port < self.ports_max(caller):
            raise HypercallError(errno.EINVAL, f"port {port} is out of range")
        state, remote_domain, remote_port, vcpu = Port.unpack(self.word(caller, port))
        if state in (Port.FREE, Port.RESERVED):
            raise HypercallError(errno.EINVAL, f"port {port} is not bound")
        memory = self.domains[caller].memory
        if state == Port.VIRQ:
            memory.store32(Domain.virq(self._virq_row(remote_port, vcpu), remote_port), 0)
        elif state == Port.INTERDOMAIN:
            self._unbind_peer(caller, port, remote_domain, remote_port)
        # Pending goes after the peer cannot send any more, and before the number can be handed out again.
        self.path.clear_pending(caller, port)
        self._set_word(caller, port, 0)
        self._lowest_free[caller] = min(self._lowest_free[caller], port)

    def _unbind_peer(self, caller: int, port: int, remote_domain: int, remote_port: int) -> None:
        if remote_domain not in self.domains:
            return
        state, back_domain, back_port, vcpu = Port.unpack(self.word(remote_domain, remote_port))
        if state == Port.INTERDOMAIN and (back_domain, back_port) == (caller, port):
            unbound = Port.pack(Port.UNBOUND, remote_domain=caller, vcpu=vcpu)
            kept = self.word(remote_domain, remote_port) & Port.KEPT
            self._set_word(remote_domain, remote_port, unbound | kept | Port.PEER_CLOSED)

    def send(self, caller: int, port: int) -> None:
        """Mirror EVTCHNOP_send: EINVAL bad, VIRQ, PIRQ, free; to an unbound peer it is dropped, with success."""
        if not 0 < port < self.ports_max(caller):
            raise HypercallError(errno.EINVAL, f"port {port} is out of range")
        state, remote_domain, remote_port, _ = Port.unpack(self.word(caller, port))
        if state == Port.INTERDOMAIN:
            self.raise_port(remote_domain, remote_port)
        elif state == Port.IPI:
            self.raise_port(caller, port)
        elif state != Port.UNBOUND:
            raise HypercallError(errno.EINVAL, f"port {port} cannot be sent to")

    def unmask(self, caller: int, port: int) -> None:
        """Mirror EVTCHNOP_unmask: EINVAL only when out of range. A pending port is raised again."""
        if not 0 <= port < self.ports_max(caller):
            raise HypercallError(errno.EINVAL, f"port {port} is out of range")
        self._ring(caller, self.path.unmask(caller, port))

    def unmask_and_raise(self, caller: int, port: int) -> None:
        """Unmask at the end of an interrupt, or of a move: a pending port is raised even if it was not masked any more."""
        self._ring(caller, self.path.unmask(caller, port, 1))

    def status(self, caller: int, dom: int, port: int) -> PortStatus:
        """Mirror EVTCHNOP_status: ESRCH, EINVAL, EPERM. For a VIRQ `remote_port` is its number."""
        domain = self._domain(caller, dom)
        used = max(1, domain.memory.load32(Domain.VALID_EVTCHNS))
        valid = min(self.ports_max(domain.domid), -(-used // VALID_STEP) * VALID_STEP)  # tools find the end of the table by it
        if not 0 <= port < valid:
            raise HypercallError(errno.EINVAL, f"port {port} lies beyond the {valid} that are in use")
        if caller not in (domain.domid, self.hardware_domain):
            raise HypercallError(errno.EPERM)
        state, remote_domain, remote_port, vcpu = Port.unpack(self.word(domain.domid, port))
        return PortStatus(_STATUS[state], vcpu, remote_domain, remote_port)

    def reset(self, caller: int, dom: int) -> None:
        """Mirror EVTCHNOP_reset: ESRCH, EPERM, EINVAL; closes every port of the domain, which is on the 2-level ABI again."""
        domain = self._domain(caller, dom)
        if caller not in (domain.domid, self.hardware_domain):
            raise HypercallError(errno.EPERM)
        if domain.domid != caller:
            raise HypercallError(errno.EINVAL, f"domain {domain.domid} is not paused")
        for port, word in list(self.ports(domain.domid)):
            if word & 7 != Port.RESERVED:
                self.close(domain.domid, port)
        fifo.leave(domain)

    # ---- events

    def raise_port(self, domid: int, port: int) -> None:
        """Set a port pending and ring its vCPU's doorbell if that sleeps."""
        self._ring(domid, self.path.set_pending(domid, port))

    def raise_virq(self, domid: int, virq: int, vcpu: int) -> int:
        """Raise a VIRQ as Xen does itself; give the port. ESRCH, EINVAL, ENOENT (vCPU, or nobody has bound it)."""
        if not 0 <= virq < NR_VIRQS:
            raise HypercallError(errno.EINVAL, f"VIRQ {virq}: there are {NR_VIRQS}")
        if domid not in self.domains:
            raise HypercallError(errno.ESRCH, f"no domain {domid}")
        if is_global(virq):
            domid = self.virq_handler(virq)  # a global one goes to its handler, whoever it was meant for
        domain = self.domains.get(domid)
        if domain is None:
            raise HypercallError(errno.ESRCH, f"no domain {domid}, which handles global VIRQs")
        if not 0 <= vcpu < domain.vcpus:
            raise HypercallError(errno.ENOENT, f"domain {domid} has no vCPU {vcpu}")
        port = domain.memory.load32(Domain.virq(self._virq_row(virq, vcpu), virq))
        if port == 0:
            raise HypercallError(errno.ENOENT, f"VIRQ {virq} is not bound in domain {domid}")
        self.raise_port(domid, port)
        return port

    def _ring(self, domid: int, vcpu: int) -> None:
        if vcpu >= 0:
            self.kick(domid, vcpu)

    def keep(self, domid: int, port: int) -> int:
        """Note that a port was made for no file, so that no heir takes it for one that a file has lost; give the port."""
        self._set_word(domid, port, self.word(domid, port) | Port.RAW)
        return port

    def bind_static_pair(self, domid: int, port: int, remote_domid: int, remote_port: int) -> None:
        """Connect two numbers of free ports, before anything runs. EBUSY when one is taken. Neither is born pending."""
        ends = ((domid, port, remote_domid, remote_port), (remote_domid, remote_port, domid, port))
        for own, number, _, _ in ends:
            if self.word(own, number) & 7 != Port.FREE:
                raise HypercallError(errno.EBUSY, f"port {own}:{number} is taken")
        for own, number, other, others_number in ends:
            word = Port.pack(Port.INTERDOMAIN, remote_domain=other, remote_port=others_number)
            self._set_word(own, number, word | Port.STATIC)
