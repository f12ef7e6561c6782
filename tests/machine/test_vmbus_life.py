# SPDX-License-Identifier: Apache-2.0
"""Devices and drivers of a running bus: offers, probes, removals, names, attributes; settling knows of it all."""

from __future__ import annotations

import errno
import select
import uuid
from typing import TYPE_CHECKING, Any

import pytest

from pvbus.shm.memory import BufferTooSmall
from pvbus.tests.machine.vmbus_support import ECHO, HEARTBEAT, Recorder, config, drive, echo, receive

if TYPE_CHECKING:
    from collections.abc import Callable

RING_BYTES_MIN = 8 * 1024
RING_BYTES_LARGE = 256 * 4096


@pytest.fixture(scope="module")
def pvbus_config() -> str:
    return config(cpus=2)


@pytest.fixture
def machine(pvbus_shared_machine: Any) -> Any:
    machine = pvbus_shared_machine.machine
    yield machine
    for channel in machine.channels():
        if channel["state"] != "revoked":
            machine.rescind(channel["relid"])
    for name in list(machine.bus()._drivers):
        machine.unregister_driver(name)
    machine.settle()
    assert machine.channels() == []
    assert machine.devices() == []


def names(machine: Any) -> list[str]:
    return [device["name"] for device in machine.devices()]


@pytest.mark.checklist("B7.1", "B3.5", "B3.3", "X20")
def test_a_device_offered_before_its_driver_is_probed_when_that_registers(machine: Any) -> None:
    relid = machine.offer("echo")
    machine.settle()
    (name,) = names(machine)

    driver = machine.register_driver(Recorder())

    assert driver.calls == [("probe", name)]
    assert driver.devices[name].relid == relid
    assert machine.devices()[0]["driver"] == "echo"


@pytest.mark.checklist("B1.3")
def test_every_line_of_the_bus_in_the_log_begins_with_the_name_of_its_module(pvbus_shared_machine: Any, machine: Any) -> None:
    machine.offer("echo")
    machine.settle()
    (name,) = names(machine)
    machine.register_driver(Recorder("loud", refuses=errno.ENXIO))

    lines = pvbus_shared_machine.log.splitlines()

    for said in (f"child device {name} registered", "registering driver loud", f"probe failed for device {name} ({errno.ENXIO})"):
        assert [line for line in lines if line.endswith(said)] == [f"hv_vmbus: domain 0: {said}"]


@pytest.mark.checklist("B7.6", "X13")
def test_a_device_offered_after_its_driver_is_probed_at_once(machine: Any) -> None:
    driver = machine.register_driver(Recorder())

    machine.offer("echo")
    machine.settle()

    (name,) = names(machine)
    assert driver.calls == [("probe", name)]
    assert [one["state"] for one in machine.channels()] == ["open"]


@pytest.mark.checklist("B3.4")
def test_a_device_of_another_class_is_nobodys(machine: Any) -> None:
    driver = machine.register_driver(Recorder(classes=(HEARTBEAT,)))

    machine.offer("echo")
    machine.settle()

    assert driver.calls == []
    assert machine.devices()[0]["driver"] is None


@pytest.mark.checklist("B7.7", "B3.6", "X16")
def test_a_rescinded_device_is_removed_and_its_name_never_comes_again(machine: Any) -> None:
    driver = machine.register_driver(Recorder())
    seen = []
    for _ in range(3):
        relid = machine.offer("echo")
        machine.settle()
        seen += names(machine)
        machine.rescind(relid)
        machine.settle()
        assert names(machine) == []

    assert driver.calls == [(call, name) for name in seen for call in ("probe", "remove")]
    numbers = [int(name.removeprefix("vmbus_0_")) for name in seen]
    assert numbers == list(range(numbers[0], numbers[0] + 3))
    assert driver.devices == {}
    assert machine.channels() == []


@pytest.mark.checklist("B3.5", "X20")
def test_a_probe_that_refuses_leaves_the_device_to_the_next_driver(machine: Any) -> None:
    machine.offer("echo")
    machine.settle()
    (name,) = names(machine)
    refusing = machine.register_driver(Recorder("refusing", refuses=errno.ENOMEM))
    assert machine.devices()[0]["driver"] is None

    taking = machine.register_driver(Recorder("taking"))
    late = machine.register_driver(Recorder("late"))

    assert refusing.calls == taking.calls == [("probe", name)]
    assert late.calls == []
    assert machine.devices()[0]["driver"] == "taking"


@pytest.mark.checklist("X20")
def test_of_two_drivers_the_first_whose_probe_succeeds_wins(machine: Any) -> None:
    refusing = machine.register_driver(Recorder("refusing", refuses=errno.ENODEV))
    taking = machine.register_driver(Recorder("taking"))
    late = machine.register_driver(Recorder("late"))

    machine.offer("echo")
    machine.settle()

    assert [len(one.calls) for one in (refusing, taking, late)] == [1, 1, 0]
    echo(taking.channel, 3)


