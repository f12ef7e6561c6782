# SPDX-License-Identifier: Apache-2.0
"""VMBus: a driver process and the host's echo device, over a channel with two rings of 256 KiB.

A packet counts when the driver has it back: it has been written, read, written and read, through both rings, and is a bytes
object again. The peers' packets go one way only, from a process that sends bytes to one that receives bytes; that is half the
work, so the comparison is in their favour. Signals are the driver's to the host: what would be hypercalls.
"""

from __future__ import annotations

import select
import threading
import time
import uuid
from time import perf_counter_ns
from typing import TYPE_CHECKING, Any

from pvbus.actors.client.vmbus import VmbusChannel, VmbusDevice, VmbusDriver
from pvbus.actors.runtime.vmbus_facts import DEVICE_CLASSES
from pvbus.benchmarks.page import END_S_MAX, RECEIVED, SIGNALS, STOP, FeedError, Page

if TYPE_CHECKING:
    from contextlib import ExitStack

TRANSPORT, TITLE = "vmbus", "pvbus VMBus, echo"
RING_BYTES = 256 * 1024
PACKET_BYTES_MORE = 24  # descriptor and trailer
BATCH = 256
PROBE_S_MAX = 10.0
LOOK_MS = 10


class EchoDriver(VmbusDriver):
    """The driver's half of the echo device."""

    name, id_table = "bench-echo", (DEVICE_CLASSES["echo"],)

    def __init__(self) -> None:
        self.probed = threading.Event()
        self.device: VmbusDevice | None = None

    def probe(self, device: VmbusDevice, matched_id: uuid.UUID) -> None:
        """Open the channel."""
        del matched_id
        device.channel.open(ring_bytes=RING_BYTES)
        self.device = device
        self.probed.set()


class Bell:
    """A channel's doorbell, waited for as any event loop would."""

    def __init__(self, channel: VmbusChannel) -> None:
        self._poll = select.poll()
        self._poll.register(channel.fileno(), select.POLLIN)

    def wait(self) -> None:
        """Sleep until it rings, or long enough to look whether the row is over."""
        self._poll.poll(LOOK_MS)


def open_echo(machine: Any, stack: ExitStack) -> VmbusChannel:
    """Offer the device and be its driver; both end with `stack`."""
    relid = machine.offer("echo")
    stack.callback(machine.rescind, relid)
    driver = EchoDriver()
    machine.register_driver(driver)
    stack.callback(machine.unregister_driver, driver)
    if not driver.probed.wait(PROBE_S_MAX) or driver.device is None:
        raise FeedError(f"no echo device within {PROBE_S_MAX:.0f} s")
    return driver.device.channel


def _signals(channel: VmbusChannel) -> int:
    state = channel.state()
    return int(state["out_signals"] + state["in_signals"])


def stream(page: Page, channel: VmbusChannel, size: int) -> None:
    """Send and receive batches of packets until the row is over and all of them are back."""
    words, bell, before = page.words, Bell(channel), _signals(channel)
    payloads = [bytes(size)] * min(BATCH, RING_BYTES // 2 // (size + PACKET_BYTES_MORE))
    sent = received = 0
    over_s = None
    while over_s is None or received < sent:
        if over_s is None:
            sent += channel.send_many(payloads, sent)
            over_s = time.monotonic() if words[STOP] else None
        elif time.monotonic() > over_s + END_S_MAX:
            raise FeedError(f"{sent - received} packets did not come back within {END_S_MAX:.0f} s")
        packets = channel.recv_many(4 * BATCH)
        received += len(packets)
        words[RECEIVED], words[SIGNALS] = received, _signals(channel) - before
        if not packets:
            bell.wait()


def trip(page: Page, channel: VmbusChannel) -> list[int]:
    """Send a packet and wait for its completion, again and again; return the times in nanoseconds."""
    words, bell, before = page.words, Bell(channel), _signals(channel)
    times: list[int] = []
    while not words[STOP]:
        deadline_s = time.monotonic() + END_S_MAX
        begin = perf_counter_ns()
        channel.send(b"8 bytes.", len(times), completion=True)
        while channel.recv() is None:
            bell.wait()
            if time.monotonic() > deadline_s:
                raise FeedError(f"a completion did not come within {END_S_MAX:.0f} s")
        times.append(perf_counter_ns() - begin)
    words[RECEIVED], words[SIGNALS] = len(times), _signals(channel) - before
    return times
