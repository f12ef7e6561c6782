# SPDX-License-Identifier: Apache-2.0
"""A writer changes the descriptor of a packet that it has published, while the reader takes it: is more taken than the ring held?

Contexts: the writer (ChannelRing.send, then a store over its own descriptor) and the reader (ChannelRing.recv, once it is
signalled). The reader may get the packet as it was, or refuse the ring (EIO); what it must not do is believe a length that it
has not checked.
"""

from __future__ import annotations

import errno
from collections.abc import Iterable
from functools import partial
from typing import TYPE_CHECKING, Any, Final

from pvbus.shm._core_explored import ChannelRing, Memory
from pvbus.shm.channel_ring import ChannelControl, PacketType
from pvbus.verify.explorer.scenario import Scenario, Start, claimed
from pvbus.verify.scenarios.channel_ring import RING_BYTES

if TYPE_CHECKING:
    from pvbus.verify.explorer.model import Model

PAYLOAD: Final = b"8 bytes!"
LIE_EIGHTHS: Final = 400  # the length that is claimed afterwards


class HostileRing(Scenario):
    """One packet, and a lie about it."""

    name = "hostile-ring"
    claims = claimed("sc tso arm", {})

    def prepare(self, model: Model, variants: int) -> None:
        """Make the rings."""
        self.door = model.bell("door")
        self.memory: Any = Memory(model, 2 * RING_BYTES)
        model.name(self.memory, "rings")

    def start(self, model: Model) -> Iterable[Start]:
        """Give the writer and the reader."""
        self.taken: list[int] = []
        self.writer_ring = ChannelRing(self.memory, 0, RING_BYTES, RING_BYTES)
        self.reader_ring = ChannelRing(self.memory, RING_BYTES, 0, RING_BYTES)
        yield "writer", partial(self._writer, model), False
        yield "reader", partial(self._reader, model), False

    def _writer(self, model: Model) -> None:
        self.writer_ring.send(PAYLOAD, 1)
        model.ring(self.door, "door.signal")
        self.memory.store64(ChannelControl.BYTES, PacketType.IN_BAND | 2 << 16 | LIE_EIGHTHS << 32, "writer.lies")

    def _reader(self, model: Model) -> None:
        model.wait(self.door, "door.wait")
        self.taken.append(self.take())

    def take(self) -> int:
        """Take the packet; give the length of its payload, or 0 if the ring is refused."""
        try:
            packet = self.reader_ring.recv()
        except OSError as error:
            if error.errno != errno.EIO:
                raise
            return 0
        return len(packet[2]) if packet is not None else -1

    def broken(self, model: Model, stuck: list[str]) -> str | None:
        """Nothing was taken that the writer had not written."""
        if self.taken in ([0], [len(PAYLOAD)]):
            return None
        return f"{self.taken} bytes of payload were taken of a packet of {len(PAYLOAD)}"
