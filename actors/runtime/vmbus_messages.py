# SPDX-License-Identifier: Apache-2.0
"""The vocabulary of the machine's Hyper-V half: hypercalls of a domain's kernel, the bus and its drivers.

Calls run one way, as everywhere: user -> workqueue -> hypervisor -> cpu; what a driver is asked (probe, remove, shutdown) comes
on the connection that it has made. A message of VMBus itself never travels here: it goes through SynIC and its pages.
"""

from __future__ import annotations

from typing import Any, ClassVar

import msgspec

from pvbus.actors.runtime.wire import Message

# ---- workqueue -> hypervisor: what the domain's kernel asks of the hypervisor


class PostMessage(Message, frozen=True, kw_only=True):
    """Mirror HvPostMessage; Done with the status. `serial`: another one for each call, the same for a call that is made again."""

    fds_max: ClassVar[int | None] = 0
    connection: int
    type: int
    payload: bytes
    serial: int = 0


class SignalEvent(Message, frozen=True, kw_only=True):
    """Mirror HvSignalEvent; Done with the status."""

    fds_max: ClassVar[int | None] = 0
    connection: int
    flag: int = 0


class WriteMsr(Message, frozen=True, kw_only=True):
    """Write a register of a virtual processor. EFAULT for a #GP."""

    fds_max: ClassVar[int | None] = 0
    vp: int
    msr: int
    value: int


class ReadMsr(Message, frozen=True, kw_only=True):
    """Read a register of a virtual processor; Done with its value. EFAULT for a #GP."""

    fds_max: ClassVar[int | None] = 0
    vp: int
    msr: int


class GuestMemory(Message, frozen=True, kw_only=True):
    """Give the domain more memory: `pages` frames from `frame` on. fds: the memfd."""

    fds_max: ClassVar[int | None] = 1
    frame: int
    pages: int


class DropMemory(Message, frozen=True, kw_only=True):
    """Take that memory back."""

    fds_max: ClassVar[int | None] = 0
    frame: int


class AttachChannel(Message, frozen=True, kw_only=True):
    """Wire a channel's doorbells. fds: the driver's (rung by event tasklets), the host's (rung by the driver).

    `monitor_frame`: where the driver's page of triggers lies in the guest's memory; 0, it has none.
    """

    fds_max: ClassVar[int | None] = 2
    relid: int
    monitor_frame: int = 0


class DetachChannel(Message, frozen=True, kw_only=True):
    """Forget a channel's doorbells."""

    fds_max: ClassVar[int | None] = 0
    relid: int


class SynchronizeIrq(Message, frozen=True, kw_only=True):
    """Mirror synchronize_irq: Done once no CPU of the domain runs a handler that began before."""

    fds_max: ClassVar[int | None] = 0


class MemoryKnown(Message, frozen=True, kw_only=True):
    """Tell a hypervisor's heir that it has all of the domain's memory and doorbells again: its host goes on.

    `fresh`: from a workqueue that has just been born, and has none.
    """

    fds_max: ClassVar[int | None] = 0
    fresh: bool = False


# ---- supervisor -> hypervisor


class WorkqueueUp(Message, frozen=True, kw_only=True):
    """Connect a domain's workqueue, first or reborn. fds: the socket."""

    fds_max: ClassVar[int | None] = 1
    domain: int


# ---- hypervisor -> cpu


class AttachDoor(Message, frozen=True, kw_only=True):
    """Ring this for a channel. fds: an eventfd."""

    fds_max: ClassVar[int | None] = 1
    relid: int


class DetachDoor(Message, frozen=True, kw_only=True):
    """Forget a channel."""

    fds_max: ClassVar[int | None] = 0
    relid: int


# ---- user -> supervisor -> hypervisor: what the host does


class Offer(Message, frozen=True, kw_only=True):
    """Offer a synthetic device; Done with its relid. EINVAL for a class without a device, EEXIST, ENOSPC, ENODEV."""

    fds_max: ClassVar[int | None] = 0
    domain: int
    class_id: str
    instance_id: str
    latency_100ns: int = 0  # of its monitor; 0: it has none


class RescindOffer(Message, frozen=True, kw_only=True):
    """Withdraw a device. ENOENT for a relid that is not offered."""

    fds_max: ClassVar[int | None] = 0
    domain: int
    relid: int


class ListChannels(Message, frozen=True, kw_only=True):
    """Ask the host for its channels; the reply is Report."""

    fds_max: ClassVar[int | None] = 0
    domain: int


class HostShutdown(Message, frozen=True, kw_only=True):
    """Have a shutdown device ask its guest to shut down; Done when it was asked. ENOENT, ENOTCONN when it is not open."""

    fds_max: ClassVar[int | None] = 0
    domain: int
    relid: int


# ---- user -> supervisor -> workqueue


class ConnectBus(Message, frozen=True, kw_only=True):
    """Ask for a connection to a domain's bus; the reply is BusConnection. ENODEV without the platform, or a bus."""

    fds_max: ClassVar[int | None] = 0
    domain: int


class BusConnection(Message, frozen=True, kw_only=True):
    """Answer ConnectBus. fds: the connection; to which birth of the workqueue it leads."""

    fds_max: ClassVar[int | None] = 1
    generation: int = 0


