# SPDX-License-Identifier: Apache-2.0
"""Between a channel's rings and a service: reads batches, sends what the service answers, signals when the ring says so.

A service (echo.py, heartbeat.py, shutdown.py) knows packets only. While something of it waits for room in the ring nothing more
is read, and what a timer sends is dropped, so at most one batch of answers is held; the guest signals when it has made room. A
ring in which the guest has written something impossible is left alone from then on: that channel is broken, no other notices.
"""

from __future__ import annotations

from collections import deque
from typing import TYPE_CHECKING, NamedTuple, Protocol

from pvbus.actors.runtime.vmbus_facts import STATUS_SUCCESS, STATUS_UNSUCCESSFUL

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable

    from pvbus.actors.hypervisor.vmbus.channel import Handle, RingPages

IN_BAND, TRANSFER_PAGES, GPA_DIRECT, COMPLETION = 6, 7, 9, 0xB
HOST_TAKES = frozenset({IN_BAND, TRANSFER_PAGES, GPA_DIRECT, COMPLETION})

BATCH_PACKETS_MAX = 64
ROUNDS_MAX = 4
"""Batches in a row; then others have their turn, and `tick` goes on. Measured with event channels that go to and fro
beside a saturated echo: with 1024 packets a turn instead of 256 their round trip took half as long again (p50), and p99 was
milliseconds; with 64 the echo carried a third."""


class Packet(NamedTuple):
    """One packet of a ring, as ChannelRing gives it."""

    type: int
    transaction: int
    payload: bytes
    completion: bool = False


class Ring(Protocol):
    """The host's view of a channel's two rings (ChannelRing). EAGAIN (BlockingIOError): full; other OSErrors: broken."""

    def send(self, payload: bytes, transaction_id: int = 0, completion: bool = False, type: int = IN_BAND) -> int:  # noqa: A002
        """Send; 1 = signal the guest."""

    def recv_many(self, max_packets: int) -> list[tuple[int, int, bytes, bool]]:
        """Take what is there."""

    def echo(self, max_packets: int) -> tuple[int, bool, bool]:
        """Send back what is there, no Packet made; give how many were taken, whether to signal, whether it is full."""

    def begin_read(self) -> None:
        """Ask for no signals."""

    def end_read(self) -> bool:
        """Ask for signals; True: something has come meanwhile."""

    def take_signal(self) -> bool:
        """Whether the guest waits for the room that was made: signal it."""


class Service(Protocol):
    """What a device does, without rings."""

    echoes: bool
    """Every packet's answer is the packet: `on_packets` is not called, the ring does it."""

    def on_open(self) -> list[Packet]:
        """Give what to send first."""

    def on_packets(self, packets: list[Packet]) -> list[Packet]:
        """Give the answers."""

    def on_close(self) -> None:
        """Forget the guest."""

    def due_ns(self) -> int | None:
        """When `tick` is wanted; 0 = at once."""

    def tick(self, now_ns: int) -> list[Packet]:
        """Do what is due; give what to send."""

    def save(self) -> bytes:
        """Give what an heir needs."""

    def restore(self, state: bytes) -> None:
        """Go on from there."""


class Endpoint:
    """A Device (channel.py) made of a service and a way to map rings."""

    def __init__(self, service: Service, make_ring: Callable[[RingPages], Ring]) -> None:
        self.service = service
        self._make_ring = make_ring
        self._ring: Ring | None = None
        self._handle: Handle | None = None
        self._unsent: deque[Packet] = deque()
        self._more = False      # the rounds were used up: there may be more to read
        self._full = False      # an echo waits for room
        self.fault = ""         # why the ring is left alone
        self.sent = self.received = self.signals = 0

    def on_open(self, handle: Handle, pages: RingPages) -> int | None:
        """Map the rings."""
        try:
            self._ring = self._make_ring(pages)
        except (OSError, ValueError) as error:
            self.fault = str(error)
            return STATUS_UNSUCCESSFUL
        self._handle, self.fault, self._more = handle, "", False
        self._unsent = deque(self.service.on_open())
        return STATUS_SUCCESS

    def on_opened(self) -> None:
        """Send what comes first, and answer what the guest has written before it opened."""
        self._pump()

    def on_close(self) -> bool:
        """Let the rings go at once."""
        if self._ring is not None:
            self.service.on_close()
        self._ring, self._handle = None, None
        self._unsent.clear()
        return True

    def on_signal(self) -> None:
        """Read, answer."""
        self._pump()

    def submit(self, packets: Iterable[Packet]) -> None:
        """Send what the service has made of a call from outside."""
        self._unsent.extend(packets)
        self._pump()

    def due_ns(self) -> int | None:
        """When `tick` is wanted."""
        if self._ring is None or self.fault:
            return None
        return 0 if self._more else self.service.due_ns()

    def tick(self, now_ns: int) -> None:
        """Read on, and let the service do what is due."""
        due = self.due_ns()
        if due is not None and due <= now_ns:
            service_due = self.service.due_ns()
            if service_due is not None and service_due <= now_ns:
                room = not self._unsent
                packets = self.service.tick(now_ns)
                self._unsent.extend(packets if room else ())
            self._pump()

    def save(self) -> bytes:
        """Give the service's state."""
        return self.service.save()

    def restore(self, state: bytes) -> None:
        """Go on: nothing is sent anew, but what lies in the ring is read."""
        self._unsent.clear()
        self.service.restore(state)
        self._pump()

    # ------------------------------------------------------------------------------------------------- inside

    def _pump(self) -> None:
        ring, handle = self._ring, self._handle
        if ring is None or handle is None or self.fault:
            return
        try:
            must_signal = self._exchange(ring)
        except (OSError, ValueError) as error:
            self.fault, must_signal = str(error), False
            self._unsent.clear()
        if must_signal:
            self.signals += 1
            handle.signal()

    def _exchange(self, ring: Ring) -> bool:
        """Send and read until nothing is left, no room is left, or it is the turn of others; give whether to signal."""
        self._more = self._full = False
        must_signal = self._send(ring)
        answer = self._echo if self.service.echoes else self._answer
        for _ in range(ROUNDS_MAX):
            if self._unsent:
                return must_signal
            ring.begin_read()
            took, signal = answer(ring)
            again = ring.end_read()
            must_signal = ring.take_signal() or signal or must_signal
            if not took and (self._full or not again):
                return must_signal
        self._more = True
        return must_signal

    def _answer(self, ring: Ring) -> tuple[int, bool]:
        """Have the service answer a batch; give how many packets it had, and whether to signal."""
        packets = [Packet(*packet) for packet in ring.recv_many(BATCH_PACKETS_MAX)]
        self.received += len(packets)
        strange = [packet.type for packet in packets if packet.type not in HOST_TAKES]
        if strange:
            raise ValueError(f"packets of types {strange}")
        self._unsent.extend(self.service.on_packets(packets) if packets else ())
        return len(packets), self._send(ring)

    def _echo(self, ring: Ring) -> tuple[int, bool]:
        """Answer a batch with itself."""
        took, signal, self._full = ring.echo(BATCH_PACKETS_MAX)
        self.received += took
        self.sent += took
        return took, signal

    def _send(self, ring: Ring) -> bool:
        must_signal = False
        while self._unsent:
            packet = self._unsent[0]
            try:
                must_signal = bool(ring.send(packet.payload, packet.transaction, packet.completion, packet.type)) or must_signal
            except BlockingIOError:
                break
            self._unsent.popleft()
            self.sent += 1
        return must_signal
