# SPDX-License-Identifier: Apache-2.0
"""The attributes of a device, byte for byte: what a read of each file gives.

A read takes one snapshot of the channel, its rings and the monitor pages (B2.1) and formats one field of it. The driver's is
unlocked and may be torn between fields (B2.7); ours reads each ring once, and only while the channel is open: a ring that is
being torn down reads as zeros (zoo 26, H7). Reads the monitor pages (shm/monitor.py) and nothing else; writes nothing.
"""

from __future__ import annotations

import uuid
from collections.abc import Callable, Iterable
from typing import TYPE_CHECKING, NamedTuple, Protocol

from pvbus.actors.runtime.vmbus_facts import DEVICE_CLASSES, PAGE_BYTES, modalias
from pvbus.actors.workqueue.channel import ChannelState
from pvbus.shm import monitor
from pvbus.shm.hyperv import Frame
from pvbus.shm.monitor import MonitorPage

if TYPE_CHECKING:
    from pvbus.actors.workqueue.bus import Device
    from pvbus.actors.workqueue.channel import Channel
    from pvbus.shm.memory import Memory

Triggers = Iterable[tuple["Memory", int]]
"""Pages in which drivers have triggers of their own: each a part of the guest's one page."""

VENDOR = 0x1414
DEVICE_NUMBERS = {
    name: number
    for number, name in enumerate((
        "ide", "scsi", "fibre-channel", "network", "network-direct", "pci", "video", "keyboard", "mouse", "kvp", "timesync",
        "heartbeat", "shutdown", "file-copy", "vss", "dynamic-memory",
    ))
}  # fmt: skip
"""What today's kernels show as `device`, by class. Not held against a recording."""
DEVICE_UNKNOWN = len(DEVICE_NUMBERS)
_CLASS_NAMES = {class_id: name for name, class_id in DEVICE_CLASSES.items()}


class RingState(NamedTuple):
    """One ring, read once."""

    interrupt_mask: int = 0
    read_index: int = 0
    write_index: int = 0
    read_bytes_avail: int = 0
    write_bytes_avail: int = 0


class Rings(Protocol):
    """What is asked of the rings of an open channel."""

    def states(self) -> tuple[RingState, RingState]:
        """Give the outbound and the inbound ring, validated: nothing out of range."""


class Monitor(NamedTuple):
    """What one monitor page says about a channel: its group's whole pending word (B2.8), its latency and connection."""

    pending: int = 0
    latency: int = 0
    conn_id: int = 0


class Snapshot(NamedTuple):
    """Mirror hv_device_info: all that the attributes are made of."""

    id: int = 0
    state: int = 0
    class_id: uuid.UUID = uuid.UUID(int=0)
    device_id: uuid.UUID = uuid.UUID(int=0)
    monitor_id: int = 0
    server: Monitor = Monitor()
    client: Monitor = Monitor()
    out: RingState = RingState()
    inbound: RingState = RingState()
    cpu: int = 0


def _monitor(memory: Memory, frame: int, monitor_id: int, triggers: Triggers = ()) -> Monitor:
    if monitor_id >= MonitorPage.IDS:
        return Monitor()
    page, pending = frame * PAGE_BYTES, 0
    for where, at in ((memory, page), *triggers):
        pending |= where.load64(at + MonitorPage.group(monitor_id), "mon.group") & 0xFFFFFFFF
    return Monitor(
        pending=pending, latency=monitor.latency_100ns(memory, page, monitor_id),
        conn_id=monitor.connection_of(memory, page, monitor_id),
    )  # fmt: skip


def snapshot(channel: Channel | None, memory: Memory, rings: Rings | None, triggers: Triggers = ()) -> Snapshot:
    """Mirror get_channel_info and vmbus_get_debug_info (B2.1, X15). No channel: all zeros. Not open: the rings are zeros (H7)."""
    if channel is None:
        return Snapshot()
    offer = channel.offer
    is_open = rings is not None and channel.state is ChannelState.OPENED and not channel.gone
    out, inbound = rings.states() if rings is not None and is_open else (RingState(), RingState())
    return Snapshot(
        id=offer.relid, state=min(channel.state, ChannelState.OPENED), class_id=offer.class_id, device_id=offer.instance_id,
        monitor_id=offer.monitor_id, server=_monitor(memory, Frame.MONITOR, offer.monitor_id),
        client=_monitor(memory, Frame.MONITOR + 1, offer.monitor_id, triggers), out=out, inbound=inbound, cpu=channel.target_vp,
    )  # fmt: skip


