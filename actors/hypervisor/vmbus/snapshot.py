# SPDX-License-Identifier: Apache-2.0
"""What an heir of the hypervisor needs of a domain's VMBus host: one msgpack record, stored in a page after each message.

The process calls `take` after each message, signal and tick and stores the bytes (`SNAPSHOT_BYTES_MAX` bound them) before it
takes the next; the heir calls `restore` on a fresh server with devices made anew. An heir whose record is older than the last
thing said says it again: OFFERs and results that nobody waits for are dropped by a guest. The rings lie in the guest's memory;
what was read there and not answered, and what was answered and not given back, is endpoint.py's concern.
"""

from __future__ import annotations

from collections import deque
from typing import TYPE_CHECKING

import msgspec

from pvbus.actors.hypervisor.vmbus.channel import Channel, Device, State
from pvbus.actors.hypervisor.vmbus.connection import Link
from pvbus.actors.hypervisor.vmbus.gpadl import Gpadl

if TYPE_CHECKING:
    from collections.abc import Callable

    from pvbus.actors.hypervisor.vmbus.server import Server

SNAPSHOT_BYTES_MAX = 1024 * 1024
"""32,768 words of 9 bytes, 255 channels of at most 800, 1,024 messages of at most 200 that wait."""

DEVICE_STATE_BYTES_MAX = 256


class Counters(msgspec.Struct):
    """What happened."""

    messages: int = 0
    violations: int = 0     # what a guest must not do
    overtaken: int = 0      # what a RESCIND has overtaken
    refused: int = 0        # not taken: no room for the answer
    stray_signals: int = 0  # of channels that are not open


class Snapshot(msgspec.Struct, kw_only=True):
    """All that an heir needs, but for the devices."""

    link: Link
    channels: list[Channel]
    gpadls: list[Gpadl]
    outgoing: list[bytes]
    serial: int
    counters: Counters


class SnapshotError(RuntimeError):
    """The record is longer than its bound, or none of ours."""


def take(server: Server) -> bytes:
    """Give the record of a server."""
    channels = []
    for channel in server.offers:
        state = server.devices[channel.relid].save() if channel.state is State.OPEN else b""
        if len(state) > DEVICE_STATE_BYTES_MAX:
            raise SnapshotError(f"relid {channel.relid}: {len(state)} bytes of device state")
        channels.append(msgspec.structs.replace(channel, device_state=state))
    data = msgspec.msgpack.encode(
        Snapshot(
            link=server.link, channels=channels, gpadls=server.gpadls.all(), outgoing=list(server.outgoing),
            serial=server.offers.serial, counters=server.counters,
        )
    )
    if len(data) > SNAPSHOT_BYTES_MAX:
        raise SnapshotError(f"a snapshot of {len(data)} bytes")
    return data


def restore(server: Server, data: bytes, device_of: Callable[[Channel], Device], *, guest_gone: bool = False) -> None:
    """Make a fresh server the heir. Devices of open channels are opened again; a channel whose rings are gone is rescinded.

    `guest_gone`: nobody is connected any more. What was offered is offered to whoever comes; what was rescinded is gone.
    """
    try:
        record = msgspec.msgpack.decode(data, type=Snapshot)
    except msgspec.MsgspecError as error:
        raise SnapshotError(f"no snapshot: {error}") from None
    server.counters = record.counters
    if guest_gone:
        kept = [channel for channel in record.channels if channel.state is not State.REVOKED]
        for channel in kept:
            channel.state, channel.opened, channel.reopen, channel.device_state = State.CLIENT_RELEASED, None, None, b""
            server.devices[channel.relid] = device_of(channel)
        server.offers.load(kept, record.serial)
        return
    server.link, server.outgoing = record.link, deque(record.outgoing)
    server.gpadls.load(record.gpadls)
    server.offers.load(record.channels, record.serial)
    for channel in server.offers:
        if channel.state is not State.REVOKED:
            server.devices[channel.relid] = device_of(channel)
    for channel in server.offers:
        server.resume(channel)
