# SPDX-License-Identifier: Apache-2.0
"""The two sides of vmbus_pair.py: what runs Server in the host's context, and the workqueue's logic in the guest's."""

from __future__ import annotations

import uuid
from collections.abc import Callable
from typing import TYPE_CHECKING, Any, Final

from pvbus.actors.hypervisor.vmbus.connection import ConnectionState as HostState
from pvbus.actors.hypervisor.vmbus.connection import Link
from pvbus.actors.runtime.clock import ManualClock, Timers
from pvbus.actors.runtime.config import VARIANTS
from pvbus.actors.runtime.vmbus_facts import DEVICE_CLASSES, STATUS_SUCCESS, V5_3, VMBUS_SINT, connection_id
from pvbus.actors.runtime.vmbus_wire import InitiateContact, kind_of
from pvbus.actors.workqueue import waits
from pvbus.actors.workqueue.attributes import RingState
from pvbus.actors.workqueue.bus import NULL_GUID, Bus, Driver
from pvbus.actors.workqueue.connection import Connection, ConnectionState
from pvbus.actors.workqueue.discovery import Platform, Vmbus
from pvbus.actors.workqueue.tasks import Tasks
from pvbus.shm.hyperv import PAGE, Frame

if TYPE_CHECKING:
    import pvbus.shm.memory
    from pvbus.actors.hypervisor.vmbus.channel import Handle, RingPages
    from pvbus.actors.workqueue.channel import Channel
    from pvbus.verify.explorer.model import Model
    from pvbus.verify.scenarios.vmbus_pair import VmbusPair

ECHO: Final = DEVICE_CLASSES["echo"]
OTHER: Final = DEVICE_CLASSES["kvp"]
INSTANCES: Final = {letter: uuid.UUID(int=number) for number, letter in enumerate("abc", 1)}
RING_PAGES: Final = 4  # two rings of a control page and one of data
INSUFFICIENT_BUFFERS: Final = 19
FRAMES_APART: Final = 0x1000


class Said(bytes):
    """A message, by its name in traces."""

    def __repr__(self) -> str:
        return kind_of(self, V5_3).name


class Ring:
    """Channel memory of the guest's (`Pages`): the `number`-th that an execution makes."""

    def __init__(self, pair: VmbusPair, model: Model, number: int) -> None:
        first = Frame.CHANNELS + number * FRAMES_APART
        self.frames = range(first, first + RING_PAGES)
        self.downstream_page = RING_PAGES // 2
        self.memory = pair.memories[number]
        self._model = model
        self.freed = False

    def states(self) -> tuple[RingState, RingState]:
        """Give what the attributes show: a look into the memory is what matters here."""
        index = self.memory.load64(0, "attribute.read")
        return RingState(write_index=index), RingState()

    def free(self) -> None:
        """Give it back to the heap."""
        self.freed = True
        self._model.free(self.memory, "ring.free")


class HostDevice:
    """A device of the host: it writes into the rings when it is opened, and at every tick while it is open.

    It takes its time to open: `later` is told, and has to call `opened`.
    """

    def __init__(self, later: Callable[[HostDevice], None]) -> None:
        self._later = later
        self.rings: Any = None
        self.handle: Handle | None = None
        self.pages: RingPages | None = None
        self.opens = 0

    def __repr__(self) -> str:
        return "device"

    def on_open(self, handle: Handle, pages: RingPages) -> int | None:
        """Begin to map the rings."""
        self.handle, self.pages = handle, pages
        self._later(self)
        return None

    def opened(self) -> None:
        """Have mapped them."""
        if self.handle is not None and self.pages is not None:
            self.rings = self.pages.memory
            self.handle.opened(STATUS_SUCCESS)

    def on_opened(self) -> None:
        """Send something."""
        self.opens += 1
        self.write()
        if self.handle is not None:
            self.handle.signal()

    def on_close(self) -> bool:
        """Let the rings go."""
        self.rings = self.pages = None
        return True

    def on_signal(self) -> None:
        """Answer."""
        self.write()

    def write(self) -> None:
        """Touch the rings, if they are mapped."""
        if self.rings is not None:
            self.rings.store64(0, 1, "device.write")

    def due_ns(self) -> int | None:
        """It has no timer of its own."""
        return None

    def tick(self, now_ns: int) -> None:
        """Write."""
        self.write()

    def save(self) -> bytes:
        """Nothing is remembered."""
        return b""

    def restore(self, state: bytes) -> None:
        """Nothing is remembered."""


