# SPDX-License-Identifier: Apache-2.0
"""Two sides of a channel fall asleep over a ring: the reader when it is empty, the writer when it is full.

Contexts: the writer (ChannelRing.send, waits for a signal when there is no room) and the reader (a server: reads
until there is nothing, with the interrupt mask up if it uses it, and sleeps). Both run the production code; the
modelled doorbells stand for the signals of the channel. A ring that is to be full is filled with packets that are
all header, so that reading them takes two loads each.
"""

from __future__ import annotations

from collections.abc import Iterable
from functools import partial
from typing import Final

from pvbus.shm._core_explored import ChannelRing, Memory
from pvbus.shm.channel_ring import ChannelControl, PacketType
from pvbus.verify.explorer.model import Model
from pvbus.verify.explorer.scenario import Scenario, Start, claimed, within

RING_BYTES: Final = 8192  # the least
DATA_BYTES: Final = RING_BYTES - ChannelControl.BYTES
PACKET_BYTES: Final = 24  # an empty one
FULL: Final = (DATA_BYTES - PACKET_BYTES,)  # as much is left as a packet has, which is not enough


class ChannelRings(Scenario):
    """`packets` empty packets, sent one by one or, with `batch`, together.

    `filled` are the lengths, in bytes, of the packets that lie in the ring before; what is left of it is for the writer.
    Without `masked` the reader never touches the interrupt mask, and sleeps when it finds the ring empty.
    """

    ranges = within(packets=(1, 64), filled=(16, DATA_BYTES - 8))
    name = "channel-ring"
    claims = claimed(
        "sc tso arm", {}, {"packets": 3, "batch": True}, {"packets": 3, "masked": False}, {"packets": 1, "filled": FULL},
        {"packets": 2, "filled": FULL, "masked": False},
    )  # fmt: skip

    def __init__(
        self, *, packets: int = 2, batch: bool = False, masked: bool = True, filled: tuple[int, ...] = ()
    ) -> None:
        if any(size % 8 for size in filled) or sum(filled) >= DATA_BYTES:
            raise ValueError(f"filled={','.join(map(str, filled))}: multiples of 8, and the ring has {DATA_BYTES} bytes")
        self.packets = packets
        self.batch = batch
        self.masked = masked
        self.filled = filled
        self.got: list[int] = []

    def prepare(self, model: Model, variants: int) -> None:
        """Make the pages, and fill the ring."""
        self.door, self.room = model.bell("door"), model.bell("room")
        self.memory = Memory(model, 2 * RING_BYTES)
        model.name(self.memory, "ring")
        at = 0
        for number, length in enumerate(self.filled):
            eighths = (length - 8) // 8
            word = PacketType.GPA_DIRECT | eighths << 16 | eighths << 32
            self.memory.store64(ChannelControl.BYTES + at, word)
            self.memory.store64(ChannelControl.BYTES + at + 8, number)
            at += length
        self.memory.store32(ChannelControl.WRITE_INDEX, at)

    def start(self, model: Model) -> Iterable[Start]:
        """Give the writer and the reader; each has taken up its indices."""
        self.got = []
        self.writer_ring = ChannelRing(self.memory, 0, RING_BYTES, RING_BYTES)
        self.reader_ring = ChannelRing(self.memory, RING_BYTES, 0, RING_BYTES)
        yield "writer", partial(self._writer, model), False
        yield "reader", partial(self._reader, model), True

    def _writer(self, model: Model) -> None:
        first = len(self.filled)
        ids = list(range(first, first + self.packets))
        while ids:
            sent, must_signal = self._send(ids)
            if must_signal:
                model.ring(self.door, "door.signal")
            del ids[:sent]
            if ids and (self.batch or not sent):
                self.no_room(self.memory)
                model.wait(self.room, "room.wait")
                model.take(self.room, "room.take")

    def _send(self, ids: list[int]) -> tuple[int, bool]:
        if self.batch:
            return self.writer_ring.send_many([b""] * len(ids), ids[0])
        try:
            return 1, bool(self.writer_ring.send(b"", ids[0]))
        except BlockingIOError:
            return 0, False

    def no_room(self, memory: Memory) -> None:
        """Do what a writer does before it waits: nothing, pending_send_sz is set."""

    def _reader(self, model: Model) -> None:
        ring = self.reader_ring
        while True:
            if self.masked:
                ring.begin_read()
            self.read(model)
            if self.masked and ring.end_read():
                continue
            model.wait(self.door, "door.wait")
            model.take(self.door, "door.take")

    def read(self, model: Model) -> None:
        """Read until there is nothing, one by one, and pass on what the writer has to be told."""
        while (packet := self.reader_ring.recv()) is not None:
            self.got.append(packet[1])
            if self.reader_ring.take_signal():
                model.ring(self.room, "room.signal")

    def broken(self, model: Model, stuck: list[str]) -> str | None:
        """Every packet has been read, once and in order, and the writer was told of room once for each time that it asked.

        Or twice: a reader that has read a demand just before it is withdrawn compares it with what was sent since.
        """
        expected = len(self.filled) + self.packets
        if self.got != list(range(len(self.got))):
            return f"packets read {self.got}"
        if stuck:
            free = self.writer_ring.state()["out_write_bytes_avail"]
            return f"the writer waits for room, the reader sleeps, and {free} of {DATA_BYTES} bytes are free"
        if len(self.got) != expected:
            return f"the reader sleeps, and {expected - len(self.got)} packet(s) lie unread"
        asked, told = self.writer_ring.state()["out_full"], self.reader_ring.state()["in_signals"]
        return f"the writer asked for room {asked} times, and was told {told} times" if told > 2 * asked else None
