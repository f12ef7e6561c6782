# SPDX-License-Identifier: Apache-2.0
"""The contract of an open event-channel file, where it is not the event path: the ioctls of /dev/xen/evtchn.

What `open` made lives here until `release`: bound ports, their count, the restriction. Ring and bitmap lie in the file's
page, reached through what is handed in. Pure and synchronous: an ioctl is a generator that yields hypercalls (messages) and
is resumed with their value, or has their OSError thrown in; a unit test answers them from a plain `EventChannels`.

One call at a time (the driver's bind lock), so the process must not start one before the last has ended.
"""

from __future__ import annotations

import errno
import os
import struct
from typing import TYPE_CHECKING, Protocol

from pvbus.actors.runtime import messages as m
from pvbus.actors.runtime.inbox import InvariantError
from pvbus.shm.layout import PORTS_MAX, FilePage
from pvbus.shm.layout import Machine as MachinePage

if TYPE_CHECKING:
    from collections.abc import Generator, Mapping

    from pvbus.actors.runtime.wire import Message
    from pvbus.shm.memory import Memory

BIND_VIRQ = 0x00044500
BIND_INTERDOMAIN = 0x00084501
BIND_UNBOUND_PORT = 0x00044502
UNBIND = 0x00044503
NOTIFY = 0x00044504
RESET = 0x00004505
RESTRICT_DOMID = 0x00024506
BIND_STATIC = 0x00044507

UNRESTRICTED = 0xFFFF
DOMID_FIRST_RESERVED = 0x7FF0


class Ring(Protocol):
    """What the file needs of its event ring (EventPath has it)."""

    def grow(self, slot: int, /) -> int:
        """Double the ring, 64 slots first; give its new size. OSError ENOMEM."""

    def reset(self, slot: int, /) -> int:
        """Empty it, clear the overflow, begin a new epoch."""


class BadPointer(OSError):
    """The user's argument could not be copied."""

    def __init__(self) -> None:
        super().__init__(errno.EFAULT, os.strerror(errno.EFAULT))


def _error(number: int, text: str = "") -> OSError:
    return OSError(number, text or os.strerror(number))


def copy_from_user(argument: bytes | None, layout: str) -> tuple[int, ...]:
    """Read a structure from the user's buffer; EFAULT for a bad pointer (None) and for a buffer that ends too early."""
    size = struct.calcsize(layout)
    if argument is None or len(argument) < size:
        raise BadPointer
    return struct.unpack(layout, argument[:size])


