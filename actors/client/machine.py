# SPDX-License-Identifier: Apache-2.0
"""A running machine, as an attached process sees it: open files, raise VIRQs, look at the state.

Everything here is a call on the machine's socket, or a look into its segments (`inspector`). A forked child connects anew.
"""

from __future__ import annotations

import contextlib
import errno
import os
import socket
import threading
import uuid
import weakref
from pathlib import Path
from typing import TYPE_CHECKING, Any, Self

from pvbus.actors.client.evtchn import EvtchnFile
from pvbus.actors.client.inspector import Inspector
from pvbus.actors.client.vmbus import Bus, VmbusDriver
from pvbus.actors.runtime import messages as m
from pvbus.actors.runtime import rundir
from pvbus.actors.runtime import vmbus_messages as vm
from pvbus.actors.runtime.asking import ask_blocking
from pvbus.actors.runtime.peer import PeerGone
from pvbus.shm.layout import FilePage
from pvbus.shm.memory import Memory

if TYPE_CHECKING:
    from pvbus.actors.runtime.wire import Message

CALL_TIMEOUT_S = 25.0

_machines: weakref.WeakSet[Machine] = weakref.WeakSet()


def _after_fork_in_child() -> None:
    for machine in list(_machines):
        machine._forked()  # noqa: SLF001 - of this module


os.register_at_fork(after_in_child=_after_fork_in_child)


class MachineNotFoundError(ConnectionError):
    """No machine to attach to; the text says how to start one."""


def attach(name: str | None = None) -> Machine:
    """Attach to a running machine: `name`, else $PVBUS_MACHINE, else the one machine that runs.

    Raises MachineNotFoundError when there is none, or several and no name; ValueError for a name that is none.
    """
    wanted = name or os.environ.get("PVBUS_MACHINE") or None
    if wanted is None:
        running = [found.name for found in rundir.list_machines() if found.alive]
        if not running:
            raise MachineNotFoundError("no machine is running; start one with: pvbus up")
        if len(running) > 1:
            raise MachineNotFoundError(f"several machines run ({', '.join(running)}): say which one (--name, $PVBUS_MACHINE)")
        wanted = running[0]
    return Machine(wanted)


