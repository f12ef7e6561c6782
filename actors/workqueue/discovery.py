# SPDX-License-Identifier: Apache-2.0
"""How the guest finds its VMBus, brings it up and takes it down: module init and exit, the ACPI device, the SynIC of every CPU.

Bring-up is a strict order of steps; a failure undoes what was done, last first (B6, B9):

    platform, ACPI driver, device within 5 s, irq | hv_init, bus, irq handler, SynIC of every CPU, connect, offers

The ACPI namespace is the configuration's. Registers are the hypervisor's, read and written by waiting for it; the pages that
SIMP and SIEFP name, and the vector in each virtual CPU's state, are ours. Pure.
"""

from __future__ import annotations

import errno
from typing import TYPE_CHECKING, Any, NamedTuple

from pvbus.actors.workqueue.connection import REPLY_S, failed
from pvbus.actors.workqueue.waits import ReadMsr, Reply, Request, Steps, Synchronize, WriteMsr
from pvbus.shm.hyperv import PAGE, SINT_VMBUS, VECTOR_OF_IRQ0, Frame, Sint, Vp

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from pvbus.actors.workqueue.bus import Bus
    from pvbus.actors.workqueue.channels import Channels
    from pvbus.shm.memory import Memory

MSR_GUEST_OS_ID = 0x40000000
MSR_HYPERCALL = 0x40000001
MSR_SCONTROL = 0x40000080
MSR_SVERSION = 0x40000081
MSR_SIEFP = 0x40000082
MSR_SIMP = 0x40000083
MSR_SINT0 = 0x40000090
ENABLE = 1
RESERVED = 0xFFE    # of SIMP and SIEFP: preserved

LINUX_ID_2012 = 2976579765 << 32
ENOTSUPP = 524
"""The kernel's own, of which errno knows nothing."""

ACPI_IDS = ("VMBUS", "VMBus")
"""Case matters (B8.3)."""

HYPERCALL_FRAME = Frame.of_vp(0, Frame.UNUSED)


class Resource(NamedTuple):
    """One entry of `_CRS`."""

    kind: str                           # "irq", or something that is ignored
    interrupts: tuple[int, ...] = ()


class AcpiDevice(NamedTuple):
    """A device of the ACPI namespace; `walk_fails` : evaluating `_CRS` fails behind the resources that are given."""

    hardware_id: str = "VMBUS"
    resources: Sequence[Resource] = ()
    walk_fails: bool = False


class Platform(NamedTuple):
    """What the machine looks like to the guest."""

    is_hyperv: bool = True
    acpi: bool = True
    devices: Sequence[AcpiDevice] = (AcpiDevice(resources=(Resource("irq", (7,)),)),)
    vcpus: int = 1


