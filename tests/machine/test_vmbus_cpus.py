# SPDX-License-Identifier: Apache-2.0
"""Messages and events on several CPUs at once: none is stranded, but with the 2012 driver's one pair of tasklets (H10)."""

from __future__ import annotations

import os
import signal
import threading
from typing import TYPE_CHECKING, Any

import pytest

from pvbus.shm import hyperv
from pvbus.shm.hyperv import Header, Vp
from pvbus.shm.memory import Memory
from pvbus.tests.machine.vmbus_support import Recorder, config, drive, echo, process, receive, wait_until

if TYPE_CHECKING:
    from collections.abc import Iterator

CPUS = 2
ROUNDS = 40
ECHOES = 1500
SCHEDULED = Vp.TASKLET_MESSAGE | Vp.TASKLET_EVENT


def segment(machine: Any) -> Memory:
    """The segment of domain 0, as its processes have it."""
    fd = os.open(f"/dev/shm/pvbus-{machine.run_id}-h0", os.O_RDWR)
    try:
        return Memory(fd, hyperv.BYTES)
    finally:
        os.close(fd)


def one_channel_a_cpu(machine: Any) -> tuple[Recorder, list[Any]]:
    for _ in range(CPUS):
        machine.offer("echo")
    driver = drive(machine)
    devices = [driver.devices[name] for _, name in driver.calls]
    for vp, device in enumerate(devices):
        device.modify_target(vp)
    return driver, [device.channel for device in devices]


@pytest.fixture(params=range(CPUS), ids="messages-to-cpu-{}".format)
def messages_cpu(request: pytest.FixtureRequest) -> int:
    vp: int = request.param
    return vp


@pytest.fixture
def machine(pvbus_boot: Any, messages_cpu: int) -> Any:
    return pvbus_boot(config(cpus=CPUS, keys=f"vmbus_cpu = {messages_cpu}")).machine


@pytest.fixture
def machine_of_2012(pvbus_boot: Any) -> Any:
    return pvbus_boot(config(cpus=CPUS, top='variants = ["one-tasklet-pair"]')).machine


@pytest.fixture
def words(machine: Any) -> Iterator[Memory]:
    memory = segment(machine)
    yield memory
    memory.close()


@pytest.mark.checklist("B5.1", "B5.2", "B5.3", "B5.5", "B4.2", "X14", "X19")
def test_cpus_that_wake_at_once_with_events_and_messages_strand_none(
    machine: Any, messages_cpu: int, words: Memory
) -> None:
    driver, channels = one_channel_a_cpu(machine)
    pids = [process(machine, f"cpu/0.{vp}")["pid"] for vp in range(CPUS)]
    for turn in range(ROUNDS):
        machine.settle()
        for pid in pids:
            os.kill(pid, signal.SIGSTOP)
        for channel in channels:
            channel.send(b"while it sleeps", turn)
        relids = [machine.offer("echo") for _ in range(3)]
        for pid in pids if turn % 2 else reversed(pids):
            os.kill(pid, signal.SIGCONT)

        for channel in channels:
            assert [packet[1] for packet in receive(channel)] == [turn]
        machine.settle()
        assert len(driver.devices) == CPUS + len(relids)
        for relid in relids:
            machine.rescind(relid)
    machine.settle()
    assert len(driver.devices) == CPUS
    taken = [words.load64(Vp.at(vp, Vp.MESSAGES)) for vp in range(CPUS)]
    assert [vp for vp in range(CPUS) if taken[vp]] == [messages_cpu]


@pytest.mark.checklist("H10", "B5.5")
def test_two_cpus_under_traffic_and_a_stream_of_offers_strand_none(machine: Any, words: Memory) -> None:
    driver, channels = one_channel_a_cpu(machine)
    failures: list[BaseException] = []

    def ping_pong(channel: Any) -> None:
        try:
            for turn in range(ECHOES):
                echo(channel, 1, turn)  # one packet under way: a flag that is left behind stops it for good
        except BaseException as error:
            failures.append(error)

    threads = [threading.Thread(target=ping_pong, args=(channel,)) for channel in channels]
    for thread in threads:
        thread.start()
    offered = 0
    while any(thread.is_alive() for thread in threads):
        machine.rescind(machine.offer("echo"))
        offered += 1
    for thread in threads:
        thread.join()

    assert failures == []
    machine.settle()
    assert len(driver.devices) == CPUS
    assert offered > 0
    for vp in range(CPUS):
        assert words.load64(Vp.at(vp, Vp.EVENTS)) > ECHOES // 2


@pytest.mark.checklist("H10")
def test_with_one_tasklet_pair_a_message_waits_for_the_next_interrupt_of_its_cpu(machine_of_2012: Any) -> None:
    machine = machine_of_2012
    machine.offer("echo")
    channel = drive(machine).channel
    words = segment(machine)
    # As CPU 1 leaves it between scheduling the one pair and running it, which then looks at CPU 1's page only.
    words.store32(Header.GLOBAL_TASKLETS, SCHEDULED)

    machine.offer("echo")

    wait_until("CPU 0 has had its interrupt", lambda: words.load64(Vp.at(0, Vp.COALESCED)) == 1)
    machine.settle()
    assert len(machine.devices()) == 1  # H10: nobody will look
    words.store32(Header.GLOBAL_TASKLETS, 0)  # CPU 1 has run it
    machine.settle()
    assert len(machine.devices()) == 1
    channel.send(b"an event for CPU 0", 1)
    receive(channel)
    machine.settle()
    assert len(machine.devices()) == 2
    words.close()


@pytest.mark.checklist("H10", "B5.5")
def test_by_default_another_cpus_tasklets_are_its_own(machine: Any, words: Memory) -> None:
    words.store32(Header.GLOBAL_TASKLETS, SCHEDULED)
    _, channels = one_channel_a_cpu(machine)
    for channel in channels:
        echo(channel, 50)
    words.store32(Header.GLOBAL_TASKLETS, SCHEDULED)
    machine.offer("echo")
    machine.settle()

    assert len(machine.devices()) == CPUS + 1


@pytest.mark.checklist("B5.4")
def test_an_interrupt_with_nothing_to_do_is_counted_and_harmless(machine: Any, words: Memory) -> None:
    _, channels = one_channel_a_cpu(machine)
    machine.settle()
    none = words.load64(Vp.at(0, Vp.IRQ_NONE))
    vector = words.load32(Vp.at(0, Vp.VECTOR))

    for turn in range(5):
        words.test_and_set_bit(Vp.at(0, Vp.IRR) + vector // 64 * 8, vector % 64, "syn_irr")
        machine.settle()  # which asks the CPU: it is not idle
        assert words.load64(Vp.at(0, Vp.IRQ_NONE)) == none + turn + 1

    for channel in channels:
        echo(channel, 10)
