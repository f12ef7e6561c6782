# SPDX-License-Identifier: Apache-2.0
"""A domain's workqueue process: handles the messages of VMBus in their order, runs the bus, calls the drivers of user processes.

Consumer of the domain's work ring. Drivers are user processes, each on a connection of its own; one that hangs up has its drivers
removed and its channels closed. What waits runs in `Tasks`; nothing here blocks.
"""

from __future__ import annotations

import collections
import contextlib
import errno
import os
import select
import socket
import sys
from typing import TYPE_CHECKING, Any

from pvbus.actors.runtime import messages as m
from pvbus.actors.runtime import vmbus_messages as vm
from pvbus.actors.runtime.clock import SharedClock
from pvbus.actors.runtime.process import Peer, PeerGone, ProcessActor, Received
from pvbus.actors.runtime.vmbus_facts import MESSAGE_TYPE, uses_interrupt_page
from pvbus.actors.runtime.wire import Done, Failure, Message, close_fds
from pvbus.actors.workqueue import attributes, waits
from pvbus.actors.workqueue.bus import Bus, Device, Driver
from pvbus.actors.workqueue.channels import Channels
from pvbus.actors.workqueue.connection import Connection
from pvbus.actors.workqueue.discovery import AcpiDevice, Platform, Resource, Vmbus
from pvbus.actors.workqueue.rings import RingMemories, RingMemory
from pvbus.actors.workqueue.sysfs import Sysfs
from pvbus.actors.workqueue.tasks import Tasks
from pvbus.actors.workqueue.work import WorkRing
from pvbus.actors.workqueue.work_per_cpu import PerCpuWorkRing
from pvbus.shm import hyperv
from pvbus.shm.layout import Machine
from pvbus.shm.memory import Memory
from pvbus.shm.segment import check

if TYPE_CHECKING:
    from collections.abc import Callable

CALL_DEADLINE_S = 20.0
DRIVER_DEADLINE_S = 60.0  # a probe opens a channel: two answers of the host, five seconds each, and its own work
NULL_GUID = bytes(16)
CALLS_A_USER_MAX = 256  # of one process that wait at a time: each of its threads makes one
DRIVERS_A_USER_MAX = 256
DEVICES_A_FRAME = 6  # with attributes of less than two KiB, an override and a driver's name of four each; a frame has 64
DRIVERS_A_FRAME = 12  # a name has less than four KiB
GIVEN_ANYWAY = (vm.GuestMemory, vm.DropMemory, vm.MemoryKnown)  # an heir is given the memory that there is when it comes
WRITABLE = {"driver_override"}