def number(value: int) -> str:
    """Give a C `int` as %d does: 32 bits, signed."""
    value &= 0xFFFFFFFF
    return f"{value - (value >> 31 << 32)}\n"


def guid(value: uuid.UUID) -> str:
    """Give a GUID in its braces, fields in Windows order."""
    return f"{{{value}}}\n"


_RING = ("intr_mask", "read_index", "write_index", "read_bytes_avail", "write_bytes_avail")

Show = Callable[[Snapshot], str]


def _monitor_shows(side: str, of: Callable[[Snapshot], Monitor]) -> dict[str, Show]:
    return {
        f"{side}_monitor_pending": lambda s: number(of(s).pending),
        f"{side}_monitor_latency": lambda s: number(of(s).latency),
        f"{side}_monitor_conn_id": lambda s: number(of(s).conn_id),
    }


def _ring_shows(side: str, of: Callable[[Snapshot], RingState]) -> dict[str, Show]:
    def show(field: int) -> Show:
        return lambda s: number(of(s)[field])

    return {f"{side}_{name}": show(field) for field, name in enumerate(_RING)}


ATTRIBUTES: dict[str, Show] = {
    "id": lambda s: number(s.id),
    "state": lambda s: number(s.state),
    "class_id": lambda s: guid(s.class_id),
    "device_id": lambda s: guid(s.device_id),
    "monitor_id": lambda s: number(s.monitor_id),
    "modalias": lambda s: modalias(s.class_id) + "\n",
    **_monitor_shows("server", lambda s: s.server),
    **_monitor_shows("client", lambda s: s.client),
    **_ring_shows("out", lambda s: s.out),
    **_ring_shows("in", lambda s: s.inbound),
}
"""The 22 of 2012, mode 0444, in their order (B2.3)."""

CHANNEL_ATTRIBUTES: dict[str, Show] = {
    "cpu": lambda s: f"{s.cpu}\n",
    "state": lambda s: number(s.state),
    "in_mask": lambda s: f"{s.inbound.interrupt_mask}\n",
    "out_mask": lambda s: f"{s.out.interrupt_mask}\n",
    "read_avail": lambda s: f"{s.inbound.read_bytes_avail}\n",
    "write_avail": lambda s: f"{s.out.write_bytes_avail}\n",
    "monitor_id": lambda s: f"{s.monitor_id}\n",
    "pending": lambda s: f"{s.client.pending}\n",     # of the whole group, as B2.8 has it
    "latency": lambda s: f"{s.client.latency}\n",
    "subchannel_id": lambda _: "0\n",
}
"""Files of channels/<relid>/."""


def show(name: str, seen: Snapshot) -> str:
    """Mirror vmbus_show_device_attr: the text of one of the 22; an unknown name gives nothing (B2.6)."""
    form = ATTRIBUTES.get(name)
    return form(seen) if form is not None else ""


def device_number(class_id: uuid.UUID) -> int:
    """Give the number that today's kernels have for a class of devices."""
    return DEVICE_NUMBERS.get(_CLASS_NAMES.get(class_id, ""), DEVICE_UNKNOWN)


def all_of(device: Device, memory: Memory, rings: Rings | None, triggers: Triggers = ()) -> dict[str, str]:
    """Give every attribute of a device by name, those of today's kernels too; one snapshot for all of them."""
    seen = snapshot(device.channel, memory, rings, triggers)
    texts = {name: form(seen) for name, form in ATTRIBUTES.items()}
    texts |= {
        "vendor": f"{VENDOR:#x}\n",
        "device": f"{device_number(seen.class_id):#x}\n",
        "numa_node": "0\n",
        "channel_vp_mapping": f"{seen.id}:{seen.cpu}\n",
        "driver_override": f"{device.driver_override or '(null)'}\n",
    }
    return texts | {f"channels/{seen.id}/{name}": form(seen) for name, form in CHANNEL_ATTRIBUTES.items()}
