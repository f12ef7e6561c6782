# SPDX-License-Identifier: Apache-2.0
"""A guest, connected back to back with the real protocol server: no process, no socket, a clock that the test moves."""

import errno
import itertools
import os
import uuid
from collections import deque
from collections.abc import Callable
from typing import Any, Self

import pytest

from pvbus.actors.hypervisor.vmbus.channel import Handle, RingPages
from pvbus.actors.hypervisor.vmbus.server import Server
from pvbus.actors.runtime.clock import ManualClock, Timers
from pvbus.actors.runtime.vmbus_facts import DEVICE_CLASSES, SPOKEN, STATUS_SUCCESS
from pvbus.actors.workqueue import guest
from pvbus.actors.workqueue.bus import NULL_GUID, Driver
from pvbus.actors.workqueue.channel import Channel
from pvbus.actors.workqueue.connection import HV_INSUFFICIENT_BUFFERS, HV_INVALID_CONNECTION_ID
from pvbus.actors.workqueue.waits import (
    Listen,
    Post,
    Probe,
    Quiesce,
    ReadMsr,
    Remove,
    Shutdown,
    Steps,
    Synchronize,
    Wait,
    WriteMsr,
)  # fmt: skip
from pvbus.shm.hyperv import BYTES, PAGE, Frame
from pvbus.shm.memory import Memory

ECHO = DEVICE_CLASSES["echo"]
KVP = DEVICE_CLASSES["kvp"]


def anonymous(size: int) -> Memory:
    """Map pages that nobody else has."""
    fd = os.memfd_create("test")
    os.ftruncate(fd, size)
    memory = Memory(fd, size)
    os.close(fd)
    return memory


class RingMemory:
    """Channel memory in frames of its own, that complains when it is freed twice."""

    numbers = itertools.count(Frame.CHANNELS, 0x1000)

    def __init__(self, guest: "Guest", pages: int) -> None:
        first = next(self.numbers)
        self.frames = range(first, first + pages)
        self.downstream_page = pages // 2
        self.memory = anonymous(pages * PAGE)
        self.freed = 0
        self.guest = guest
        guest.rings.append(self)

    def free(self) -> None:
        self.freed += 1
        assert self.freed == 1, "the pages of a ring are freed twice"
        assert not self.guest.mapped(self), "pages are freed that the host has mapped"


class Echo:
    """A device of the host that opens at once, or when it is told to."""

    def __init__(self, status: int | None = STATUS_SUCCESS) -> None:
        self.status, self.signals = status, 0
        self.handle: Handle | None = None
        self.pages: RingPages | None = None

    def on_open(self, handle: Handle, pages: RingPages) -> int | None:
        self.handle, self.pages = handle, pages
        if self.status not in (STATUS_SUCCESS, None):
            self.pages = None
        return self.status

    def on_opened(self) -> None:
        pass

    def on_close(self) -> bool:
        self.pages = None
        return True

    def on_signal(self) -> None:
        self.signals += 1

    def due_ns(self) -> int | None:
        return None

    def tick(self, now_ns: int) -> None:
        del now_ns

    def save(self) -> bytes:
        return b""

    def restore(self, state: bytes) -> None:
        del state


