# SPDX-License-Identifier: Apache-2.0
"""Zoo 36: a port is unmasked by the guest itself, and by a hypercall on top of that."""

from pvbus.shm.layout import Fifo
from pvbus.verify.explorer.model import Model
from pvbus.verify.scenarios.fifo_queue import FifoQueue, word_at
from pvbus.verify.zoo import CAUGHT, Bug


class UnmaskedTwice(FifoQueue):
    """Looks whether an event is pending, unmasks, and raises it again by what it has seen before."""

    def prepare(self, model: Model, variants: int) -> None:
        """Make the pages."""
        super().prepare(model, variants)
        self.model = model

    def end(self, port: int) -> int:
        """End the port's interrupt; raise what was pending under the mask, twice."""
        pending = self.domain.load32(word_at(port), "by hand") & Fifo.PENDING
        if super().end(port) >= 0:
            self.model.ring(self.doorbell, "cpu.kick")
        return self.set_pending(port) if pending else -1


BUG = Bug(
    number=36,
    name="fifo-unmask-twice",
    sentence="an unmask is done locally and by hypercall: an event that was pending under the mask is delivered twice",
    scenario=FifoQueue,
    handler=UnmaskedTwice,
    parameters={"script": (("eoi", 1),), "waiting": (1,)},
    expected={"sc": CAUGHT, "tso": CAUGHT, "arm": CAUGHT},
    story=(
        "Unmasking a port whose event is pending has to raise it again. A guest may clear the mask bit itself, and must ask "
        "the hypervisor if something is pending. Clearing first and asking afterwards, by what was seen before, does it "
        "twice: in between the event is taken from the queue and handled, and then raised once more out of nothing. Who "
        "counts its events gets one too many."
    ),
    citation="'fix race in evtchn_fifo_unmask()', Juergen Gross, 2020.",
)
