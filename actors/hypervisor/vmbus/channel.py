# SPDX-License-Identifier: Apache-2.0
"""A channel as the host sees it: its record, its states, and the device that it leads to.

    offer() ──► ClientReleased ──REQUESTOFFERS──► Closed ──OPEN──► Opening ──opened()──► Open
                      ▲                             ▲  ◄──────────────┘ failed            │ CLOSE
                      │ INITIATE, UNLOAD            └──closed()── Closing ◄───────────────┘
                      │ (…ClientRelease while the       OPEN ▼      ▲
                      │  device opens or closes)        ClosingReopen ──closed()──► Opening
                      │
    rescind() in any state that the guest knows of ──► Revoked ──RELID_RELEASED──► gone
                                             offer() ▼    ▲ rescind()
                                                   Reoffered ──RELID_RELEASED──► Closed

The records belong to server.py, which stores them; an heir of the hypervisor reads them back.
"""

from __future__ import annotations

import enum
import uuid
from typing import TYPE_CHECKING, NamedTuple, Protocol

import msgspec

from pvbus.actors.runtime.vmbus_wire import OpenChannel

if TYPE_CHECKING:
    from pvbus.shm.memory import Memory

CHANNELS_MAX = 255
"""Relids 1..255: a 2012 guest looks at 256 bits of its interrupt page."""


class State(enum.StrEnum):
    """Where a channel stands."""

    CLIENT_RELEASED = "client released"     # the guest does not know of it
    CLOSED = "closed"
    OPENING = "opening"                     # the device has been asked
    OPEN = "open"
    CLOSING = "closing"                     # the device still closes
    CLOSING_REOPEN = "closing, to be opened again"
    REVOKED = "revoked"                     # rescinded, and the guest has not released the relid
    REOFFERED = "reoffered"                 # offered again before the guest has released the relid
    CLOSING_CLIENT_RELEASE = "closing, client released"
    OPENING_CLIENT_RELEASE = "opening, client released"


UNKNOWN_TO_GUEST = frozenset({State.CLIENT_RELEASED, State.CLOSING_CLIENT_RELEASE, State.OPENING_CLIENT_RELEASE})
GONE_FOR_GUEST = frozenset({State.REVOKED, State.REOFFERED})


class Channel(msgspec.Struct, kw_only=True):
    """A channel's record. {relid, generation} names it: a relid is used again, a generation never."""

    relid: int
    generation: int
    class_id: uuid.UUID
    instance_id: uuid.UUID
    flags: int = 0
    mmio_mb: int = 0
    user_data: bytes = b""
    monitor_id: int | None = None           # its trigger in the monitor pages, with its latency
    latency_100ns: int = 0
    state: State = State.CLIENT_RELEASED
    opened: OpenChannel | None = None       # the request that opened it, or is about to
    reopen: OpenChannel | None = None       # the one that waits for the device to close
    device_state: bytes = b""               # filled for a snapshot only


class RingPages(NamedTuple):
    """Where a channel's two rings lie: guest to host first, host to guest from `downstream` on, offsets in bytes."""

    memory: Memory
    offset: int
    size: int
    downstream: int


class Handle(Protocol):
    """What a device may say about its channel. After the channel has been closed, revoked or reset it says it to nobody."""

    @property
    def relid(self) -> int:
        """The channel's number."""

    def signal(self) -> None:
        """Interrupt the guest for this channel."""

    def opened(self, status: int) -> None:
        """End an open that `on_open` had left open."""

    def closed(self) -> None:
        """End a close that `on_close` had left open."""


class Device(Protocol):
    """What a channel leads to. Calls come one at a time, from the server."""

    def on_open(self, handle: Handle, pages: RingPages) -> int | None:
        """Map the rings; give a status, or None and call `handle.opened` later."""

    def on_opened(self) -> None:
        """The guest is about to be told: now the device may send."""

    def on_close(self) -> bool:
        """Let the rings go; False: `handle.closed` comes later. Also ends an open that is under way."""

    def on_signal(self) -> None:
        """The guest has signalled the channel."""

    def due_ns(self) -> int | None:
        """When `tick` is wanted."""

    def tick(self, now_ns: int) -> None:
        """Do what is due."""

    def save(self) -> bytes:
        """Give what an heir needs beside the rings, a few bytes."""

    def restore(self, state: bytes) -> None:
        """Go on as one who has been open before; the rings have been mapped by `on_open`."""
