# SPDX-License-Identifier: Apache-2.0
"""Zoo 29 on seeded random walks: one sender, several CPUs that serve, ports that move, change priority, are masked and close.

After every step the words that are LINKED are those that the heads reach, and every event raised is still on its way, or has
come. Over the explored core others act in between two accesses of a step, at a site drawn by the seed.
"""

import random
from collections.abc import Callable
from functools import partial
from types import ModuleType

import pytest

from pvbus.actors.hypervisor import fifo
from pvbus.shm import _core_explored
from pvbus.shm.layout import Domain, Fifo, Irq
from pvbus.tests.shm.rig import Rig

VCPUS, PORTS, STEPS = 3, 9, 120
# Where a CPU may act while the hypervisor raises, or unmasks; and the other way round.
RAISING = [
    "fifo.pending", "fifo.linked", "fifo.queue", "fifo.tail", "fifo.word", "fifo_link", "fifo.head", "fifo_ready", "upcall",
]
SERVING = [
    "upcall.clear", "fifo.ready.take", "fifo.ready.known", "fifo.local", "fifo.head", "fifo.word", "fifo_link", "irq.claim",
    "irq.mask", "irq.clear", "irq.disable", "evr.publish",
]


class Walk:
    """A rig, what was raised and has not come yet, and the steps that change it."""

    def __init__(self, core: ModuleType, seed: int) -> None:
        self.random = random.Random(seed)
        self.rig = Rig(core, (VCPUS,))
        self.rig.fifo()
        self.rig.open(0, size=1024)
        self.ports = self.rig.virq_ports(0, PORTS)
        self.owed: set[int] = set()         # raised, and not delivered since
        self.raises = dict.fromkeys(self.ports, 0)
        self.comes = dict.fromkeys(self.ports, 0)
        self.masked: set[int] = set()
        self.interleaved = core is _core_explored
        self.nested = 0

    def port(self) -> int:
        return self.random.choice(self.ports)

    def send(self) -> None:
        port = self.port()
        self.owed.add(port)
        self.raises[port] += 1
        self.during(RAISING, self.serve, lambda: self.rig.path.set_pending(0, port))

    def serve(self) -> None:
        vcpu, budget = self.random.randrange(VCPUS), self.random.choice((1, 2, 256))
        self.during(SERVING, self.send_and_move, lambda: self.rig.path.upcall(0, vcpu, budget))
        self.take()

    def send_and_move(self) -> None:
        self.random.choice((self.send, self.send, self.move, self.mask))()

    def take(self) -> None:
        for port in self.rig.read(0):
            self.comes[port] += 1
            # What was raised between delivery and now is pending, or owed again by now.
            if not self.rig.at(port).pending:
                self.owed.discard(port)

    def write_back(self) -> None:
        port = self.port()
        self.during(RAISING, self.serve, lambda: self.rig.path.eoi(0, port, 0))

    def move(self) -> None:
        self.rig.channels.bind_vcpu(0, self.port(), self.random.randrange(VCPUS))

    def settle(self) -> None:
        self.rig.irqs.set_affinity(0, self.port(), self.random.randrange(VCPUS))

    def change_priority(self) -> None:
        fifo.set_priority(self.rig.channels, 0, self.port(), self.random.randrange(Fifo.PRIORITIES))

    def mask(self) -> None:
        port = self.port()
        self.masked.add(port)
        self.rig.path.mask(0, port)

    def unmask(self) -> None:
        """A guest unmasks only what it has masked, and not while the port waits for its end of interrupt."""
        for port in sorted(self.masked):
            self.masked.discard(port)
            if not self.rig.irq(port) & Irq.REASONS:
                self.during(RAISING, self.serve, partial(self.rig.channels.unmask, 0, port))

    def during(self, sites: list[str], act: Callable[[], None], step: Callable[[], object]) -> None:
        """Run a step; over the explored core, have the other side act before one of its accesses."""
        if not self.interleaved or self.nested or self.random.random() < 0.3:
            step()
            return
        site = self.random.choice(sites)
        self.nested += 1
        self.rig.world.before[site] = act
        step()
        if self.rig.world.before.get(site) is act:
            del self.rig.world.before[site]
        self.nested -= 1

    def step(self) -> None:
        self.random.choices(
            (self.send, self.serve, self.write_back, self.move, self.settle, self.change_priority, self.mask, self.unmask),
            weights=(12, 10, 8, 3, 2, 3, 2, 3),
        )[0]()

    def finish(self) -> None:
        """Unmask, write back and serve until nothing is left."""
        self.interleaved = False
        self.unmask()
        for _ in range(3):
            for port in self.ports:
                self.rig.path.eoi(0, port, 0)
                if not self.rig.irq(port) & Irq.REASONS:
                    self.rig.channels.unmask(0, port)
            self.rig.deliver()
            self.take()


@pytest.mark.checklist("E12", "A11.3")
def test_the_linked_words_are_those_that_the_heads_reach_after_every_step(core: ModuleType) -> None:
    for seed in range(60):
        walk = Walk(core, seed)
        for number in range(STEPS):
            walk.step()
            walk.rig.check_links()
            for port in walk.owed:
                assert walk.rig.at(port).pending, f"seed {seed}, step {number}: {port} was raised, and is nowhere"
        walk.finish()

        assert walk.owed == set(), seed
        assert walk.rig.queues() == {}, seed
        for port in walk.ports:
            assert (walk.comes[port] > 0) == (walk.raises[port] > 0), (seed, port)
            assert walk.comes[port] <= walk.raises[port], (seed, port)
        walk.rig.close()


def test_the_walks_reach_what_they_are_for() -> None:
    """Moves while linked, links behind others, interleavings: otherwise the walk above would show nothing."""
    acted, chains, old_queue = 0, 0, 0
    for seed in range(10):
        walk = Walk(_core_explored, seed)
        for _ in range(STEPS):
            walk.step()
            acted += walk.nested == 0 and not walk.rig.world.before
            for (vcpu, priority), ports in walk.rig.queues().items():
                chains += len(ports) > 1
                for port in ports:
                    queue = walk.rig.domains[0].memory.load64(Domain.table(Domain.QUEUE_WORDS, port))
                    old_queue += Fifo.queue(queue)[0] != priority or walk.rig.channels.word(0, port) >> 48 & 0x3F != vcpu
    assert min(acted, chains, old_queue) > 20


@pytest.mark.checklist("E12")
def test_a_link_that_is_lost_is_seen() -> None:
    """The planted bug: a tail's LINK is written over, so that what was behind it is in no queue."""
    walk = Walk(_core_explored, 1)
    for port in walk.ports[:3]:
        walk.rig.path.set_pending(0, port)
    walk.rig.check_links()
    walk.rig.set_event_word(2, walk.rig.word(2) & ~Fifo.LINK)

    with pytest.raises(AssertionError):
        walk.rig.check_links()
