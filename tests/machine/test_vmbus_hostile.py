# SPDX-License-Identifier: Apache-2.0
"""Drivers that scribble over their rings, and users that say wrong things to the bus: nobody else notices."""

from __future__ import annotations

import contextlib
import errno
import os
import random
import socket
from pathlib import Path
from typing import Any

import pytest

from pvbus.actors.runtime import vmbus_messages as vm
from pvbus.actors.runtime.wire import Done, WireError, encode, send_frame
from pvbus.shm.hyperv import Frame
from pvbus.shm.memory import Memory
from pvbus.tests.machine.vmbus_support import ECHO, Recorder, config, drive, echo, guests, holds_as_before, process, wait_until

RING_BYTES = 16 * 1024
WRITE_INDEX, READ_INDEX, MASK = 0, 4, 8
DATA = 4096
WORDS = (0xFFFFFFFF, 0x80000000, RING_BYTES, RING_BYTES - 4096, 12292, 3, 1 << 20)


@pytest.fixture
def machine(pvbus_boot: Any) -> Any:
    return pvbus_boot(config()).machine


def two_channels(machine: Any) -> tuple[Any, Any]:
    machine.offer("echo")
    machine.offer("echo")
    driver = drive(machine, Recorder(ring_bytes=RING_BYTES))
    hostile, honest = (driver.devices[name] for _, name in driver.calls)  # opened in this order
    echo(hostile.channel, 10)
    echo(honest.channel, 10)
    return hostile, honest


def ring_of(machine: Any) -> Memory:
    """A second mapping of the first channel's rings, as any driver has one of its own."""
    machine.settle()
    directory = Path("/proc", str(process(machine, "workqueue/0")["pid"]), "fd")
    (link,) = [one for one in directory.iterdir() if f"pvbus-channel-{Frame.CHANNELS:#x}" in str(one.readlink())]
    fd = os.open(link, os.O_RDWR)
    try:
        return Memory(fd, 2 * RING_BYTES)
    finally:
        os.close(fd)


def signal(channel: Any) -> None:
    os.eventfd_write(channel._host, 1)


def still_serves(machine: Any, honest: Any) -> None:
    pids = {name: process(machine, name)["restarts"] for name in ("hypervisor", "workqueue/0", "cpu/0.0")}
    echo(honest.channel, 50)
    assert set(pids.values()) == {0}


@pytest.mark.parametrize("ring", [0, RING_BYTES])
@pytest.mark.parametrize("index", [WRITE_INDEX, READ_INDEX])
def test_an_impossible_index_breaks_that_channel_only(machine: Any, ring: int, index: int) -> None:
    hostile, honest = two_channels(machine)
    for word in WORDS:
        ring_of(machine).store32(ring + index, word)
        signal(hostile.channel)
        machine.settle()
        still_serves(machine, honest)
        hostile.channel.close()
        hostile.channel.open(ring_bytes=RING_BYTES)
        echo(hostile.channel, 5)  # its next rings are as good as any


@pytest.fixture(scope="module")
def pvbus_config() -> str:
    return config()


