# SPDX-License-Identifier: Apache-2.0
"""Zoo 29, third of three: a port is linked behind itself, because the tail still names it."""

from pvbus.verify.scenarios.fifo_queue import FifoQueue
from pvbus.verify.zoo import CAUGHT, Bug
from pvbus.verify.zoo.by_hand_fifo import FifoByHand


class OldTail(FifoByHand):
    """Believes that what the tail names is another word of the queue."""

    def is_queued_behind(self, tail: int, port: int) -> bool:
        """Link behind the tail, whoever that is."""
        return tail != 0 and self.link(tail, port)


BUG = Bug(
    number=29,
    name="fifo-old-tail",
    sentence="the tail still names the port that is raised again: it is linked behind itself, and nobody finds it",
    scenario=FifoQueue,
    handler=OldTail,
    parameters={"script": (("eoi", 1), ("raise", 1)), "before": (1,)},
    expected={"sc": CAUGHT, "tso": CAUGHT, "arm": CAUGHT},
    story=(
        "The hypervisor keeps each queue's last port. The guest empties the queue without telling, so the tail goes on naming "
        "a word that has left. When that very port is raised again, it is LINKED before the tail is looked at: the tail looks "
        "alive, and the port becomes its own successor. The queue was empty, its head is never set, and nothing announces "
        "it. The same happens across queues when a port's priority or CPU has changed in between."
    ),
    citation="'old tail relinked', David Vrabel, 2014, e33d4257fc.",
)
