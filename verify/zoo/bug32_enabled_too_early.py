# SPDX-License-Identifier: Apache-2.0
"""Zoo 32: the handler says "not enabled" before it masks; a user who writes the port back in between hangs it."""

from pvbus.shm.layout import Domain, Irq
from pvbus.verify.scenarios.port_life import PortLife
from pvbus.verify.zoo import CAUGHT, Bug
from pvbus.verify.zoo.by_hand import ALL, ByHand, Handler


class DisabledFirst(Handler):
    """Clears ENABLED with the claim, and masks afterwards."""

    def claimed(self, irq: int) -> int:
        """Give the irq word of a port that is being served, not enabled any more."""
        return super().claimed(irq) & ~Irq.ENABLED

    def handle(self, port: int) -> None:
        """Mask and clear what may have been written back and unmasked by now."""
        self.domain.fetch_or64(Domain.EVTCHN_MASK, 1 << port, "irq.mask")
        self.domain.fetch_and64(Domain.EVTCHN_PENDING, ~(1 << port) & ALL, "irq.clear")
        self.push(port)


class Early(ByHand, PortLife):
    """A port's life with that handler."""

    handler = DisabledFirst


BUG = Bug(
    number=32,
    name="enabled-too-early",
    sentence="a port written back before it was read is unmasked between claim and mask, and stays masked for ever",
    scenario=PortLife,
    handler=Early,
    parameters={"script": (("raise", 1), ("eoi", 1), ("await", 1), ("eoi", 1))},
    expected={"sc": CAUGHT, "tso": CAUGHT, "arm": CAUGHT},
    story=(
        "A user may write back a port that it has not read yet; the driver's flag that would tell is written by the handler "
        "outside every lock that write() takes. If the flag falls before the port is masked, such a write ends the "
        "interrupt and unmasks at once; the handler then masks what nobody will write back again, because the flag says "
        "that it is enabled. In the driver the window goes the other way: unmasked before the entry is queued, the port "
        "can get a second entry. Ours disables only once the port is masked, so a write that comes early is ignored."
    ),
    citation="drivers/xen/evtchn.c: `enabled` is written in the handler outside of every lock that write() uses (by design).",
)
