# SPDX-License-Identifier: Apache-2.0
"""A guest with one open channel, for tests of devices: its ring is two queues in memory."""

import errno
from collections import deque

from pvbus.actors.hypervisor.vmbus import integration
from pvbus.actors.hypervisor.vmbus.echo import Echo
from pvbus.actors.hypervisor.vmbus.endpoint import HOST_TAKES, IN_BAND, Endpoint, Packet, Service
from pvbus.actors.hypervisor.vmbus.integration import (
    NEGOTIATE,
    RESPONSE,
    TRANSACTION,
    V3_0,
    IcMessage,
    decode,
    versions_body,
    versions_of,
)
from pvbus.actors.runtime import vmbus_wire as wire
from pvbus.actors.runtime.vmbus_facts import STATUS_SUCCESS
from pvbus.shm.memory import Memory
from pvbus.tests.hypervisor.vmbus.rig import ECHO, INSTANCE, Pages, Rig


class MemoryRing:
    """Both directions of a channel as two bounded queues; signals as a ring decides them: empty → not empty, blocked → room."""

    def __init__(self, capacity: int = 8) -> None:
        self.capacity = capacity
        self.to_guest: deque[Packet] = deque()
        self.to_host: deque[Packet] = deque()
        self.masked = False
        self.guest_blocked = self.host_blocked = False
        self.broken = False

    def send(self, payload: bytes, transaction_id: int = 0, completion: bool = False, type: int = IN_BAND) -> int:  # noqa: A002
        """Send to the guest."""
        if len(self.to_guest) >= self.capacity:
            self.host_blocked = True
            raise BlockingIOError(errno.EAGAIN, "full")
        self.to_guest.append(Packet(type, transaction_id, bytes(payload), completion))
        return int(len(self.to_guest) == 1)

    def recv_many(self, max_packets: int) -> list[tuple[int, int, bytes, bool]]:
        """Take from the guest."""
        if self.broken:
            raise OSError(errno.EIO, "impossible index")
        return [self.to_host.popleft() for _ in range(min(max_packets, len(self.to_host)))]

    def echo(self, max_packets: int) -> tuple[int, bool, bool]:
        """Send back, one by one."""
        taken, signal = 0, False
        if self.broken:
            raise OSError(errno.EIO, "impossible index")
        while self.to_host and taken < max_packets:
            if self.to_host[0].type not in HOST_TAKES:
                raise OSError(errno.EPROTO, "strange type")
            try:
                for packet in Echo().on_packets([self.to_host[0]]):
                    signal = bool(self.send(packet.payload, packet.transaction, False, packet.type)) or signal
            except BlockingIOError:
                return taken, signal, True
            self.to_host.popleft()
            taken += 1
        return taken, signal, False

    def begin_read(self) -> None:
        """Mask."""
        self.masked = True

    def end_read(self) -> bool:
        """Unmask, look again."""
        self.masked = False
        return bool(self.to_host)

    def keep(self, memory: Memory, offset: int, heir: bool, /) -> None:
        """Nobody inherits a queue."""

    def position(self) -> tuple[int, int, int]:
        """Stand still: an heir finds nothing that was sent and not kept."""
        return 0, 0, 1 << 20

    def hold(self) -> None:
        """What is read is gone at once."""

    def release(self, read_index: int | None = None, /) -> None:
        """It is gone."""

    def take_signal(self) -> bool:
        """Whether the guest waits for room."""
        freed, self.guest_blocked = self.guest_blocked and len(self.to_host) < self.capacity, False
        return freed


class PacketByPacket(Echo):
    """The echo as a service that is handed its packets."""

    echoes = False


class Driver:
    """A guest with one open channel."""

    def __init__(self, pages: Pages, service: Service, capacity: int = 8) -> None:
        self.rig, self.ring = Rig(pages), MemoryRing(capacity)
        self.endpoint = Endpoint(service, lambda _: self.ring)
        self.relid = self.rig.server.offer(ECHO, INSTANCE, self.endpoint)
        self.rig.connect()
        self.rig.give_pages(self.relid)
        (result,) = self.rig.say(self.rig.opening(self.relid))
        assert result == wire.OpenResult(self.relid, 7, STATUS_SUCCESS)

    def put(self, *packets: Packet) -> None:
        """Write packets, signal once."""
        self.ring.to_host.extend(packets)
        self.rig.server.on_signal(self.relid)

    def take(self) -> list[Packet]:
        """Read everything; signal if the host waits for room."""
        taken = list(self.ring.to_guest)
        self.ring.to_guest.clear()
        if self.ring.host_blocked:
            self.ring.host_blocked = False
            self.rig.server.on_signal(self.relid)
        return taken

    def agree(self, *, frame: integration.IcVersion = V3_0, version: integration.IcVersion = V3_0) -> None:
        """Answer the question for versions."""
        (question,) = self.take()
        asked = decode(question.payload)
        assert asked.type == NEGOTIATE
        assert frame in versions_of(asked.body)[0]
        self.answer(asked, body=versions_body((frame,), (version,)))

    def answer(self, asked: IcMessage, *, body: bytes = b"", status: int = 0, transaction: int | None = None) -> None:
        """Answer a request."""
        self.put(Packet(IN_BAND, 0, IcMessage(
            type=asked.type, body=body, frame=asked.frame, version=asked.version, status=status, flags=TRANSACTION | RESPONSE,
            transaction=asked.transaction if transaction is None else transaction,
        ).encode()))  # fmt: skip
