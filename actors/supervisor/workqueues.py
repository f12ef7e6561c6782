# SPDX-License-Identifier: Apache-2.0
"""The Hyper-V half of a machine, as its supervisor keeps it: a workqueue process a domain, and the doorbells around it."""

from __future__ import annotations

import errno
import os
import signal
import socket
from typing import TYPE_CHECKING, Any

from pvbus.actors.runtime import messages as m
from pvbus.actors.runtime import vmbus_messages as vm
from pvbus.actors.runtime.config import VMBUS_VERSIONS
from pvbus.actors.runtime.process import Peer, Received, failure_of
from pvbus.actors.runtime.supervision import Child, ChildSpec, State
from pvbus.actors.runtime.wire import Done, Failure, Message
from pvbus.actors.supervisor import limits
from pvbus.actors.supervisor.opening import ignore
from pvbus.actors.supervisor.quota import Quota

if TYPE_CHECKING:
    from pvbus.actors.runtime.config import DomainConfig
    from pvbus.actors.supervisor.process import Supervisor

ENTRY = "pvbus.actors.workqueue.process:WorkqueueProcess"
CALL_DEADLINE_S = 20.0
RETRY_NS = 2_000_000  # a workqueue that has died is started again in some 20 ms
CONNECTS_MAX = 5_000
CONNECTS_A_USER_MAX = 16  # a process needs one a domain, and one more when a workqueue has died
SETTLES_A_USER_MAX = 16  # each has the whole machine asked in turns


def on_hyperv(domains: tuple[DomainConfig, ...]) -> list[DomainConfig]:
    """Give the domains on the Hyper-V platform."""
    return [domain for domain in domains if "hyperv" in domain.platforms]


