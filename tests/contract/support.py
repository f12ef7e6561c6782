# SPDX-License-Identifier: Apache-2.0
"""What the contract tests share: connected ports, full rings, and threads that sleep in a call."""

import contextlib
import errno
import re
import select
import struct
import threading
import time
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

BIND_VIRQ = 0x00044500
BIND_INTERDOMAIN = 0x00084501
BIND_UNBOUND_PORT = 0x00044502
UNBIND = 0x00044503
NOTIFY = 0x00044504
RESET = 0x00004505
RESTRICT_DOMID = 0x00024506
BIND_STATIC = 0x00044507

RING_SIZE_FIRST = 64
PORTS_MAX = 4096  # the 2-level ABI on 64 bits
PAGE = 4096
DOMID_SELF = 0x7FF0
READY_OUT = select.POLLOUT | select.POLLWRNORM
READY_IN = select.POLLIN | select.POLLRDNORM
EVERYTHING = READY_OUT | READY_IN | select.POLLPRI | select.POLLRDBAND | select.POLLWRBAND

WAIT_S_MAX = 5.0
ASLEEP_SAMPLES = 3
SAMPLE_GAP_S = 0.01


def pack(*ports: int) -> bytes:
    """Return ports as the bytes of a read or write."""
    return struct.pack(f"={len(ports)}I", *ports)


def unpack(data: bytes) -> list[int]:
    """Return the ports in the bytes of a read."""
    return list(struct.unpack(f"={len(data) // 4}I", data))


def errno_of(call: Callable[..., Any], *arguments: Any, **options: Any) -> str:
    """Return the name of the errno with which a call fails; "" if it does not."""
    try:
        call(*arguments, **options)
    except OSError as problem:
        return errno.errorcode.get(problem.errno or 0, repr(problem))
    return ""


def ready(file: Any) -> int:
    """Return what a poll for everything says now."""
    mask: int = file.poll(EVERYTHING, timeout_ms=0)
    return mask


def take(machine: Any, file: Any) -> list[int]:
    """Wait until the machine is idle and read all that is there."""
    machine.settle()
    ports: list[int] = []
    with contextlib.suppress(BlockingIOError):
        while data := file.read(PAGE):
            ports += unpack(data)
    return ports


@dataclass
class Pair:
    """Two connected ports: `tx_port` of tx raises `rx_port` of rx. Born enabled, with empty rings."""

    machine: Any
    rx: Any
    rx_port: int
    tx: Any
    tx_port: int

    def send(self) -> None:
        """Raise an event at rx and wait until it has gone as far as it can."""
        self.tx.notify(self.tx_port)
        self.machine.settle()

    def enable(self) -> None:
        """Write the port back at rx, and wait until what that set free has arrived."""
        assert self.rx.write(pack(self.rx_port)) == 4
        self.machine.settle()

    def queue(self, entries: int) -> None:
        """Put that many entries of this one port into the ring: writing before reading is legal."""
        for _ in range(entries):
            self.send()
            self.enable()

    def overflow(self) -> None:
        """Fill a ring of the first size, and raise one event more."""
        self.queue(RING_SIZE_FIRST)
        self.send()


def connect(machine: Any, rx: Any, tx: Any) -> Pair:
    """Bind a port of rx and one of tx to each other, both in domain 0, and take the first event of tx's."""
    rx_port = rx.bind_unbound_port(remote_domain=0)
    tx_port = tx.bind_interdomain(0, rx_port)
    if rx is not tx:
        assert take(machine, tx) == [tx_port]
        tx.write(pack(tx_port))
    return Pair(machine, rx, rx_port, tx, tx_port)


def connect_many(machine: Any, rx: Any, tx: Any, count: int) -> list[Pair]:
    """Connect many ports, rx's first, so that those of each file have rising numbers."""
    rx_ports = [rx.bind_unbound_port(remote_domain=0) for _ in range(count)]
    tx_ports = [tx.bind_interdomain(0, port) for port in rx_ports]
    assert sorted(take(machine, tx)) == sorted(tx_ports)
    write_all(tx, tx_ports)
    return [Pair(machine, rx, *both) for both in zip(rx_ports, [tx] * count, tx_ports, strict=True)]


def write_all(file: Any, ports: Iterable[int]) -> None:
    """Write ports back, a page a call."""
    numbers = list(ports)
    for start in range(0, len(numbers), PAGE // 4):
        file.write(pack(*numbers[start : start + PAGE // 4]))


def bound(machine: Any) -> set[int]:
    """Return the ports of domain 0 that are not free."""
    return {port["port"] for port in machine.ports() if port["domain"] == 0 and port["state"] != "free"}


def wait_until(condition: Callable[[], bool], what: str) -> None:
    """Wait for a condition; fail after some seconds."""
    deadline = time.monotonic() + WAIT_S_MAX
    pace = threading.Event()
    while not condition():
        assert time.monotonic() < deadline, f"not within {WAIT_S_MAX:g} s: {what}"
        pace.wait(SAMPLE_GAP_S)


class InThread(threading.Thread):
    """Makes one call in a thread, and keeps what it gave."""

    def __init__(self, call: Callable[[], Any]) -> None:
        super().__init__(daemon=True)
        self._call = call
        self.done = threading.Event()
        self.value: Any = None
        self.errno = ""
        self.start()

    def run(self) -> None:
        """Make the call."""
        try:
            self.value = self._call()
        except OSError as problem:
            self.errno = errno.errorcode.get(problem.errno or 0, repr(problem))
        self.done.set()

    def result(self) -> Any:
        """Wait for the call to return and give its value."""
        assert self.done.wait(WAIT_S_MAX), "the call does not return"
        self.join(WAIT_S_MAX)
        return self.value

    def sleeps(self) -> bool:
        """Wait until the thread sleeps in its call. False: the call has returned."""
        return asleep(self.native_id, self.done.is_set)


def asleep(native_id: int | None, returned: Callable[[], bool]) -> bool:
    """Wait until a thread of this process is asleep and stays so; False if its call returns instead."""
    deadline = time.monotonic() + WAIT_S_MAX
    pace = threading.Event()
    before, alike = "", 0
    while time.monotonic() < deadline:
        if returned():
            return False
        text = Path(f"/proc/self/task/{native_id}/status").read_text()
        found = re.search(r"State:\s+(\w)[\s\S]*\nvoluntary_ctxt_switches:\s+(\d+)", text)
        state = f"{found[1]} {found[2]}" if found else ""
        alike = alike + 1 if state == before and state.startswith("S") else 0
        if alike >= ASLEEP_SAMPLES:
            return not returned()
        before = state
        pace.wait(SAMPLE_GAP_S)
    raise AssertionError("the thread neither sleeps nor returns")
