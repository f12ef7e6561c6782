# SPDX-License-Identifier: Apache-2.0
"""The hypervisor's side of a FIFO queue once more, access by access in Python, so that a bug of the zoo can change one step.

It does what fifo.c does when a port is raised: on one vCPU, without a link that the guest keeps changing. As it stands it
is right, and a test holds it to the same scenarios.
"""

from __future__ import annotations

from pvbus.shm.layout import Domain, Fifo, Vcpu
from pvbus.verify.scenarios.fifo_queue import CONTROL, FifoQueue, word_at


class FifoByHand(FifoQueue):
    """The scenario with that sender. A queue's last word stands in its tail, whether it is still linked or not."""

    def set_pending(self, port: int) -> int:
        """Raise a port; give the vCPU whose doorbell is to be rung, or -1."""
        if not self.pend(port):
            return -1
        return self.enqueue(port)

    def pend(self, port: int) -> bool:
        """Set PENDING, and LINKED unless it is masked or linked already; tell whether it has to be queued."""
        if self.set_bits(word_at(port), Fifo.PENDING) & (Fifo.MASKED | Fifo.LINKED):
            return False
        return not self.set_bits(word_at(port), Fifo.LINKED) & Fifo.LINKED

    def set_bits(self, at: int, bits: int) -> int:
        """Or bits into a word by compare-exchange; give the old one."""
        old = self.domain.load32(at, "by hand")
        while (seen := self.domain.compare_exchange32(at, old, old | bits, "by hand")) != old:
            old = seen
        return old

    def priority_of(self, port: int) -> int:
        """Give the queue that the port belongs to."""
        return 0 if port in self.urgent else Fifo.PRIORITY_DEFAULT

    def tail_at(self, priority: int) -> int:
        """Give the offset of the hypervisor's tail of a queue."""
        return Domain.vcpu(0, Vcpu.FIFO_TAIL) + 4 * priority

    def enqueue(self, port: int) -> int:
        """Put a port that is LINKED, and in no queue, behind its queue."""
        at = self.tail_at(self.priority_of(port))
        tail = self.domain.load32(at, "fifo.tail")
        if self.is_queued_behind(tail, port):
            self.domain.store32(at, port, "fifo.tail")
            return -1
        return self.begin(port)

    def is_queued_behind(self, tail: int, port: int) -> bool:
        """Link the port behind the tail, if that still is in its queue; a port that is its own tail was the last one."""
        return tail not in (0, port) and self.link(tail, port)

    def link(self, tail: int, port: int) -> bool:
        """Write the successor into the last word; False if that has left its queue."""
        at = word_at(tail)
        word = self.domain.load32(at, "by hand")
        while word & Fifo.LINKED:
            seen = self.domain.compare_exchange32(at, word, word & ~Fifo.LINK | port, "fifo_link")
            if seen == word:
                return True
            word = seen
        return False

    def begin(self, port: int) -> int:
        """Make the port the head of an empty queue, announce the queue, then the upcall."""
        priority = self.priority_of(port)
        self.set_head(port, priority)
        announced = self.announce(priority)
        return -1 if announced else self.mark()

    def set_head(self, port: int, priority: int) -> None:
        """Store head and tail."""
        self.domain.store32(CONTROL + Fifo.HEAD + 4 * priority, port, "fifo.head")
        self.domain.store32(self.tail_at(priority), port, "fifo.tail")

    def announce(self, priority: int) -> bool:
        """Set the queue's ready bit; tell whether it was set."""
        return bool(self.set_bits(CONTROL + Fifo.READY, 1 << priority) >> priority & 1)

    def mark(self) -> int:
        """Set the upcall flag; give the vCPU if it sleeps."""
        if self.domain.exchange8(Domain.vcpu_info(0, Domain.UPCALL_PENDING), 1, "upcall"):
            return -1
        self.domain.smp_mb("cpu_sleep")
        if not self.domain.load32(Domain.vcpu(0, Vcpu.SLEEPING), "cpu.sleeping"):
            return -1
        return 0 if self.domain.exchange32(Domain.vcpu(0, Vcpu.SLEEPING), 0, "cpu.wake") else -1
