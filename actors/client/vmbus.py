# SPDX-License-Identifier: Apache-2.0
"""A VMBus driver as a user process: devices that the bus gives to it, and their channels.

    class Echo(VmbusDriver):
        name, id_table = "echo", [ECHO_GUID]
        def probe(self, device, matched_id):
            device.channel.open(ring_bytes=64 * 1024)

    with attach() as machine:
        machine.register_driver(Echo)

Packets go through the rings that this process and the host share; a call is made only to open and to close.
"""

from __future__ import annotations

import contextlib
import errno
import os
import sys
import threading
import traceback
import uuid
from typing import TYPE_CHECKING, Any, ClassVar

from pvbus.actors.client.bus_link import BusLink
from pvbus.actors.runtime import vmbus_messages as vm
from pvbus.shm import monitor
from pvbus.shm.memory import ChannelRing, Memory
from pvbus.shm.monitor import MonitorPage

if TYPE_CHECKING:
    import socket
    from collections.abc import Callable, Sequence

    from typing_extensions import Buffer

    from pvbus.actors.client.bus import BusConnection

Packet = tuple[int, int, bytes, bool]  # type, transaction id, payload, completion wanted


class VmbusChannel:
    """A device's channel. Threads may send and receive at once, one of each."""

    def __init__(self, bus: BusConnection, device: str) -> None:
        self._bus = bus
        self._device = device
        self._ring: ChannelRing | None = None
        self._door = self._host = -1
        self._triggers: tuple[Memory, int, int] | None = None  # memory, page, our trigger
        self._lock = threading.Lock()
        self.ring_bytes = 0
        self.hypercalls = self.triggers = 0

    @property
    def is_open(self) -> bool:
        """Whether it is open here; the host may have rescinded it meanwhile."""
        return self._ring is not None

    def open(self, ring_bytes: int = 64 * 1024, user_data: bytes = b"", target_vp: int = 0) -> None:
        """Mirror vmbus_open: two rings of `ring_bytes` each, a multiple of the page size, control page included.

        EINVAL, EISCONN when it is open, ETIMEDOUT, ENODEV when it was rescinded, EMFILE, EIO with the host's status.
        """
        if self._ring is not None:
            raise OSError(errno.EISCONN, f"{self._device} is open")
        message = vm.OpenRing(device=self._device, ring_bytes=ring_bytes, user_data=user_data, target_vp=target_vp)
        try:
            opened, fds = self._bus.ask(message)
        except OSError as error:
            if error.errno == errno.EMFILE:  # perhaps ours, and what it opened is open
                with contextlib.suppress(OSError):  # or it is not
                    self._bus.ask(vm.CloseRing(device=self._device))
            raise
        if not isinstance(opened, vm.RingOpened) or len(fds) != 3:
            raise ConnectionError(f"unexpected {type(opened).__name__}")
        memory_fd, self._door, self._host = fds
        monitored = opened.monitor_id >= 0
        memory = Memory(memory_fd, 2 * opened.ring_bytes + (MonitorPage.BYTES if monitored else 0))
        os.close(memory_fd)
        self._ring = ChannelRing(memory, 0, opened.ring_bytes, opened.ring_bytes, opened.signal_always)
        self._triggers = (memory, 2 * opened.ring_bytes, opened.monitor_id) if monitored else None
        self.ring_bytes = opened.ring_bytes

    def _open_ring(self) -> ChannelRing:
        ring = self._ring
        if ring is None:
            raise OSError(errno.ENOTCONN, f"{self._device} is not open")
        if self._bus.closed:
            raise OSError(errno.EIO, f"{self._device}: the bus has gone")
        return ring

    def forked(self) -> None:
        """In a forked child: who held the lock is not here."""
        self._lock = threading.Lock()

    def wake(self) -> None:
        """Ring our own doorbell: whoever sleeps on it looks again, and finds that the channel is no more."""
        with self._lock:
            if self._door >= 0:
                os.eventfd_write(self._door, 1)

    def _signal(self) -> None:
        """Mirror vmbus_setevent: a trigger, if we have one and the host looks at it, or a hypercall."""
        triggers = self._triggers
        if triggers is not None and not monitor.trigger(*triggers):
            self.triggers += 1
            return
        self.hypercalls += 1
        with self._lock:  # the bus may be closing it: the number is another file's then
            if self._host >= 0:
                os.eventfd_write(self._host, 1)

    # ---- packets

    def send(self, payload: Buffer, transaction_id: int = 0, *, completion: bool = False) -> None:
        """Send a packet. EAGAIN when the ring is full (the host signals room), EMSGSIZE, EIO when the ring is broken."""
        if self._open_ring().send(payload, transaction_id, completion):
            self._signal()

    def send_many(self, payloads: Sequence[bytes], first_transaction_id: int = 0, *, completion: bool = False) -> int:
        """Send as many as fit, numbered from `first_transaction_id` on; give how many. One signal at most."""
        sent, signal = self._open_ring().send_many(payloads, first_transaction_id, completion)
        if signal:
            self._signal()
        return sent

    def recv(self, max_bytes: int | None = None) -> Packet | None:
        """Take the next packet: (type, transaction id, payload, completion wanted), or None. ENOBUFS names the size it needs."""
        ring = self._open_ring()
        packet = ring.recv(max_bytes)
        if packet is None and self._arm():
            packet = ring.recv(max_bytes)
        if ring.take_signal():
            self._signal()
        return packet

    def recv_many(self, max_packets: int = 1024, max_bytes: int | None = None) -> list[Packet]:
        """Take up to `max_packets`; none leaves an empty list."""
        ring = self._open_ring()
        packets = ring.recv_many(max_packets, max_bytes)
        if not packets and self._arm():
            packets = ring.recv_many(max_packets, max_bytes)
        if ring.take_signal():
            self._signal()
        return packets

    def _arm(self) -> bool:
        """Take the bell back, then look again: what came in between rang before, and would leave nobody to ring."""
        with self._lock:
            try:
                return self._door >= 0 and os.eventfd_read(self._door) > 0
            except BlockingIOError:
                return False

    def fileno(self) -> int:
        """Give the doorbell: readable when the host has signalled; a receive that finds nothing takes that back."""
        self._open_ring()
        return self._door

    def state(self) -> dict[str, Any]:
        """Give the rings' indices and figures."""
        return self._open_ring().state()

    def close(self) -> None:
        """Mirror vmbus_close; closing what is closed does nothing."""
        with self._lock:
            is_open, self._ring = self._ring is not None, None  # unmapped when the last thread that uses it has left
        if not is_open:
            return
        self.wake()
        try:
            self._bus.ask(vm.CloseRing(device=self._device))
        except OSError as error:
            if error.errno not in (errno.EIO, errno.ENODEV):  # the bus, or the device, has gone before us
                raise
        finally:
            with self._lock:
                for fd in (self._door, self._host):
                    os.close(fd)
                self._door = self._host = -1


