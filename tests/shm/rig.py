# SPDX-License-Identifier: Apache-2.0
"""A machine without processes: its pages, the event path over them, and users, all in one thread.

Built over either compilation of the native core. Over the explored one every access is a step: a test can let the
one who makes it die there, or let somebody else act in between. Each test owns its own; nobody else writes here.
"""

import contextlib
import mmap
import os
import select
import socket
from collections.abc import Callable, Iterator
from types import ModuleType
from typing import Any

from pvbus.actors.hypervisor import kernel
from pvbus.actors.hypervisor.irqs import IrqLayer
from pvbus.actors.hypervisor.ports import DomainState, EventChannels
from pvbus.shm import _core, _core_explored, channel
from pvbus.shm.layout import (
    PORTS_2L,
    Domain,
    Fifo,
    File,
    FilePage,
    Irq,
    Machine,
    Port,
    PublicPage,
    Submission,
    SubmissionRing,
    Vcpu,
)

CORES = [_core, _core_explored]
M32 = 2**32 - 1
M64 = 2**64 - 1


class Died(Exception):
    """The process whose access this was is dead: it executes nothing further."""


class World:
    """What the models of one machine share: who dies where, who acts in between, which accesses were made."""

    def __init__(self) -> None:
        self.armed = False
        self.steps = 0
        self.dies_at = 0
        self.sites: list[str] = []
        self.before: dict[str, Callable[[], None]] = {}    # a site -> what others do before it, once
        self.bytes_in_the_door = 0
        self.kicks = 0

    def step(self, site: str, *, writes: bool = False) -> None:
        """Let others act; die, if it is time. To die before a load is to die before the next write."""
        act = self.before.pop(site, None)
        if act is not None:
            act()
        if self.armed and writes:
            self.steps += 1
            self.sites.append(site)
            if self.steps == self.dies_at:
                self.armed = False
                raise Died(site)

    @contextlib.contextmanager
    def dying_at(self, step: int) -> Iterator[None]:
        """Let the one who acts die before a write (0: never); how many there were is in `steps`."""
        self.armed, self.steps, self.dies_at, self.sites = True, 0, step, []
        with contextlib.suppress(Died):
            yield
        self.armed = False


class Model:
    """A page of the explored core, one context at a time: an access takes place when it is made."""

    def __init__(self, world: World, size: int) -> None:
        self.world = world
        self.data = mmap.mmap(-1, size)    # a domain is large, and mostly never touched

    def load(self, _memory: Any, at: int, width: int, _order: int, site: str) -> int:
        self.world.step(site)
        return int.from_bytes(self.data[at:at + width], "little")

    def store(self, _memory: Any, at: int, width: int, value: int, _order: int, site: str) -> None:
        self.world.step(site, writes=True)
        self.data[at:at + width] = (value & (1 << 8 * width) - 1).to_bytes(width, "little")

    def rmw(self, _memory: Any, at: int, width: int, op: int, value: int, site: str) -> int:
        self.world.step(site, writes=True)
        old = int.from_bytes(self.data[at:at + width], "little")
        new = [old | value, old & value, value, old + value][op] & (1 << 8 * width) - 1
        self.data[at:at + width] = new.to_bytes(width, "little")
        return old

    def cas(self, _memory: Any, at: int, width: int, expected: int, desired: int, site: str) -> int:
        self.world.step(site, writes=True)
        old = int.from_bytes(self.data[at:at + width], "little")
        if old == expected:
            self.data[at:at + width] = (desired & (1 << 8 * width) - 1).to_bytes(width, "little")
        return old

    def fence(self, _kind: int, site: str) -> None:
        self.world.step(site)

    def spin(self, site: str) -> None:
        self.world.step(site)

    def door_take(self) -> int:
        taken, self.world.bytes_in_the_door = self.world.bytes_in_the_door, 0
        return taken

    def door_wait(self) -> int:
        return 1 if self.world.bytes_in_the_door else -11

    def kick(self) -> int:
        self.world.kicks += 1
        return 0


