# SPDX-License-Identifier: Apache-2.0
"""Zoo 29, first of three: a port is linked behind a word that has just left its queue."""

from pvbus.shm.layout import Fifo
from pvbus.verify.scenarios.fifo_queue import FifoQueue, word_at
from pvbus.verify.zoo import CAUGHT, Bug
from pvbus.verify.zoo.by_hand_fifo import FifoByHand


class LinkByStore(FifoByHand):
    """Looks whether the tail is linked, then stores the successor."""

    def link(self, tail: int, port: int) -> bool:
        """Write the successor; whatever the guest has done to the word meanwhile is undone."""
        word = self.domain.load32(word_at(tail), "by hand")
        if word & Fifo.LINKED:
            self.domain.store32(word_at(tail), word | port, "by hand")
        return bool(word & Fifo.LINKED)


BUG = Bug(
    number=29,
    name="fifo-link-by-a-store",
    sentence="the queue's last word gets its successor by a plain store: the guest has taken it out, and the queue is lost",
    scenario=FifoQueue,
    handler=LinkByStore,
    parameters={"script": (("raise", 2),), "before": (1,)},
    expected={"sc": CAUGHT, "tso": CAUGHT, "arm": CAUGHT},
    story=(
        "A FIFO queue is a chain through the event words. The sender links a port behind the last word while the guest takes "
        "words out at the front; with one word in the queue both work on the same word. Looking whether it is LINKED and then "
        "writing its LINK has to be one exchange, or the sender links behind a word that is no longer in any queue: the port "
        "is LINKED, nobody reaches it, and no later raise of it does anything. All events of that queue are lost."
    ),
    citation="The invariant of Xen's FIFO event channels: 'fix' series by David Vrabel, 2013 to 2015, among them 70ccddb14a.",
)
