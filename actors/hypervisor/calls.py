# SPDX-License-Identifier: Apache-2.0
"""The calls that take several steps, as generators: each yields what it has to wait for, the process resumes it.

Pure: a unit test answers every wait at once. One call runs at a time, so a call sees no other half done; and before it
starts every submission ring is drained, so it sees every notify that had returned.
"""

from __future__ import annotations

import contextlib
import errno
from typing import TYPE_CHECKING, NamedTuple

from pvbus.actors.hypervisor.errors import HypercallError
from pvbus.actors.hypervisor.ports import DOMID_SELF
from pvbus.actors.runtime import messages as m
from pvbus.shm import channel
from pvbus.shm.layout import Irq, Port

if TYPE_CHECKING:
    from collections.abc import Callable, Generator

    from pvbus.actors.hypervisor.irqs import IrqLayer
    from pvbus.actors.runtime.wire import Message

UNBINDS_A_TURN = 64  # about a millisecond
LOOKS_A_TURN = 512
HANDLER_ROUNDS_MAX = 1_000_000  # a handler takes a microsecond; a dead CPU's heir finishes it within the restart time


class Flush(NamedTuple):
    """Wait until every CPU of the domain has delivered what is pending."""

    domid: int


class Again(NamedTuple):
    """Wait a turn of the loop: a handler is running."""


Wait = Flush | Again


def barrier(domid: int) -> Generator[Wait, None, int]:
    """Deliver everything that was notified before."""
    yield Flush(domid)
    return 0


def _disable_all(irqs: IrqLayer, domid: int, ports: list[int]) -> Generator[Wait, None, int]:
    running = yield from _those(ports, lambda port: irqs.disable(domid, port))
    for _ in range(HANDLER_ROUNDS_MAX):
        running = [port for port in running if irqs.disable(domid, port)]
        if not running:
            break
        yield Again()
    else:
        raise HypercallError(errno.EIO, f"the handler of port {running[0]} does not end")
    # FIFO: a word that is linked is taken out by its CPU, which has been told; its number is free only then.
    linked = yield from _those(ports, lambda port: irqs.is_linked(domid, port))
    for _ in range(HANDLER_ROUNDS_MAX):
        linked = [port for port in linked if irqs.is_linked(domid, port)]
        if not linked:
            return 0
        yield Again()
    raise HypercallError(errno.EIO, f"port {linked[0]} stays in its queue")


def _those(ports: list[int], condition: Callable[[int], bool]) -> Generator[Wait, None, list[int]]:
    """Find the ports for which a condition holds, in turns: there may be 131,071, and others' notifies go on meanwhile."""
    found = []
    for at, port in enumerate(ports):
        if condition(port):
            found.append(port)
        if at % LOOKS_A_TURN == LOOKS_A_TURN - 1:
            yield Again()
    return found


def unbind_irq(irqs: IrqLayer, domid: int, slot: int, port: int) -> Generator[Wait, None, int]:
    """Mirror A8: deliver what came before, disable, wait for a running handler, then unbind and close."""
    yield Flush(domid)
    if irqs.word(domid, port) & Irq.SLOT != slot + 1:
        return 0  # repeated after a rebirth of the hypervisor: it was done
    yield from _disable_all(irqs, domid, [port])
    irqs.unbind(domid, port)
    return 0


def close_port(irqs: IrqLayer, domid: int, slot: int, port: int) -> Generator[Wait, None, int]:
    """Close a port that the file could not bind (A7.3); a handler that a dead hypervisor bound and did not report goes, too."""
    word = irqs.word(domid, port)
    # A static handler is an older binding of a number that Xen has handed out now (EEXIST): it stays.
    if word & Irq.SLOT == slot + 1 and not word & Irq.STATIC:
        yield from _disable_all(irqs, domid, [port])
        irqs.unbind(domid, port)
    else:
        irqs.channels.close(domid, port)
    return 0


def release(irqs: IrqLayer, domid: int, slot: int) -> Generator[Wait, None, int]:
    """Mirror evtchn_release: every port of the file, the largest first (A2.3); give their number. H1: what it forgot stays."""
    ports = sorted(irqs.ports_of(domid, slot), reverse=True)
    yield from _disable_all(irqs, domid, ports)
    for at, port in enumerate(ports):
        if irqs.word(domid, port) & Irq.LOST and irqs.channels.word(domid, port) & 7 != Port.FREE:
            irqs.abandon(domid, port)
        else:
            irqs.unbind(domid, port)
        if at % UNBINDS_A_TURN == UNBINDS_A_TURN - 1:  # a file may have 131,071: others' notifies go on meanwhile
            yield Again()
    return len(ports)


def forget_ports(irqs: IrqLayer, domid: int, slot: int, leaked: int) -> int:
    """Mark a channel that its file has not closed (H3), or with 0 every handler whose record it has lost (H1)."""
    for port in [leaked] if leaked else list(irqs.ports_of(domid, slot)):
        irqs.mark_lost(domid, port)
    return 0


def bind_irq(irqs: IrqLayer, domid: int, slot: int, port: int, *, static: bool) -> int:
    """Mirror bind_evtchn_to_irqhandler_lateeoi."""
    irqs.bind(domid, port, slot, static=static)
    return port


def at_once(irqs: IrqLayer, domid: int, slot: int, message: Message, unclaimed: set[int]) -> int:
    """Execute a call of a file that has nothing to wait for; what it is given is in `unclaimed` until it binds a handler.

    A file that dies in between must not leak a port.
    """
    channels = irqs.channels
    match message:
        case m.AllocUnbound():
            value = channels.alloc_unbound(domid, DOMID_SELF, message.remote_domain)
        case m.BindInterdomain():
            value = channels.bind_interdomain(domid, message.remote_domain, message.remote_port)
        case m.BindVirq():
            value = channels.bind_virq(domid, message.virq, message.vcpu)
        case m.BindIrq():
            value = bind_irq(irqs, domid, slot, message.port, static=message.static)
            unclaimed.discard(message.port)
            return value
        case m.NrChannels():
            return channel.nr_channels(channels.domains[domid].memory)
        case m.SendPort():
            with contextlib.suppress(HypercallError):  # A9.6: 0 whatever the hypervisor said
                channels.send(domid, message.port)
            return 0
        case m.ForgetPorts():
            return forget_ports(irqs, domid, slot, message.leaked)
        case _:
            raise HypercallError(errno.ENOSYS, f"no hypercall {type(message).__name__}")
    unclaimed.add(value)
    return value
