# SPDX-License-Identifier: Apache-2.0
"""Between a channel's rings and a service: reads batches, sends what the service answers, signals when the ring says so.

A service (echo.py, heartbeat.py, shutdown.py) knows packets only. While something of it waits for room in the ring nothing more
is read, and what a timer sends is dropped, so at most one batch of answers is held; the guest signals when it has made room. A
ring in which the guest has written something impossible is left alone from then on: that channel is broken, no other notices.

A hypervisor that dies loses no packet and answers none twice. What a service has answered is given back to the guest only when
its state is kept; before the first answer goes out, the state from before the batch is kept with the place where the answers
begin. So an heir that finds a batch half answered answers it anew, and leaves out as many bytes of answers as lie there. An echo,
which has no state, goes by the ring's claim word instead.
"""

from __future__ import annotations

from collections import deque
from typing import TYPE_CHECKING, NamedTuple, Protocol

import msgspec

from pvbus.actors.runtime.vmbus_facts import STATUS_SUCCESS, STATUS_UNSUCCESSFUL
from pvbus.shm.channel_ring import packet_bytes

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable

    from pvbus.actors.hypervisor.vmbus.channel import Handle, RingPages
    from pvbus.shm.memory import Memory

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

    def keep(self, memory: Memory, offset: int, heir: bool, /) -> None:
        """Note there what `echo` answers; `heir`: a forerunner did."""

    def position(self) -> tuple[int, int, int]:
        """Give where we read, where we write, and the size of a ring."""

    def hold(self) -> None:
        """Give back nothing of what is read from now on."""

    def release(self, read_index: int | None = None, /) -> None:
        """Give back what was read, or all before an index."""


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


class Kept(NamedTuple):
    """What an heir needs: a service's state, up to where that has read, where it writes, and whether answers are going out."""

    state: bytes
    read_index: int
    write_index: int
    answering: bool


def nothing_to_keep() -> None:
    """Be the `keep` of an endpoint that has no heir."""


class Endpoint:
    """A Device (channel.py) made of a service and a way to map rings.

    `keep` stores what `save` gives; `claims` is where the claim words of all channels lie.
    """

    def __init__(
        self, service: Service, make_ring: Callable[[RingPages], Ring], keep: Callable[[], None] = nothing_to_keep,
        claims: tuple[Memory, int] | None = None,
    ) -> None:  # fmt: skip
        self.service = service
        self._make_ring, self._keep, self._claims = make_ring, keep, claims
        self._before: Kept | None = None    # while a batch is being answered
        self._said_bytes = 0                # of its answers: a forerunner has sent so many already
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
        self._claim(heir=False)
        self._pump()

    def _claim(self, *, heir: bool) -> None:
        if self._ring is not None and self._handle is not None and self._claims is not None and self.service.echoes:
            memory, offset = self._claims
            try:
                self._ring.keep(memory, offset + 8 * self._handle.relid, heir)
            except OSError as error:
                self.fault = str(error)

    def on_close(self) -> bool:
        """Let the rings go at once."""
        if self._ring is not None:
            self.service.on_close()
        self._ring, self._handle, self._before, self._said_bytes = None, None, None, 0
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
        """Give what an heir needs; nothing for an echo, whose claim word says all."""
        if self.service.echoes or self._ring is None:
            return b""
        return msgspec.msgpack.encode(self._before or self._now(self._ring, answering=False))

    def _now(self, ring: Ring, *, answering: bool) -> Kept:
        read_index, write_index, _ = ring.position()
        return Kept(self.service.save(), read_index, write_index, answering)

    def restore(self, state: bytes) -> None:
        """Go on: what lies in the ring is read, and answered if it was not; the guest is signalled, as nobody may have."""
        self._unsent.clear()
        ring, handle = self._ring, self._handle
        if ring is None or handle is None:
            return
        if state:
            self._take_over(ring, msgspec.msgpack.decode(state, type=Kept))
        else:
            self._claim(heir=True)
        self._pump()
        handle.signal()

    def _take_over(self, ring: Ring, kept: Kept) -> None:
        self.service.restore(kept.state)
        _, write_index, size = ring.position()
        self._said_bytes = (write_index - kept.write_index) % size if kept.answering else 0
        try:
            ring.release(kept.read_index)
        except (OSError, ValueError) as error:
            self.fault = str(error)

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
        before = self._now(ring, answering=True)
        ring.hold()
        packets = [Packet(*packet) for packet in ring.recv_many(BATCH_PACKETS_MAX)]
        self.received += len(packets)
        strange = [packet.type for packet in packets if packet.type not in HOST_TAKES]
        if strange:
            raise ValueError(f"packets of types {strange}")
        if packets:
            self._before = before
            self._unsent.extend(self.service.on_packets(packets))
            if self._unsent:
                self._keep()    # as it was before: the answers are about to go out
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
            if self._said_bytes > 0:
                self._said_bytes -= packet_bytes(len(packet.payload))
                self._unsent.popleft()
                continue
            try:
                must_signal = bool(ring.send(packet.payload, packet.transaction, packet.completion, packet.type)) or must_signal
            except BlockingIOError:
                break
            self._unsent.popleft()
            self.sent += 1
        if self._before is not None and not self._unsent:
            self._before, self._said_bytes = None, 0
            self._keep()
            ring.release()
        return must_signal