class EvtchnFile:
    """Per-open data and the ioctls on it. `page` holds the bitmap of bound ports that NOTIFY and write look at.

    `variants` are the bits of the machine's header: defects of the driver that are switched on. `inject` says how many
    allocations are still to fail: `record_allocation_failures`, `ring_growth_failures`.
    """

    def __init__(
        self, slot: int, page: Memory, ring: Ring, variants: int = 0, inject: Mapping[str, int] | None = None
    ) -> None:
        self.slot = slot
        self.variants = variants
        self.inject = dict(inject or {})
        self.page = page
        self.ring = ring
        self.ports: set[int] = set()
        self.nr_evtchns = 0
        self.ring_size = 0
        self.restrict_domid = UNRESTRICTED

    def ioctl(self, request: int, argument: bytes | None) -> Generator[Message, int, int]:
        """Mirror evtchn_ioctl (A9). Gives the driver's value; raises OSError with its errno, checks in its order."""
        handlers = {
            BIND_VIRQ: self._bind_virq,
            BIND_INTERDOMAIN: self._bind_interdomain,
            BIND_UNBOUND_PORT: self._bind_unbound_port,
            UNBIND: self._unbind,
            NOTIFY: self._notify,
            RESET: self._reset,
            RESTRICT_DOMID: self._restrict_domid,
            BIND_STATIC: self._bind_static,
        }
        handler = handlers.get(request)
        if handler is None:
            raise _error(errno.ENOSYS)
        return handler(argument)

    # ---- A9

    def _bind_virq(self, argument: bytes | None) -> Generator[Message, int, int]:
        if self.restrict_domid != UNRESTRICTED:
            raise _error(errno.EACCES)
        (virq,) = copy_from_user(argument, "=I")
        port = yield m.BindVirq(virq=virq, vcpu=0)
        return (yield from self.bind_to_user(port))

    def _bind_interdomain(self, argument: bytes | None) -> Generator[Message, int, int]:
        port = yield self.hypercall_of(BIND_INTERDOMAIN, argument)
        return (yield from self.bind_to_user(port))

    def _bind_unbound_port(self, argument: bytes | None) -> Generator[Message, int, int]:
        port = yield self.hypercall_of(BIND_UNBOUND_PORT, argument)
        return (yield from self.bind_to_user(port))

    def hypercall_of(self, request: int, argument: bytes | None) -> Message:
        """Check what BIND_UNBOUND_PORT and BIND_INTERDOMAIN check first; give their hypercall. EACCES, EFAULT, in their order."""
        if request == BIND_UNBOUND_PORT:
            if self.restrict_domid != UNRESTRICTED:
                raise _error(errno.EACCES)
            (remote_domain,) = copy_from_user(argument, "=I")
            return m.AllocUnbound(remote_domain=remote_domain & 0xFFFF)
        remote_domain, remote_port = copy_from_user(argument, "=II")
        # Compared as u32, passed on as u16: 65541 is not 5 here, and is domain 5 for the hypervisor.
        if self.restrict_domid not in (UNRESTRICTED, remote_domain):
            raise _error(errno.EACCES)
        return m.BindInterdomain(remote_domain=remote_domain & 0xFFFF, remote_port=remote_port)

    def _unbind(self, argument: bytes | None) -> Generator[Message, int, int]:
        (port,) = copy_from_user(argument, "=I")
        if port not in self.ports:  # a port of ours lies below the limit, which on FIFO moves: only now it is asked for
            limit = yield m.NrChannels()
            raise _error(errno.EINVAL if port >= limit else errno.ENOTCONN)
        yield m.UnbindIrq(port=port)
        self._delete(port)
        return 0

    def _notify(self, argument: bytes | None) -> Generator[Message, int, int]:
        (port,) = copy_from_user(argument, "=I")
        if port not in self.ports:
            raise _error(errno.ENOTCONN)
        yield m.SendPort(port=port)
        return 0

    def _reset(self, argument: bytes | None) -> Generator[Message, int, int]:
        del argument  # ignored, whatever it is (A9.10)
        yield m.Barrier()
        self.ring.reset(self.slot)
        return 0

    def _restrict_domid(self, argument: bytes | None) -> Generator[Message, int, int]:
        if self.restrict_domid != UNRESTRICTED:
            raise _error(errno.EACCES)
        (domid,) = copy_from_user(argument, "=H")
        if domid == 0 or domid >= DOMID_FIRST_RESERVED:
            raise _error(errno.EINVAL)
        self.restrict_domid = domid
        yield from ()
        return 0

    def _bind_static(self, argument: bytes | None) -> Generator[Message, int, int]:
        if self.restrict_domid != UNRESTRICTED and self.variants & MachinePage.VARIANT_STRICT_STATIC:
            raise _error(errno.EACCES)  # H2: where the other binds that name no domain say so
        (port,) = copy_from_user(argument, "=I")
        if port in self.ports:
            raise _error(errno.EISCONN)
        yield from self.bind_to_user(port, static=True)
        return 0  # not the port

    # ---- A2, A6, A7

    def bind_to_user(self, port: int, *, static: bool = False) -> Generator[Message, int, int]:
        """Mirror evtchn_bind_to_user (A7): record, room in the ring, then the handler, whose first event may fire at once."""
        if self._fails("record_allocation_failures"):
            yield from self._without_record(port, static=static)
        duplicate, recorded = port in self.ports, False
        try:
            self.record(port)
            recorded = True
            yield m.BindIrq(port=port, static=static)
        except OSError as error:
            if recorded:
                self.forget([port])
            if error.errno == errno.EPIPE:
                # The hypervisor died. Its heir has closed what had no handler, and may have given the number to another
                # file since; so only a handler of ours goes, if the forerunner had bound it before it died.
                yield m.UnbindIrq(port=port)
            elif not static:  # closed once (H4), and not leaked (H3)
                yield from self.close_quietly(port)
                if recorded and self.variants & MachinePage.VARIANT_DOUBLE_CLOSE:
                    # H4: the irq layer has closed it, and now the driver does. Not carried out: the number may be another
                    # file's by now. The guest kernel ends in BUG, this process ends here.
                    raise InvariantError(f"port {port} is closed twice (variant double-close): BUG") from error
            if duplicate:
                yield from self._erase_what_was_not_inserted()
            raise
        self.ports.add(port)
        return port

    def record(self, port: int) -> None:
        """Count the port, see to room for its event, let its users write it back (A7.1, A7.2). EEXIST, ENOMEM."""
        self.nr_evtchns += 1
        try:
            if port in self.ports:
                raise _error(errno.EEXIST)
            self._resize()
        except OSError:
            self.nr_evtchns -= 1
            raise
        if port < PORTS_MAX:
            self._mark(port, bound=True)

    def forget(self, ports: list[int]) -> None:
        """Undo `record` of ports that got no handler."""
        for port in ports:
            self.nr_evtchns -= 1
            if port < PORTS_MAX:
                self._mark(port, bound=False)

    def _without_record(self, port: int, *, static: bool) -> Generator[Message, int, None]:
        """A7.1 failed: close what the hypervisor has handed out, or leave it to nobody, as the driver does (H3)."""
        if not static and self.variants & MachinePage.VARIANT_LEAK_ON_ENOMEM:
            yield m.ForgetPorts(leaked=port)
        elif not static:
            yield from self.close_quietly(port)
        raise _error(errno.ENOMEM, "no memory for the port's record (injected)")

    def _erase_what_was_not_inserted(self) -> Generator[Message, int, None]:
        """H1: nothing was inserted, so nothing may be erased. The driver erases, and with a zeroed node the whole tree."""
        if not self.variants & MachinePage.VARIANT_DUPLICATE_DROPS:
            return
        yield m.ForgetPorts()
        for port in self.ports:
            self._mark(port, bound=False)
        self.ports.clear()  # and not nr_evtchns: the driver goes on counting them

    def close_quietly(self, port: int) -> Generator[Message, int, None]:
        """Close a port of the hypervisor's that no handler was bound to."""
        try:
            yield m.ClosePort(port=port)
        except OSError as error:
            if error.errno not in (errno.EINVAL, errno.EBUSY):  # already closed, or another handler's
                raise

    def _resize(self) -> None:
        """Mirror evtchn_resize_ring (A6): one doubling is enough, the count grows by one."""
        if self.nr_evtchns > self.ring_size:
            if self.ring_size and self._fails("ring_growth_failures"):
                raise _error(errno.ENOMEM, "no memory for a larger ring (injected)")
            self.ring_size = self.ring.grow(self.slot)

    def _fails(self, allocation: str) -> bool:
        """Whether this allocation is one of those that the configuration lets fail."""
        left = self.inject.get(allocation, 0)
        self.inject[allocation] = max(0, left - 1)
        return left > 0

    def _delete(self, port: int) -> None:
        self.ports.discard(port)
        self.nr_evtchns -= 1
        self._mark(port, bound=False)

    def _mark(self, port: int, *, bound: bool) -> None:
        at = FilePage.BITMAP + port // 64 * 8
        if bound:
            self.page.test_and_set_bit(at, port % 64)
        else:
            self.page.test_and_clear_bit(at, port % 64)