class WorkqueueProcess(ProcessActor):
    """The workqueue and the bus of one domain."""

    def __init__(self, name: str, control: socket.socket, arguments: dict[str, Any], fds: dict[str, int]) -> None:
        super().__init__(name, control)
        self.domid: int = arguments["domain"]
        machine = Memory(fds["machine"], Machine.BYTES)
        self.memory = Memory(fds["hyperv"], hyperv.BYTES)
        check(self.memory, hyperv.MAGIC, f"the Hyper-V segment of domain {self.domid}")
        self.inbox.clock = SharedClock(machine, Machine.CLOCK_OFFSET_NS)
        self.hypervisor: Peer = self.inbox.add_peer(socket.socket(fileno=fds["hypervisor"]), "hypervisor")
        self.work_doorbell = fds["work"]
        self.tasks = Tasks(self, self.inbox.clock, self.inbox.call_at)
        self.requests = waits.Requests()
        variants = machine.load32(Machine.VARIANTS)
        per_cpu = bool(variants & Machine.VARIANT_WORK_PER_CPU)
        self.work = PerCpuWorkRing(self.memory) if per_cpu else WorkRing(self.memory)
        self.connection = Connection(
            self.memory, self.requests, self._log,
            versions=arguments["versions"], target_vp=arguments["target_vp"],
            stalls=bool(variants & Machine.VARIANT_OFFERS_STALL),
        )  # fmt: skip
        queued = bool(variants & Machine.VARIANT_RESCIND_QUEUE)
        self.channels = Channels(self.connection, self.requests, self._spawn, self._log, rescind_queued=queued)
        self.bus = Bus(self.channels, self._spawn, self._log, self._uevent)
        self.sysfs = Sysfs(self.bus, self._uevent)
        dirty = bool(variants & Machine.VARIANT_LEAVES_DIRTY)
        self.vmbus = Vmbus(_platform(arguments), self.memory, self.channels, self.bus, self._log, leaves_dirty=dirty)
        self.memories = RingMemories(self._memory_gone)
        self.users: set[Peer] = set()
        self.calls: collections.Counter[Peer] = collections.Counter()  # of users, that wait
        self.opening: dict[int, RingMemory] = {}  # by relid: what Listen wires
        self.orphans: list[tuple[Message, tuple[int, ...], Callable[[Message], None]]] = []
        self.items = 0  # of the work ring
        self.posts = 0  # messages posted: the serial of the last
        self.fresh = True  # until a hypervisor has heard that it need not look for a forerunner's memory
        self.started = False
        self.after_leaving: Callable[[], None] | None = None  # while we leave the host
        self.start_error: OSError | None = None

    def on_ready(self) -> None:
        """Bring the bus up; drivers that register meanwhile wait for its offers as they do later."""
        self.inbox.add_fd(self.work_doorbell, select.EPOLLIN, self._on_work)
        self._tell_memory()
        self.tasks.start(self.vmbus.begin(), self._initialised)
        self._on_work(0)

    def _initialised(self, outcome: Any) -> None:
        self.started = True
        if isinstance(outcome, OSError):
            self.start_error = outcome
            self._log(f"no bus: {outcome.strerror}")

    def _log(self, text: str) -> None:
        print(f"hv_vmbus: domain {self.domid}: {text}", file=sys.stderr, flush=True)

    def _spawn(self, steps: waits.Steps[Any]) -> None:
        self.tasks.start(steps, self._spawned)

    def _spawned(self, outcome: Any) -> None:
        if isinstance(outcome, OSError):
            self._log(f"{outcome.strerror}")

    # ---- work items

    def _on_work(self, _events: int) -> None:
        with contextlib.suppress(BlockingIOError):
            os.eventfd_read(self.work_doorbell)
        while (payload := self.work.take()) is not None:
            self.items += 1
            self.channels.onmessage(payload)
            self.work.done()
        self.tasks.pump()

    # ---- what the waiting functions wait for (Outside)

    def ask(self, wait: waits.Wait, answer: Callable[[Any], None]) -> None:
        """Have a wait answered by the hypervisor, or by a driver."""
        match wait:
            case waits.Post(connection=connection, payload=payload):
                self.posts = self.posts % (hyperv.Buffer.SERIALS - 1) + 1
                message = vm.PostMessage(connection=connection, type=MESSAGE_TYPE, payload=payload, serial=self.posts)
                self._hypercall(message, answer)
            case waits.ReadMsr(vp=vp, number=number):
                self._hypercall(vm.ReadMsr(vp=vp, msr=number), answer)
            case waits.WriteMsr(vp=vp, number=number, value=value):
                self._hypercall(vm.WriteMsr(vp=vp, msr=number, value=value), answer)
            case waits.Listen(relid=relid):
                memory = self.opening[relid]
                attach = vm.AttachChannel(relid=relid, monitor_frame=memory.monitor_frame)
                self._hypercall(attach, answer, memory.doors)
            case waits.Quiesce(relid=relid):
                self._hypercall(vm.DetachChannel(relid=relid), answer)
            case waits.Synchronize():
                self._hypercall(vm.SynchronizeIrq(), answer)
            case waits.Probe(driver=driver, device=device, matched=matched):
                self._call_driver("probe", driver, device, answer, matched or NULL_GUID)
            case waits.Remove(driver=driver, device=device):
                self._call_driver("remove", driver, device, answer)
            case waits.Shutdown(driver=driver, device=device):
                self._call_driver("shutdown", driver, device, answer)
            case _:
                raise TypeError(f"{type(wait).__name__} is answered inside")

    def _hypercall(self, message: Message, answer: Callable[[Any], None], fds: tuple[int, ...] = ()) -> None:
        self._ask_hypervisor(message, fds, lambda reply: answer(_value_of(reply)))

    def _ask_hypervisor(self, message: Message, fds: tuple[int, ...], then: Callable[[Message], None]) -> None:
        """Ask; what dies with a hypervisor is asked again of its heir."""
        asked = self.hypervisor

        def answered(reply: Message, _fds: list[int]) -> None:
            if not isinstance(reply, Failure) or reply.errno != errno.EPIPE:
                then(reply)
            elif isinstance(message, GIVEN_ANYWAY):
                pass
            elif asked is self.hypervisor:
                self.orphans.append((message, fds, then))
            else:  # asked of a dead one, heard behind its heir's coming: nobody would look at the orphans again
                self._ask_hypervisor(message, fds, then)

        asked.ask(message, answered, CALL_DEADLINE_S, fds=fds)

    def _call_driver(
        self, call: str, driver: Driver, device: Device, answer: Callable[[Any], None], matched: bytes = b""
    ) -> None:
        owner = driver.owner
        if not isinstance(owner, Peer) or owner not in self.users:
            answer(errno.ENODEV)
            return
        offer = device.channel.offer
        facts = {
            "relid": offer.relid, "class_id": offer.class_id.bytes_le, "device_id": offer.instance_id.bytes_le,
        }  # fmt: skip
        message = vm.CallDriver(call=call, driver=driver.name, device=device.name, matched_id=matched, facts=facts)

        def then(reply: Message, fds: list[int]) -> None:
            close_fds(fds)  # a driver may say anything
            answer(reply.errno if isinstance(reply, Failure) else 0)

        owner.ask(message, then, DRIVER_DEADLINE_S)

    def _memory_gone(self, memory: RingMemory) -> None:
        self._ask_hypervisor(vm.DropMemory(frame=memory.first_frame), (), lambda _reply: None)

    def _uevent(self, variables: list[str]) -> None:
        """Tell every user process; those that do not listen drop it."""
        env = dict(line.partition("=")[::2] for line in variables)
        for user in tuple(self.users):
            with contextlib.suppress(PeerGone):
                user.tell(vm.Uevent(action=env["ACTION"], devpath=env["DEVPATH"], env=env))

    # ---- messages

    def on_message(self, received: Received) -> Message | None:
        """Answer supervisor and user processes."""
        message = received.message
        if received.peer is self.supervisor:
            if isinstance(message, vm.BusUser):
                self.users.add(self.inbox.add_peer(socket.socket(fileno=received.fds[0]), f"driver process {message.pid}"))
                return Done()
            if isinstance(message, vm.SettleBus):
                self._settle(received)
                return None
            if isinstance(message, m.Rewire):
                self._rewire(received.fds[0])
                return Done()
            if isinstance(message, m.Advance):
                return Done()  # that we are awake is all
            return super().on_message(received)
        if received.peer not in self.users:
            raise OSError(errno.EPERM, f"{received.peer.name} does not use this bus")
        return self._from_user(received)

    def _from_user(self, received: Received) -> Message | None:
        message = received.message
        if self.calls[received.peer] >= CALLS_A_USER_MAX:
            raise OSError(errno.EAGAIN, f"{CALLS_A_USER_MAX} calls of this process wait")
        match message:
            case vm.RegisterDriver():
                if sum(driver.owner is received.peer for driver in self.bus.drivers.values()) >= DRIVERS_A_USER_MAX:
                    raise OSError(errno.ENOSPC, f"{DRIVERS_A_USER_MAX} drivers of this process are registered")
                driver = Driver(
                    message.name, [*message.id_table, NULL_GUID], received.peer, True, message.has_remove, message.has_shutdown
                )
                self._run(received, self._register(driver))
            case vm.UnregisterDriver():
                self._run(received, self.bus.unregister(self._driver(message.name, received.peer)))
            case vm.OpenRing():
                self._open(received, message)
            case vm.CloseRing():
                self._run(received, self.channels.close(self._device(message.device, received.peer).channel))
            case vm.ModifyTarget():
                device = self._device(message.device, received.peer)
                self._run(received, self.channels.modify(device.channel, message.target_vp))
            case vm.ListDevices():
                named = (device for device in self.bus.devices.values() if message.name in ("", device.name))
                behind = [device for device in named if device.number > message.after]
                few = sorted(behind, key=lambda device: device.number)[:DEVICES_A_FRAME]
                return m.Report(data={"devices": [self._described(device) for device in few]})
            case vm.ListDrivers():
                names = sorted(name for name in self.bus.drivers if name > message.after)
                return m.Report(data={"drivers": names[:DRIVERS_A_FRAME]})
            case vm.ReadBus():
                return vm.AttributeText(text=self.sysfs.read_bus(message.name))
            case vm.WriteBus() | vm.WriteDriver() | vm.WriteUevent():
                self._run(received, self.sysfs.write(message))
            case vm.ReadAttribute():
                return vm.AttributeText(text=self._attribute(message.device, message.name))
            case vm.WriteAttribute():
                if message.name not in self._attributes(self._any_device(message.device)):
                    raise OSError(errno.ENOENT, f"{message.device} has no {message.name}")
                if message.name not in WRITABLE:
                    raise OSError(errno.EACCES, f"{message.name} can only be read")
                self.bus.override(self._any_device(message.device), message.text)
                return Done()
            case _:
                return super().on_message(received)
        return None

    def _settle(self, received: Received) -> None:
        """Answer once nothing waits but for time-outs and for what the host withholds; say how far everything has come."""

        def steps() -> waits.Steps[None]:
            self._on_work(0)
            yield waits.Until(self.tasks.is_quiet)

        self._run(received, steps(), lambda: _answer(received, Done(value=self.tasks.progress + self.items)))

    def _register(self, driver: Driver) -> waits.Steps[None]:
        yield waits.Until(lambda: self.started)
        if self.start_error is not None:
            raise OSError(errno.ENODEV, f"domain {self.domid} has no bus: {self.start_error.strerror}")
        yield from self.bus.register(driver)

    def _run(self, received: Received, steps: waits.Steps[Any], then: Callable[[], None] | None = None) -> None:
        self.calls[received.peer] += 1

        def ended(outcome: Any) -> None:
            self.calls[received.peer] -= 1
            self.calls += collections.Counter()  # those that have none are forgotten
            if isinstance(outcome, OSError):
                _answer(received, Failure(errno=outcome.errno or errno.EIO, text=outcome.strerror or ""))
            elif then is not None:
                then()
            else:
                _answer(received, Done())

        self.tasks.start(steps, ended)

    # ---- devices

    def _any_device(self, name: str) -> Device:
        device = self.bus.devices.get(name)
        if device is None:
            raise OSError(errno.ENODEV, f"there is no device {name}")
        return device

    def _device(self, name: str, owner: Peer) -> Device:
        device = self._any_device(name)
        if device.driver is None or device.driver.owner is not owner:
            raise OSError(errno.EPERM, f"{name} is not bound to a driver of this process")
        return device

    def _driver(self, name: str, owner: Peer) -> Driver:
        driver = self.bus.drivers.get(name)
        if driver is None or driver.owner is not owner:
            raise OSError(errno.ENOENT, f"this process has no driver {name}")
        return driver

    def _rings_of(self, device: Device) -> RingMemory | None:
        ring = device.channel.ring
        return ring.pages if ring is not None and isinstance(ring.pages, RingMemory) else None

    def _attributes(self, device: Device) -> dict[str, str]:
        triggers = [memory.monitor for memory in self.memories.all.values() if memory.monitor is not None]
        return attributes.all_of(device, self.memory, self._rings_of(device), triggers)

    def _attribute(self, name: str, attribute: str) -> str:
        texts = self._attributes(self._any_device(name))
        if attribute not in texts:
            raise OSError(errno.ENOENT, f"{name} has no {attribute}")
        return texts[attribute]

    def _described(self, device: Device) -> dict[str, Any]:
        offer = device.channel.offer
        return {
            "number": device.number, "name": device.name, "relid": offer.relid,
            "class_id": str(offer.class_id), "device_id": str(offer.instance_id),
            "driver": device.driver.name if device.driver is not None else None, "attributes": self._attributes(device),
        }  # fmt: skip

    # ---- channels

    def _open(self, received: Received, message: vm.OpenRing) -> None:
        device = self._device(message.device, received.peer)
        if device.channel.relid in self.opening:
            raise OSError(errno.EBUSY, f"{message.device} is being opened")
        memory = self.memories.make(message.ring_bytes, monitored=device.channel.offer.monitor_allocated)
        relid = device.channel.relid
        self.opening[relid] = memory

        def steps() -> waits.Steps[None]:
            try:
                yield from self.channels.open(
                    device.channel, memory, target_vp=message.target_vp, user_data=message.user_data
                )
            finally:
                self.opening.pop(relid, None)

        def opened() -> None:
            always = uses_interrupt_page(self.connection.version)
            monitor = device.channel.offer.monitor_id if memory.monitor_frame else -1
            reply = vm.RingOpened(
                relid=relid, ring_bytes=memory.ring_bytes, signal_always=always, monitor_id=monitor
            )  # fmt: skip
            _answer(received, reply, (memory.fd, *memory.doors))

        given = vm.GuestMemory(frame=memory.first_frame, pages=memory.given_pages)
        # The socket keeps the order: the host knows the frames before the GPADL that names them is posted.
        self._ask_hypervisor(given, (memory.fd,), lambda _reply: None)
        self._run(received, steps(), opened)

    # ---- the end

    def leave(self, then: Callable[[], None]) -> None:
        """Leave the host in order: devices removed, channels closed, UNLOAD, SynIC off (B9.9). A dead one is left already."""
        if not self.vmbus.running or self.hypervisor.closed:
            then()
        else:
            self.after_leaving = then
            self.tasks.start(self.vmbus.exit(), lambda _outcome: self._has_left())

    def _has_left(self) -> None:
        if self.after_leaving is not None:
            then, self.after_leaving = self.after_leaving, None
            then()

    def _rewire(self, fd: int) -> None:
        """Go on with a hypervisor's heir: it is given all memory and doorbells, then what was asked of its forerunner."""
        self.hypervisor = self.inbox.add_peer(socket.socket(fileno=fd), "hypervisor")
        for memory in self.memories.all.values():
            self._ask_hypervisor(vm.GuestMemory(frame=memory.first_frame, pages=memory.given_pages), (memory.fd,), _ignore)
        listening = {device.channel.relid: self._rings_of(device) for device in self.bus.devices.values()} | self.opening
        for relid, ring in listening.items():
            if ring is not None:
                again = vm.AttachChannel(relid=relid, monitor_frame=ring.monitor_frame)
                self._ask_hypervisor(again, ring.doors, _ignore)
        self._tell_memory()
        orphans, self.orphans = self.orphans, []
        for message, fds, then in orphans:
            self._ask_hypervisor(message, fds, then)

    def _tell_memory(self) -> None:
        def told(reply: Message) -> None:
            self.fresh = self.fresh and isinstance(reply, Failure)

        self._ask_hypervisor(vm.MemoryKnown(fresh=self.fresh), (), told)

    def on_hangup(self, peer: Peer) -> None:
        """A driver process has gone: what it drove is removed, and can be driven by another."""
        if peer is self.hypervisor:
            self._has_left()  # one that stays is sent an heir's connection: Rewire
        if peer not in self.users:
            return
        self.users.discard(peer)
        for driver in tuple(self.bus.drivers.values()):
            if driver.owner is peer:
                self._spawn(self.bus.unregister(driver))


def _platform(arguments: dict[str, Any]) -> Platform:
    """What the configuration lets the guest find."""
    irq = arguments["irq"]
    resources = (Resource("irq", (irq,)),) if irq else ()
    devices = (AcpiDevice(resources=resources),) if arguments["acpi_device"] else ()
    return Platform(devices=devices, vcpus=arguments["vcpus"])


def _value_of(reply: Message) -> Any:
    return reply.as_oserror() if isinstance(reply, Failure) else getattr(reply, "value", 0)


def _ignore(_reply: Message) -> None:
    """Take an answer that says nothing new."""


def _answer(received: Received, reply: Message, fds: tuple[int, ...] = ()) -> None:
    with contextlib.suppress(PeerGone):  # its process died meanwhile
        received.peer.reply(received.request, reply, fds)
