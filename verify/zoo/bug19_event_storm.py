# SPDX-License-Identifier: Apache-2.0
"""Zoo 19: the interrupt is ended by the handler, not by the user: a storm of events never lets the user run."""

from pvbus.verify.scenarios.port_life import PortLife
from pvbus.verify.zoo import CAUGHT, Bug
from pvbus.verify.zoo.by_hand import ByHand, Handler


class EagerEoi(Handler):
    """Ends the interrupt as soon as the port lies in the ring."""

    def handle(self, port: int) -> None:
        """Queue it, then end its interrupt, whoever has to read it."""
        super().handle(port)
        self.scenario.path.eoi(0, port, 0)


class Storm(ByHand, PortLife):
    """A port's life with that handler."""

    handler = EagerEoi


BUG = Bug(
    number=19,
    name="event-storm",
    sentence="the interrupt ends with its handler: a peer that goes on raising keeps the CPU and fills the ring",
    scenario=PortLife,
    handler=Storm,
    parameters={"script": (("raise", 1), ("await", 1), ("raise", 1))},
    expected={"sc": CAUGHT, "tso": CAUGHT, "arm": CAUGHT},
    story=(
        "If a port is unmasked again as soon as its handler has run, the peer's next event interrupts at once: a peer that "
        "raises fast enough keeps the CPU in the upcall loop, and no user ever gets to read. So an event that a user must "
        "read stays masked until that user has written it back (a late EOI): then k events cost one interrupt, and the "
        "user's own pace is the limit. What shows here is a second entry for a port that nobody has written back."
    ),
    citation="XSA-332, Juergen Gross, 2020: 54c9de89895e, c44b849cee8c, e99502f76271, 5f7f77400ab5.",
)
