# SPDX-License-Identifier: Apache-2.0
"""What the tests of VMBus share: machines on the Hyper-V platform, drivers that note what is done with them, waiting."""

from __future__ import annotations

import collections
import contextlib
import multiprocessing
import os
import select
import signal
import threading
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pvbus.actors.client import VmbusDriver, attach
from pvbus.actors.runtime.vmbus_facts import DEVICE_CLASSES

if TYPE_CHECKING:
    import uuid
    from collections.abc import Callable, Iterator

BOUND_S = 20.0
ECHO, HEARTBEAT, SHUTDOWN = (DEVICE_CLASSES[name] for name in ("echo", "heartbeat", "shutdown"))
RING_BYTES = 64 * 1024

CONFIG = """\
{top}
[[domain]]
id = 0
cpus = {cpus}
platforms = ["hyperv"]
{keys}
[[domain]]
id = 1
platforms = ["xen"]
"""


def config(cpus: int = 1, keys: str = "", top: str = "") -> str:
    return CONFIG.format(cpus=cpus, keys=keys, top=top)


def wait_until(what: str, condition: Callable[[], object], bound_s: float = BOUND_S) -> None:
    deadline = time.monotonic() + bound_s
    while not condition():
        assert time.monotonic() < deadline, f"not within {bound_s} s: {what}"
        select.select([], [], [], 0.002)


def process(machine: Any, name: str) -> dict[str, Any]:
    found: dict[str, Any] = next(one for one in machine.status()["processes"] if one["name"] == name)
    return found


def kill_and_wait_for_heir(machine: Any, name: str) -> None:
    before = process(machine, name)
    os.kill(before["pid"], signal.SIGKILL)

    def is_back() -> bool:
        now = process(machine, name)
        return now["restarts"] > before["restarts"] and now["state"] == "up" and now["pid"] not in (0, before["pid"])

    wait_until(f"{name} is back", is_back)


class Recorder(VmbusDriver):
    """Opens what it is given, and notes every call. `refuses`: an errno that probe answers."""

    id_table = (ECHO,)

    def __init__(
        self, name: str = "echo", classes: tuple[Any, ...] = (ECHO,), *, refuses: int = 0, ring_bytes: int = RING_BYTES
    ) -> None:
        self.name, self.id_table, self.refuses, self.ring_bytes = name, classes, refuses, ring_bytes  # type: ignore[misc]
        self.calls: list[tuple[str, str]] = []
        self.devices: dict[str, Any] = {}
        self.lock = threading.Lock()

    def probe(self, device: Any, matched_id: uuid.UUID) -> None:
        self.calls.append(("probe", device.name))
        if self.refuses:
            raise OSError(self.refuses, os.strerror(self.refuses))
        assert matched_id in self.id_table
        if self.ring_bytes:
            device.channel.open(ring_bytes=self.ring_bytes)
        self.devices[device.name] = device

    def remove(self, device: Any) -> None:
        self.calls.append(("remove", device.name))
        self.devices.pop(device.name, None)

    def shutdown(self, device: Any) -> None:
        self.calls.append(("shutdown", device.name))

    @property
    def channel(self) -> Any:
        """The channel of its one device."""
        (device,) = self.devices.values()
        return device.channel


def drive(machine: Any, driver: Recorder | None = None) -> Recorder:
    """Register a driver and have it probe what was offered before."""
    machine.settle()
    registered: Recorder = machine.register_driver(driver or Recorder())
    machine.settle()
    return registered


def receive(channel: Any, count: int = 1, bound_s: float = BOUND_S) -> list[Any]:
    """Wait for so many packets."""
    got: list[Any] = []
    poll = select.poll()
    poll.register(channel.fileno(), select.POLLIN)
    deadline = time.monotonic() + bound_s
    while len(got) < count:
        more = channel.recv_many(count - len(got))
        got += more
        if not more:
            left = deadline - time.monotonic()
            assert left > 0, f"{len(got)} of {count} packets within {bound_s} s: {channel.state()}"
            poll.poll(left * 1000)
    return got


def echo(channel: Any, count: int, first: int = 0, size: int = 64) -> None:
    """Send packets and have them back, each once and in order."""
    payloads = [(first + at).to_bytes(8, "little").ljust(size, b".") for at in range(count)]
    sent = 0
    got: list[Any] = []
    poll = select.poll()
    poll.register(channel.fileno(), select.POLLIN)
    deadline = time.monotonic() + BOUND_S
    while len(got) < count:
        sent += channel.send_many(payloads[sent:], first + sent) if sent < count else 0
        more = channel.recv_many()
        got += more
        if not more:
            left = deadline - time.monotonic()
            assert left > 0, f"{len(got)} of {count} packets, {sent} sent: {channel.state()}"
            poll.poll(left * 1000)
    assert [packet[1] for packet in got] == list(range(first, first + count))
    assert [packet[2] for packet in got] == payloads


@contextlib.contextmanager
def driver_process(machine: Any, work: Callable[[Any, Any], None]) -> Iterator[Any]:
    """Run `work(machine, connection)` in a process of its own, attached anew; give (process, our end of the pipe)."""
    ours, theirs = multiprocessing.Pipe()
    pid = os.fork()
    if pid == 0:
        code = 1
        try:
            ours.close()
            with attach(name=machine.name) as own:
                work(own, theirs)
            code = 0
        finally:
            os._exit(code)
    theirs.close()
    child = Child(pid, ours)
    try:
        yield child
    finally:
        ours.close()
        child.end()


class Child:
    """A forked process."""

    def __init__(self, pid: int, pipe: Any) -> None:
        self.pid, self.pipe, self.status = pid, pipe, -1

    def kill(self) -> None:
        os.kill(self.pid, signal.SIGKILL)
        self.wait()

    def wait(self) -> int:
        if self.pid:
            _, self.status = os.waitpid(self.pid, 0)
            self.pid = 0
        return self.status

    def end(self) -> None:
        if self.pid:
            os.kill(self.pid, signal.SIGKILL)
            self.wait()

    def receive(self, bound_s: float = BOUND_S) -> Any:
        assert self.pipe.poll(bound_s), f"nothing from the process within {bound_s} s"
        return self.pipe.recv()


def descriptors(pid: int) -> dict[str, int]:
    """What a process has open, but for which socket it is."""
    found = []
    for entry in Path("/proc", str(pid), "fd").iterdir():
        with contextlib.suppress(FileNotFoundError):
            found.append(str(entry.readlink()).partition(":")[0])
    return dict(collections.Counter(found))


def guests(machine: Any) -> dict[str, dict[str, int]]:
    """The descriptors of everybody who holds some for channels."""
    return {
        one["name"]: descriptors(one["pid"]) for one in machine.status()["processes"]
        if one["name"].partition("/")[0] in ("hypervisor", "cpu", "workqueue")
    }


def holds_as_before(machine: Any, before: dict[str, dict[str, int]]) -> None:
    """Wait until everybody holds what they held: a CPU drops a doorbell when it gets to it, behind what it does."""
    deadline = time.monotonic() + BOUND_S
    while (now := guests(machine)) != before:
        assert time.monotonic() < deadline, f"held {before}, holds {now}"
        select.select([], [], [], 0.005)
