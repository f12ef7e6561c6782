# SPDX-License-Identifier: Apache-2.0
"""/dev/xen/privcmd: the hypercalls of a tool. Of Xen's there is one, event_channel_op, and it is the machine's own.

Everything else a tool may try on it or on its neighbours (gntdev) answers as a kernel without the feature does, ENOTTY for an
ioctl and ENOSYS for a hypercall: the tools of Xen ask first, and do without.
"""

from __future__ import annotations

import errno
import stat
import struct
from collections.abc import Callable

from pvbus.actors.hypervisor.operations import OPERATIONS
from pvbus.view.fuse.abi import FOPEN_DIRECT_IO, FOPEN_NONSEEKABLE, Attributes
from pvbus.view.fuse.node import Handle, Node, error
from pvbus.view.fuse.session import Request

IOCTL_HYPERCALL = 0x00305000
HYPERCALL = struct.Struct("=Q5Q")  # privcmd_hypercall: which one, and its arguments
EVENT_CHANNEL_OP = 32

EventChannelOp = Callable[[int, bytes | None], bytes]
"""As `Machine.event_channel_op` for one domain."""
ReadMemory = Callable[[int, int, int], bytes | None]
WriteMemory = Callable[[int, int, bytes], bool]


class Device(Node):
    """A device that can be opened and has no ioctl of its own."""

    def attributes(self) -> Attributes:
        """Give what can be shown of a device without its number."""
        return Attributes(stat.S_IFREG | 0o600)

    def open(self, request: Request, flags: int) -> Handle:
        """Open it: there is nothing to keep."""
        handle = Handle()
        handle.open_flags = FOPEN_DIRECT_IO | FOPEN_NONSEEKABLE
        return handle


class Privcmd(Device):
    """Answers hypercalls for a domain; the caller's memory is reached through what is handed in."""

    def __init__(self, event_channel_op: EventChannelOp, read_memory: ReadMemory, write_memory: WriteMemory) -> None:
        self.event_channel_op = event_channel_op
        self.read_memory = read_memory
        self.write_memory = write_memory

    def open(self, request: Request, flags: int) -> Handle:
        """Open it."""
        return _PrivcmdHandle(self)

    def hypercall(self, tid: int, argument: int) -> int:
        """Carry out the hypercall that a thread describes at `argument`; give its value. OSError with Xen's errno, EFAULT."""
        raw = self.read_memory(tid, argument, HYPERCALL.size)
        if raw is None:
            raise error(errno.EFAULT)
        number, operation, address, *_ = HYPERCALL.unpack(raw)
        if number != EVENT_CHANNEL_OP or operation not in OPERATIONS:
            raise error(errno.ENOSYS)
        structure = self.read_memory(tid, address, OPERATIONS[operation].size)
        answer = self.event_channel_op(operation, structure)
        if not self.write_memory(tid, address, answer):
            raise error(errno.EFAULT)
        return 0


class _PrivcmdHandle(Handle):
    open_flags = FOPEN_DIRECT_IO | FOPEN_NONSEEKABLE

    def __init__(self, device: Privcmd) -> None:
        self.device = device

    def ioctl(self, request: Request, command: int, argument: int) -> int:
        """Answer IOCTL_PRIVCMD_HYPERCALL; ENOTTY for the others."""
        if command != IOCTL_HYPERCALL:
            raise error(errno.ENOTTY)
        return self.device.hypercall(request.pid, argument)
