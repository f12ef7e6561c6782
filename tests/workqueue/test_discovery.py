# SPDX-License-Identifier: Apache-2.0
"""Finding the bus, bringing it up in order, undoing it from every step, leaving."""

import errno
from collections.abc import Callable, Iterator
from typing import Any

import pytest

from pvbus.actors.runtime.vmbus_facts import V0_13, V5_3
from pvbus.actors.workqueue import discovery
from pvbus.actors.workqueue.bus import Bus
from pvbus.actors.workqueue.connection import ConnectionState
from pvbus.actors.workqueue.discovery import AcpiDevice, Platform, Resource, Vmbus
from pvbus.actors.workqueue.waits import Post, ReadMsr, Synchronize, Wait, WriteMsr
from pvbus.actors.workqueue.work import WorkRing
from pvbus.shm.hyperv import MESSAGE_VMBUS, PAGE, SINT_VMBUS, Frame, Sint, Slot, Vp
from pvbus.shm.layout import Domain, Machine
from pvbus.shm.memory import EventPath
from pvbus.tests.workqueue.rig import ECHO, Guest, anonymous, driver

IRQ = Resource("irq", (7, 9))
SINT2 = discovery.MSR_SINT0 + SINT_VMBUS


def machine(platform: Platform, **options: Any) -> tuple[Guest, Vmbus]:
    guest = Guest()
    guest.bus.exists = guest.bus.registered = False
    return guest, Vmbus(platform, guest.memory, guest.channels, guest.bus, guest.log.append, **options)


def error_of(guest: Guest, vmbus: Vmbus) -> int | None:
    with pytest.raises(OSError) as caught:
        guest.run(vmbus.init())
    return caught.value.errno


def steps(trace: list[Wait]) -> list[str]:
    names = {
        discovery.MSR_GUEST_OS_ID: "os-id", discovery.MSR_HYPERCALL: "hypercall", discovery.MSR_SIMP: "simp",
        discovery.MSR_SIEFP: "siefp", SINT2: "sint2", discovery.MSR_SCONTROL: "scontrol", discovery.MSR_SVERSION: "sversion",
    }  # fmt: skip
    found = []
    for wait in trace:
        if isinstance(wait, WriteMsr):
            found.append(f"{names[wait.number]}.{wait.vp}={wait.value:#x}")
        elif isinstance(wait, Post):
            found.append(f"post {wait.payload[0]}")
        elif not isinstance(wait, ReadMsr):
            found.append(type(wait).__name__)
    return found


@pytest.mark.checklist("B9.1")
def test_another_platform_is_enodev_at_once() -> None:
    guest, vmbus = machine(Platform(is_hyperv=False))

    assert error_of(guest, vmbus) == errno.ENODEV
    assert (guest.clock.now_ns(), guest.trace) == (0, [])


@pytest.mark.checklist("B9.3", "X18")
@pytest.mark.parametrize("devices", [(), (AcpiDevice("vmbus", (IRQ,)),)])
def test_without_the_device_it_is_etimedout_after_five_seconds(devices: tuple[AcpiDevice, ...]) -> None:
    guest, vmbus = machine(Platform(devices=devices))

    assert error_of(guest, vmbus) == errno.ETIMEDOUT
    assert guest.clock.now_ns() == 5_000_000_000
    assert not guest.bus.exists


@pytest.mark.checklist("X23", "X18")
def test_a_device_that_is_added_while_init_waits_ends_the_wait() -> None:
    guest, vmbus = machine(Platform(devices=()))
    outcome = guest.start(vmbus.init())

    vmbus.acpi_add(AcpiDevice("VMBus", (IRQ,)))
    guest.tasks.pump()
    guest.deliver()

    assert outcome == [None]
    assert guest.clock.now_ns() == 0


@pytest.mark.checklist("X23", "B9.2")
def test_without_acpi_its_error_is_returned_at_once() -> None:
    guest, vmbus = machine(Platform(acpi=False))

    assert error_of(guest, vmbus) == errno.ENODEV
    assert guest.clock.now_ns() == 0


