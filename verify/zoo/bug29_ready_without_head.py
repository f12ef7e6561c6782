# SPDX-License-Identifier: Apache-2.0
"""Zoo 29, second of three: a queue is announced before its head is there."""

from pvbus.verify.scenarios.fifo_queue import FifoQueue
from pvbus.verify.zoo import CAUGHT, Bug
from pvbus.verify.zoo.by_hand_fifo import FifoByHand


class ReadyFirst(FifoByHand):
    """Sets the ready bit, and the head afterwards."""

    def begin(self, port: int) -> int:
        """Announce the queue, then make the port its head."""
        priority = self.priority_of(port)
        announced = self.announce(priority)
        self.set_head(port, priority)
        return -1 if announced else self.mark()


BUG = Bug(
    number=29,
    name="fifo-ready-without-head",
    sentence="a queue's ready bit is set before its head: the CPU looks at an old head, finds nothing, and the queue is lost",
    scenario=FifoQueue,
    handler=ReadyFirst,
    parameters={"script": (("raise", 2),), "before": (1,)},
    expected={"sc": CAUGHT, "tso": CAUGHT, "arm": CAUGHT},
    story=(
        "The ready bit says that a queue has become non-empty; the CPU takes the bit and follows the queue from its head. Set "
        "in the other order, or for a port that is not the head, the CPU takes the bit, finds a word that is not linked, and "
        "takes the queue for empty. The bit is gone, and what the head names then stays there until something else is raised "
        "on an empty queue of the same priority."
    ),
    citation="'READY only for heads', David Vrabel, 2013, 70ccddb14a.",
)
