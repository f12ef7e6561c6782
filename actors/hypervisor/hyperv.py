# SPDX-License-Identifier: Apache-2.0
"""The Hyper-V host of one domain, put together: SynIC, the VMBus server, its synthetic devices, and the guest's memory.

Pure as its parts are: interrupts leave through `interrupt(vp, vector)`, and what an heir needs lies in the domain's segment
(SynIC) and in the snapshot segment, written after each step that changed something (`keep`).
"""

from __future__ import annotations

import errno
import functools
import uuid
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

from pvbus.actors.hypervisor.errors import HypercallError
from pvbus.actors.hypervisor.synic import ConnectionKind, HvFault, HvStatus, Synic
from pvbus.actors.hypervisor.vmbus import snapshot
from pvbus.actors.hypervisor.vmbus.channel import State
from pvbus.actors.hypervisor.vmbus.echo import Echo
from pvbus.actors.hypervisor.vmbus.endpoint import Endpoint
from pvbus.actors.hypervisor.vmbus.heartbeat import Heartbeat
from pvbus.actors.hypervisor.vmbus.monitor import LATENCY_100NS_MAX, Monitors
from pvbus.actors.hypervisor.vmbus.mute import Mute
from pvbus.actors.hypervisor.vmbus.offers import event_connection
from pvbus.actors.hypervisor.vmbus.server import Server
from pvbus.actors.hypervisor.vmbus.shutdown import Shutdown
from pvbus.actors.runtime.vmbus_facts import DEVICE_CLASSES, MESSAGE_TYPE, VMBUS_SINT, uses_interrupt_page
from pvbus.shm import hyperv, store

if TYPE_CHECKING:
    from pvbus.actors.hypervisor.vmbus.channel import Channel, Device, RingPages
    from pvbus.actors.hypervisor.vmbus.endpoint import Ring, Service
    from pvbus.shm.memory import Memory

MESSAGE_PORT, EVENT_PORT = 1, 2
MESSAGE_CONNECTIONS = (1, 4)
EVENT_CONNECTION = 2
MESSAGES_A_TURN = 16
SHUTDOWN_NS_MAX = 10_000_000_000
SERVICES: dict[uuid.UUID, Callable[[], Service]] = {
    DEVICE_CLASSES["echo"]: Echo,
    DEVICE_CLASSES["heartbeat"]: Heartbeat,
    DEVICE_CLASSES["shutdown"]: Shutdown,
}
"""What the host has a device of; other classes that it knows are offered without one (mute.py)."""


class Frames:
    """The guest's memory by frame number: its segment, and what it was given for channels."""

    def __init__(self, segment: Memory) -> None:
        self._segment = segment
        self._more: dict[int, tuple[int, Memory]] = {}

    def add(self, frame: int, pages: int, memory: Memory) -> None:
        """Map `pages` frames from `frame` on. EEXIST when some are there."""
        if any(frame < first + count and first < frame + pages for first, (count, _) in self._more.items()):
            raise HypercallError(errno.EEXIST, f"frame {frame:#x} is there")
        self._more[frame] = (pages, memory)

    def drop(self, frame: int) -> Memory | None:
        """Forget what begins at `frame`; give its mapping."""
        found = self._more.pop(frame, None)
        return found[1] if found else None

    def clear(self) -> None:
        """Forget all but the segment: whoever gave it is dead. Rings that are mapped stay so until their devices let them go."""
        self._more.clear()

    def find(self, frame: int) -> tuple[Memory, int] | None:
        """Give the mapping of a page and the page's offset in it."""
        if 0 <= frame < hyperv.Frame.COUNT:
            return self._segment, frame * hyperv.PAGE
        for first, (pages, memory) in self._more.items():
            if first <= frame < first + pages:
                return memory, (frame - first) * hyperv.PAGE
        return None


