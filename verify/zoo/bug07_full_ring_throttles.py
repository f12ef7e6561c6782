# SPDX-License-Identifier: Apache-2.0
"""Zoo 7: a reader that compares the demand for room with what it saw before it read the demand."""

from typing import TYPE_CHECKING

from pvbus.shm.channel_ring import ChannelControl
from pvbus.verify.scenarios.channel_ring import DATA_BYTES, PACKET_BYTES, ChannelRings
from pvbus.verify.zoo import CAUGHT, Bug

if TYPE_CHECKING:
    from pvbus.verify.explorer.model import Model

# One packet fits, so that the writer can fill the ring between the reader's look and its comparison.
NEARLY_FULL = (PACKET_BYTES, DATA_BYTES - 2 * PACKET_BYTES - 8)


class KeepsTheWriteIndex(ChannelRings):
    """Compares with the write index by which it has found the packet, not with a fresh one."""

    def read(self, model: "Model") -> None:
        """Read until there is nothing; signal when the room that is asked for has just come free."""
        memory = self.memory
        at = memory.load32(ChannelControl.READ_INDEX, "vmr.own")
        while (end := memory.load32_acquire(ChannelControl.WRITE_INDEX, "vmr_publish")) != at:
            word = memory.load64(ChannelControl.BYTES + at, "vmr.packet")
            self.got.append(memory.load64(ChannelControl.BYTES + (at + 8) % DATA_BYTES, "vmr.packet"))
            before, at = at, (at + (word >> 32 & 0xFFFF) * 8 + 8) % DATA_BYTES
            memory.store32_release(ChannelControl.READ_INDEX, at, "vmr_reuse")
            memory.smp_mb("vmr_room")
            wanted = memory.load32(ChannelControl.PENDING_SEND_SZ, "vmr.pending")
            if wanted and free(end, before) < wanted <= free(end, at):
                model.ring(self.room, "room.signal")


def free(write_index: int, read_index: int) -> int:
    """Give the room of a ring; an empty one has all of it."""
    return (read_index - write_index - 1) % DATA_BYTES + 1


BUG = Bug(
    number=7,
    name="old-write-index",
    sentence="the reader decides by an old write index that the writer had room all along: ring full, and both sleep",
    scenario=ChannelRings,
    parameters={"filled": NEARLY_FULL, "masked": False},
    handler=KeepsTheWriteIndex,
    expected={"sc": CAUGHT, "tso": CAUGHT, "arm": CAUGHT},
    story=(
        "A writer that finds no room says in pending_send_sz how much it needs, looks once more, and sleeps. The reader "
        "frees room and signals if there was too little of it before and is enough now. It took four attempts to get that "
        "right: without a barrier the two miss each other; with signals at every chance the host throttles the guest; and "
        "with a write index that was read before the demand the ring seems to have had that room all along, so nobody "
        "signals. The order is: read_index stored, full barrier, the demand, and only then write_index. And as much room as "
        "the packet has is not enough, or a full ring would look empty."
    ),
    citation=(
        "a389fcfd2cb5, 2016, the missing barrier; 433e19cf33d3, Dexuan Cui, January 2017, too many signals; 'Fix ring buffer "
        "signaling', Michael Kelley, 2018, the order."
    ),
)
