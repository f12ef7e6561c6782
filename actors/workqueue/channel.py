# SPDX-License-Identifier: Apache-2.0
"""A channel as the guest sees it, and the pages that it has lent to the host for it.

    (none) --OFFER--> OPEN --open()--> OPENING --OPEN_RESULT--> OPENED --close()--> CLOSING --> OPEN
                        `-- RESCIND, in any state: `gone`; the relid is released when its device is --> (none)

The numbers are those of the `state` attribute. OPEN is the driver's word for "offered and registered"; what `open` has opened is
OPENED. Records of channels.py; nobody else writes them.
"""

from __future__ import annotations

import enum
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Protocol

if TYPE_CHECKING:
    from collections.abc import Sequence

    from pvbus.actors.runtime.vmbus_wire import OfferChannel


class ChannelState(enum.IntEnum):
    """Where a channel stands."""

    OFFER = 0
    OPENING = 1
    OPEN = 2
    OPENED = 3
    CLOSING = 4     # ours: the driver counts it as open still


class Pages(Protocol):
    """A channel's two rings in guest memory: guest to host first, host to guest behind it."""

    @property
    def frames(self) -> Sequence[int]:
        """Their frame numbers, in order."""

    @property
    def downstream_page(self) -> int:
        """With which of them the host-to-guest ring begins."""

    def free(self) -> None:
        """Give them back; called once, when the host does not know them any more."""


@dataclass(eq=False, slots=True)
class Lent:
    """Pages that the host knows, or may know, under a handle."""

    gpadl: int
    pages: Pages
    limbo: bool = False     # nobody waits for the host's word on them any more: it decides when it comes (zoo 27)


@dataclass(eq=False, slots=True)
class Channel:
    """One channel, from its OFFER until its relid is released. Epoch and serial name it: a relid is used again (zoo 15)."""

    offer: OfferChannel
    epoch: int
    serial: int
    state: ChannelState = ChannelState.OFFER
    gone: bool = False              # rescinded, or the connection has ended
    target_vp: int = 0
    open_id: int = 0                # of the last open
    late_open_id: int = 0           # of an open that was given up while the host still thinks about it
    ring: Lent | None = None        # of an open channel
    lent: dict[int, Lent] = field(default_factory=dict)
    busy: int = 0                   # functions that wait with this channel in their hands

    @property
    def relid(self) -> int:
        """The number that the host knows it by."""
        return self.offer.relid
