# SPDX-License-Identifier: Apache-2.0
"""What a toolstack or a tool inside a domain asks of the hypervisor, and the domain's kernel of its irq layer.

Raw hypercalls, VIRQs as hardware would raise them, the handler of a global VIRQ, the CPU that serves a port. Pure: each is
executed at once, between two calls of files.
"""

from __future__ import annotations

import errno
from typing import TYPE_CHECKING

from pvbus.actors.hypervisor import operations
from pvbus.actors.hypervisor.errors import HypercallError
from pvbus.actors.runtime import messages as m
from pvbus.actors.runtime.wire import Done

if TYPE_CHECKING:
    from pvbus.actors.hypervisor.irqs import IrqLayer
    from pvbus.actors.hypervisor.ports import EventChannels
    from pvbus.actors.runtime.wire import Message

REQUESTS = (m.RaiseVirq, m.EventChannelOp, m.SetVirqHandler, m.SetAffinity)


def execute(channels: EventChannels, irqs: IrqLayer, message: Message) -> Message:
    """Execute one of REQUESTS; give the answer. Raises OSError with the hypercall's errno."""
    match message:
        case m.RaiseVirq():
            return Done(value=channels.raise_virq(message.domain, message.virq, message.vcpu))
        case m.EventChannelOp():
            if message.domain not in channels.domains:
                raise HypercallError(errno.ESRCH, f"no domain {message.domain}")
            return m.OpDone(argument=operations.event_channel_op(channels, message.domain, message.op, message.argument))
        case m.SetVirqHandler():
            channels.set_virq_handler(message.virq, message.domain)
        case m.SetAffinity():
            irqs.set_affinity(message.domain, message.port, message.vcpu)
        case _:
            raise HypercallError(errno.ENOSYS, f"no request {type(message).__name__}")
    return Done()
