# SPDX-License-Identifier: Apache-2.0
"""The user processes of `pvbus demo`: ping and pong, storm and sink, and a driver of the echo device. Short enough
to learn the client from. The heartbeat's driver is verify/drivers/heartbeat.py.

Started as `python -m pvbus.view.demo_users ROLE MACHINE FD [PORT …]`. They count in a memfd of the demo's
own, a word one writer; it is not a page of the machine. Their standard input is their leash: a line is a
wish, its end is the end.
"""

from __future__ import annotations

import mmap
import random
import select
import statistics
import struct
import sys
import time
import uuid
from typing import Any

from pvbus.actors.client import VmbusDevice, VmbusDriver, attach
from pvbus.actors.runtime.vmbus_facts import DEVICE_CLASSES

STORM_PORTS = 64
STOP, REST = 0, 1  # by the demo: raise no more · read no more
TRIPS, ECHOES, TRIP_P50_NS = 2, 3, 4  # by ping, by pong, by ping
PACKETS_SENT, PACKETS_BACK, PACKETS_WRONG = 5, 6, 7  # by echo
# Of the storm, each + the number of the port: notifies, events read, notifies as they were at the last read.
SENT, SEEN, LAST = 64, 128, 192
WORDS = 256
READ_MS = 100  # how long a reader sleeps before it looks whether it shall rest
TRIPS_A_MEDIAN = 200
MERGES_MAX = 8  # a burst notifies an even port once to so many times
BURST_PAUSE_S = 0.002
PATIENCE_S = 5.0  # for packets that are still under way at the end
RING_BYTES = 64 * 1024
PACKETS = [b"0123456789abcdef" * 4] * 128


def counters(fd: int) -> memoryview:
    """Map the words."""
    return memoryview(mmap.mmap(fd, 8 * WORDS)).cast("Q")


def say(*ports: int) -> None:
    """Tell the demo one's ports, or nothing: that one rests."""
    print(*ports, flush=True)


def ping(machine: Any, words: memoryview, offered: list[int]) -> None:
    """Notify, wait for the answer, write it back, and again."""
    file = machine.open_evtchn(domain=0)
    port = file.bind_interdomain(1, offered[0])
    say(port)
    file.write(file.read(4))  # the local end of a new channel is born pending
    times: list[int] = []
    while not words[STOP]:
        begin = time.perf_counter_ns()
        file.notify(port)
        file.write(file.read(4))
        times.append(time.perf_counter_ns() - begin)
        words[TRIPS] += 1
        if len(times) == TRIPS_A_MEDIAN:
            words[TRIP_P50_NS] = int(statistics.median(times))
            times.clear()
    say()
    sys.stdin.read()


def pong(machine: Any, words: memoryview, _: list[int]) -> None:
    """Answer each event."""
    file = machine.open_evtchn(domain=1)
    port = file.bind_unbound_port(0)
    say(port)
    while not words[REST]:
        if file.poll(select.POLLIN, timeout_ms=READ_MS) & select.POLLIN:
            file.write(file.read(4))
            words[ECHOES] += 1
            file.notify(port)
    say()
    sys.stdin.read()


def storm(machine: Any, words: memoryview, offered: list[int]) -> None:
    """Notify many ports in bursts.

    Even ones several times, and what is pending already merges; odd ones only when the last event was seen,
    so that none may merge and a doubled one shows.
    """
    file = machine.open_evtchn(domain=1, nonblock=True)
    ports = [file.bind_interdomain(0, port) for port in offered]
    say(*ports)
    notify = file.notify
    while not words[STOP]:
        for index, port in enumerate(ports):
            seen_all = words[SEEN + index] == words[SENT + index]
            for _ in range(int(seen_all) if index % 2 else random.randint(1, MERGES_MAX)):
                words[SENT + index] += 1
                notify(port)
        time.sleep(BURST_PAUSE_S)
    say()
    for _ in sys.stdin:  # one event more, for `explain`
        notify(ports[0])
        say()


def sink(machine: Any, words: memoryview, _: list[int]) -> None:
    """Read whatever comes, note how much had been sent by then, write it back."""
    file = machine.open_evtchn(domain=0)
    ports = [file.bind_unbound_port(1) for _ in range(STORM_PORTS)]
    index_of = {port: index for index, port in enumerate(ports)}
    say(*ports)
    while not words[REST]:
        if file.poll(select.POLLIN, timeout_ms=READ_MS) & select.POLLIN:
            data = file.read(4096)
            for (port,) in struct.iter_unpack("=I", data):
                index = index_of[port]
                words[LAST + index] = words[SENT + index]
                words[SEEN + index] += 1
            file.write(data)
    say()
    sys.stdin.read()


class Echo(VmbusDriver):
    """The driver of the echo device: opens its channel, and leaves the packets to `echo`."""

    name, id_table = "echo", (DEVICE_CLASSES["echo"],)
    device: VmbusDevice | None = None

    def probe(self, device: VmbusDevice, matched_id: uuid.UUID) -> None:
        """Take it."""
        device.channel.open(ring_bytes=RING_BYTES)
        self.device = device


def echo(machine: Any, words: memoryview, _: list[int]) -> None:
    """Send packets in batches, count those that come back, in their order."""
    driver = machine.register_driver(Echo)
    device = driver.device  # the machine offers it from the start: probed before the registration returns
    say()
    channel, bell = device.channel, select.poll()
    bell.register(channel.fileno(), select.POLLIN)
    sent = back = 0
    alone_s = 0.0  # when nothing has come back since
    while not words[STOP] or (back < sent and time.monotonic() < alone_s + PATIENCE_S):
        if back == sent:
            time.sleep(BURST_PAUSE_S)
            sent += channel.send_many(PACKETS, sent)
            words[PACKETS_SENT] = sent
        bell.poll(READ_MS)
        for _type, transaction, payload, _completion in channel.recv_many():
            words[PACKETS_WRONG] += transaction != back or payload != PACKETS[0]
            back += 1
            alone_s = time.monotonic()
        words[PACKETS_BACK] = back
    say()
    sys.stdin.read()


def main() -> int:
    """Play one role."""
    role, name, fd, *ports = sys.argv[1:]
    play = {"ping": ping, "pong": pong, "storm": storm, "sink": sink, "echo": echo}[role]
    with attach(name=name) as machine:
        play(machine, counters(int(fd)), [int(port) for port in ports])
    return 0


if __name__ == "__main__":
    sys.exit(main())
