# SPDX-License-Identifier: Apache-2.0
"""/dev/xen/privcmd: the hypercalls of a tool. Of Xen's there is one, event_channel_op, and it is the machine's own.

Everything else a tool may try on it or on its neighbours (gntdev) answers as a kernel without the feature does, ENOTTY for an
ioctl and ENOSYS for a hypercall: the tools of Xen ask first, and do without.
"""

from __future__ import annotations

import errno
import struct
from collections.abc import Callable

from pvbus.actors.client.evtchn import CALL_TIMEOUT_S
from pvbus.actors.hypervisor.operations import OPERATIONS
from pvbus.actors.runtime import messages as m
from pvbus.actors.runtime.peer import Peer
from pvbus.actors.runtime.wire import Failure, Message, close_fds
from pvbus.view.fuse.abi import FOPEN_DIRECT_IO, FOPEN_NONSEEKABLE
from pvbus.view.fuse.node import DeviceNode, Handle, error
from pvbus.view.fuse.request import Request
from pvbus.view.seccomp import abi

IOCTL_HYPERCALL = 0x00305000
HYPERCALL = struct.Struct("=Q5Q")  # privcmd_hypercall: which one, and its arguments
EVENT_CHANNEL_OP = 32

Then = Callable[[int, bytes], None]
"""Called with an errno, 0 for success, and with the structure as it is afterwards."""
EventChannelOp = Callable[[int, bytes | None, Then], None]
"""HYPERVISOR_event_channel_op of a domain, with a continuation."""


def machine_op(machine: Peer, domain: int) -> EventChannelOp:
    """Have a machine carry out the operations of a domain."""

    def ask(operation: int, argument: bytes | None, then: Then) -> None:
        def answered(reply: Message, fds: list[int]) -> None:
            close_fds(fds)
            if isinstance(reply, m.OpDone):
                then(0, reply.argument)
            else:
                then(reply.errno if isinstance(reply, Failure) else errno.EPROTO, b"")

        machine.ask(m.EventChannelOp(op=operation, argument=argument, domain=domain), answered, CALL_TIMEOUT_S)

    return ask


class Mute(DeviceNode):
    """A device that can be opened and has no ioctl of its own."""

    def open(self, request: Request, flags: int) -> Handle:
        """Open it: there is nothing to keep."""
        handle = Handle()
        handle.open_flags = FOPEN_DIRECT_IO | FOPEN_NONSEEKABLE
        return handle


class Privcmd(Mute):
    """Answers hypercalls of a domain's tools."""

    def __init__(self, event_channel_op: EventChannelOp) -> None:
        self.event_channel_op = event_channel_op

    def open(self, request: Request, flags: int) -> Handle:
        """Open it."""
        return _PrivcmdHandle(self)

    def hypercall(self, tid: int, argument: int, then: Callable[[int], None]) -> None:
        """Carry out the hypercall that a thread describes at `argument`; `then` gets 0 or an errno. EFAULT, ENOSYS at once."""
        raw = abi.read_memory(tid, argument, HYPERCALL.size)
        if raw is None:
            raise error(errno.EFAULT)
        number, operation, address, *_ = HYPERCALL.unpack(raw)
        if number != EVENT_CHANNEL_OP or operation not in OPERATIONS:
            raise error(errno.ENOSYS)

        def done(failed: int, structure: bytes) -> None:
            if not failed and not abi.write_memory(tid, address, structure):
                failed = errno.EFAULT
            then(failed)

        self.event_channel_op(operation, abi.read_memory(tid, address, OPERATIONS[operation].size), done)


class _PrivcmdHandle(Handle):
    open_flags = FOPEN_DIRECT_IO | FOPEN_NONSEEKABLE

    def __init__(self, device: Privcmd) -> None:
        self.device = device

    def ioctl(self, request: Request, command: int, argument: int) -> int | None:
        """Answer IOCTL_PRIVCMD_HYPERCALL; ENOTTY for the others."""
        if command != IOCTL_HYPERCALL:
            raise error(errno.ENOTTY)
        self.device.hypercall(request.pid, argument, lambda failed: request.fail(failed) if failed else request.result(0))
        return None