class HypervHost:
    """What the hypervisor is for one domain on the Hyper-V platform."""

    def __init__(
        self,
        segment: Memory,
        kept: Memory,
        vcpus: int,
        interrupt: Callable[[int, int], None],
        make_ring: Callable[[RingPages], Ring],
        clock: Callable[[], int],
        *,
        wrong_signal_word: bool = False,
    ) -> None:
        self.frames = Frames(segment)
        self.synic = Synic(segment, vcpus, interrupt, clock=clock)
        self.server = Server(self._post, self.frames, self._raise_flag, vcpus)
        self.monitors = Monitors(self.server, self.frames, self.synic.hv_signal_event)
        self._kept = kept
        self._make_ring = make_ring
        self._clock = clock
        self._wrong_signal_word = wrong_signal_word
        self.synic.create_message_port(MESSAGE_PORT, VMBUS_SINT)
        self.synic.create_event_port(EVENT_PORT, VMBUS_SINT)
        for number in MESSAGE_CONNECTIONS:
            self.synic.connect(number, ConnectionKind.MESSAGE, self._message_waits)
        self.synic.connect(EVENT_CONNECTION, ConnectionKind.EVENT, self._on_event)

    # ---- host to guest

    def _post(self, payload: bytes) -> int:
        status = self.synic.post(MESSAGE_PORT, MESSAGE_TYPE, payload, self.server.link.target_vp)
        return int(status)

    def _raise_flag(self, flag: int, vp: int) -> None:
        self.synic.signal(EVENT_PORT, flag, vp)

    # ---- guest to host

    def _message_waits(self, connection: int) -> None:
        """Take what waits; one whose answer has no room stays in its buffer, and the guest's next post finds none free."""
        for _ in range(MESSAGES_A_TURN):
            message = self.synic.take(connection)
            if message is None:
                return
            if message.type == MESSAGE_TYPE and not self.server.on_message(message.payload):
                return  # no room for the answer: it stays in its buffer
            self._connect_channels()
            self.keep()
            self.synic.done(message)

    def _connect_channels(self) -> None:
        """Each channel that the guest may signal has an event connection of its own (from 2.4)."""
        for channel in self.server.offers:
            number = event_connection(channel.relid)
            self.synic.connect(number, ConnectionKind.EVENT, functools.partial(self._signalled, channel.relid), flags=1)
        self.monitors.follow()
        self.monitors.opened(self._clock())

    def _signalled(self, relid: int, _flag: int) -> None:
        self.monitors.woken(relid, self._clock())
        self.signal(relid)

    def _on_event(self, _flag: int) -> None:
        self.server.on_event()
        self._keep_devices()

    def ring(self, relid: int) -> None:
        """A driver has rung a channel's doorbell: what its guest would do with a hypercall, in the way of its version."""
        self.monitors.woken(relid, self._clock())
        if uses_interrupt_page(self.server.link.version):
            self.server.set_guest_signal(relid, wrong_word=self._wrong_signal_word)
            self.synic.hv_signal_event(EVENT_CONNECTION, 0)
        else:
            self.signal(relid)

    def signal(self, relid: int) -> None:
        """The guest has signalled a channel by its event connection."""
        self.server.on_signal(relid)
        channel = self.server.offers.get(relid)
        if channel is not None and channel.state is State.OPEN and self.server.devices[relid].save():
            self.keep()

    def write_msr(self, vp: int, msr: int, value: int) -> None:
        """Write a register. EFAULT for what faults on a processor."""
        try:
            self.synic.write_msr(vp, msr, value)
        except HvFault as fault:
            raise HypercallError(errno.EFAULT, str(fault)) from None
        self.server.flush()

    def read_msr(self, vp: int, msr: int) -> int:
        """Read a register. EFAULT for what faults on a processor."""
        try:
            return self.synic.read_msr(vp, msr)
        except HvFault as fault:
            raise HypercallError(errno.EFAULT, str(fault)) from None

    def on_exits(self) -> None:
        """A CPU has written EOM: messages that waited are delivered, and others find room."""
        self.synic.attend_eoms()
        self._flush()

    def on_cpu_up(self, vp: int) -> None:
        """A CPU's process begins, first or reborn."""
        self.synic.cpu_reborn(vp)
        self._flush()

    def _flush(self) -> None:
        if self.server.outgoing:
            self.server.flush()
            self.keep()

    # ---- the host's own doing

    def offer(self, class_text: str, instance_text: str, latency_100ns: int = 0) -> int:
        """Offer a synthetic device; give its relid. EINVAL for a class that has none here.

        With a latency it has a monitor: the guest signals it by a trigger, as long as one is free and the host looks.
        """
        class_id, instance_id = parse_class(class_text), parse_guid(instance_text)
        if not 0 <= latency_100ns <= LATENCY_100NS_MAX:
            raise HypercallError(errno.EINVAL, f"a latency of {latency_100ns} x 100 ns: at most {LATENCY_100NS_MAX}")
        number = self.monitors.allocate() if latency_100ns else None
        relid = self.server.offer(
            class_id, instance_id, self._device_of_class(class_id), monitor_id=number,
            latency_100ns=latency_100ns if number is not None else 0,
        )  # fmt: skip
        self._connect_channels()
        self.keep()
        return relid

    def _device_of_class(self, class_id: uuid.UUID) -> Device:
        if class_id not in DEVICE_CLASSES.values():
            raise HypercallError(errno.EINVAL, f"class {class_id} is none of {', '.join(DEVICE_CLASSES)}")
        return Endpoint(SERVICES.get(class_id, Mute)(), self._make_ring, self.keep, (self._kept, store.CLAIMS))

    def rescind(self, relid: int) -> None:
        """Withdraw a device. ENOENT."""
        if not self.server.rescind(relid):
            raise HypercallError(errno.ENOENT, f"relid {relid} is not offered")
        self.keep()

    def service(self, relid: int) -> tuple[Endpoint, Service]:
        """Give a device that its guest has opened. ENOENT, ENOTCONN."""
        channel = self.server.offers.get(relid)
        if channel is None or relid not in self.server.devices:
            raise HypercallError(errno.ENOENT, f"relid {relid} is not offered")
        if channel.state is not State.OPEN:
            raise HypercallError(errno.ENOTCONN, f"relid {relid} is {channel.state}")
        device = self.server.devices[relid]
        assert isinstance(device, Endpoint)  # we made it
        return device, device.service

    def shut_down(self, relid: int, on_answer: Callable[[int | None], None]) -> None:
        """Ask the guest to shut down, through its shutdown device; its status, or None, goes to `on_answer`.

        EINVAL for another device, EBUSY while one is asked, ENOTCONN without a driver, and as `service`.
        """
        endpoint, service = self.service(relid)
        if not isinstance(service, Shutdown):
            raise HypercallError(errno.EINVAL, f"relid {relid} is no shutdown device")
        endpoint.submit(service.shutdown(0, self._clock() + SHUTDOWN_NS_MAX, on_answer))

    def channels(self) -> list[dict[str, Any]]:
        """List the channels as the host sees them."""
        return [
            {
                "relid": channel.relid, "class_id": str(channel.class_id), "instance_id": str(channel.instance_id),
                "class": next((name for name, known in DEVICE_CLASSES.items() if known == channel.class_id), None),
                "state": str(channel.state), "generation": channel.generation,
                "target_vp": channel.opened.target_vp if channel.opened is not None else None,
                "monitor_id": channel.monitor_id,
            }
            for channel in self.server.offers
        ]  # fmt: skip

    def due_ns(self) -> int | None:
        """When `tick` is wanted."""
        due = (self.server.due_ns(), self.monitors.due_ns())
        return min((when for when in due if when is not None), default=None)

    def tick(self) -> None:
        """Do what is due. Kept is what may have changed: a busy echo, which has no state, costs an heir nothing."""
        waiting = len(self.server.outgoing)
        self.monitors.look(self._clock())
        self.server.tick(self._clock())
        if len(self.server.outgoing) != waiting:
            self.keep()
        else:
            self._keep_devices()

    def look(self) -> None:
        """Look at every monitor page now, whatever the latencies: a machine that settles has no trigger left."""
        self.monitors.look(self._clock(), all_due=True)

    # ---- heirs

    def keep(self) -> None:
        """Store what an heir needs."""
        store.write(self._kept, snapshot.take(self.server))

    def _keep_devices(self) -> None:
        opened = (self.server.devices[channel.relid] for channel in self.server.offers if channel.state is State.OPEN)
        if any(device.save() for device in opened):
            self.keep()

    def recover(self, *, guest_gone: bool = False) -> None:
        """Go on where a forerunner died: with its channels, its messages, and the memory that the guest has given again.

        `guest_gone`: the workqueue has died, too; what it had been offered is offered to its heir.
        """
        if guest_gone:
            self.synic.forget_calls()
        data = store.read(self._kept)
        if data:
            snapshot.restore(self.server, data, self._again, guest_gone=guest_gone)
        self._connect_channels()
        self.synic.recover()
        for number in MESSAGE_CONNECTIONS:
            self._message_waits(number)

    def _again(self, channel: Channel) -> Device:
        return self._device_of_class(channel.class_id)


def parse_class(text: str) -> uuid.UUID:
    """Read a class by its name or GUID. EINVAL."""
    return DEVICE_CLASSES.get(text) or parse_guid(text)


def parse_guid(text: str) -> uuid.UUID:
    """Read a GUID. EINVAL naming it."""
    try:
        return uuid.UUID(text)
    except ValueError:
        raise HypercallError(errno.EINVAL, f"{text!r} is no GUID, and no class of {', '.join(DEVICE_CLASSES)}") from None


__all__ = ["Frames", "HvStatus", "HypervHost", "parse_class", "parse_guid"]
