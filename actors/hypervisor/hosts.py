# SPDX-License-Identifier: Apache-2.0
"""The Hyper-V hosts of all domains, wired: doorbells, timers, memory that comes by descriptor, messages of workqueues.

Part of the hypervisor's process, and the only part that knows both its inbox and hyperv.py.
"""

from __future__ import annotations

import contextlib
import errno
import functools
import os
import select
import socket
from typing import TYPE_CHECKING, Any, NamedTuple

from pvbus.actors.hypervisor.errors import HypercallError
from pvbus.actors.hypervisor.hyperv import HypervHost
from pvbus.actors.hypervisor.synic import request_interrupt
from pvbus.actors.runtime import messages as m
from pvbus.actors.runtime import vmbus_messages as vm
from pvbus.actors.runtime.process import Peer, PeerGone
from pvbus.actors.runtime.vmbus_facts import HOST_DEVICES
from pvbus.actors.runtime.wire import Done, Failure, Message
from pvbus.shm import hyperv, store
from pvbus.shm.layout import Machine
from pvbus.shm.memory import ChannelRing, Memory

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping

    from pvbus.actors.hypervisor.cpus import Cpus
    from pvbus.actors.hypervisor.vmbus.channel import RingPages
    from pvbus.actors.hypervisor.vmbus.endpoint import Ring
    from pvbus.actors.runtime.inbox import Inbox
    from pvbus.actors.runtime.process import Received
    from pvbus.shm.memory import EventPath


SYNCHRONIZE_DEADLINE_S = 10.0
TICKS_A_LOOK_MAX = 64  # a guest that fills its ring as fast as it is read does not settle


def map_ring(pages: RingPages) -> Ring:
    """Give the host's view of a channel's rings. ValueError when they differ in size."""
    if pages.size != 2 * pages.downstream:
        raise ValueError(f"rings of {pages.downstream} and {pages.size - pages.downstream} bytes")
    return ChannelRing(pages.memory, pages.offset + pages.downstream, pages.offset, pages.downstream)


class Doors(NamedTuple):
    """A channel's doorbells."""

    drivers: int
    hosts: int


class Host:
    """One domain's host and what it is wired to."""

    def __init__(self, domid: int, host: HypervHost) -> None:
        self.domid = domid
        self.host = host
        self.workqueue: Peer | None = None
        self.doors: dict[int, Doors] = {}
        self.exits: dict[str, tuple[int]] = {}  # by CPU
        self.recovered = False  # knows what its forerunner knew: before that nothing may be offered or stored
        self.waiting: list[Received] = []  # of the toolstack, until then
        self.timer: Any = None
        self.timer_ns: int | None = None