@pytest.mark.checklist("B3.4")
def test_a_driver_override_binds_one_driver_whatever_its_table_says(machine: Any) -> None:
    machine.offer("echo")
    machine.settle()
    (name,) = names(machine)
    bus = machine.bus()
    assert bus.read_attribute(name, "driver_override") == "(null)\n"
    bus.write_attribute(name, "driver_override", "chosen\n")

    usual = machine.register_driver(Recorder("usual"))

    class Willing(Recorder):
        def probe(self, device: Any, matched_id: uuid.UUID) -> None:
            self.calls.append(("probe", device.name))

    chosen = machine.register_driver(Willing("chosen", classes=(HEARTBEAT,)))

    assert usual.calls == []
    assert chosen.calls == [("probe", name)]
    assert bus.read_attribute(name, "driver_override") == "chosen\n"
    for wrong, number in (("id", errno.EACCES), ("nothing", errno.ENOENT)):
        with pytest.raises(OSError) as refused:
            bus.write_attribute(name, wrong, "1")
        assert refused.value.errno == number


@pytest.mark.checklist("X20", "B7.2", "B1.1")
def test_a_name_that_is_taken_is_busy_until_its_driver_goes(machine: Any) -> None:
    from pvbus.actors.client import attach

    first = machine.register_driver(Recorder("taken"))
    with attach(name=machine.name) as other:
        with pytest.raises(OSError) as busy:
            other.register_driver(Recorder("taken"))
        assert busy.value.errno == errno.EBUSY
        machine.unregister_driver(first)
        other.register_driver(Recorder("taken"))
        other.unregister_driver("taken")
        with pytest.raises(OSError) as unknown:
            other.unregister_driver("taken")
    assert unknown.value.errno == errno.ENOENT


@pytest.mark.checklist("B7.4", "B3.6")
def test_unregistering_removes_every_device_and_another_driver_can_have_them(machine: Any) -> None:
    driver = machine.register_driver(Recorder())
    for _ in range(3):
        machine.offer("echo")
    machine.settle()
    held = names(machine)
    assert sorted(driver.devices) == sorted(held)

    machine.unregister_driver(driver)

    assert sorted(driver.calls) == sorted((call, name) for name in held for call in ("probe", "remove"))
    assert {one["state"] for one in machine.channels()} == {"closed"}
    again = machine.register_driver(Recorder("again"))
    assert sorted(again.devices) == sorted(held)
    for device in again.devices.values():
        echo(device.channel, 2)


@pytest.mark.checklist("B2.3", "B2.4", "B2.5", "X15", "H7")
def test_attributes_of_a_closed_channel_are_zeros_and_of_an_open_one_its_rings(machine: Any) -> None:
    instance = uuid.uuid4()
    relid = machine.offer("echo", str(instance))
    machine.settle()
    closed = machine.devices()[0]["attributes"]
    assert closed["id"] == f"{relid}\n"
    assert closed["class_id"] == f"{{{ECHO}}}\n"
    assert closed["device_id"] == f"{{{instance}}}\n"
    assert closed["modalias"] == f"vmbus:{ECHO.bytes_le.hex()}\n"
    rings = [f"{side}_{name}" for side in ("out", "in") for name in (
        "intr_mask", "read_index", "write_index", "read_bytes_avail", "write_bytes_avail",
    )]  # fmt: skip
    assert {closed[name] for name in rings} == {"0\n"}

    driver = machine.register_driver(Recorder(ring_bytes=RING_BYTES_MIN))
    driver.channel.send(b"12345678", 1)
    receive(driver.channel)
    machine.settle()

    opened = machine.devices()[0]["attributes"]
    assert opened["state"] == "3\n"
    assert opened["out_write_index"] == opened["in_read_index"] == "32\n"  # 16 header, 8 payload, 8 index
    assert opened["out_read_index"] == opened["in_write_index"] == "32\n"
    assert int(opened["out_write_bytes_avail"]) == 4096
    assert driver.devices[machine.devices()[0]["name"]].attribute("out_write_index") == "32\n"


@pytest.mark.checklist("B9.1")
def test_a_domain_without_the_platform_has_no_bus(machine: Any) -> None:
    calls: list[Callable[[], object]] = [
        lambda: machine.register_driver(Recorder(), domain=1), lambda: machine.offer("echo", domain=1),
        lambda: machine.channels(1), lambda: machine.register_driver(Recorder(), domain=7),
    ]  # fmt: skip
    for call in calls:
        with pytest.raises(OSError) as refused:
            call()
        assert refused.value.errno == errno.ENODEV