@pytest.mark.checklist("X22", "B8.1", "B8.4", "B9.5")
@pytest.mark.parametrize(
    ("resources", "irq"),
    [((), 0), ((Resource("io"),), 0), ((IRQ,), 7), ((Resource("io"), IRQ, Resource("irq", (5,)), Resource("memory")), 5)],
)
def test_the_irq_is_the_first_of_the_last_irq_resource(resources: tuple[Resource, ...], irq: int) -> None:
    guest, vmbus = machine(Platform(devices=(AcpiDevice(resources=resources),)))

    if irq:
        guest.run(vmbus.init())
        assert guest.memory.load32(Vp.at(0, Vp.VECTOR)) == 0x30 + irq
    else:
        assert error_of(guest, vmbus) == errno.ENODEV
        assert (guest.bus.exists, guest.trace) == (False, [])


@pytest.mark.checklist("X22", "B8.2")
def test_an_irq_seen_before_the_walk_failed_lets_bring_up_go_on() -> None:
    guest, vmbus = machine(Platform(devices=(AcpiDevice(resources=(IRQ,), walk_fails=True),)))

    guest.run(vmbus.init())

    assert vmbus.running


class Walked(tuple[Resource, ...]):
    """Resources that note whether their device was known when they were walked."""

    __slots__ = ()
    bus: Bus
    known: list[bool]

    def __iter__(self) -> Iterator[Resource]:
        self.known.append(self.bus.exists)
        return super().__iter__()


@pytest.mark.checklist("B8.2")
@pytest.mark.parametrize(("fails", "answer"), [(True, -errno.ENODEV), (False, 0)])
def test_a_device_is_remembered_before_its_resources_are_walked_and_when_that_fails(fails: bool, answer: int) -> None:
    guest, vmbus = machine(Platform(devices=()))
    outcome = guest.start(vmbus.init())
    known: list[bool] = []
    resources = type("Resources", (Walked,), {"__slots__": (), "bus": guest.bus, "known": known})((IRQ,))
    assert not guest.bus.exists

    added = vmbus.acpi_add(AcpiDevice("VMBUS", resources, walk_fails=fails))
    guest.tasks.pump()
    guest.deliver()

    assert (added, known) == (answer, [True])
    assert (outcome, guest.bus.exists) == ([None], True)    # the wait has ended either way


@pytest.mark.checklist("B8.3")
@pytest.mark.parametrize(
    ("hardware_id", "found"),
    [("VMBUS", True), ("VMBus", True), ("vmbus", False), ("Vmbus", False), ("VMBUS0", False), ("", False)],
)
def test_the_device_is_known_by_two_ids_and_their_case_matters(hardware_id: str, found: bool) -> None:
    guest, vmbus = machine(Platform(devices=(AcpiDevice(hardware_id, (IRQ,)),)))

    if found:
        guest.run(vmbus.init())
    else:
        assert error_of(guest, vmbus) == errno.ETIMEDOUT
    assert (vmbus.running, guest.bus.exists) == (found, found)


@pytest.mark.checklist("B1.1")
def test_two_devices_are_one_bus_and_without_one_there_is_no_irq() -> None:
    twice = (AcpiDevice("VMBUS", (IRQ,)), AcpiDevice("VMBus", (Resource("irq", (5,)),)))
    guest, vmbus = machine(Platform(devices=twice))
    before = (guest.bus.exists, vmbus.irq)

    guest.run(vmbus.init())

    assert before == (False, 0)
    assert [post.payload[0] for post in guest.posts] == [14, 3]
    assert (guest.bus.exists, vmbus.irq, guest.memory.load32(Vp.at(0, Vp.VECTOR))) == (True, 5, 0x35)
    guest.run(vmbus.exit())
    assert (guest.bus.exists, vmbus.irq) == (False, 0)


