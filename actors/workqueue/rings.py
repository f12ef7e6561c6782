# SPDX-License-Identifier: Apache-2.0
"""The memory and the doorbells of channels: a sealed memfd for both rings, guest frames for it, an eventfd each way.

Made here for a driver that opens a channel; kept for the heir of a hypervisor, which is given everything again. The host may
write into a ring until it has said that its GPADL is torn down: only then `free` is called, and the frames may be used anew.
"""

from __future__ import annotations

import contextlib
import errno
import os
from typing import TYPE_CHECKING, NamedTuple

from pvbus.actors.workqueue.attributes import RingState
from pvbus.shm.hyperv import PAGE, Frame
from pvbus.shm.memory import ChannelRing, Memory
from pvbus.shm.segment import sealed_memfd

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

RINGS_FRAMES_MAX = 0x1000
FRAMES_A_CHANNEL = RINGS_FRAMES_MAX + 1  # and a page of triggers
CHANNELS_MAX = 1024
RING_PAGES_MIN = 2  # control page and one of data
RING_BYTES_MAX = RINGS_FRAMES_MAX * PAGE // 2


class Doors(NamedTuple):
    """A channel's doorbells: the driver's is rung by event tasklets, the host's by the driver."""

    drivers: int
    hosts: int


class RingMemory:
    """Both rings of one channel (`Pages` of channel.py, `Rings` of attributes.py), and its triggers if it is `monitored`."""

    def __init__(
        self, first_frame: int, ring_bytes: int, released: Callable[[RingMemory], None], *, monitored: bool = False
    ) -> None:
        if ring_bytes % PAGE or not RING_PAGES_MIN * PAGE <= ring_bytes <= RING_BYTES_MAX:
            text = f"a ring of {ring_bytes} bytes: whole pages, {RING_PAGES_MIN * PAGE} to {RING_BYTES_MAX}"
            raise OSError(errno.EINVAL, text)
        self.first_frame, self.ring_bytes = first_frame, ring_bytes
        self._released = released
        self.page_count = 2 * ring_bytes // PAGE
        self.given_pages = self.page_count + monitored
        self.monitor_frame = first_frame + self.page_count if monitored else 0
        with contextlib.ExitStack() as undo:  # the last descriptors may be among them
            self.fd = sealed_memfd(f"pvbus-channel-{first_frame:#x}", self.given_pages * PAGE)
            undo.callback(os.close, self.fd)
            self._memory = Memory(self.fd, self.given_pages * PAGE)
            undo.callback(self._memory.close)
            drivers = os.eventfd(0, os.EFD_NONBLOCK | os.EFD_CLOEXEC)
            undo.callback(os.close, drivers)
            self.doors = Doors(drivers, os.eventfd(0, os.EFD_NONBLOCK | os.EFD_CLOEXEC))
            undo.pop_all()

    @property
    def monitor(self) -> tuple[Memory, int] | None:
        """The page of its triggers, if it has one."""
        return (self._memory, 2 * self.ring_bytes) if self.monitor_frame else None

    @property
    def frames(self) -> Sequence[int]:
        """The numbers of the rings' frames, in order."""
        return range(self.first_frame, self.first_frame + self.page_count)

    @property
    def downstream_page(self) -> int:
        """With which of them the host-to-guest ring begins."""
        return self.ring_bytes // PAGE

    def states(self) -> tuple[RingState, RingState]:
        """Give what the attributes show: the ring that the guest writes, and the one that it reads."""
        look = ChannelRing(self._memory, 0, self.ring_bytes, self.ring_bytes).state()
        out, inbound = (
            RingState(*(look[f"{side}_{name}"] for name in (
                "intr_mask", "read_index", "write_index", "read_bytes_avail", "write_bytes_avail",
            ))) for side in ("out", "in")
        )  # fmt: skip
        return out, inbound

    def free(self) -> None:
        """Give everything back."""
        self._memory.close()
        for fd in (self.fd, *self.doors):
            os.close(fd)
        self._released(self)


class RingMemories:
    """All of them, by first frame."""

    def __init__(self, released: Callable[[RingMemory], None]) -> None:
        self._released = released
        self.all: dict[int, RingMemory] = {}

    def make(self, ring_bytes: int, *, monitored: bool = False) -> RingMemory:
        """Make rings. EINVAL for a size that is none, ENOSPC, EMFILE."""
        for index in range(CHANNELS_MAX):
            frame = Frame.CHANNELS + index * FRAMES_A_CHANNEL
            if frame not in self.all:
                self.all[frame] = RingMemory(frame, ring_bytes, self._gone, monitored=monitored)
                return self.all[frame]
        raise OSError(errno.ENOSPC, f"{CHANNELS_MAX} channels have memory")

    def _gone(self, memory: RingMemory) -> None:
        del self.all[memory.first_frame]
        self._released(memory)
