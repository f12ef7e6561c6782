# SPDX-License-Identifier: Apache-2.0
"""A machine whose guest speaks protocol 0.13: signals by the interrupt page, both ways, across real processes."""

from __future__ import annotations

import select
import threading
import time
from typing import TYPE_CHECKING, Any

import pytest

from pvbus.actors.client import VmbusDriver
from pvbus.actors.runtime.vmbus_facts import DEVICE_CLASSES
from pvbus.tests.machine.test_kills import kill_and_wait_for_heir

if TYPE_CHECKING:
    import uuid

    from pvbus.actors.client.vmbus import VmbusDevice

WAIT_S = 20.0
DOMAIN = '[[domain]]\nid = 0\ncpus = 2\nplatforms = ["xen", "hyperv"]\n'
OLD = DOMAIN + 'vmbus_versions = ["0.13"]\n'
WRONG_WORD = 'variants = ["wrong-signal-word"]\n'


class EchoDriver(VmbusDriver):
    name, id_table = "echo", (DEVICE_CLASSES["echo"],)

    def __init__(self, relid: int) -> None:
        self.relid = relid
        self.opened = threading.Event()
        self.device: VmbusDevice | None = None

    def probe(self, device: VmbusDevice, matched_id: uuid.UUID) -> None:
        del matched_id
        if device.relid != self.relid:
            return
        device.channel.open(ring_bytes=64 * 1024)
        self.device = device
        self.opened.set()


def open_echo(machine: Any, offers: int = 1) -> VmbusDevice:
    """Offer so many echo devices and open the last one's channel."""
    relid = [machine.offer("echo") for _ in range(offers)][-1]
    driver = EchoDriver(relid)
    machine.register_driver(driver)
    assert driver.opened.wait(WAIT_S)
    assert driver.device is not None
    return driver.device


def exchange(device: VmbusDevice, first: int, wait_s: float = WAIT_S) -> list[tuple[int, bytes]]:
    """Send ten packets one by one, each after the answer to the last; give what came before the time was over."""
    got: list[tuple[int, bytes]] = []
    channel, deadline_s = device.channel, time.monotonic() + wait_s
    doorbell = select.poll()
    doorbell.register(channel.fileno(), select.POLLIN)
    for number in range(first, first + 10):
        channel.send(b"%08d" % number, number, completion=True)
        while (packet := channel.recv()) is None:
            left_ms = 1000 * (deadline_s - time.monotonic())
            if left_ms <= 0:
                return got
            doorbell.poll(left_ms)
        got.append((packet[1], packet[2]))
    return got


def numbered(first: int) -> list[tuple[int, bytes]]:
    return [(number, b"%08d" % number) for number in range(first, first + 10)]


@pytest.mark.checklist("X11", "X14", "B5.2", "H11")
def test_a_guest_of_0_13_and_its_host_signal_each_other_by_the_interrupt_page(pvbus_boot: Any) -> None:
    machine = pvbus_boot(OLD).machine
    device = open_echo(machine, offers=40)     # relid 40: the second 32-bit word
    assert device.relid == 40

    assert exchange(device, 0) == numbered(0)
    kill_and_wait_for_heir(machine, "hypervisor")
    assert exchange(device, 100) == numbered(100)

    assert device.channel.state()["out_signals"] >= 20      # 0.13 signals at every packet


@pytest.mark.checklist("H11")
def test_with_the_2012_drivers_word_index_a_channel_from_32_on_is_never_heard(pvbus_boot: Any) -> None:
    machine = pvbus_boot(WRONG_WORD + OLD).machine
    device = open_echo(machine, offers=33)     # its bit is seen as that of relid 66, which nobody has

    assert exchange(device, 0, wait_s=0.5) == []
    assert device.channel.state()["out_read_bytes_avail"] > 0


@pytest.mark.checklist("H6", "X12")
@pytest.mark.parametrize("variants", ["", 'variants = ["offers-stall"]\n'])
def test_with_stalling_offers_a_registration_waits_for_five_seconds_that_nobody_ends(pvbus_boot: Any, variants: str) -> None:
    machine = pvbus_boot(variants + DOMAIN).machine
    registered = threading.Event()
    driver = EchoDriver(machine.offer("echo"))

    def register() -> None:
        machine.register_driver(driver)
        registered.set()

    thread = threading.Thread(target=register)
    thread.start()
    assert registered.wait(0.5 if variants else WAIT_S) is (not variants)
    while variants and not registered.wait(0.05):   # bring-up's five seconds, then the registration's own
        machine.advance(1.0)
    thread.join()
    assert driver.opened.wait(WAIT_S)
    assert driver.device is not None

    assert exchange(driver.device, 0) == numbered(0)