@pytest.mark.checklist("X11h", "X11s", "B6.6", "B6.8", "X19b")
def test_bring_up_goes_in_its_order_on_every_cpu() -> None:
    guest, vmbus = machine(Platform(vcpus=2))
    guest.msrs[1, discovery.MSR_SIMP] = 0x5A0
    guest.memory.store64(Frame.of_vp(1, Frame.MESSAGES) * PAGE + 512, 99)

    guest.run(vmbus.init())

    page = {(vp, which): Frame.of_vp(vp, which) << 12 for vp in range(2) for which in range(4)}
    assert steps(guest.trace) == [
        f"os-id.0={2976579765 << 32:#x}", f"hypercall.0={page[0, Frame.UNUSED] | 1:#x}",
        f"simp.0={page[0, Frame.MESSAGES] | 1:#x}", f"siefp.0={page[0, Frame.EVENT_FLAGS] | 1:#x}", "sint2.0=0x37",
        "scontrol.0=0x1",
        f"simp.1={page[1, Frame.MESSAGES] | 0x5A1:#x}", f"siefp.1={page[1, Frame.EVENT_FLAGS] | 1:#x}", "sint2.1=0x37",
        "scontrol.1=0x1", "post 14", "post 3",
    ]  # fmt: skip
    assert guest.memory.load64(Frame.of_vp(1, Frame.MESSAGES) * PAGE + 512) == 0
    assert (guest.bus.exists, guest.bus.registered) == (True, True)
    assert guest.connection.version == V5_3


class Watched(Guest):
    """Lets somebody act before each wait of bring-up; what is `held` is not answered until it is let go."""

    def __init__(self) -> None:
        super().__init__()
        self.bus.exists = self.bus.registered = False
        self.before: Callable[[Wait], None] = lambda _: None
        self.holds: Callable[[Wait], bool] = lambda _: False
        self.held: list[tuple[Wait, Callable[[Any], None]]] = []

    def ask(self, wait: Wait, answer: Callable[[Any], None]) -> None:
        self.before(wait)
        if self.holds(wait):
            self.held.append((wait, answer))
        else:
            super().ask(wait, answer)

    def vmbus_of(self, platform: Platform) -> Vmbus:
        return Vmbus(platform, self.memory, self.channels, self.bus, self.log.append)


@pytest.mark.checklist("B6.2", "B6.3", "B6.4", "B6.5", "B6.9")
def test_hypervisor_bus_irq_and_synic_come_one_after_the_other_with_no_tasklet_scheduled() -> None:
    guest = Watched()
    seen: list[tuple[str, bool, list[int]]] = []

    def look(wait: Wait) -> None:
        assert [guest.memory.load32(Vp.at(vp, Vp.TASKLETS)) for vp in range(2)] == [0, 0]
        if isinstance(wait, WriteMsr | Post):
            vectors = [guest.memory.load32(Vp.at(vp, Vp.VECTOR)) for vp in range(2)]
            seen.append((steps([wait])[0].partition("=")[0], guest.bus.registered, vectors))

    guest.before = look
    guest.run(guest.vmbus_of(Platform(vcpus=2)).init())

    assert seen == [
        ("os-id.0", False, [0, 0]), ("hypercall.0", False, [0, 0]),
        *((f"{name}.{vp}", True, [0x37, 0x37]) for vp in range(2) for name in ("simp", "siefp", "sint2", "scontrol")),
        ("post 14", True, [0x37, 0x37]), ("post 3", True, [0x37, 0x37]),
    ]  # fmt: skip


