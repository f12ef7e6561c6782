# SPDX-License-Identifier: Apache-2.0
"""A device of a class that the host knows by name only: it can be offered, seen and opened, and answers nothing.

For whoever wants to see how programs find a network or storage device, not how they drive it.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from pvbus.actors.hypervisor.vmbus.endpoint import Packet


class Mute:
    """Take every packet, and say nothing."""

    echoes = False

    def on_open(self) -> list[Packet]:
        """Nothing is sent first."""
        return []

    def on_packets(self, packets: list[Packet]) -> list[Packet]:
        """They are read, so that the ring has room again."""
        return []

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