def test_random_bytes_in_a_ring_do_no_harm(machine: Any) -> None:
    seed = 20121121
    noise = random.Random(seed)
    hostile, honest = two_channels(machine)
    for turn in range(100):
        print("seed", seed, "turn", turn)
        memory = ring_of(machine)
        for _ in range(64):
            at = noise.randrange(RING_BYTES // 8) * 8
            memory.store64(DATA + at if DATA + at < RING_BYTES else at, noise.getrandbits(64))
        memory.store32(WRITE_INDEX, noise.randrange(0, RING_BYTES - 4096, 8))
        signal(hostile.channel)
        if turn % 10 == 0:
            machine.settle()
            still_serves(machine, honest)
        hostile.channel.close()
        hostile.channel.open(ring_bytes=RING_BYTES)
        echo(hostile.channel, 5)  # opened anew it is as good as any
    machine.rescind(hostile.relid)
    machine.settle()
    still_serves(machine, honest)


def test_a_doorbell_that_is_rung_without_end_holds_up_nobody(machine: Any) -> None:
    hostile, honest = two_channels(machine)
    for _ in range(2000):
        signal(hostile.channel)
    still_serves(machine, honest)


WRONG: list[tuple[str, Any, int]] = [
    ("a foreign driver", vm.UnregisterDriver(name="echo"), errno.ENOENT),
    ("a foreign device", vm.CloseRing(device="vmbus_0_1"), errno.EPERM),
    ("a foreign device's ring", vm.OpenRing(device="vmbus_0_1", ring_bytes=8192), errno.EPERM),
    ("a foreign device's target", vm.ModifyTarget(device="vmbus_0_1", target_vp=0), errno.EPERM),
    ("no device", vm.CloseRing(device="vmbus_0_99"), errno.ENODEV),
    ("no attribute", vm.ReadAttribute(device="vmbus_0_1", name="nothing"), errno.ENOENT),
    ("a table of rubbish", vm.RegisterDriver(name="x", id_table=[b"short"]), errno.EINVAL),
    ("an endless table", vm.RegisterDriver(name="x", id_table=[ECHO.bytes_le] * 1000), errno.EINVAL),
    ("a name that is taken", vm.RegisterDriver(name="echo", id_table=[ECHO.bytes_le]), errno.EBUSY),
    ("a name of a page", vm.RegisterDriver(name="x" * 4096, id_table=[ECHO.bytes_le]), errno.EINVAL),
    ("a name as long as a frame", vm.RegisterDriver(name="x" * 65350, id_table=[ECHO.bytes_le]), errno.EINVAL),
    ("a driver_override of a page", vm.WriteAttribute(device="vmbus_0_1", name="driver_override", text="x" * 4096), errno.EINVAL),
    ("a hypercall", vm.WriteMsr(vp=0, msr=0x40000080, value=0), errno.ENOSYS),
    ("a post", vm.PostMessage(connection=4, type=1, payload=b"\x10" + bytes(7)), errno.ENOSYS),
    ("an administrator's call", vm.SettleBus(), errno.ENOSYS),
]  # fmt: skip


@pytest.mark.parametrize(("what", "message", "number"), WRONG, ids=[one[0] for one in WRONG])
def test_a_user_that_says_what_it_must_not_is_refused(
    pvbus_shared_machine: Any, what: str, message: Any, number: int
) -> None:
    from pvbus.actors.client import attach

    machine = pvbus_shared_machine.machine
    machine.offer("echo", "22222222-0000-0000-0000-000000000001") if not machine.channels() else None
    if "echo" not in machine.bus()._drivers:
        drive(machine)
    (device,) = machine.devices()
    if getattr(message, "device", None) == "vmbus_0_1":
        import msgspec

        message = msgspec.structs.replace(message, device=device["name"])
    with attach(name=machine.name) as other, pytest.raises(OSError) as refused:
        other.bus()._connection.ask(message)
    assert refused.value.errno == number, what
    assert machine.devices()[0]["driver"] == "echo"


def test_a_user_that_sends_rubbish_loses_its_connection_and_nobody_else_theirs(machine: Any) -> None:
    from pvbus.actors.client import attach

    _, honest = two_channels(machine)
    machine.settle()
    before = guests(machine)
    with attach(name=machine.name) as other:
        connection = other.bus()._connection
        for turn in range(64):
            with contextlib.suppress(BrokenPipeError):  # cut off before we have said it all
                send_frame(connection._sock, bytes([turn]) * (turn + 1))
        wait_until("the connection is cut", lambda: connection.closed)
    machine.settle()
    still_serves(machine, honest)
    holds_as_before(machine, before)


def test_a_user_that_answers_what_nobody_asked_is_not_heard(machine: Any) -> None:
    _, honest = two_channels(machine)
    connection = machine.bus()._connection
    for number in (0, 1, 2, 99, 1 << 31):
        with connection._sending:
            send_frame(connection._sock, encode(Done(value=7), number, reply=True))
    machine.settle()
    still_serves(machine, honest)


@pytest.mark.parametrize("target_vp", [-1, 1 << 32, 1 << 63])
def test_a_target_that_no_message_has_room_for_is_refused(machine: Any, target_vp: int) -> None:
    hostile, honest = two_channels(machine)
    with pytest.raises(OSError) as refused:
        hostile.modify_target(target_vp)
    assert refused.value.errno == errno.EINVAL
    hostile.channel.close()
    machine.settle()
    before = guests(machine)
    with pytest.raises(OSError) as refused:
        hostile.channel.open(ring_bytes=RING_BYTES, target_vp=target_vp)
    assert refused.value.errno == errno.EINVAL
    machine.settle()
    holds_as_before(machine, before)
    still_serves(machine, honest)
    hostile.channel.open(ring_bytes=RING_BYTES)
    echo(hostile.channel, 5)


def test_descriptors_in_a_driver_s_answer_are_nobody_s(machine: Any) -> None:
    from pvbus.actors.client import attach
    from pvbus.actors.runtime.process import Start
    from pvbus.actors.runtime.wire import decode, recv_frame

    machine.offer("echo")
    machine.settle()
    with attach(name=machine.name) as other:
        _, (fd,) = other._ask(vm.ConnectBus(domain=0))
        before = guests(machine)
        with socket.socket(fileno=fd) as sock:
            for turn in range(3):
                send_frame(sock, encode(vm.RegisterDriver(name=f"x{turn}", id_table=[ECHO.bytes_le]), 2 * turn + 1))
                while not isinstance((frame := decode(recv_frame(sock)[0])).message, vm.CallDriver):
                    pass  # a uevent
                send_frame(sock, encode(Start(name="x", entry="x"), frame.request, reply=True), [fd] * 8)
                send_frame(sock, encode(vm.UnregisterDriver(name=f"x{turn}"), 2 * turn + 2))
                while not isinstance((frame := decode(recv_frame(sock)[0])).message, vm.CallDriver):
                    pass
                send_frame(sock, encode(Done(), frame.request, reply=True))
            machine.settle()
            holds_as_before(machine, before)


def test_words_that_fit_a_frame_only_as_they_came_are_refused(machine: Any) -> None:
    """Handed on, a call has another number: a frame that was full is then too long, and its caller's business."""
    from pvbus.actors.client import attach
    from pvbus.actors.runtime.asking import await_blocking

    machine.settle()
    with attach(name=machine.name) as other:
        for _ in range(130):  # the supervisor's numbers take two bytes now
            other.channels()
        sock = other._connected()
        for length in range(65536, 65300, -1):
            message = vm.Offer(domain=0, class_id="x" * length, instance_id="")
            with contextlib.suppress(WireError):
                if len(data := encode(message, 1)) == 65536:
                    break
        send_frame(sock, data)
        with pytest.raises(OSError) as refused:
            await_blocking(sock, message, 1, 20.0)
        assert refused.value.errno == errno.EMSGSIZE
        assert other.channels() == machine.channels()


def test_a_clock_does_not_leave_its_word(machine: Any) -> None:
    def parts() -> list[tuple[str, int, int]]:
        """Return who serves the machine: the warm pool fills up meanwhile, and is no part of this."""
        rows = machine.status()["processes"]
        return [(row["name"], row["pid"], row["restarts"]) for row in rows if not row["name"].startswith("file/")]

    before = parts()
    for seconds in (1e10, 1.8e10):
        with pytest.raises(OSError) as refused:
            machine.advance(seconds)
        assert refused.value.errno == errno.EINVAL
    assert parts() == before
