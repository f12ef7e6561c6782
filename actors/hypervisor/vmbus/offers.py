# SPDX-License-Identifier: Apache-2.0
"""Which channels there are, and which relid each has.

A relid is a number that the guest holds on to: it is given to another channel only after the guest has released it (or has been
reset), and lowest first, because a 2012 guest scans few of them. Relid 0 is never used. Part of server.py's state.
"""

from __future__ import annotations

import errno
from typing import TYPE_CHECKING

from pvbus.actors.hypervisor.errors import HypercallError
from pvbus.actors.hypervisor.vmbus.channel import CHANNELS_MAX, Channel, State
from pvbus.actors.runtime.vmbus_facts import VMBUS_SINT
from pvbus.actors.runtime.vmbus_wire import OfferChannel

if TYPE_CHECKING:
    import uuid
    from collections.abc import Iterable, Iterator

_SINT_SHIFT = 12


def event_connection(relid: int) -> int:
    """Give the connection by which a guest from 2.4 on signals a channel."""
    return relid | VMBUS_SINT << _SINT_SHIFT


def relid_of_connection(connection: int) -> int | None:
    """Give the channel that an event connection belongs to; None if it is none of ours."""
    relid = connection & (1 << _SINT_SHIFT) - 1
    return relid if relid and event_connection(relid) == connection else None


class Offers:
    """The channels by relid."""

    def __init__(self) -> None:
        self._channels: dict[int, Channel] = {}
        self.serial = 0     # the last generation given out

    def __iter__(self) -> Iterator[Channel]:
        return iter([self._channels[relid] for relid in sorted(self._channels)])

    def __len__(self) -> int:
        return len(self._channels)

    def get(self, relid: int) -> Channel | None:
        """Look a channel up."""
        return self._channels.get(relid)

    def load(self, channels: Iterable[Channel], serial: int) -> None:
        """Take over those of a snapshot."""
        self._channels = {channel.relid: channel for channel in channels}
        self.serial = serial

    def add(self, class_id: uuid.UUID, instance_id: uuid.UUID) -> Channel:
        """Enter a channel, or offer one again whose relid the guest still holds. EEXIST, ENOSPC (no relid free)."""
        same = [channel for channel in self if (channel.class_id, channel.instance_id) == (class_id, instance_id)]
        if any(channel.state is not State.REVOKED for channel in same):
            raise HypercallError(errno.EEXIST, f"{instance_id} of class {class_id} is offered")
        if not same and len(self._channels) >= CHANNELS_MAX:
            raise HypercallError(errno.ENOSPC, f"{CHANNELS_MAX} channels")
        self.serial += 1
        if same:
            same[0].generation, same[0].state = self.serial, State.REOFFERED
            return same[0]
        relid = next(relid for relid in range(1, CHANNELS_MAX + 1) if relid not in self._channels)
        channel = Channel(relid=relid, generation=self.serial, class_id=class_id, instance_id=instance_id)
        self._channels[relid] = channel
        return channel

    def remove(self, channel: Channel) -> None:
        """Free the relid."""
        del self._channels[channel.relid]


def offer_message(channel: Channel) -> OfferChannel:
    """Describe a channel to the guest."""
    return OfferChannel(
        class_id=channel.class_id, instance_id=channel.instance_id, relid=channel.relid, flags=channel.flags,
        latency_100ns=channel.latency_100ns, mmio_mb=channel.mmio_mb, user_data=channel.user_data,
        monitor_id=channel.monitor_id or 0, monitor_allocated=channel.monitor_id is not None, dedicated=True,
        connection=event_connection(channel.relid),
    )  # fmt: skip
