# SPDX-License-Identifier: Apache-2.0
"""HYPERVISOR_event_channel_op: the fourteen EVTCHNOP operations by number, with Xen's structures in and out (wire facts X2).

Pure: what a domain's kernel (or a tool in it, through privcmd) passes is decoded here, executed by ports.py and fifo.py, and
what the operation gives is written back into the structure. The caller is the domain; whether somebody may speak for it is
decided where the call arrives.
"""

from __future__ import annotations

import errno
import struct
from typing import TYPE_CHECKING, NamedTuple

from pvbus.actors.hypervisor import fifo
from pvbus.actors.hypervisor.errors import HypercallError

if TYPE_CHECKING:
    from collections.abc import Callable

    from pvbus.actors.hypervisor.ports import EventChannels

(
    BIND_INTERDOMAIN, BIND_VIRQ, BIND_PIRQ, CLOSE, SEND, STATUS, ALLOC_UNBOUND,
    BIND_IPI, BIND_VCPU, UNMASK, RESET, INIT_CONTROL, EXPAND_ARRAY, SET_PRIORITY,
) = range(14)  # fmt: skip

DOMID_SELF = 0x7FF0
STATUS_UNBOUND, STATUS_INTERDOMAIN, STATUS_PIRQ, STATUS_VIRQ = 1, 2, 3, 4


class Operation(NamedTuple):
    """One operation: its structure (native alignment, no padding left out), and what executes it on the decoded fields."""

    name: str
    layout: str
    execute: Callable[[EventChannels, int, tuple[int, ...]], tuple[int, ...]]

    @property
    def size(self) -> int:
        """Give the size of the structure in bytes."""
        return struct.calcsize(self.layout)


def _bind_interdomain(channels: EventChannels, caller: int, a: tuple[int, ...]) -> tuple[int, ...]:
    return (a[0], a[1], channels.keep(caller, channels.bind_interdomain(caller, a[0], a[1])))


def _bind_virq(channels: EventChannels, caller: int, a: tuple[int, ...]) -> tuple[int, ...]:
    return (a[0], a[1], channels.keep(caller, channels.bind_virq(caller, a[0], a[1])))


def _bind_pirq(channels: EventChannels, caller: int, a: tuple[int, ...]) -> tuple[int, ...]:
    return (a[0], a[1], channels.bind_pirq(caller, a[0]))


def _close(channels: EventChannels, caller: int, a: tuple[int, ...]) -> tuple[int, ...]:
    channels.close(caller, a[0])
    return a


def _send(channels: EventChannels, caller: int, a: tuple[int, ...]) -> tuple[int, ...]:
    channels.send(caller, a[0])
    return a


def _status(channels: EventChannels, caller: int, a: tuple[int, ...]) -> tuple[int, ...]:
    found = channels.status(caller, a[0], a[1])
    detail = (0, 0)
    if found.status == STATUS_UNBOUND:
        detail = (found.remote_domain, 0)
    elif found.status == STATUS_INTERDOMAIN:
        detail = (found.remote_domain, found.remote_port)
    elif found.status in (STATUS_PIRQ, STATUS_VIRQ):
        detail = (found.remote_port, 0)
    return (a[0], a[1], found.status, found.vcpu, *detail)


def _alloc_unbound(channels: EventChannels, caller: int, a: tuple[int, ...]) -> tuple[int, ...]:
    domid = caller if a[0] == DOMID_SELF else a[0]
    return (a[0], a[1], channels.keep(domid, channels.alloc_unbound(caller, a[0], a[1])))


def _bind_ipi(channels: EventChannels, caller: int, a: tuple[int, ...]) -> tuple[int, ...]:
    return (a[0], channels.keep(caller, channels.bind_ipi(caller, a[0])))


def _bind_vcpu(channels: EventChannels, caller: int, a: tuple[int, ...]) -> tuple[int, ...]:
    channels.bind_vcpu(caller, a[0], a[1])
    return a


def _unmask(channels: EventChannels, caller: int, a: tuple[int, ...]) -> tuple[int, ...]:
    channels.unmask(caller, a[0])
    return a


def _reset(channels: EventChannels, caller: int, a: tuple[int, ...]) -> tuple[int, ...]:
    channels.reset(caller, a[0])
    return a


def _init_control(channels: EventChannels, caller: int, a: tuple[int, ...]) -> tuple[int, ...]:
    gfn, offset, vcpu, _ = a
    return (gfn, offset, vcpu, fifo.init_control(channels, caller, vcpu, gfn, offset))


def _expand_array(channels: EventChannels, caller: int, a: tuple[int, ...]) -> tuple[int, ...]:
    fifo.expand_array(channels, caller, a[0])
    return a


def _set_priority(channels: EventChannels, caller: int, a: tuple[int, ...]) -> tuple[int, ...]:
    fifo.set_priority(channels, caller, a[0], a[1])
    return a


OPERATIONS = {
    BIND_INTERDOMAIN: Operation("bind_interdomain", "=H2xII", _bind_interdomain),
    BIND_VIRQ: Operation("bind_virq", "=III", _bind_virq),
    BIND_PIRQ: Operation("bind_pirq", "=III", _bind_pirq),
    CLOSE: Operation("close", "=I", _close),
    SEND: Operation("send", "=I", _send),
    STATUS: Operation("status", "=H2xIIIII", _status),
    ALLOC_UNBOUND: Operation("alloc_unbound", "=HHI", _alloc_unbound),
    BIND_IPI: Operation("bind_ipi", "=II", _bind_ipi),
    BIND_VCPU: Operation("bind_vcpu", "=II", _bind_vcpu),
    UNMASK: Operation("unmask", "=I", _unmask),
    RESET: Operation("reset", "=H", _reset),
    INIT_CONTROL: Operation("init_control", "=QIIB7x", _init_control),
    EXPAND_ARRAY: Operation("expand_array", "=Q", _expand_array),
    SET_PRIORITY: Operation("set_priority", "=II", _set_priority),
}


def event_channel_op(channels: EventChannels, caller: int, op: int, argument: bytes | None) -> bytes:
    """Execute operation `op` for domain `caller`; give the structure as it is afterwards.

    ENOSYS for an unknown one, before the argument is looked at; EFAULT for a bad pointer (None) and for a structure that ends
    too early; then the operation's own errors in Xen's order.
    """
    operation = OPERATIONS.get(op)
    if operation is None:
        raise HypercallError(errno.ENOSYS, f"no event-channel operation {op}")
    if argument is None or len(argument) < operation.size:
        raise HypercallError(errno.EFAULT)
    fields = struct.unpack(operation.layout, argument[: operation.size])
    return struct.pack(operation.layout, *operation.execute(channels, caller, fields)) + argument[operation.size :]