class Segment:
    """The guest's segment while its execution lasts: what a generator cleans up when it is collected later reaches nobody."""

    def __init__(self, memory: Any) -> None:
        self._memory, self.is_over = memory, False

    def __getattr__(self, name: str) -> Any:
        return ignore if self.is_over else getattr(self._memory, name)


class HostSide:
    """Server in its context, fed by the toolstack and by hypercalls."""

    def __init__(self, pair: VmbusPair, model: Model) -> None:
        self._pair, self._model, self._runs = pair, model, False
        self.early: list[bytes] = []    # before anybody runs
        self.last = b""
        self.devices: dict[str, HostDevice] = {}
        self.generations: dict[str, tuple[int, int]] = {}
        self.server = pair.make_server(self._post, self, self._raise_flag)
        contact = InitiateContact(version=V5_3, sint=VMBUS_SINT)
        self.server.link = Link(state=HostState.CONNECTED, version=V5_3, contact=contact, offers_requested=True)

    def _post(self, payload: bytes) -> int:
        self.last = payload
        if not self._runs:
            self.early.append(payload)
        else:
            self._model.post(self._pair.to_cpu, ("message", Said(payload)), "SynIC")
        return STATUS_SUCCESS

    def _raise_flag(self, flag: int, _vp: int) -> None:
        self._model.post(self._pair.to_cpu, ("flag", flag), "flag")

    def find(self, frame: int) -> tuple[pvbus.shm.memory.Memory, int]:
        """Give a page of the guest's: of a ring."""
        number, page = divmod(frame - Frame.CHANNELS, FRAMES_APART)
        return self._pair.memories[number], page * PAGE

    def offer(self, letter: str) -> None:
        """Offer an instance, and remember under which name it can be withdrawn."""
        device = self.devices[letter] = HostDevice(self._opens_later)
        relid = self.server.offer(ECHO, INSTANCES[letter], device)
        channel = self.server.offers.get(relid)
        assert channel is not None
        self.generations[letter] = relid, channel.generation

    def _opens_later(self, device: HostDevice) -> None:
        self._model.post(self._pair.to_host, ("opened", device), "device.open")

    def run(self) -> None:
        """Take what comes, one after the other."""
        pair, model = self._pair, self._model
        self._runs = True
        while True:
            match model.receive(pair.to_host, "host.take"):
                case ("offer", letter):
                    self.offer(letter)
                case ("rescind", letter):
                    self.server.rescind(*self.generations[letter])
                case ("opened", device):
                    device.opened()
                case ("again",):
                    self._post(self.last)   # the heir of a host that died with its last word unrecorded says it again
                case ("tick",):
                    self.server.tick(0)
                case ("hypercall", number, payload):
                    status = STATUS_SUCCESS if self.server.on_message(payload) else INSUFFICIENT_BUFFERS
                    model.post(pair.to_guest, ("answer", number, status), "hypercall.answer")
                case ("wire" | "unwire" as what, number, relid):
                    model.post(pair.to_cpu, (what, relid), what)
                    model.post(pair.to_guest, ("answer", number, None), "hypercall.answer")
                case other:
                    raise AssertionError(other)


