# SPDX-License-Identifier: Apache-2.0
"""A guest for the VMBus server: real pages, a list of what it was told, and a device whose pace a test decides."""

import os
import uuid
from collections import deque

from pvbus.actors.hypervisor.vmbus.channel import Channel, Handle, RingPages, State
from pvbus.actors.hypervisor.vmbus.server import Server
from pvbus.actors.runtime.vmbus_facts import DEVICE_CLASSES, STATUS_SUCCESS, V0_13, V5_3, Version
from pvbus.actors.runtime.vmbus_gpadl import gpadl_messages
from pvbus.actors.runtime.vmbus_wire import ChannelMessage, InitiateContact, OpenChannel, RequestOffers, decode
from pvbus.shm.memory import Memory
from pvbus.shm.segment import sealed_memfd

INSUFFICIENT_BUFFERS = 19
ECHO = DEVICE_CLASSES["echo"]
INSTANCE = uuid.UUID("8c2eaf3d-32a7-4b09-ab99-bd1f1c86b5ff")
GUEST_PAGES, CHANNEL_FRAME, CHANNEL_PAGES = 8, 0x100000, 64
INTERRUPT_FRAME, MONITOR_FRAME = 1, 2
RING_GPADL = 0xE1E10


class Pages:
    """GuestMemory over two memfds: the guest's own frames 0..7, and the channel's from 0x100000 on."""

    def __init__(self) -> None:
        self._fds = [sealed_memfd("pvbus-test", pages * 4096) for pages in (GUEST_PAGES, CHANNEL_PAGES)]
        self.own, self.channel = Memory(self._fds[0], GUEST_PAGES * 4096), Memory(self._fds[1], CHANNEL_PAGES * 4096)

    def find(self, frame: int) -> tuple[Memory, int] | None:
        """Find a page."""
        if 0 <= frame < GUEST_PAGES:
            return self.own, frame * 4096
        if CHANNEL_FRAME <= frame < CHANNEL_FRAME + CHANNEL_PAGES:
            return self.channel, (frame - CHANNEL_FRAME) * 4096
        return None

    def close(self) -> None:
        """Unmap."""
        self.own.close()
        self.channel.close()
        for fd in self._fds:
            os.close(fd)


class PacedDevice:
    """A device that opens and closes when the test says so (slow), or at once. It fails the test if it is closed twice."""

    def __init__(self, *, slow: bool = False, status: int = STATUS_SUCCESS) -> None:
        self.slow, self.status = slow, status
        self.mapped: RingPages | None = None
        self.handle: Handle | None = None
        self.pending = ""
        self.calls: list[str] = []

    def on_open(self, handle: Handle, pages: RingPages) -> int | None:
        """Open, now or by `go_on`."""
        assert self.mapped is None
        assert not self.pending
        self.calls.append("open")
        self.handle = handle
        if not self.slow and self.status != STATUS_SUCCESS:
            return self.status
        self.mapped = pages
        self.pending = "open" if self.slow else ""
        return None if self.slow else STATUS_SUCCESS

    def on_opened(self) -> None:
        """Note it."""
        self.calls.append("opened")

    def on_close(self) -> bool:
        """Close, now or by `go_on`; an open under way ends at once."""
        assert self.mapped is not None
        self.calls.append("close")
        if self.slow and not self.pending:
            self.pending = "close"
            return False
        self.mapped, self.pending = None, ""
        return True

    def go_on(self) -> None:
        """Finish what is pending."""
        pending, self.pending = self.pending, ""
        assert self.handle is not None or not pending
        if pending == "close":
            self.mapped = None
            assert self.handle is not None
            self.handle.closed()
        elif pending == "open":
            if self.status != STATUS_SUCCESS:
                self.mapped = None
            assert self.handle is not None
            self.handle.opened(self.status)

    def on_signal(self) -> None:
        """Note it."""
        self.calls.append("signal")

    def due_ns(self) -> int | None:
        """It has no timer."""
        return None

    def tick(self, now_ns: int) -> None:
        """Note it."""
        self.calls.append(f"tick {now_ns}")

    def save(self) -> bytes:
        """Give a mark."""
        return b"paced"

    def restore(self, state: bytes) -> None:
        """Note it."""
        self.calls.append(f"restored {state.decode()}")


class Rig:
    """A server and its guest."""

    def __init__(self, pages: Pages, version: Version = V5_3, vcpus: int = 2) -> None:
        self.version, self.pages, self.vcpus = version, pages, vcpus
        self.room = 10_000      # buffers for host messages
        self.raw: list[bytes] = []
        self.told: deque[ChannelMessage] = deque()
        self.flags: list[tuple[int, int]] = []
        self.server = Server(self.post, pages, lambda flag, vp: self.flags.append((flag, vp)), vcpus)

    def post(self, payload: bytes) -> int:
        """Be the host's message port."""
        if not self.room:
            return INSUFFICIENT_BUFFERS
        self.room -= 1
        self.raw.append(payload)
        self.told.append(decode(payload, self.version))
        return STATUS_SUCCESS

    def say(self, message: ChannelMessage) -> list[ChannelMessage]:
        """Post a guest's message; give what the host has said since the last time."""
        assert self.server.on_message(message.encode(self.version))
        return self.heard()

    def heard(self) -> list[ChannelMessage]:
        """Give what the host has said since the last time."""
        told = list(self.told)
        self.told.clear()
        return told

    def contact(self) -> InitiateContact:
        """Make the INITIATE_CONTACT of this rig's version."""
        monitor = {"monitor_host_to_guest": MONITOR_FRAME * 4096, "monitor_guest_to_host": (MONITOR_FRAME + 1) * 4096}
        if self.version == V0_13:
            return InitiateContact(version=V0_13, interrupt_page=INTERRUPT_FRAME * 4096, **monitor)
        return InitiateContact(version=self.version, sint=2, **monitor)

    def connect(self) -> list[ChannelMessage]:
        """Connect and ask for offers."""
        return self.say(self.contact()) + self.say(RequestOffers())

    def give_pages(self, relid: int, gpadl: int = RING_GPADL, pages: int = 16) -> list[ChannelMessage]:
        """Hand pages of the channel's memory over."""
        answers = []
        for message in gpadl_messages(relid, gpadl, pages * 4096, range(CHANNEL_FRAME, CHANNEL_FRAME + pages)):
            answers += self.say(message)
        return answers

    def opening(self, relid: int, open_id: int = 7, gpadl: int = RING_GPADL, vp: int = 0) -> OpenChannel:
        """Make an OPENCHANNEL."""
        return OpenChannel(relid=relid, open_id=open_id, ring_gpadl=gpadl, target_vp=vp, downstream_page=8)

    def channel(self, relid: int) -> Channel:
        """Give the server's record of a channel."""
        channel = self.server.offers.get(relid)
        assert channel is not None
        return channel

    def state(self, relid: int) -> State | None:
        """Give a channel's state; None: there is none."""
        channel = self.server.offers.get(relid)
        return channel.state if channel is not None else None


def connected(rig: Rig) -> int:
    """Offer one device, connect."""
    relid = rig.server.offer(ECHO, INSTANCE, PacedDevice())
    rig.connect()
    return relid


def opened(rig: Rig, device: PacedDevice, vp: int = 0) -> int:
    """Offer a device, and open it."""
    relid = rig.server.offer(ECHO, INSTANCE, device)
    rig.connect()
    rig.give_pages(relid)
    rig.say(rig.opening(relid, vp=vp))
    assert rig.state(relid) is (State.OPENING if device.slow else State.OPEN)
    return relid
