# SPDX-License-Identifier: Apache-2.0
"""A host is killed at any step while it echoes packets, and its heir goes on: does each packet come back, and once?

Claim, do, release: the claim word says how far the answers will be written and the packets given back, before either is.
Contexts: the host, which may die anywhere; its heir, which maps the rings anew and does what Endpoint does when it is restored;
and the driver, as in channel_echo.py.
"""

from __future__ import annotations

from collections.abc import Iterable
from functools import partial
from typing import TYPE_CHECKING

from pvbus.shm._core_explored import Memory
from pvbus.verify.explorer.scenario import claimed, within
from pvbus.verify.scenarios.channel_echo import ChannelEcho

if TYPE_CHECKING:
    from pvbus.actors.hypervisor.vmbus.endpoint import Endpoint
    from pvbus.verify.explorer.model import Model
    from pvbus.verify.explorer.scenario import Start

CLAIMS_BYTES = 4096


class ChannelDeath(ChannelEcho):
    """The driver sends `packets` and has all their echoes in the end."""

    ranges = within(packets=(1, 64))
    name = "channel-death"
    claims = claimed("sc tso arm", {}, deaths=1) + claimed("sc tso", {"packets": 2}, deaths=1)
    mortal = ("host",)

    def __init__(self, *, packets: int = 1) -> None:
        super().__init__(packets=packets)

    def prepare(self, model: Model, variants: int) -> None:
        """Make the rings, and the claim words."""
        super().prepare(model, variants)
        words = Memory(model, CLAIMS_BYTES)
        model.name(words, "claims")
        self.claim_words = (words, 0)

    def start(self, model: Model) -> Iterable[Start]:
        """Give the host, the driver, and the heir."""
        yield from super().start(model)
        yield "heir", partial(self._heir, model), True

    def _heir(self, model: Model) -> None:
        model.await_death("host")
        endpoint = self.opened(model)
        self.restore(endpoint)
        self.serve(model, endpoint)

    def restore(self, endpoint: Endpoint) -> None:
        """Go on where the dead one was."""
        endpoint.restore(b"")

    def broken(self, model: Model, stuck: list[str]) -> str | None:
        """Every packet has come back, once and in order."""
        expected = list(range(1, self.packets + 1))
        if self.got != expected:
            return f"the driver has {self.got} back of {expected}"
        if answers := self.driver_ring.state()["in_read_bytes_avail"]:
            return f"every packet came back, and {answers} bytes of answers lie unread: one was answered twice"
        return None