class Rig:
    """Pages, event path, hypercalls and irq layer of a machine; `cpus` gives the virtual CPUs of each domain."""

    def __init__(self, core: ModuleType = _core, cpus: tuple[int, ...] = (2, 1), *, spread: bool = False) -> None:
        self.core: Any = core
        self.world = World()
        self.kicks: list[tuple[int, int]] = []
        self.machine = self.memory(Machine.BYTES)
        self.domains = {
            domid: DomainState(domid, count, self.memory(Domain.BYTES)) for domid, count in enumerate(cpus)
        }
        for state in self.domains.values():
            for word in range(64):      # a guest boots with every port masked
                state.memory.store64(Domain.EVTCHN_MASK + 8 * word, M64)
            state.memory.store64(Domain.table(Domain.PORT_WORDS, 0), Port.pack(Port.RESERVED))
            state.memory.store32(Domain.PORTS_MAX, PORTS_2L)
            state.memory.store32(Domain.VALID_EVTCHNS, 64)
        self.public = self.memory(PublicPage.BYTES)
        self.pages: dict[int, Any] = {}
        self.rings: dict[int, tuple[Any, int]] = {}
        self.descriptors: list[Any] = []
        self.spread = spread
        self.reborn()

    def memory(self, size: int) -> Any:
        if self.core is _core_explored:
            return self.core.Memory(Model(self.world, size), size)
        fd = os.memfd_create("pvbus-test", os.MFD_CLOEXEC)
        os.ftruncate(fd, size)
        memory = self.core.Memory(fd, size)
        os.close(fd)
        return memory

    def reborn(self) -> None:
        """Let heirs take over: the same pages, a fresh path and fresh views of them."""
        domains = {domid: state.memory for domid, state in self.domains.items()}
        self.path = self.core.EventPath(self.machine, domains)
        self.channels = EventChannels(self.domains, self.path, lambda *key: self.kicks.append(key), machine=self.machine)
        self.irqs = IrqLayer(self.channels, spread=dict.fromkeys(self.domains, self.spread))
        for slot, page in self.pages.items():
            self.path.attach_file(slot, page)
        for index, (ring, slot) in self.rings.items():
            self.path.attach_submission(index, ring, slot)

    # ---- files

    def open(self, slot: int, domid: int = 0, *, size: int = 64) -> Any:
        """Open a file whose ring has `size` entries; give its page."""
        page = self.pages[slot] = self.memory(FilePage.BYTES)
        self.machine.store32(Machine.file(slot, File.DOMAIN), domid)
        self.machine.store32(Machine.file(slot, File.STATE), File.OPEN)
        self.path.attach_file(slot, page)
        while size and self.path.grow(slot) < size:
            pass
        return page

    def attach(self, index: int, slot: int, at: int = 0) -> Any:
        """Give a file a submission ring whose indices begin at `at`."""
        ring = self.memory(SubmissionRing.BYTES)
        ring.store32(SubmissionRing.TAIL, at)
        ring.store32(SubmissionRing.HEAD, at)
        self.machine.store32(Machine.submission(index, Submission.HEAD), at)
        self.machine.store32(Machine.submission(index, Submission.STATE), Submission.ATTACHED)
        self.machine.store32(Machine.submission(index, Submission.SLOT), slot)
        self.rings[index] = (ring, slot)
        self.path.attach_submission(index, ring, slot)
        return ring

    def submit(self, index: int, op: int, port: int) -> None:
        ring = self.rings[index][0]
        tail = ring.load32(SubmissionRing.TAIL)
        ring.store32(SubmissionRing.DATA + tail % 8192 * 4, op << 30 | port)
        ring.store32(SubmissionRing.TAIL, tail + 1 & M32)

    def user(self, slot: int, index: int) -> Any:
        """Give a user of a file: its own, non-blocking view of page, ring and doorbell."""
        ours, theirs = socket.socketpair()
        kick = os.eventfd(0, os.EFD_NONBLOCK | os.EFD_CLOEXEC)
        ours.setblocking(False)
        self.descriptors += [ours, theirs, os.fdopen(kick)]
        ring = self.rings[index][0]
        tail = ring.load32(SubmissionRing.TAIL)
        context = self.core.Context(
            page=self.pages[slot], ring=ring, public_page=self.public, door=ours.fileno(), kick=kick, tail=tail,
            ports_max=4096,
        )
        return self.core.UserFile(context)

    def close(self) -> None:
        for descriptor in self.descriptors:
            descriptor.close()

    def place(self, slot: int, cons: int, entries: list[int], epoch: int = 0) -> None:
        """Plant unread entries of a ring, as if all before them had been read."""
        size = self.machine.load32(Machine.file(slot, File.SIZE))
        page, prod = self.pages[slot], cons + len(entries) & M32
        for i, port in enumerate(entries):
            page.store32(FilePage.RING + (cons + i) % size * 4, port)
        self.machine.store64(Machine.file(slot, File.PROD), epoch << 34 | prod)
        page.store64(FilePage.PROD, epoch << 34 | prod)
        page.store64(FilePage.CONS, epoch << 34 | cons)
        self.machine.store64(Machine.file(slot, File.CONS_SEEN), epoch << 34 | cons)

    def unread(self, slot: int) -> list[int]:
        """Give the unread entries, as the users' page has them."""
        page = self.pages[slot]
        prod, cons, size = (page.load64(FilePage.PROD), page.load64(FilePage.CONS), page.load32(FilePage.SIZE))
        count = (prod & M32) - (cons & M32) & M32
        return [page.load32(FilePage.RING + ((cons & M32) + i) % size * 4) for i in range(count)]

    def read(self, slot: int) -> list[int]:
        """Read everything, as a user would."""
        entries, page = self.unread(slot), self.pages[slot]
        cons = page.load64(FilePage.CONS)
        page.store64(FilePage.CONS, cons & ~M32 | (cons & M32) + len(entries) & M32)
        return entries

    # ---- ports

    def bind(self, slot: int, port: int, domid: int = 0, *, static: bool = False) -> int:
        """Bind a handler of a file, as the file's process does."""
        self.irqs.bind(domid, port, slot, static=static)
        self.pages[slot].test_and_set_bit(FilePage.BITMAP + port // 64 * 8, port % 64)
        return port

    def pair(self, sender: int, receiver: int, domid: int = 0) -> tuple[int, int]:
        """Connect two files of a domain; give both ports, neither of them pending."""
        theirs = self.bind(receiver, self.channels.alloc_unbound(domid, domid, domid), domid)
        ours = self.channels.bind_interdomain(domid, domid, theirs)
        self.set_bit(domid, Domain.EVTCHN_PENDING, ours, on=False)
        return self.bind(sender, ours, domid), theirs

    def virq_ports(self, slot: int, count: int) -> list[int]:
        """Bind `count` unbound ports of a file: they are raised by `path.set_pending`."""
        return [self.bind(slot, self.channels.alloc_unbound(0, 0, 0)) for _ in range(count)]

    def irq(self, port: int, domid: int = 0) -> int:
        return self.irqs.word(domid, port)

    def set_irq(self, port: int, word: int, domid: int = 0) -> None:
        self.domains[domid].memory.store64(Domain.table(Domain.IRQ_WORDS, port), word)

    def bit(self, domid: int, table: int, port: int) -> bool:
        word: int = self.domains[domid].memory.load64(table + port // 64 * 8)
        return bool(word >> port % 64 & 1)

    def set_bit(self, domid: int, table: int, port: int, *, on: bool = True) -> None:
        memory = self.domains[domid].memory
        (memory.test_and_set_bit if on else memory.test_and_clear_bit)(table + port // 64 * 8, port % 64)

    def pending(self, port: int, domid: int = 0) -> bool:
        return self.bit(domid, Domain.EVTCHN_PENDING, port)

    def masked(self, port: int, domid: int = 0) -> bool:
        return self.bit(domid, Domain.EVTCHN_MASK, port)

    # ---- FIFO

    def fifo(self, domid: int = 0) -> None:
        """Boot the domain's kernel anew: on the FIFO ABI, with room for 1023 ports."""
        kernel.boot(self.channels, domid, abi="fifo")
        kernel.give_word(self.channels, domid, 1)

    def word(self, port: int, domid: int = 0) -> int:
        """Read an event word; 0 while there is none."""
        memory = self.domains[domid].memory
        at = channel.event_word_at(memory, port)
        word: int = memory.load32(at) if at else 0
        return word

    def set_event_word(self, port: int, word: int, domid: int = 0) -> None:
        memory = self.domains[domid].memory
        memory.store32(channel.event_word_at(memory, port), word)

    def at(self, port: int, domid: int = 0) -> channel.EventState:
        """Give a port's bits, whatever the ABI."""
        return channel.state(self.domains[domid].memory, port)

    def control(self, vcpu: int, field: int, domid: int = 0) -> int:
        memory = self.domains[domid].memory
        value: int = memory.load32(memory.load32(Domain.vcpu(vcpu, Vcpu.CONTROL)) + field)
        return value

    def queues(self, domid: int = 0) -> dict[tuple[int, int], list[int]]:
        """Give (vCPU, priority) -> ports, for every queue that its CPU will look at: announced, or known to it."""
        memory, found = self.domains[domid].memory, {}
        for vcpu in range(self.domains[domid].vcpus):
            if not memory.load32(Domain.vcpu(vcpu, Vcpu.CONTROL)):
                continue
            announced = self.control(vcpu, Fifo.READY, domid) | memory.load32(Domain.vcpu(vcpu, Vcpu.FIFO_READY))
            for priority in range(Fifo.PRIORITIES):
                if announced >> priority & 1:
                    head = memory.load32(Domain.vcpu(vcpu, Vcpu.FIFO_HEAD) + 4 * priority)
                    head = head or self.control(vcpu, Fifo.HEAD + 4 * priority, domid)
                    ports = self._chain(head, domid)
                    if ports:
                        found[vcpu, priority] = ports
        return found

    def _chain(self, port: int, domid: int) -> list[int]:
        ports: list[int] = []
        while port and self.word(port, domid) & Fifo.LINKED:
            assert port not in ports, f"the queue bites its tail: {ports}, {port}"
            ports.append(port)
            port = self.word(port, domid) & Fifo.LINK
        return ports

    def check_links(self, domid: int = 0) -> None:
        """Zoo 29: the words that are LINKED are those reachable from the heads, each once; none stays BUSY."""
        reachable = sorted(port for ports in self.queues(domid).values() for port in ports)
        end = self.domains[domid].memory.load32(Domain.VALID_EVTCHNS)
        linked = [port for port in range(1, end) if self.word(port, domid) & Fifo.LINKED]
        assert reachable == linked, self.queues(domid)
        assert not [port for port in range(1, end) if self.word(port, domid) & Fifo.BUSY]
        for vcpu, priority in self.queues(domid):
            assert self.domains[domid].memory.load8(Domain.vcpu_info(vcpu, Domain.UPCALL_PENDING)), (vcpu, priority)

    def deliver(self, domid: int = 0, budget: int = 256) -> int:
        """Let every virtual CPU of a domain serve until nothing is left; give the number of events."""
        served = 0
        for vcpu in range(self.domains[domid].vcpus):
            for _ in range(100):
                result = self.path.upcall(domid, vcpu, budget)
                if result is None:
                    break
                served += result[0]
        return served


def is_readable(sock: Any) -> bool:
    """Whether a read of a descriptor would not block."""
    return bool(select.select([sock], [], [], 0)[0])


DELIVERED = Irq.ACTIVE | Irq.EOI_PENDING