@pytest.mark.checklist("B6.9", "B6.2")
def test_an_interrupt_at_any_step_of_bring_up_finds_its_handler_and_no_page_that_is_not_there() -> None:
    guest = Watched()
    path = EventPath(anonymous(Machine.BYTES), {0: anonymous(Domain.BYTES)})
    path.set_hyperv(0, guest.memory, -1)
    interrupts = 0

    def interrupt(wait: Wait) -> None:
        nonlocal interrupts
        for vp in range(2):
            vector = guest.memory.load32(Vp.at(vp, Vp.VECTOR))
            interrupts += vector != 0
            guest.memory.fetch_or64(Vp.at(vp, Vp.IRR), 1 << 0x37)
            path.hv_run(0, vp)
            assert guest.memory.load32(Vp.at(vp, Vp.TASKLETS)) == 0
        if isinstance(wait, WriteMsr) and wait.number == discovery.MSR_SIMP:    # as the hypervisor does
            guest.memory.store64(Vp.at(wait.vp, Vp.SIMP), wait.value)

    guest.before = interrupt
    guest.run(guest.vmbus_of(Platform(vcpus=2)).init())

    assert interrupts >= 16     # two CPUs, four registers each, and the posts
    assert WorkRing(guest.memory).take() is None
    slot = Frame.of_vp(1, Frame.MESSAGES)
    guest.memory.store32(Slot.at(slot, SINT_VMBUS, Slot.META), 8)
    guest.memory.store32(Vp.at(1, Vp.OFFERED) + 4 * SINT_VMBUS, 1)
    guest.memory.store32(Slot.at(slot, SINT_VMBUS, Slot.TYPE), MESSAGE_VMBUS)
    guest.memory.fetch_or64(Vp.at(1, Vp.IRR), 1 << 0x37)
    path.hv_run(0, 1)
    assert WorkRing(guest.memory).take() == bytes(8)


@pytest.mark.checklist("B6.6", "X19b")
@pytest.mark.parametrize("vp", [0, 1, 2])
def test_connecting_waits_until_the_synic_of_every_cpu_is_set_up(vp: int) -> None:
    guest = Watched()
    guest.holds = lambda wait: isinstance(wait, WriteMsr) and (wait.vp, wait.number) == (vp, discovery.MSR_SCONTROL)
    outcome = guest.start(guest.vmbus_of(Platform(vcpus=3)).init())

    assert guest.posts == []
    ((wait, answer),) = guest.held
    guest.holds = lambda _: False
    guest.ask(wait, answer)
    guest.deliver()

    assert outcome == [None]
    assert {cpu for cpu, number in guest.msrs if number == discovery.MSR_SCONTROL} == {0, 1, 2}


@pytest.mark.checklist("B6.8")
def test_offers_that_cannot_be_requested_are_logged_and_the_bus_is_up() -> None:
    guest, vmbus = machine(Platform())
    guest.post_status = lambda post: 6 if post.payload[0] == 3 else None

    guest.run(vmbus.init())

    assert vmbus.running
    assert "unable to request offers: status 6" in guest.log
    guest.post_status = lambda _: None
    guest.run(guest.bus.register(driver("echo", ECHO)))     # it asks again
    guest.offer()
    assert guest.calls == [("probe", "echo", "vmbus_0_1")]


def check_down(guest: Guest) -> None:
    assert not guest.bus.exists
    assert not guest.bus.registered
    assert [guest.memory.load32(Vp.at(vp, Vp.VECTOR)) for vp in range(2)] == [0, 0]
    assert guest.msrs.get((0, discovery.MSR_GUEST_OS_ID), 0) == 0
    assert guest.msrs.get((0, discovery.MSR_HYPERCALL), 0) == 0
    for vp in range(2):
        for number in (discovery.MSR_SIMP, discovery.MSR_SIEFP, discovery.MSR_SCONTROL):
            assert not guest.msrs.get((vp, number), 0) & 1
    assert guest.connection.state is ConnectionState.DISCONNECTED
    with pytest.raises(OSError) as caught:
        guest.run(guest.bus.register(driver("echo", ECHO)))
    assert caught.value.errno == errno.ENODEV
    guest.check_at_rest()


@pytest.mark.checklist("X11h", "X11c", "B6.1", "B9.6")
@pytest.mark.parametrize("fault", [discovery.MSR_GUEST_OS_ID, discovery.MSR_HYPERCALL])
def test_without_a_hypercall_page_it_is_enotsupp_and_undone(fault: int) -> None:
    guest, vmbus = machine(Platform(vcpus=2))
    guest.faults.add((0, fault))

    assert error_of(guest, vmbus) == 524

    assert any(line.startswith("hv_init: ") and line.endswith(" 0x20c") for line in guest.log)
    assert not any(isinstance(wait, Synchronize | Post) for wait in guest.trace)    # nothing behind it had begun
    check_down(guest)