class VmbusDevice:
    """A device of the bus, as its driver gets it."""

    def __init__(self, bus: BusConnection, name: str, facts: dict[str, Any]) -> None:
        self._bus = bus
        self.name = name
        self.relid: int = facts.get("relid", 0)
        self.class_id = uuid.UUID(bytes_le=facts["class_id"])
        self.device_id = uuid.UUID(bytes_le=facts["device_id"])
        self.channel = VmbusChannel(bus, name)

    def attribute(self, name: str) -> str:
        """Read an attribute, as its file would give it. ENOENT, ENODEV."""
        reply, _ = self._bus.ask(vm.ReadAttribute(device=self.name, name=name))
        return getattr(reply, "text", "")

    def modify_target(self, target_vp: int) -> None:
        """Have the channel interrupt another CPU."""
        self._bus.ask(vm.ModifyTarget(device=self.name, target_vp=target_vp))


class VmbusDriver:
    """A driver: subclass it, name it, say which classes it serves. OSError from `probe` refuses the device."""

    name: ClassVar[str] = ""
    id_table: ClassVar[Sequence[uuid.UUID | str]] = ()

    def probe(self, device: VmbusDevice, matched_id: uuid.UUID) -> None:
        """Take a device; open its channel here, or later."""

    def remove(self, device: VmbusDevice) -> None:
        """Let a device go: it was rescinded, or the driver is unregistered. Its channel is closed afterwards in any case."""

    def shutdown(self, device: VmbusDevice) -> None:
        """Make a device quiet: the guest shuts down."""