class Vmbus:
    """The driver. `leaves_dirty` brings back how it left in 2012: SynIC enabled, no UNLOAD (H9)."""

    def __init__(
        self, platform: Platform, memory: Memory, channels: Channels, bus: Bus, log: Callable[[str], None], *,
        leaves_dirty: bool = False,
    ) -> None:  # fmt: skip
        self._platform, self._memory, self._channels, self._bus, self._log = platform, memory, channels, bus, log
        self._leaves_dirty = leaves_dirty
        self._found = Request(lambda _: False, 0, 0)    # the completion that the ACPI device's add signals
        self._hypercall_page = False
        self.irq = 0
        self.running = False

    # ------------------------------------------------------------------------------------------- B8: ACPI

    def _walk(self, resource: Resource) -> None:
        """Mirror vmbus_walk_resources (B8.1): the first interrupt of the last IRQ resource."""
        if resource.kind == "irq" and resource.interrupts:
            self.irq = resource.interrupts[0]

    def acpi_add(self, device: AcpiDevice) -> int:
        """Mirror vmbus_acpi_add (B8.2). The device is remembered before its resources are walked, and stays so if that fails."""
        self._bus.exists = True
        for resource in device.resources:
            self._walk(resource)
        self._found.ended = True
        return -errno.ENODEV if device.walk_fails else 0

    def _acpi_register(self) -> None:
        """Mirror acpi_bus_register_driver (X23): add is called for what is there already, and its errors are its own."""
        if not self._platform.acpi:
            raise failed(errno.ENODEV)
        for device in self._platform.devices:
            if device.hardware_id in ACPI_IDS:
                self.acpi_add(device)

    def _acpi_unregister(self) -> None:
        self._bus.exists = False
        self._found = Request(lambda _: False, 0, 0)
        self.irq = 0

    # ----------------------------------------------------------------------------- B9: module init and exit

    def init(self) -> Steps[None]:
        """Mirror hv_acpi_init (B9): ENODEV on another platform, at once; ETIMEDOUT without the device; ENODEV without an irq."""
        if not self._platform.is_hyperv:
            raise failed(errno.ENODEV)
        self._acpi_register()
        try:
            yield Reply(self._found, REPLY_S)
            if not self._found.ended:
                raise failed(errno.ETIMEDOUT, "no VMBUS device in ACPI")
            if self.irq <= 0:
                raise failed(errno.ENODEV, "the VMBUS device has no irq")
            yield from self._bus_init()
        except OSError:
            self._acpi_unregister()
            raise
        self.running = True

    def begin(self) -> Steps[None]:
        """Come up, first or as an heir: what the process that has died left on is switched off before, as after a crash."""
        if any(self._memory.load32(Vp.at(vp, Vp.VECTOR), "hv.vector") for vp in range(self._platform.vcpus)):
            yield from self._free_irq()
            yield from self._synic_cleanup()
            yield from self._hv_cleanup()
        yield from self.init()

    def exit(self) -> Steps[None]:
        """Mirror vmbus_exit (B9.9), and between its steps what it left out: UNLOAD, and the SynIC off on every CPU."""
        self.running = False
        if self._leaves_dirty:
            self._channels.connection.free()
        else:
            yield from self._channels.connection.unload()
        yield from self._free_irq()
        yield from self._bus.remove_all()
        self._bus.registered = False
        if not self._leaves_dirty:
            yield from self._synic_cleanup()
        yield from self._hv_cleanup()
        self._acpi_unregister()

    # ----------------------------------------------------------------------------------------- B6: bring-up

    def _bus_init(self) -> Steps[None]:
        """Mirror vmbus_bus_init: in this order, and undone from behind. The result of requesting offers is ignored (B6.8)."""
        undo: list[Callable[[], Steps[Any]]] = []
        try:
            yield from self._hv_init()
            undo.append(self._hv_cleanup)
            self._bus.registered = True
            undo.append(self._unregister_bus)
            self._request_irq()
            undo.append(self._free_irq)
            for vp in range(self._platform.vcpus):
                yield from self._synic_init(vp)
            undo.append(self._synic_cleanup)
            yield from self._channels.connection.connect()
        except OSError:
            for step in reversed(undo):
                if not (self._leaves_dirty and step == self._synic_cleanup):
                    yield from step()
            raise
        try:
            yield from self._channels.connection.request_offers()
        except OSError as error:
            self._log(f"offers: {error}")

    def _unregister_bus(self) -> Steps[None]:
        self._bus.registered = False
        yield from ()

    def _hv_init(self) -> Steps[None]:
        """Mirror hv_init (X11h): who we are, then the hypercall page, and whether it is there. ENOTSUPP, with all undone."""
        try:
            yield WriteMsr(0, MSR_GUEST_OS_ID, LINUX_ID_2012)
            yield WriteMsr(0, MSR_HYPERCALL, HYPERCALL_FRAME << 12 | ENABLE)
            there = yield ReadMsr(0, MSR_HYPERCALL)
        except OSError as error:
            self._log(str(error))
            there = 0
        if not there & ENABLE:
            self._log(f"hv_init: unable to initialise the hypervisor: {ENOTSUPP:#x}")
            yield from self._hv_cleanup()
            raise failed(ENOTSUPP, "no hypercall page")
        self._hypercall_page = True

    def _hv_cleanup(self) -> Steps[None]:
        """Mirror hv_cleanup (X11c). It does not touch the SynIC."""
        self._hypercall_page = False
        for number in (MSR_GUEST_OS_ID, MSR_HYPERCALL):
            yield from self._write_quietly(0, number, 0)

    def _request_irq(self) -> None:
        """Mirror request_irq (X21), exclusive. From here on the handler runs, before there is a page to look at (B6.9)."""
        vectors = [Vp.at(vp, Vp.VECTOR) for vp in range(self._platform.vcpus)]
        if any(self._memory.load32(at, "hv.vector") for at in vectors):
            self._log(f"unable to request IRQ {self.irq}")
            raise failed(errno.EBUSY)
        for at in vectors:
            self._memory.store32(at, VECTOR_OF_IRQ0 + self.irq, "hv.vector")

    def _free_irq(self) -> Steps[None]:
        """Mirror free_irq: no handler starts any more, and a running one has ended."""
        for vp in range(self._platform.vcpus):
            self._memory.store32(Vp.at(vp, Vp.VECTOR), 0, "hv.vector")
        yield Synchronize()

    def _synic_init(self, vp: int) -> Steps[None]:
        """Mirror hv_synic_init (X11s) on one CPU: zeroed pages, SIMP, SIEFP, SINT2 as a whole, SCONTROL."""
        if not self._hypercall_page:
            return
        pages = ((MSR_SIMP, Frame.of_vp(vp, Frame.MESSAGES)), (MSR_SIEFP, Frame.of_vp(vp, Frame.EVENT_FLAGS)))
        for _, frame in pages:
            for at in range(frame * PAGE, (frame + 1) * PAGE, 8):
                self._memory.store64(at, 0, "hv.pages")
        try:
            yield ReadMsr(vp, MSR_SVERSION)
            for number, frame in pages:
                old = yield ReadMsr(vp, number)
                yield WriteMsr(vp, number, old & RESERVED | frame << 12 | ENABLE)
            yield WriteMsr(vp, MSR_SINT0 + SINT_VMBUS, VECTOR_OF_IRQ0 + self.irq)
            old = yield ReadMsr(vp, MSR_SCONTROL)
            yield WriteMsr(vp, MSR_SCONTROL, old | ENABLE)
        except OSError as error:
            self._log(f"SynIC of CPU {vp}: {error}")

    def _synic_cleanup(self) -> Steps[None]:
        """Mirror hv_synic_cleanup of later kernels (H9): mask, then the pages off, then all of it, on every CPU."""
        for vp in range(self._platform.vcpus):
            yield from self._write_quietly(vp, MSR_SINT0 + SINT_VMBUS, Sint.MASKED)
            for number in (MSR_SIMP, MSR_SIEFP, MSR_SCONTROL):
                try:
                    old = yield ReadMsr(vp, number)
                except OSError as error:
                    self._log(str(error))
                else:
                    yield from self._write_quietly(vp, number, old & ~ENABLE)

    def _write_quietly(self, vp: int, number: int, value: int) -> Steps[None]:
        try:
            yield WriteMsr(vp, number, value)
        except OSError as error:
            self._log(str(error))
