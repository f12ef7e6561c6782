# SPDX-License-Identifier: Apache-2.0
"""The machine's own side, on each ABI: a sender in one domain, a receiver in another, bound port by port.

One virtual CPU serves all ports of the receiver, as in the real kernel; a third pair spreads its ports over two.

An event counts when the receiver has read it and written it back. A notify that merges into one still
pending is therefore worth nothing, and the sender holds back: it never has more under way than it has ports
(two with one port: the second stays pending while the first is masked). When merging has let its count run
ahead of the truth, the receiver stands still, and the sender starts counting anew from what was received.
The receiver's word that it got on is an event on the same ports, the other way: a sender that is ahead blocks on it.
"""

from __future__ import annotations

import errno
import select
import time
from itertools import repeat
from time import perf_counter_ns
from typing import NamedTuple

from pvbus.benchmarks.page import DONE, RECEIVED, STOP, STRIDE, Feed, Page
from pvbus.verify.launch import Machine, OpenFile

MACHINE = """\
name = "{name}"

[[domain]]
id = 0
cpus = 2
platforms = ["xen", "hyperv"]

[[domain]]
id = 1

[[domain]]
id = 2
cpus = 2
abi = "2-level"

[[domain]]
id = 3
abi = "2-level"

[[domain]]
id = 4
cpus = 2
affinity = "spread"

[[domain]]
id = 5
"""


class Abi(NamedTuple):
    """Which domains of the machine above are a pair, and how many ports they have: port 0 is never given out."""

    transport: str
    title: str
    receiver: int
    sender: int
    ports_max: int


FIFO = Abi("pvbus-fifo", "pvbus (FIFO)", 0, 1, 131071)
TWO_LEVEL = Abi("pvbus-2l", "pvbus (2-level)", 2, 3, 4095)
SPREAD = Abi("pvbus-spread", "pvbus (FIFO, over two CPUs)", 4, 5, 256)  # the kernel's own default is CPU 0 for all
ABIS = (FIFO, TWO_LEVEL, SPREAD)
STANDSTILL_NS = 500_000  # some wake-ups long: no event in that time means that none is under way
FEED_PAUSE_S = 0.0002
CREDIT = 64  # events from one word of the receiver to the sender to the next
BIRTH_S_MAX = 120.0  # of 65,536 ports, on a loaded computer


def offer(file: OpenFile, abi: Abi, ports_max: int) -> list[int]:
    """Offer as many ports as fit."""
    ports: list[int] = []
    try:
        while len(ports) < min(ports_max, abi.ports_max):
            ports.append(file.bind_unbound_port(abi.sender))
    except OSError as error:
        if error.errno != errno.ENOSPC:
            raise
    return ports


def accept(file: OpenFile, abi: Abi, offered: list[int]) -> list[int]:
    """Bind to as many of them as fit, and take the event that each is born with."""
    ports: list[int] = []
    try:
        for remote in offered:
            ports.append(file.bind_interdomain(abi.receiver, remote))  # noqa: PERF401 -- ENOSPC ends it half-way
    except OSError as error:
        if error.errno != errno.ENOSPC:
            raise
    born = 0
    deadline = time.monotonic() + BIRTH_S_MAX
    while born < len(ports) and time.monotonic() < deadline:
        if file.poll(select.POLLIN, timeout_ms=100) & select.POLLIN:
            data = file.read(4096)
            file.write(data)
            born += len(data) // 4
    return ports


def drain(machine: Machine, file: OpenFile) -> None:
    """Take what is left over from a row, so that the next begins with nothing under way."""
    machine.settle()
    while file.poll(select.POLLIN, timeout_ms=0) & select.POLLIN:
        file.write(file.read(4096))
        machine.settle()


class Pacer:
    """Holds a sender back to what its ports can carry."""

    def __init__(self, page: Page, file: OpenFile, ports: int) -> None:
        self._words = page.words
        self._file = file
        self._under_way_max = max(2, ports)
        self._sent = 0

    def step(self, events: int) -> None:
        """Wait until so many more fit; give up waiting when the receiver stands still."""
        words = self._words
        limit = self._under_way_max - events
        seen = words[RECEIVED]
        if self._sent - seen > limit:
            since = perf_counter_ns()
            while self._sent - (now := words[RECEIVED]) > limit and not words[STOP]:
                if now != seen:
                    seen, since = now, perf_counter_ns()
                elif self._file.poll(select.POLLIN, timeout_ms=1) & select.POLLIN:  # the receiver says that it got on
                    self._file.write(self._file.read(4096))
                if perf_counter_ns() - since > STANDSTILL_NS:
                    self._sent = now
        self._sent += events


def send_single(page: Page, file: OpenFile, ports: list[int]) -> None:
    """Notify port after port, one call each."""
    words = page.words
    notify = file.notify
    step = min(STRIDE, len(ports))
    groups = [ports[at : at + step] for at in range(0, len(ports), step)]
    pacer = Pacer(page, file, len(ports))
    while not words[STOP]:
        for group in groups:
            pacer.step(len(group))
            for port in group:
                notify(port)
    for _ in Feed(page, FEED_PAUSE_S):
        for port in groups[0]:
            notify(port)


def receive_single(page: Page, file: OpenFile, ports: list[int]) -> None:
    """Read one port, write it back; every read blocks while there is nothing."""
    words = page.words
    read, write, notify = file.read, file.write, file.notify
    stride = max(1, min(CREDIT, len(ports) // 4))
    count = 0
    while not words[STOP]:
        for _ in repeat(None, stride):
            write(read(4))
        count += stride
        words[RECEIVED] = count
        notify(ports[0])  # the way back carries the credit, as between two drivers
    words[DONE] = 1


def send_batch(page: Page, file: OpenFile, ports: list[int], batch: int) -> None:
    """Notify lists of ports."""
    words = page.words
    notify_many = file.notify_many
    step = min(batch, max(1, len(ports) // 4))  # so that four lists can be under way
    groups = [ports[at : at + step] for at in range(0, len(ports), step)]
    pacer = Pacer(page, file, len(ports))
    while not words[STOP]:
        for group in groups:
            pacer.step(len(group))
            notify_many(group)
    for _ in Feed(page, FEED_PAUSE_S):
        notify_many(groups[0])


def receive_batch(page: Page, file: OpenFile, batch: int) -> None:
    """Read lists of ports, and enable them."""
    words = page.words
    read_ports, enable, notify = file.read_ports, file.enable, file.notify
    count = 0
    while not words[STOP]:
        ports = read_ports(batch)
        enable(ports)
        count += len(ports)
        words[RECEIVED] = count
        notify(ports[0])
    words[DONE] = 1


def trip(page: Page, file: OpenFile, port: int) -> list[int]:
    """Notify, wait for the answer on the same port, write it back; return the times in nanoseconds."""
    words = page.words
    notify, read, write = file.notify, file.read, file.write
    times = []
    while not words[STOP]:
        begin = perf_counter_ns()
        notify(port)
        write(read(4))
        times.append(perf_counter_ns() - begin)
    words[DONE] = 1
    notify(port)  # wakes the other side, which sees DONE and does not answer
    return times


def echo(page: Page, file: OpenFile, port: int) -> None:
    """Answer every event on its own port."""
    words = page.words
    notify, read, write = file.notify, file.read, file.write
    while True:
        write(read(4))
        if words[DONE]:
            return
        notify(port)
