# SPDX-License-Identifier: Apache-2.0
"""Zoo 15: a revoke names a relid, and that is another channel's by now."""

from typing import Any

from pvbus.actors.hypervisor.vmbus.server import Server
from pvbus.verify.scenarios.offers import Offers
from pvbus.verify.zoo import CAUGHT, Bug


class ByNumber(Server):
    """Withdraws whatever has the relid now."""

    def rescind(self, relid: int, generation: int | None = None) -> bool:
        """Ignore which offer was meant."""
        del generation
        return super().rescind(relid)


class WithoutGenerations(Offers):
    """A host that knows relids only."""

    def make_server(self, *arguments: Any) -> Server:
        """Make the host's protocol."""
        return ByNumber(*arguments)


BUG = Bug(
    number=15,
    name="revokes-the-next-one",
    sentence="a second revoke of a device that is gone takes the device that has its relid now",
    scenario=Offers,
    parameters={"script": "rescind a, offer b, rescind a", "opens": False},
    handler=WithoutGenerations,
    expected={"sc": CAUGHT, "tso": CAUGHT, "arm": CAUGHT},
    story=(
        "A device is revoked; the guest releases its relid, and the next device gets it. Then something of the first device is "
        "dropped, a stream in the original, and its destructor revokes once more, by number. It depends on how fast the guest "
        "has been whether that hits nothing or the wrong device: the problem called ABA. A number that is used again names "
        "nothing; relid and generation together do."
    ),
    citation="OpenVMM issue 1815, August 2025. The driver of 2012 has its like: a re-offer of a GUID still listed is dropped.",
)