class Bus:
    """A domain's bus, as an attached process uses it: register drivers, look at devices.

    When its workqueue dies, every device is taken from its driver by `remove`; then the drivers are registered with the heir,
    which has the same devices under other names, and probed anew. Nobody has to register twice.
    """

    def __init__(self, connect: Callable[[], tuple[socket.socket, int]]) -> None:
        self._drivers: dict[str, VmbusDriver] = {}
        self._devices: dict[tuple[str, str], VmbusDevice] = {}
        self._registering: set[str] = set()
        self._on_uevent: Callable[[dict[str, str]], None] = _ignore
        self._on_death: Callable[[], None] = _ignore
        self._on_heir: Callable[[], None] = _ignore
        self._link = BusLink(
            connect, self._call, died=self._died, let_go=self._let_go, come_back=self._come_back,
        )  # fmt: skip

    @property
    def _connection(self) -> BusConnection:
        return self._link.connection

    @property
    def closed(self) -> bool:
        """Whether the bus has gone for good, or we have left it."""
        return self._link.closed

    @property
    def calls_here(self) -> bool:
        """Whether the caller is a driver's probe, remove or shutdown."""
        return self._link.calls_here()

    def await_heir(self) -> None:
        """Return when a workqueue's heir has every driver of this process. ETIMEDOUT."""
        self._link.await_heir()

    @property
    def generation(self) -> int:
        """Number the workqueue: the devices of another one are others, though they be called the same."""
        return self._link.generation

    def _died(self) -> None:
        for device in tuple(self._devices.values()):
            device.channel.wake()
        self._on_death()

    def _let_go(self) -> None:
        for key, device in tuple(self._devices.items()):
            try:
                driver = self._drivers.get(key[0])
                if driver is not None:
                    driver.remove(device)
            except OSError:
                pass  # what a remove answers is ignored (B3.6)
            except Exception:
                traceback.print_exc()
            finally:
                self._forget(key)

    def _come_back(self, connection: BusConnection) -> None:
        connection.on_uevent = self._on_uevent
        self._on_heir()
        for name, driver in tuple(self._drivers.items()):
            if name in self._registering:
                continue  # its caller hears what becomes of it
            try:
                connection.ask(vm.RegisterDriver(name=name, id_table=_table(driver)))
            except OSError as error:
                if connection.closed:  # another heir has it before it
                    return
                del self._drivers[name]
                print(f"pvbus: driver {name} is not registered with the bus's heir: {error}", file=sys.stderr, flush=True)

    def register(self, driver: type[VmbusDriver] | VmbusDriver) -> VmbusDriver:
        """Mirror vmbus_driver_register: every device that nobody has is tried before this returns. EBUSY: the name is taken."""
        made = driver() if isinstance(driver, type) else driver
        table = _table(made)
        if not made.name or not table:
            raise OSError(errno.EINVAL, f"{type(made).__name__} needs a name and an id_table")
        if made.name in self._drivers:
            raise OSError(errno.EBUSY, f"driver {made.name} is registered")
        self._drivers[made.name] = made
        self._registering.add(made.name)
        try:
            self._link.ask(vm.RegisterDriver(name=made.name, id_table=table), again=True)
        except BaseException:
            del self._drivers[made.name]
            raise
        finally:
            self._registering.discard(made.name)
        return made

    def unregister(self, driver: VmbusDriver | str) -> None:
        """Mirror vmbus_driver_unregister: `remove` is called for each of its devices before this returns. ENOENT."""
        name = driver if isinstance(driver, str) else driver.name
        self._link.ask(vm.UnregisterDriver(name=name), again=True)
        self._drivers.pop(name, None)

    def device(self, name: str) -> dict[str, Any] | None:
        """Describe one device, its attributes and its `number` among them; None: there is none of that name."""
        reply, _ = self._link.ask(vm.ListDevices(name=name))
        found: list[dict[str, Any]] = getattr(reply, "data", {}).get("devices", []) if name else []
        return found[0] if found else None

    def drivers(self) -> list[str]:
        """List the names of the drivers, whichever process they are in; sorted."""
        found: list[str] = []
        while True:
            reply, _ = self._link.ask(vm.ListDrivers(after=found[-1] if found else ""))
            more: list[str] = getattr(reply, "data", {}).get("drivers", [])
            found += more
            if not more:
                return found

    def devices(self) -> list[dict[str, Any]]:
        """List the devices with their attributes."""
        found: list[dict[str, Any]] = []
        while True:
            reply, _ = self._link.ask(vm.ListDevices(after=found[-1]["number"] if found else 0), again=not found)
            more: list[dict[str, Any]] = getattr(reply, "data", {}).get("devices", [])
            found += more
            if not more:
                break
        return [{key: value for key, value in device.items() if key != "number"} for device in found]

    def wait_gone(self, timeout_s: float | None = None) -> bool:
        """Wait until the bus has gone for good, with its machine or without; whether it has. An heir's coming is no end."""
        return self._link.gone.wait(timeout_s)

    def read_attribute(self, device: str, name: str) -> str:
        """Read an attribute. ENODEV, ENOENT."""
        return getattr(self._link.ask(vm.ReadAttribute(device=device, name=name))[0], "text", "")

    def write_attribute(self, device: str, name: str, text: str) -> None:
        """Write an attribute. ENODEV, ENOENT, EACCES, EINVAL."""
        self._link.ask(vm.WriteAttribute(device=device, name=name, text=text))

    def read_bus(self, name: str) -> str:
        """Read a file of the bus: drivers_autoprobe. ENOENT."""
        return getattr(self._link.ask(vm.ReadBus(name=name))[0], "text", "")

    def write_bus(self, name: str, text: str) -> None:
        """Write drivers_autoprobe, or the name of a device to drivers_probe. ENOENT, ENODEV."""
        self._link.ask(vm.WriteBus(name=name, text=text))

    def write_driver(self, driver: str, name: str, text: str) -> None:
        """Write the name of a device to `bind` or `unbind` of a driver. ENOENT, ENODEV, EBUSY, what its probe says."""
        self._link.ask(vm.WriteDriver(driver=driver, name=name, text=text))

    def write_uevent(self, devpath: str, text: str) -> None:
        """Ask for a uevent about what stands at `devpath`, as a write to its file `uevent` does. ENODEV, EINVAL, ENOMEM."""
        self._link.ask(vm.WriteUevent(devpath=devpath, text=text))

    def listen(
        self, on_uevent: Callable[[dict[str, str]], None], on_death: Callable[[], None], on_heir: Callable[[], None]
    ) -> None:
        """Have uevents from now on, from heirs as well: their variables, ACTION, DEVPATH and SUBSYSTEM first.

        `on_uevent` and `on_death` are called where the socket is read and must not ask; `on_heir` may: a bus that has died is
        up again, and what is on it has not been told.
        """
        self._on_uevent, self._on_death, self._on_heir = on_uevent, on_death, on_heir
        self._connection.on_uevent = on_uevent

    def _call(self, call: vm.CallDriver) -> None:
        driver = self._drivers.get(call.driver)
        if driver is None:
            raise OSError(errno.ENODEV, f"driver {call.driver} is not registered here")
        key = (call.driver, call.device)
        if call.call == "probe":
            device = VmbusDevice(self._connection, call.device, call.facts)
            self._devices[key] = device
            try:
                driver.probe(device, uuid.UUID(bytes_le=call.matched_id))
            except BaseException:
                self._forget(key)
                raise
            return
        device = self._devices[key]
        if call.call == "shutdown":
            driver.shutdown(device)
            return
        try:
            driver.remove(device)
        finally:
            self._forget(key)

    def _forget(self, key: tuple[str, str]) -> None:
        device = self._devices.pop(key, None)
        if device is not None:  # the driver's call may have left the bus
            device.channel.close()

    def forked(self) -> None:
        """In a forked child: connection, threads and drivers are the parent's; whoever wants a bus here connects anew."""
        self._link.forked()
        for device in self._devices.values():
            device.channel.forked()

    def close(self) -> None:
        """Leave: the bus removes our drivers, and closes their channels."""
        self._link.close()
        for device in tuple(self._devices.values()):
            device.channel.close()
        self._devices.clear()


def _table(driver: VmbusDriver) -> list[bytes]:
    return [(uuid.UUID(one) if isinstance(one, str) else one).bytes_le for one in driver.id_table]


def _ignore(*_: object) -> None:
    """Hear nothing."""