class Guest:
    """Connection, channels and bus over a segment, and the host that they talk to."""

    def __init__(self, *, versions: tuple[int, ...] = SPOKEN, deliver: bool = True, stalls: bool = False,
                 rescind_queued: bool = False) -> None:
        self.memory = anonymous(BYTES)
        self.clock, self.timers = ManualClock(), Timers()
        self.log: list[str] = []
        self.uevents: list[list[str]] = []
        self.guest = guest.Guest(
            self.memory, self, self.clock, self.timers, log=self.log.append, send_uevent=self.uevents.append,
            versions=versions, stalls=stalls, rescind_queued=rescind_queued,
        )  # fmt: skip
        self.tasks, self.requests = self.guest.tasks, self.guest.requests
        self.connection, self.channels, self.bus = self.guest.connection, self.guest.channels, self.guest.bus
        self.bus.exists = self.bus.registered = True    # discovery is another test's concern
        self.rings: list[RingMemory] = []
        self.devices: list[Echo] = []
        self.to_guest: deque[bytes] = deque()
        self.delivers = deliver
        self.flags: list[tuple[int, int]] = []
        self.server = Server(self._from_host, self, lambda flag, vp: self.flags.append((flag, vp)), vcpus=2)
        self.posts: list[Post] = []
        self.trace: list[Wait] = []
        self.post_status: Callable[[Post], int | None] = lambda _: None
        self.listening: set[int] = set()
        self.calls: list[tuple[str, str, str]] = []
        self.driver: Callable[[Wait], int | Steps[int]] = lambda _: 0
        self.msrs: dict[tuple[int, int], int] = {}
        self.faults: set[tuple[int, int]] = set()

    # ---- the host's view of our memory

    def find(self, frame: int) -> tuple[Memory, int] | None:
        for ring in self.rings:
            if frame in ring.frames:
                assert not ring.freed, f"the host looks at frame {frame:#x}, which is free"
                return ring.memory, (frame - ring.frames[0]) * PAGE
        return (self.memory, frame * PAGE) if Frame.is_guest(frame) else None

    def mapped(self, ring: RingMemory) -> bool:
        return any(device.pages is not None and device.pages.memory is ring.memory for device in self.devices)

    def _from_host(self, payload: bytes) -> int:
        self.to_guest.append(payload)
        return STATUS_SUCCESS

    # ---- what is outside of the room

    def ask(self, wait: Wait, answer: Callable[[Any], None]) -> None:
        self.trace.append(wait)
        if isinstance(wait, Post):
            self.posts.append(wait)
            answer(self._post(wait))
        elif isinstance(wait, Listen):
            self.listening.add(wait.relid)
            answer(None)
        elif isinstance(wait, Quiesce):
            self.listening.discard(wait.relid)
            answer(None)
        elif isinstance(wait, Synchronize):
            answer(None)
        elif isinstance(wait, Probe | Remove | Shutdown):
            self.calls.append((type(wait).__name__.lower(), wait.driver.name, wait.device.name))
            result = self.driver(wait)
            if isinstance(result, int):
                answer(result)
            else:
                self.tasks.start(result, answer)
        elif isinstance(wait, WriteMsr):
            if (wait.vp, wait.number) in self.faults:
                answer(OSError(errno.EFAULT, f"wrmsr {wait.number:#x}"))
            else:
                self.msrs[wait.vp, wait.number] = wait.value
                answer(0)
        elif isinstance(wait, ReadMsr):
            answer(self.msrs.get((wait.vp, wait.number), 0))
        else:
            pytest.fail(f"a wait that nobody answers: {wait}")

    def _post(self, wait: Post) -> int:
        status = self.post_status(wait)
        if status is not None:
            return status
        if wait.connection not in (1, 4):
            return HV_INVALID_CONNECTION_ID
        return STATUS_SUCCESS if self.server.on_message(wait.payload) else HV_INSUFFICIENT_BUFFERS

    # ---- driving

    def start(self, steps: Steps[Any]) -> list[Any]:
        """Begin; the list gets the outcome."""
        outcome: list[Any] = []
        self.tasks.start(steps, outcome.append)
        if self.delivers:
            self.deliver()
        return outcome

    def run(self, steps: Steps[Any]) -> Any:
        """Run to its end, letting time pass if nothing else goes on; OSErrors are raised."""
        outcome = self.start(steps)
        for _ in range(1000):
            if outcome:
                break
            assert self.pass_time(), "it waits for ever"
        (result,) = outcome
        if isinstance(result, OSError):
            raise result
        return result

    def deliver(self, count: int = 1_000_000) -> None:
        """Hand over messages of the host, in order."""
        while self.to_guest and count:
            count -= 1
            self.channels.onmessage(self.to_guest.popleft())
            self.tasks.pump()

    def pass_time(self) -> bool:
        """Jump to the next timer; False: there is none."""
        due = self.timers.next_ns()
        if due is None:
            return False
        self.clock.advance(ns=max(0, due - self.clock.now_ns()))
        while (callback := self.timers.pop_due(self.clock.now_ns())) is not None:
            callback()
        if self.delivers:
            self.deliver()
        return True

    def connected(self) -> Self:
        self.run(self.connection.connect())
        self.run(self.connection.request_offers())
        return self

    def offer(self, class_id: uuid.UUID = ECHO, *, device: Echo | None = None, instance: uuid.UUID | None = None) -> int:
        device = device or Echo()
        self.devices.append(device)
        relid = self.server.offer(class_id, instance or uuid.uuid4(), device)
        if self.delivers:
            self.deliver()
        return relid

    def channel(self, relid: int) -> Channel:
        channel = self.channels.find(relid)
        assert channel is not None
        return channel

    def check_at_rest(self) -> None:
        """Nobody waits, nothing is lent that nobody has, and the host has seen no offence."""
        assert self.tasks.running == 0
        assert len(self.requests) == 0
        assert self.server.last_violation == ""
        lent = {id(entry.pages) for channel in self.channels for entry in channel.lent.values()}
        for ring in self.rings:
            assert (ring.freed == 0) == (id(ring) in lent)


def driver(name: str, *classes: uuid.UUID) -> Driver:
    return Driver(name, [*(class_id.bytes_le for class_id in classes), NULL_GUID])