class BusUser(Message, frozen=True, kw_only=True):
    """Tell the workqueue of a user process. fds: the connection."""

    fds_max: ClassVar[int | None] = 1
    pid: int


class SettleBus(Message, frozen=True, kw_only=True):
    """Ask a workqueue to answer once its work ring is empty and no device waits for a driver; Done with its progress so far."""

    fds_max: ClassVar[int | None] = 0


# ---- user -> workqueue


class RegisterDriver(Message, frozen=True, kw_only=True):
    """Mirror vmbus_driver_register: Done when every unbound device has been tried. EBUSY for a name that is taken."""

    fds_max: ClassVar[int | None] = 0
    name: str
    id_table: list[bytes]
    has_remove: bool = True
    has_shutdown: bool = True


class UnregisterDriver(Message, frozen=True, kw_only=True):
    """Mirror vmbus_driver_unregister: remove is called for each bound device."""

    fds_max: ClassVar[int | None] = 0
    name: str


class OpenRing(Message, frozen=True, kw_only=True):
    """Mirror vmbus_open; the reply is RingOpened. ENODEV, EBUSY, EINVAL, EMFILE, ETIMEDOUT, or EIO with the host's status."""

    fds_max: ClassVar[int | None] = 0
    device: str
    ring_bytes: int
    user_data: bytes = b""
    target_vp: int = 0


class RingOpened(Message, frozen=True, kw_only=True):
    """Answer OpenRing. fds: memory of both rings, the driver's doorbell, the host's doorbell."""

    fds_max: ClassVar[int | None] = 3
    relid: int
    ring_bytes: int  # of each
    signal_always: bool = False  # protocol 0.13
    monitor_id: int = -1  # its trigger, in the page behind both rings; -1: it has none


class CloseRing(Message, frozen=True, kw_only=True):
    """Mirror vmbus_close."""

    fds_max: ClassVar[int | None] = 0
    device: str


class ModifyTarget(Message, frozen=True, kw_only=True):
    """Have a channel interrupt another CPU. EINVAL, EIO with the host's status."""

    fds_max: ClassVar[int | None] = 0
    device: str
    target_vp: int


class ListDevices(Message, frozen=True, kw_only=True):
    """Ask for devices with their attributes, those behind number `after`, as many as fit a frame; the reply is Report.

    `name`: for this one only, or for none.
    """

    fds_max: ClassVar[int | None] = 0
    after: int = 0
    name: str = ""


class ListDrivers(Message, frozen=True, kw_only=True):
    """Ask for the names of drivers, those that sort behind `after`, as many as fit a frame; the reply is Report."""

    fds_max: ClassVar[int | None] = 0
    after: str = ""


class ReadAttribute(Message, frozen=True, kw_only=True):
    """Read an attribute as its file would give it; the reply is AttributeText. ENODEV, ENOENT."""

    fds_max: ClassVar[int | None] = 0
    device: str
    name: str


class AttributeText(Message, frozen=True, kw_only=True):
    """Answer ReadAttribute."""

    fds_max: ClassVar[int | None] = 0
    text: str


class WriteAttribute(Message, frozen=True, kw_only=True):
    """Write an attribute. ENODEV, ENOENT, EACCES for one that can only be read, EINVAL."""

    fds_max: ClassVar[int | None] = 0
    device: str
    name: str
    text: str


class ReadBus(Message, frozen=True, kw_only=True):
    """Read an attribute of the bus: drivers_autoprobe; the reply is AttributeText. ENOENT."""

    fds_max: ClassVar[int | None] = 0
    name: str


class WriteBus(Message, frozen=True, kw_only=True):
    """Write an attribute of the bus: drivers_autoprobe, or drivers_probe with a device's name. ENOENT, ENODEV."""

    fds_max: ClassVar[int | None] = 0
    name: str
    text: str


class WriteDriver(Message, frozen=True, kw_only=True):
    """Write a device's name to a driver's `bind` or `unbind`. ENOENT, ENODEV, EBUSY, or what the driver's probe says."""

    fds_max: ClassVar[int | None] = 0
    driver: str
    name: str
    text: str


class WriteUevent(Message, frozen=True, kw_only=True):
    """Write to the file `uevent` of what stands at `devpath`: everybody hears the action. ENODEV, EINVAL, ENOMEM."""

    fds_max: ClassVar[int | None] = 0
    devpath: str
    text: str


# ---- workqueue -> user


class CallDriver(Message, frozen=True, kw_only=True):
    """Call a driver: `call` is probe, remove or shutdown. Done, or Failure with the driver's errno."""

    fds_max: ClassVar[int | None] = 0
    call: str
    driver: str
    device: str
    matched_id: bytes = b""
    facts: dict[str, Any] = msgspec.field(default_factory=dict)  # of the device: relid, class_id, device_id


class Uevent(Message, frozen=True, kw_only=True):
    """Tell what a uevent says: action, devpath and its variables (those two among them), in their order."""

    fds_max: ClassVar[int | None] = 0
    action: str
    devpath: str
    env: dict[str, str] = msgspec.field(default_factory=dict)