class Hosts:
    """Every domain on the Hyper-V platform."""

    def __init__(
        self, inbox: Inbox, path: EventPath, cpus: Cpus, kick: Callable[[int, int], None], machine: Memory
    ) -> None:
        self._wrong_signal_word = bool(machine.load32(Machine.VARIANTS) & Machine.VARIANT_WRONG_SIGNAL_WORD)
        self._inbox = inbox
        self._path = path
        self._cpus = cpus
        self._kick = kick
        self._hosts: dict[int, Host] = {}
        self._of_peer: dict[Peer, Host] = {}

    def add_all(self, vcpus: Mapping[int, int], fds: Mapping[str, int]) -> None:
        """Make the hosts of those domains that have a Hyper-V segment; they know nothing of forerunners before `recover`."""
        for domid, count in vcpus.items():
            if f"hyperv{domid}" in fds:
                self._add(domid, count, fds[f"hyperv{domid}"], fds[f"kept{domid}"])

    def _add(self, domid: int, vcpus: int, segment_fd: int, kept_fd: int) -> None:
        segment = Memory(segment_fd, hyperv.BYTES)
        self._cpus.watch(domid, segment)

        def interrupt(vp: int, vector: int) -> None:
            request_interrupt(segment, vp, vector)
            if self._path.kick_vcpu(domid, vp):
                self._kick(domid, vp)

        host = HypervHost(
            segment, Memory(kept_fd, store.BYTES), vcpus, interrupt, map_ring, self._inbox.clock.now_ns,
            wrong_signal_word=self._wrong_signal_word,
        )  # fmt: skip
        self._hosts[domid] = Host(domid, host)

    def offer_defaults(self, domains: Mapping[int, Mapping[str, Any]]) -> None:
        """Offer each domain the devices of its configuration, on the first boot: an heir has them from the snapshot."""
        for domid, host in self._hosts.items():
            for name in domains[domid]["devices"]:
                host.host.offer(name, str(HOST_DEVICES[name]))

    def __contains__(self, domid: int) -> bool:
        return domid in self._hosts

    def _host(self, domid: int) -> Host:
        found = self._hosts.get(domid)
        if found is None:
            raise HypercallError(errno.ENODEV, f"domain {domid} is not on the Hyper-V platform")
        return found

    # ---- CPUs

    def cpu_up(self, domid: int, vcpu: int, peer: Peer, fd: int) -> None:
        """Hand a (re)born CPU the doorbells of its domain's channels, and listen to its exits: it has written EOM."""
        host = self._hosts[domid]
        for relid, doors in host.doors.items():
            peer.ask(vm.AttachDoor(relid=relid), _ignore, fds=(doors.drivers,))
        for old in host.exits.pop(peer.name, ()):
            self._inbox.remove_fd(old)
            os.close(old)
        host.exits[peer.name] = (fd,)

        def on_exit(_events: int) -> None:
            with contextlib.suppress(BlockingIOError):
                os.eventfd_read(fd)
            host.host.on_exits()
            self._schedule(host)

        self._inbox.add_fd(fd, select.EPOLLIN, on_exit)
        host.host.on_cpu_up(vcpu)
        self._schedule(host)

    # ---- the workqueue

    def workqueue_up(self, message: vm.WorkqueueUp, received: Received) -> Message:
        """Connect a workqueue, first or reborn."""
        host = self._host(message.domain)
        if host.workqueue is not None:
            self.forget(host.workqueue)  # its hang-up comes behind its heir
        host.workqueue = self._inbox.add_peer(socket.socket(fileno=received.fds[0]), f"workqueue/{message.domain}")
        self._of_peer[host.workqueue] = host
        return Done()

    def is_workqueue(self, peer: Peer) -> bool:
        """Tell whether a peer is a domain's workqueue."""
        return peer in self._of_peer

    def forget(self, peer: Peer) -> None:
        """A workqueue has died: its memory and doorbells are its heir's, who gives them again, or begins anew."""
        host = self._of_peer.pop(peer, None)
        if host is None or host.workqueue is not peer:
            return
        host.workqueue = None
        host.host.frames.clear()
        for relid in tuple(host.doors):
            self._drop_doors(host, relid)

    def _synchronize(self, host: Host, received: Received) -> None:
        running = dict(self._cpus.of(host.domid))

        def done(vcpu: int, _reply: Message, _fds: list[int]) -> None:
            del running[vcpu]  # answered, or dead: then nothing runs there
            if not running:
                _done(received)

        for vcpu, cpu in tuple(running.items()):
            cpu.ask(m.FlushUpcalls(), functools.partial(done, vcpu), SYNCHRONIZE_DEADLINE_S)
        if not running:
            _done(received)

    def on_message(self, received: Received) -> Message | None:
        """Execute what a domain's kernel asks of its hypervisor."""
        host = self._of_peer[received.peer]
        if isinstance(received.message, vm.SynchronizeIrq):
            self._synchronize(host, received)
            return None
        message, guest = received.message, host.host
        reply: Message = Done()
        match message:
            case vm.PostMessage():
                serial = message.serial % hyperv.Buffer.SERIALS
                status = guest.synic.hv_post_message(message.connection, message.type, message.payload, serial)
                reply = Done(value=int(status))
            case vm.SignalEvent():
                reply = Done(value=int(guest.synic.hv_signal_event(message.connection, message.flag)))
            case vm.WriteMsr():
                guest.write_msr(message.vp, message.msr, message.value)
            case vm.ReadMsr():
                reply = Done(value=guest.read_msr(message.vp, message.msr))
            case vm.GuestMemory():
                guest.frames.add(message.frame, message.pages, Memory(received.fds[0], message.pages * hyperv.PAGE))
                os.close(received.fds[0])
            case vm.DropMemory():
                guest.frames.drop(message.frame)
            case vm.AttachChannel():
                self._attach(host, message.relid, Doors(*received.fds))
                self._monitor(host, message)
            case vm.DetachChannel():
                self._drop_doors(host, message.relid)
            case vm.MemoryKnown():
                self._recover(host, guest_gone=message.fresh)
            case _:
                raise OSError(errno.ENOSYS, f"no hypercall {type(message).__name__}")
        self._schedule(host)
        return reply

    def _attach(self, host: Host, relid: int, doors: Doors) -> None:
        self._drop_doors(host, relid)
        host.doors[relid] = doors
        self._inbox.add_fd(doors.hosts, select.EPOLLIN, functools.partial(self._rung, host, relid, doors.hosts))
        for _, cpu in self._cpus.of(host.domid):
            with contextlib.suppress(PeerGone):
                cpu.ask(vm.AttachDoor(relid=relid), _ignore, fds=(doors.drivers,))

    def _monitor(self, host: Host, message: vm.AttachChannel) -> None:
        page = host.host.frames.find(message.monitor_frame) if message.monitor_frame else None
        if page is not None:
            host.host.monitors.attach(message.relid, *page)

    def _rung(self, host: Host, relid: int, fd: int, _events: int) -> None:
        """A driver has signalled: what would be HvSignalEvent is done on its guest's behalf."""
        with contextlib.suppress(BlockingIOError):
            os.eventfd_read(fd)
        host.host.ring(relid)
        self._schedule(host)

    def _drop_doors(self, host: Host, relid: int) -> None:
        doors = host.doors.pop(relid, None)
        if doors is None:
            return
        self._inbox.remove_fd(doors.hosts)
        host.host.monitors.detach(relid)
        for _, cpu in self._cpus.of(host.domid):
            with contextlib.suppress(PeerGone):
                cpu.tell(vm.DetachDoor(relid=relid))
        for fd in doors:
            os.close(fd)

    # ---- time

    def _schedule(self, host: Host) -> None:
        due = host.host.due_ns()
        if due == host.timer_ns and due is not None:
            return
        if host.timer is not None:
            host.timer.cancel()
        host.timer_ns, host.timer = due, None
        if due is not None:
            host.timer = self._inbox.call_at(due, functools.partial(self._tick, host))

    def _tick(self, host: Host) -> None:
        host.timer = host.timer_ns = None
        host.host.tick()
        self._schedule(host)

    def look(self) -> None:
        """Do at once what would be done in the next turns: exits that nobody has heard of yet, timers that are due."""
        for host in self._hosts.values():
            host.host.on_exits()
            host.host.look()
            for _ in range(TICKS_A_LOOK_MAX):
                due = host.host.due_ns()
                if due is None or due > self._inbox.clock.now_ns():
                    break
                host.host.tick()
            self._schedule(host)

    # ---- the toolstack

    def first_boot(self) -> None:
        """There is no forerunner."""
        for host in self._hosts.values():
            host.recovered = True

    def _recover(self, host: Host, *, guest_gone: bool) -> None:
        if host.recovered:
            return
        host.host.recover(guest_gone=guest_gone)
        host.recovered = True
        waiting, host.waiting = host.waiting, []
        for received in waiting:
            try:
                reply = self.execute(received.message, received)
            except OSError as error:
                reply = Failure(errno=error.errno or errno.EIO, text=error.strerror or "")
            if reply is not None:
                received.peer.reply(received.request, reply)

    def execute(self, message: Message, received: Received) -> Message | None:
        """Execute what an administrator asks of a host; an heir does so when it knows what there is."""
        waits = self._host(message.domain) if isinstance(message, REQUESTS) else None
        if waits is not None and not waits.recovered:
            waits.waiting.append(received)
            return None
        match message:
            case vm.Offer():
                host = self._host(message.domain)
                reply: Message | None = Done(value=host.host.offer(message.class_id, message.instance_id, message.latency_100ns))
            case vm.RescindOffer():
                host = self._host(message.domain)
                host.host.rescind(message.relid)
                reply = Done()
            case vm.ListChannels():
                host = self._host(message.domain)
                reply = m.Report(data={"channels": host.host.channels()})
            case vm.HostShutdown():
                host = self._host(message.domain)
                host.host.shut_down(message.relid, lambda status: _answer(received, status))
                reply = None
            case _:
                raise OSError(errno.ENOSYS, f"no request {type(message).__name__}")
        self._schedule(host)
        return reply


REQUESTS = (vm.Offer, vm.RescindOffer, vm.ListChannels, vm.HostShutdown)


def _done(received: Received) -> None:
    with contextlib.suppress(PeerGone):
        received.peer.reply(received.request, Done())


def _answer(received: Received, status: int | None) -> None:
    reply = Done(value=status) if status is not None else Failure(errno=errno.ETIMEDOUT, text="the guest has not answered")
    with contextlib.suppress(PeerGone):
        received.peer.reply(received.request, reply)


def _ignore(_reply: Message, _fds: list[int]) -> None:
    """What comes of it shows elsewhere: a CPU that dies is told again."""