class Workqueues:
    """Every workqueue of a machine."""

    def __init__(self, supervisor: Supervisor) -> None:
        self._supervisor = supervisor
        self._domains = {domain.id: domain for domain in on_hyperv(supervisor.config.domain)}
        self._connects = Quota(CONNECTS_A_USER_MAX, "requests for a bus")
        self.settles = Quota(SETTLES_A_USER_MAX, "requests to settle")
        self._work = {domid: _eventfd() for domid in self._domains}
        self._exits = {(domid, vcpu): _eventfd() for domid, domain in self._domains.items() for vcpu in range(domain.cpus)}

    def specs(self) -> list[ChildSpec]:
        """Give their child specs, which come behind the CPUs'."""
        return [ChildSpec(f"workqueue/{domid}", ENTRY) for domid in self._domains]

    def cpu_fds(self, domid: int, vcpu: int) -> dict[str, int]:
        """Give what a CPU's process needs beside the rest."""
        if domid not in self._domains:
            return {}
        segment = self._supervisor.pages.fds()[f"hyperv{domid}"]
        return {"hyperv": segment, "work": self._work[domid], "exit": self._exits[domid, vcpu]}

    def exit_fds(self, domid: int, vcpu: int) -> tuple[int, ...]:
        """Give the doorbell by which the hypervisor hears of a CPU's exits."""
        return (self._exits[domid, vcpu],) if domid in self._domains else ()

    # ---- children

    def start(self, child: Child, domid: int) -> None:
        """Tell a forked child whose workqueue it is."""
        supervisor, domain = self._supervisor, self._domains[domid]
        theirs, hypervisors = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        fds = {
            "machine": supervisor.pages.fds()["machine"],
            "hyperv": supervisor.pages.fds()[f"hyperv{domid}"],
            "hypervisor": theirs.fileno(),
            "work": self._work[domid],
        }
        arguments: dict[str, Any] = {
            "domain": domid, "vcpus": domain.cpus, "acpi_device": domain.acpi_device, "irq": domain.vmbus_irq,
            "target_vp": domain.vmbus_cpu,
            "versions": [VMBUS_VERSIONS[version] for version in domain.vmbus_versions],
        }  # fmt: skip
        hypervisor = supervisor.hypervisor()
        if hypervisor is None:  # it died meanwhile: started again behind its heir
            supervisor.forkserver.kill(child.pid, signal.SIGKILL)
        else:
            hypervisor.ask(vm.WorkqueueUp(domain=domid), ignore, CALL_DEADLINE_S, fds=(hypervisors.fileno(),))
            supervisor.ask_start(child, arguments, fds, lambda: self._started(child, domid, hypervisor))
        theirs.close()
        hypervisors.close()

    def rewire(self, hypervisor: Peer) -> None:
        """Connect every workqueue that lives to a hypervisor's heir."""
        for domid in self._domains:
            self._rewire(domid, hypervisor)

    def _rewire(self, domid: int, hypervisor: Peer) -> None:
        control = self._up(domid)
        if control is None:
            return
        theirs, hypervisors = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        hypervisor.ask(vm.WorkqueueUp(domain=domid), ignore, CALL_DEADLINE_S, fds=(hypervisors.fileno(),))
        control.ask(m.Rewire(), ignore, CALL_DEADLINE_S, fds=(theirs.fileno(),))
        theirs.close()
        hypervisors.close()

    def _started(self, child: Child, domid: int, first: Peer) -> None:
        """It is up; if the hypervisor whose socket it was given has died meanwhile, the heir did not find it up."""
        now = self._supervisor.hypervisor()
        self._supervisor.started(child.spec.name)
        if now is not None and now is not first:
            self._rewire(domid, now)

    def clock_moved(self) -> None:
        """Wake those that wait for a time."""
        for domid in self._domains:
            control = self._up(domid)
            if control is not None:
                control.ask(m.Advance(ns=0), ignore, CALL_DEADLINE_S)

    def controls(self) -> list[Peer | None]:
        """Give the workqueues' control connections; None for one that is being restarted."""
        return [self._up(domid) for domid in self._domains]

    def _up(self, domid: int) -> Peer | None:
        """One that is forked and has not been told what it is takes nothing but that."""
        name = f"workqueue/{domid}"
        return self._supervisor.controls.get(name) if self._supervisor.table[name].state is State.UP else None

    # ---- users

    def connect(self, message: vm.ConnectBus, received: Received) -> None:
        """Give a user process a connection to a domain's bus. ENODEV without the platform; a bus that is reborn is waited for.

        EAGAIN when too many requests of this user wait.
        """
        if message.domain not in self._domains:
            raise OSError(errno.ENODEV, f"domain {message.domain} is not on the Hyper-V platform")
        self._connects.take(received.peer)
        try:
            self._connect(message, received, CONNECTS_MAX)
        except OSError:
            self._connects.give(received.peer)
            raise

    def _reply(self, received: Received, reply: Message, fds: tuple[int, ...] = ()) -> None:
        self._connects.give(received.peer)
        received.peer.reply(received.request, reply, fds)

    def _connect(self, message: vm.ConnectBus, received: Received, tries: int) -> None:
        control = self._up(message.domain)
        if control is None:
            self._connect_later(message, received, tries)
            return
        limits.check_reserve(limits.RESERVE_FOR_USERS, self._work[message.domain])  # a slow bus may owe many an answer
        theirs, buses = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        generation = self._supervisor.table[f"workqueue/{message.domain}"].restarts

        def connected(reply: Message, _fds: list[int]) -> None:
            with theirs:
                if isinstance(reply, Done):
                    self._reply(received, vm.BusConnection(generation=generation), (theirs.fileno(),))
                elif getattr(reply, "errno", 0) == errno.EPIPE:
                    self._connect_later(message, received, tries)
                else:
                    text = getattr(reply, "text", "")
                    self._reply(received, Failure(errno=getattr(reply, "errno", errno.EIO), text=text))

        with buses:
            control.ask(vm.BusUser(pid=received.peer.pid), connected, CALL_DEADLINE_S, fds=(buses.fileno(),))

    def _connect_later(self, message: vm.ConnectBus, received: Received, tries: int) -> None:
        if self._supervisor.stopping or tries == 0:
            text = f"domain {message.domain} has no workqueue"
            self._reply(received, Failure(errno=errno.EAGAIN, text=text))
            return
        inbox = self._supervisor.inbox
        inbox.call_at(inbox.clock.now_ns() + RETRY_NS, lambda: self._connect_again(message, received, tries - 1))

    def _connect_again(self, message: vm.ConnectBus, received: Received, tries: int) -> None:
        try:
            if not received.peer.closed:
                self._connect(message, received, tries)
        except OSError as error:
            self._reply(received, failure_of(error))


def _eventfd() -> int:
    return os.eventfd(0, os.EFD_NONBLOCK | os.EFD_CLOEXEC)