class GuestSide:
    """The workqueue's logic in its context, and what is outside of it (`Outside`)."""

    def __init__(self, pair: VmbusPair, model: Model) -> None:
        self._pair, self._model = pair, model
        self.clock, self.timers = ManualClock(), Timers()
        self.rings: list[Ring] = []
        self._answers: dict[int, Callable[[Any], None]] = {}
        self._number = 0
        self.tasks = Tasks(self, self.clock, self.timers.add)
        self.requests = pair.make_requests()
        self.segment = Segment(pair.hv)
        memory: Any = self.segment
        self.connection = Connection(memory, self.requests, ignore)
        self.connection.state, self.connection.version = ConnectionState.CONNECTED, V5_3
        self.connection.epoch, self.connection.message_connection = 1, connection_id(V5_3)
        self.channels = pair.make_channels(self.connection, self.requests, self._spawn, ignore)
        self.bus = Bus(self.channels, self._spawn, ignore, ignore)
        self.bus.exists = self.bus.registered = True
        self.bus.drivers["driver"] = Driver("driver", [ECHO.bytes_le, NULL_GUID])
        dirty = bool(pair.variants & VARIANTS["leaves-dirty"])
        self.vmbus = Vmbus(Platform(), memory, self.channels, self.bus, ignore, leaves_dirty=dirty)
        self.vmbus.running = True

    def _spawn(self, steps: waits.Steps[Any]) -> None:
        self.tasks.start(steps, ignore)

    # ---- what the waiting functions wait for

    def ask(self, wait: waits.Wait, answer: Callable[[Any], None]) -> None:
        """Pass a wait on to whoever answers it."""
        match wait:
            case waits.Post(payload=payload):
                self._send(self._pair.to_host, "hypercall", answer, Said(payload))
            case waits.Listen(relid=relid):
                self._send(self._pair.to_host, "wire", answer, relid)
            case waits.Quiesce(relid=relid):
                self._send(self._pair.to_host, "unwire", answer, relid)
            case waits.Synchronize():
                self._number += 1
                self._answers[self._number] = answer
                self._model.post(self._pair.to_cpu, ("answer", self._number), "synchronize")
            case waits.Probe(device=device) if self._pair.opens:
                self.tasks.start(self.open(device.channel), lambda outcome: answer(getattr(outcome, "errno", 0)))
            case _:     # a driver that has nothing to do, and registers, which no scenario here looks at
                answer(0)

    def _send(self, box: int, what: str, answer: Callable[[Any], None], value: Any) -> None:
        self._number += 1
        self._answers[self._number] = answer
        self._model.post(box, (what, self._number, value), what)

    def open(self, channel: Channel) -> waits.Steps[None]:
        """Open a channel, with new rings."""
        ring = Ring(self._pair, self._model, len(self.rings))
        self.rings.append(ring)
        yield from self.channels.open(channel, ring)

    # ---- the context

    def run(self, early: list[bytes]) -> None:
        """Handle the first messages, then take what comes, one after the other."""
        for payload in early:
            self.take(("message", payload))
        while True:
            self.take(self._model.receive(self._pair.to_guest, "guest.take"))

    def take(self, item: tuple[Any, ...]) -> None:
        """Handle a message, an answer, a call or the time."""
        match item:
            case ("message", payload):
                self.channels.onmessage(payload)
            case ("answer", number, *value):
                self._answers.pop(number)(value[0] if value else None)
            case ("time", seconds):
                self.clock.advance(seconds)
                while (callback := self.timers.pop_due(self.clock.now_ns())) is not None:
                    callback()
            case ("call", user, command):
                self._call(command, lambda _outcome: self._model.post(self._pair.to_users[user], "done", "call.done"))
            case other:
                raise AssertionError(other)
        self.tasks.pump()

    def _call(self, command: str, called: Callable[[Any], None]) -> None:
        device = next(iter(self.bus.devices.values()), None)
        if command == "exit":
            self.tasks.start(self.vmbus.exit(), called)
        elif command == "register":
            self.tasks.start(self.bus.register(Driver("other", [OTHER.bytes_le, NULL_GUID])), called)
        elif device is None:
            called(None)
        elif command == "read":
            self._pair.read(self, device)
            called(None)
        else:
            self.tasks.start(self.open(device.channel) if command == "open" else self.channels.close(device.channel), called)


def ignore(*_: object) -> None:
    """Log lines and uevents: nobody listens."""
