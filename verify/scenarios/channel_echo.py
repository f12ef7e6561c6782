# SPDX-License-Identifier: Apache-2.0
"""A driver and its device send to each other through both rings of a channel, full and empty: does either sleep for ever (E9)?

Contexts: the host (a server: Endpoint with an echo behind it, as the hypervisor runs it for each signal) and the driver, which
does with its ring what VmbusChannel of the client does: sends, receives, and sleeps on its doorbell when neither goes on. The
modelled doorbells stand for the signals of the channel.
"""

from __future__ import annotations

from collections.abc import Iterable
from functools import partial
from typing import TYPE_CHECKING, Any, Final

from pvbus.actors.hypervisor.vmbus.channel import RingPages
from pvbus.actors.hypervisor.vmbus.echo import Echo
from pvbus.actors.hypervisor.vmbus.endpoint import Endpoint
from pvbus.shm._core_explored import ChannelRing, Memory
from pvbus.shm.channel_ring import ChannelControl, PacketType
from pvbus.verify.explorer.scenario import Scenario, Start, claimed, within
from pvbus.verify.scenarios.channel_ring import DATA_BYTES, PACKET_BYTES, RING_BYTES

if TYPE_CHECKING:
    from pvbus.verify.explorer.model import Model

# Leaves so much of a ring that one empty packet fits. All header, so that it costs two loads to read.
NEARLY_ALL: Final = DATA_BYTES - 2 * PACKET_BYTES


class _Handle:
    """The device's handle of its channel: a signal rings the driver's doorbell."""

    relid = 1

    def __init__(self, model: Model, door: int) -> None:
        self._model, self._door = model, door

    def signal(self) -> None:
        self._model.ring(self._door, "driver.signal")

    def opened(self, status: int) -> None:
        raise AssertionError(f"it was opened with {status} at once")

    def closed(self) -> None:
        raise AssertionError("it is open")


class ChannelEcho(Scenario):
    """The driver sends `packets` and has all their echoes in the end. `full`: a packet nearly as large lies in either ring."""

    ranges = within(packets=(1, 64))
    name = "channel-echo"
    claims = claimed("sc tso", {}, {"packets": 3}, {"packets": 1, "full": True}) + claimed("arm", {"packets": 1})
    endpoint_type: type[Endpoint] = Endpoint
    claim_words: tuple[Any, int] | None = None  # a host without an heir needs none

    def __init__(self, *, packets: int = 2, full: bool = False) -> None:
        self.packets = packets
        self.full = full
        self.got: list[int] = []

    def prepare(self, model: Model, variants: int) -> None:
        """Make the rings, the driver's in front."""
        self.door, self.host = model.bell("driver"), model.bell("host")
        self.memory: Any = Memory(model, 2 * RING_BYTES)
        model.name(self.memory, "rings")
        if self.full:
            for ring in (0, RING_BYTES):
                eighths = (NEARLY_ALL - 8) // 8
                word = PacketType.GPA_DIRECT | eighths << 16 | eighths << 32
                self.memory.store64(ring + ChannelControl.BYTES, word)
                self.memory.store32(ring + ChannelControl.WRITE_INDEX, NEARLY_ALL)

    def start(self, model: Model) -> Iterable[Start]:
        """Give the host and the driver."""
        self.got = []
        self.driver_ring = ChannelRing(self.memory, 0, RING_BYTES, RING_BYTES)
        yield "host", partial(self._host, model), True
        yield "driver", partial(self._driver, model), False

    def _host(self, model: Model) -> None:
        endpoint = self.opened(model)
        endpoint.on_opened()
        self.serve(model, endpoint)

    def opened(self, model: Model) -> Endpoint:
        """Map the rings."""
        endpoint = self.endpoint_type(Echo(), self._host_ring, claims=self.claim_words)
        endpoint.on_open(_Handle(model, self.door), RingPages(self.memory, 0, 2 * RING_BYTES, RING_BYTES))
        return endpoint

    def serve(self, model: Model, endpoint: Endpoint) -> None:
        """Answer signals."""
        while True:
            while endpoint.due_ns() == 0:
                endpoint.tick(0)
            model.wait(self.host, "host.wait")
            model.take(self.host, "host.take")
            endpoint.on_signal()
            if endpoint.fault:
                raise AssertionError(endpoint.fault)

    def _host_ring(self, pages: RingPages) -> ChannelRing:
        self.host_ring = ChannelRing(self.memory, pages.downstream, pages.offset, RING_BYTES)
        return self.host_ring

    def _driver(self, model: Model) -> None:
        numbers = list(range(1, self.packets + 1))
        expected = self.packets + 2 * self.full
        while len(self.got) < expected:
            went_on = self._send(model, numbers)
            while packet := self._recv(model):
                self.got.append(packet[1])
                went_on = True
            if not went_on:
                model.wait(self.door, "driver.wait")

    def _send(self, model: Model, numbers: list[int]) -> bool:
        sent = False
        while numbers:
            try:
                must_signal = self.driver_ring.send(b"", numbers[0])
            except BlockingIOError:
                break
            del numbers[0]
            sent = True
            if must_signal:
                model.ring(self.host, "host.signal")
        return sent

    def _recv(self, model: Model) -> tuple[int, int, bytes, bool] | None:
        """Take a packet; finding none, take the bell back and look again (VmbusChannel.recv)."""
        packet = self.driver_ring.recv()
        if packet is None and self.rearms(model):
            packet = self.driver_ring.recv()
        if self.driver_ring.take_signal():
            model.ring(self.host, "host.signal")
        return packet

    def rearms(self, model: Model) -> bool:
        """Take the bell back: whoever rang has been heard."""
        return model.take(self.door, "driver.take") > 0

    def broken(self, model: Model, stuck: list[str]) -> str | None:
        """Every packet has come back, in order; and nobody was told of room more than twice for each time that he asked."""
        expected = [0] * (2 * self.full) + list(range(1, self.packets + 1))
        if stuck or self.got != expected:
            free = self.driver_ring.state()
            return (
                f"the driver has {self.got} back of {expected}, and both sleep; of {DATA_BYTES} bytes "
                f"{free['out_write_bytes_avail']} are free towards the host, {free['in_write_bytes_avail']} towards the driver"
            )
        for who, writer, reader in (("driver", self.driver_ring, self.host_ring), ("host", self.host_ring, self.driver_ring)):
            asked, told = writer.state()["out_full"], reader.state()["in_signals"]
            if told > 2 * asked:
                return f"the {who} asked for room {asked} times, and was told {told} times"
        return None