def test_a_driver_without_a_name_or_a_table_is_refused(machine: Any) -> None:
    for driver in (Recorder(""), Recorder("empty", classes=()), Recorder("a/b")):
        with pytest.raises(OSError) as refused:
            machine.register_driver(driver)
        assert refused.value.errno == errno.EINVAL


def test_settling_from_a_probe_would_wait_for_itself(machine: Any) -> None:
    class Settler(Recorder):
        def probe(self, device: Any, matched_id: uuid.UUID) -> None:
            try:
                machine.settle()
            except OSError as error:
                self.refuses = error.errno or 0

    machine.offer("echo")

    driver = drive(machine, Settler())

    assert driver.refuses == errno.EDEADLK


@pytest.mark.parametrize("ring_bytes", [RING_BYTES_MIN, RING_BYTES_LARGE])
def test_packets_come_back_through_rings_of_every_size(machine: Any, ring_bytes: int) -> None:
    machine.offer("echo")
    driver = drive(machine, Recorder(ring_bytes=ring_bytes))

    echo(driver.channel, 2000, size=200)
    driver.channel.send(b"question", 77, completion=True)
    (answer,) = receive(driver.channel)

    assert answer[:3] == (11, 77, b"question")
    assert driver.channel.ring_bytes == ring_bytes


@pytest.mark.parametrize("ring_bytes", [0, 4096, 4097, 2 * 4096 + 8, 1 << 40])
def test_a_ring_of_an_impossible_size_is_refused_and_the_device_is_not_held(machine: Any, ring_bytes: int) -> None:
    machine.offer("echo")
    driver = drive(machine, Recorder(ring_bytes=0))
    (device,) = driver.devices.values()

    with pytest.raises(OSError) as refused:
        device.channel.open(ring_bytes=ring_bytes)

    assert refused.value.errno == errno.EINVAL
    device.channel.open(ring_bytes=RING_BYTES_MIN)
    echo(device.channel, 1)


def test_a_full_ring_answers_eagain_and_goes_on_when_the_host_has_made_room(machine: Any) -> None:
    machine.offer("echo")
    driver = drive(machine, Recorder(ring_bytes=RING_BYTES_MIN))
    channel, sent = driver.channel, 0
    with pytest.raises(BlockingIOError):
        for sent in range(10_000):  # nobody reads what comes back, so both rings fill
            channel.send(b"x" * 256, sent)
    assert sent > 4

    got = [packet[1] for packet in receive(channel, sent)]

    assert got == list(range(sent))
    echo(channel, 100)


def test_a_buffer_too_small_is_told_the_size_and_loses_nothing(machine: Any) -> None:
    machine.offer("echo")
    driver = drive(machine)
    channel = driver.channel
    channel.send(b"y" * 500, 5)
    machine.settle()

    with pytest.raises(OSError) as small:
        channel.recv(100)

    assert small.value.errno == errno.ENOBUFS
    assert isinstance(small.value, BufferTooSmall)
    assert small.value.needed == 504  # whole words
    packet = channel.recv()
    assert packet[1] == 5
    assert packet[2][:500] == b"y" * 500


def test_the_doorbell_is_readable_when_something_came_and_quiet_after_it_was_taken(machine: Any) -> None:
    machine.offer("echo")
    driver = drive(machine)
    channel = driver.channel
    with select.epoll() as epoll:
        epoll.register(channel.fileno(), select.EPOLLIN)
        machine.settle()
        assert channel.recv() is None
        assert epoll.poll(0) == []

        channel.send(b"ding", 1)
        machine.settle()

        assert [fd for fd, _ in epoll.poll(0)] == [channel.fileno()]
        assert channel.recv()[1] == 1
        assert channel.recv() is None
        assert epoll.poll(0) == []


def test_a_channel_is_opened_and_closed_again_and_again(machine: Any) -> None:
    machine.offer("echo")
    driver = drive(machine)
    channel = driver.channel
    for _ in range(20):
        with pytest.raises(OSError) as opened:
            channel.open()
        assert opened.value.errno == errno.EISCONN
        channel.close()
        channel.close()
        with pytest.raises(OSError) as closed:
            channel.send(b"")
        assert closed.value.errno == errno.ENOTCONN
        channel.open(ring_bytes=RING_BYTES_MIN)
        echo(channel, 3)


def test_interrupts_follow_the_channel_to_another_cpu(machine: Any) -> None:
    machine.offer("echo")
    driver = drive(machine)
    (device,) = driver.devices.values()
    for vp in (1, 0, 1):
        device.modify_target(vp)
        echo(device.channel, 10)
        assert machine.channels()[0]["target_vp"] == vp
        assert device.attribute("channel_vp_mapping") == f"{device.relid}:{vp}\n"
    with pytest.raises(OSError) as refused:
        device.modify_target(2)
    assert refused.value.errno == errno.EINVAL