@pytest.mark.checklist("X21", "B6.4", "B9.6")
def test_an_irq_that_is_taken_is_ebusy_and_what_came_before_undone() -> None:
    guest, vmbus = machine(Platform(vcpus=2))
    guest.memory.store32(Vp.at(1, Vp.VECTOR), 0x37)

    assert error_of(guest, vmbus) == errno.EBUSY

    assert "unable to request IRQ 7" in guest.log
    assert guest.memory.load32(Vp.at(1, Vp.VECTOR)) == 0x37     # it is another's
    guest.memory.store32(Vp.at(1, Vp.VECTOR), 0)
    check_down(guest)


@pytest.mark.checklist("X11", "H9", "B6.7", "B9.6", "B9.7")
@pytest.mark.parametrize(("status", "number"), [(None, errno.ETIMEDOUT), (18, errno.EAGAIN), (6, errno.EINVAL)])
def test_a_connection_that_fails_undoes_everything(status: int | None, number: int) -> None:
    guest, vmbus = machine(Platform(vcpus=2))
    guest.delivers = status is not None
    guest.post_status = lambda _: status

    assert error_of(guest, vmbus) == number

    guest.post_status = lambda _: None
    assert steps(guest.trace)[-11:] == [
        "sint2.0=0x10000", f"simp.0={Frame.of_vp(0, 1) << 12:#x}", f"siefp.0={Frame.of_vp(0, 2) << 12:#x}", "scontrol.0=0x0",
        "sint2.1=0x10000", f"simp.1={Frame.of_vp(1, 1) << 12:#x}", f"siefp.1={Frame.of_vp(1, 2) << 12:#x}", "scontrol.1=0x0",
        "Synchronize", "os-id.0=0x0", "hypercall.0=0x0",
    ]  # fmt: skip
    check_down(guest)


@pytest.mark.checklist("X11s", "B6.6")
def test_a_synic_that_faults_on_one_cpu_is_logged_and_does_not_stop_bring_up() -> None:
    guest, vmbus = machine(Platform(vcpus=2))
    guest.faults.add((1, SINT2))

    guest.run(vmbus.init())

    assert any(line.startswith("SynIC of CPU 1") for line in guest.log)


@pytest.mark.checklist("H9", "X16", "X11c", "B9.9")
@pytest.mark.parametrize("version", [V5_3, V0_13])
def test_exit_unloads_removes_devices_and_switches_the_synic_off_in_order(version: int) -> None:
    guest, vmbus = machine(Platform(vcpus=2))
    guest.connection._versions = (version,)
    guest.run(vmbus.init())
    guest.run(guest.bus.register(driver("echo", ECHO)))
    guest.offer()
    guest.trace.clear()

    guest.run(vmbus.exit())

    order = steps(guest.trace)
    assert order[:4] == ["post 16", "Synchronize", "Remove", "sint2.0=0x10000"]
    assert order[-2:] == ["os-id.0=0x0", "hypercall.0=0x0"]
    assert guest.server.link.version == 0
    guest.bus.drivers.clear()
    check_down(guest)
    assert any(isinstance(wait, Synchronize) for wait in guest.trace)


@pytest.mark.checklist("H9", "B9.9")
def test_the_driver_of_2012_leaves_the_synic_on_and_the_host_connected() -> None:
    guest, vmbus = machine(Platform(vcpus=2), leaves_dirty=True)
    guest.run(vmbus.init())
    guest.run(guest.bus.register(driver("echo", ECHO)))
    guest.offer()
    guest.trace.clear()

    guest.run(vmbus.exit())

    assert steps(guest.trace) == ["Synchronize", "Remove", "os-id.0=0x0", "hypercall.0=0x0"]
    assert guest.server.link.version == V5_3
    assert [guest.msrs[vp, SINT2] & Sint.MASKED for vp in range(2)] == [0, 0]
    assert guest.msrs[1, discovery.MSR_SCONTROL] & 1


def test_it_can_be_brought_up_again_after_exit() -> None:
    guest, vmbus = machine(Platform())
    guest.run(vmbus.init())
    guest.offer()
    guest.run(vmbus.exit())

    guest.run(vmbus.init())

    assert list(guest.bus.devices) == ["vmbus_0_2"]
