# SPDX-License-Identifier: Apache-2.0
"""The echo device, ours, for tests and benchmarks: every packet comes back."""

from __future__ import annotations

from pvbus.actors.hypervisor.vmbus.endpoint import COMPLETION, IN_BAND, Packet


class Echo:
    """Answer a packet that wants a completion with a completion, any other with an in-band packet; same id, same payload.

    The ring does that itself, some ten times as fast as packets pass through here; `on_packets` says what it has to do.
    """

    echoes = True

    def on_open(self) -> list[Packet]:
        """Nothing is sent first."""
        return []

    def on_packets(self, packets: list[Packet]) -> list[Packet]:
        """Give them back; completions, which answer nothing of ours, are dropped."""
        return [
            Packet(COMPLETION if packet.completion else IN_BAND, packet.transaction, packet.payload)
            for packet in packets
            if packet.type != COMPLETION
        ]

    def on_close(self) -> None:
        """Nothing is remembered."""

    def due_ns(self) -> int | None:
        """It has no timer."""
        return None

    def tick(self, now_ns: int) -> list[Packet]:
        """It has no timer."""
        return []

    def save(self) -> bytes:
        """Nothing is remembered."""
        return b""

    def restore(self, state: bytes) -> None:
        """Nothing is remembered."""
