# SPDX-License-Identifier: Apache-2.0
"""What a device holds of its channel, instead of the server: it may signal, and say that it has opened or closed."""

from __future__ import annotations

from typing import TYPE_CHECKING

from pvbus.actors.hypervisor.vmbus.channel import Channel, State

if TYPE_CHECKING:
    from pvbus.actors.hypervisor.vmbus.server import Server


class ChannelHandle:
    """A device's channel; says nothing once the channel is gone, another generation's, or closed."""

    def __init__(self, server: Server, channel: Channel) -> None:
        self._server, self._channel, self._generation = server, channel, channel.generation

    @property
    def relid(self) -> int:
        """The channel's number."""
        return self._channel.relid

    def _mine(self) -> bool:
        return self._server.offers.get(self._channel.relid) is self._channel and self._channel.generation == self._generation

    def signal(self) -> None:
        """Interrupt the guest for this channel."""
        if self._mine() and self._channel.state in (State.OPEN, State.OPENING):
            self._server.signal_guest(self._channel)

    def opened(self, status: int) -> None:
        """End an open that `on_open` had left open."""
        if self._mine():
            self._server.device_opened(self._channel, status)

    def closed(self) -> None:
        """End a close that `on_close` had left open."""
        if self._mine():
            self._server.device_closed(self._channel)