class Machine:
    """A connection to a running machine. A context manager: leaving it closes what was opened through it."""

    def __init__(self, name: str) -> None:
        self.name = name
        self._lock = threading.Lock()
        self._asking = 0  # the thread whose question waits for its answer
        self._files: weakref.WeakSet[EvtchnFile] = weakref.WeakSet()
        self._buses: dict[int, Bus] = {}
        self._inspector: Inspector | None = None
        self._settler: Machine | None = None
        self._path = rundir.run_directory(name)
        self._socket: socket.socket | None = None
        self._connect()
        _machines.add(self)

    def _forked(self) -> None:
        """In a forked child: who held the lock is not here, and drivers are the parent's."""
        self._lock = threading.Lock()
        self._asking = 0
        for bus in self._buses.values():
            bus.forked()
        self._buses.clear()

    def _connect(self) -> None:
        try:
            sock = rundir.connect_machine(self._path)
        except (FileNotFoundError, ConnectionRefusedError):
            text = f"no machine {self.name!r} is running; start it with: pvbus up --name {self.name}"
            raise MachineNotFoundError(text) from None
        try:
            welcome, _ = ask_blocking(sock, m.Hello(), timeout_s=CALL_TIMEOUT_S)
        except BaseException as error:
            sock.close()
            if isinstance(error, PeerGone):
                raise MachineNotFoundError(f"machine {self.name!r} has stopped") from None
            raise
        self._socket, self._pid = sock, os.getpid()
        self.run_id = welcome.run_id if isinstance(welcome, m.Welcome) else ""

    def _ask(
        self, message: Message, timeout_s: float = CALL_TIMEOUT_S, fds: tuple[int, ...] = ()
    ) -> tuple[Message, list[int]]:
        me = threading.get_ident()
        try:
            if self._asking == me:  # a signal handler asks while our own question waits, and its answer is none of ours
                with rundir.connect_machine(self._path) as another:
                    return ask_blocking(another, message, fds, timeout_s)
            with self._lock:
                self._asking = me
                try:
                    return ask_blocking(self._connected(), message, fds, timeout_s)
                finally:
                    self._asking = 0
        except PeerGone:
            raise MachineNotFoundError(f"machine {self.name!r} has stopped") from None

    def _connected(self) -> socket.socket:
        if self._socket is not None and self._pid != os.getpid():  # the connection is the parent's
            self._socket.close()
            self._connect()  # if it cannot now, the next call tries again
        if self._socket is None:
            raise MachineNotFoundError(f"detached from {self.name}")
        return self._socket

    # ---- Xen

    def open_evtchn(
        self, domain: int = 0, *, nonblock: bool = False, flags: int = os.O_RDWR, cloexec: bool = True
    ) -> EvtchnFile:
        """Open /dev/xen/evtchn of a domain. ENODEV for a domain without the xen platform, EMFILE when 1,024 files are open.

        `flags` are the access mode and O_NONBLOCK. `cloexec` False lets `fileno()` through an exec, as on the device without
        O_CLOEXEC; what runs then may give it to `fdopen_evtchn`.
        """
        comm = Path("/proc/thread-self/comm").read_text(encoding="utf-8", errors="replace").rstrip("\n")
        reply, fds = self._ask(m.OpenEvtchn(domain=domain, comm=comm, mode=flags & os.O_ACCMODE))
        if not isinstance(reply, m.Opened) or len(fds) != 4:
            raise ConnectionError(f"unexpected {type(reply).__name__}")
        nonblock = nonblock or bool(flags & os.O_NONBLOCK)
        file = EvtchnFile._open(fds, reply, nonblock=nonblock, cloexec=cloexec)  # noqa: SLF001 - its maker
        self._files.add(file)
        return file

    def fdopen_evtchn(self, fd: int) -> EvtchnFile:
        """Make a file of a descriptor of one (`fileno()`, or a copy) that came by SCM_RIGHTS, by fork or through an exec.

        One more reference to the same open file, with its access mode, O_NONBLOCK, ports and restriction. It takes `fd` over
        and closes it; if this raises, `fd` stays yours. EBADF; EINVAL for what is no open file of this machine; EIO when the
        file's process has died; EMFILE when 256 processes use the file. Mirrors xenevtchn_fdopen.
        """
        file = EvtchnFile._known(fd)  # noqa: SLF001 - its maker
        if file is None:
            reply, fds = self._ask(m.Reopen(), fds=(fd,))
            if not isinstance(reply, m.Opened) or len(fds) != 3:
                raise ConnectionError(f"unexpected {type(reply).__name__}")
            file = EvtchnFile._passed(fds, reply, fd)  # noqa: SLF001 - its maker
        self._files.add(file)
        return file

    def raise_virq(self, virq: int, domain: int = 0, vcpu: int = 0) -> int:
        """Raise a VIRQ as the hypervisor does; give the port. ENOENT when nobody has bound it, EINVAL, ESRCH."""
        reply, _ = self._ask(m.RaiseVirq(virq=virq, domain=domain, vcpu=vcpu))
        return getattr(reply, "value", 0)

    def event_channel_op(self, op: int, argument: bytes | None, domain: int = 0) -> bytes:
        """Mirror HYPERVISOR_event_channel_op, made by the domain's kernel, with its structure; give that back.

        OSError with Xen's errno: ENOSYS for an unknown operation, EFAULT for None and for a structure that ends too early.
        """
        reply, _ = self._ask(m.EventChannelOp(op=op, argument=argument, domain=domain))
        if not isinstance(reply, m.OpDone):
            raise ConnectionError(f"unexpected {type(reply).__name__}")
        return reply.argument

    def set_virq_handler(self, virq: int, domain: int) -> None:
        """Give a global VIRQ to a domain, as XEN_DOMCTL_set_virq_handler does. EINVAL for one that is not global, ESRCH."""
        self._ask(m.SetVirqHandler(virq=virq, domain=domain))

    def set_affinity(self, domain: int, port: int, vcpu: int) -> None:
        """Have a virtual CPU serve a port, as a write to smp_affinity does. ESRCH, ENOENT, EINVAL (no handler, cannot move)."""
        self._ask(m.SetAffinity(domain=domain, port=port, vcpu=vcpu))

    def soft_reset(self, domain: int) -> None:
        """Have a domain boot another kernel (kexec): its files answer EIO, its ports are closed, peers unbound. ESRCH."""
        self._ask(m.SoftReset(domain=domain))

    # ---- Hyper-V

    def bus(self, domain: int = 0) -> Bus:
        """Connect to a domain's VMBus; one connection a domain and process. ENODEV without the platform."""
        found = self._buses.get(domain)
        if found is not None and found.closed:
            found.close()  # cut off, or its machine has stopped
            found = None
        if found is None:
            found = self._buses[domain] = Bus(lambda: self._connect_bus(domain))
        return found

    def _connect_bus(self, domain: int) -> tuple[socket.socket, int]:
        """Ask for a connection to the bus, on one of our own: who asks may be a thread that others wait for."""
        with contextlib.ExitStack() as stack:
            try:
                own = stack.enter_context(rundir.connect_machine(self._path))
                reply, fds = ask_blocking(own, vm.ConnectBus(domain=domain), (), CALL_TIMEOUT_S)
            except (FileNotFoundError, ConnectionRefusedError, PeerGone):
                raise MachineNotFoundError(f"machine {self.name!r} has stopped") from None
        if not isinstance(reply, vm.BusConnection) or len(fds) != 1:
            raise ConnectionError(f"unexpected {type(reply).__name__}")
        return socket.socket(fileno=fds[0]), reply.generation

    def register_driver(self, driver: type[VmbusDriver] | VmbusDriver, domain: int = 0) -> VmbusDriver:
        """Mirror vmbus_driver_register in a domain: every device that nobody has is tried before this returns."""
        return self.bus(domain).register(driver)

    def unregister_driver(self, driver: VmbusDriver | str, domain: int = 0) -> None:
        """Mirror vmbus_driver_unregister: `remove` is called for each of its devices before this returns."""
        self.bus(domain).unregister(driver)

    def devices(self, domain: int = 0) -> list[dict[str, Any]]:
        """List the devices of a domain's bus: name, relid, class_id, device_id, driver, attributes."""
        return self.bus(domain).devices()

    def offer(
        self, device_class: str, instance: str | None = None, domain: int = 0, *, monitor_latency_us: float = 0
    ) -> int:
        """Have the host offer a synthetic device, by class name or GUID; give its relid. EINVAL, EEXIST, ENOSPC, ENODEV.

        With a latency (up to 6553 us) it has a monitor: its driver signals by a trigger that the host looks at as often.
        """
        latency_100ns, instance = round(monitor_latency_us * 10), instance or str(uuid.uuid4())
        reply, _ = self._ask(
            vm.Offer(domain=domain, class_id=device_class, instance_id=instance, latency_100ns=latency_100ns)
        )
        return getattr(reply, "value", 0)

    def rescind(self, relid: int, domain: int = 0) -> None:
        """Have the host withdraw a device. ENOENT."""
        self._ask(vm.RescindOffer(domain=domain, relid=relid))

    def channels(self, domain: int = 0) -> list[dict[str, Any]]:
        """List a domain's channels as its host sees them."""
        reply, _ = self._ask(vm.ListChannels(domain=domain))
        found: list[dict[str, Any]] = getattr(reply, "data", {}).get("channels", [])
        return found

    def shut_down_guest(self, relid: int, domain: int = 0) -> int:
        """Have a shutdown device ask its guest; give the status that it answers. ENOTCONN, ETIMEDOUT."""
        reply, _ = self._ask(vm.HostShutdown(domain=domain, relid=relid))
        return getattr(reply, "value", 0)

    # ---- the machine

    def settle(self) -> None:
        """Return when every submission ring is drained and every upcall done: then "nothing arrives" is a fact.

        On VMBus: no interrupt, tasklet, message or driver's call is under way. EDEADLK from a driver's call, which would wait
        for itself; ETIMEDOUT when one does not end.
        """
        if any(bus.calls_here for bus in self._buses.values()):
            raise OSError(errno.EDEADLK, "a driver's call waits for its own end")
        for bus in self._buses.values():
            bus.await_heir()
        if self._buses and self._settler is None:
            self._settler = Machine(self.name)
        # A driver's call that is waited for may itself call the machine: not behind us on the same connection.
        (self._settler or self)._ask(m.Settle())  # noqa: SLF001 - our own kind

    def advance(self, seconds: float) -> None:
        """Move the machine's clock forward: a time-out costs a test nothing."""
        self._ask(m.Advance(ns=round(seconds * 1e9)))

    def status(self) -> dict[str, Any]:
        """Give the state of the machine as plain data: processes, domains, open files, counters."""
        reply, _ = self._ask(m.Status())
        data: dict[str, Any] = getattr(reply, "data", {})
        look = self.inspector()
        return {**data, "counters": look.counters(), "domains": look.domains(data["domains"]), "files": look.files()}

    def inspector(self) -> Inspector:
        """Map the machine's segments read-only, to look at them while everything runs."""
        if self._inspector is None:
            reply, fds = self._ask(m.Inspect())
            if not isinstance(reply, m.Report):
                raise ConnectionError(f"unexpected {type(reply).__name__}")
            self._inspector = Inspector(dict(zip(reply.segments, fds, strict=True)), reply.data)
        return self._inspector

    def file_page(self, slot: int) -> Memory:
        """Map the page of an open file read-only; the caller closes it. LookupError when no file is open in that slot."""
        try:
            _, fds = self._ask(m.InspectFile(slot=slot))
        except FileNotFoundError:
            raise LookupError(f"no open file in slot {slot}") from None
        page = Memory(fds[0], FilePage.BYTES, False)
        os.close(fds[0])
        return page

    def ports(self, domain: int | None = None) -> list[dict[str, Any]]:
        """List the ports that are not free: domain, port, state, remote_domain, remote_port, file, pending, masked."""
        return self.inspector().ports(domain)

    def shutdown(self) -> None:
        """Stop the machine in order."""
        self._ask(m.Shutdown())

    def close(self) -> None:
        """Close every file opened here, and detach."""
        for file in list(self._files):
            file.close()
        for bus in self._buses.values():
            bus.close()
        self._buses.clear()
        if self._settler is not None:
            self._settler.close()
            self._settler = None
        if self._socket is not None:
            self._socket.close()
            self._socket = None
        if self._inspector is not None:
            self._inspector.close()
            self._inspector = None

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()
