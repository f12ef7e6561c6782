# SPDX-License-Identifier: Apache-2.0
"""Both compilations of the native core give the same results single-threaded: random sequences of
operations, run on pvbus.shm._core over memfds and sockets and on pvbus.shm._core_explored over plain memory, on both ABIs,
compared call by call and, at the end, page by page. Counters and time stamps, which the explorer leaves
out, are not compared.
"""

import array
import errno
import fcntl
import mmap
import os
import random
import select
import socket
import termios
from collections.abc import Callable, Iterator
from contextlib import ExitStack, suppress
from types import ModuleType
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from pvbus.shm import _core, _core_explored
from pvbus.shm.layout import (
    ABI_FIFO,
    PORTS_MAX,
    VCPUS_MAX,
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

ABIS = ["2-level", "fifo"]
PAGE = 4096
PORTS = range(1, 9)
VCPUS = 2
SLOT = 3
SIZES = {
    "machine": Machine.BYTES, "domain": Domain.BYTES, "page": FilePage.BYTES, "ring": SubmissionRing.BYTES,
    "public": PublicPage.BYTES,
}

# Statistics and stamps (PV_COUNT64, PV_STAMP64), and the cores of hypervisor and users: (offset, bytes) of each
# page.
NOT_COMPARED: dict[str, list[tuple[int, int]]] = {
    "machine": [
        (Machine.NOTIFIES, 56),
        (Machine.file(SLOT, File.DELIVERED), 32),
        (Machine.submission(0, Submission.TAKEN), 8),
    ],
    "domain": [
        *[(Domain.vcpu(vcpu, Vcpu.UPCALLS), Vcpu.ARRIVALS_HEAD - Vcpu.UPCALLS) for vcpu in range(VCPUS_MAX)],
        # The upcall loop's clock: the explorer has none.
        *[(Domain.vcpu(vcpu, Vcpu.IRQ_EPOCH), Vcpu.FIFO_READY - Vcpu.IRQ_EPOCH) for vcpu in range(VCPUS_MAX)],
        *[(Domain.vcpu(vcpu, Vcpu.FIFO_DROPPED), 8) for vcpu in range(VCPUS_MAX)],
        (Domain.table(Domain.PENDING_SINCE, 0), 2 * 8 * PORTS_MAX),
    ],
    "page": [],
    "ring": [(SubmissionRing.CORE, 4)],
    "public": [],
}


class Bytes:
    """A model without any model: each access happens where it stands. Notes which pages were written."""

    def __init__(self, size: int) -> None:
        self.data = mmap.mmap(-1, size)
        self.touched: set[int] = set()
        self.door = self.kicks = 0

    def load(self, memory: object, offset: int, width: int, order: int, site: str) -> int:
        return int.from_bytes(self.data[offset : offset + width], "little")

    def store(self, memory: object, offset: int, width: int, value: int, order: int, site: str) -> None:
        self.touched.add(offset // PAGE)
        self.data[offset : offset + width] = (value & ((1 << 8 * width) - 1)).to_bytes(width, "little")

    def rmw(self, memory: object, offset: int, width: int, op: int, value: int, site: str) -> int:
        old = self.load(memory, offset, width, 0, site)
        self.store(memory, offset, width, (old | value, old & value, value, old + value)[op], 0, site)
        return old

    def cas(self, memory: object, offset: int, width: int, expected: int, desired: int, site: str) -> int:
        old = self.load(memory, offset, width, 0, site)
        if old == expected:
            self.store(memory, offset, width, desired, 0, site)
        return old

    def fence(self, kind: int, site: str) -> None:
        pass

    def spin(self, site: str) -> None:
        raise AssertionError(f"spinning alone at {site}")

    def door_take(self) -> int:
        taken = min(self.door, 64)
        self.door -= taken
        return taken

    def door_wait(self) -> int:
        return 1 if self.door else -errno.EAGAIN

    def kick(self) -> int:
        self.kicks += 1
        return 0


class World:
    """One file, its pages and the objects over them, in one of the two compilations."""

    def __init__(self, core: ModuleType, sources: dict[str, Any], door: int, kick: int, abi: str) -> None:
        self.memory: dict[str, Any] = {name: core.Memory(sources[name], size) for name, size in SIZES.items()}
        machine, domain, page = (self.memory[name] for name in ("machine", "domain", "page"))
        machine.store32(Machine.file(SLOT, File.STATE), File.OPEN)
        machine.store32(Machine.submission(0, Submission.STATE), Submission.ATTACHED)
        machine.store32(Machine.submission(0, Submission.SLOT), SLOT)
        for port in PORTS:
            self._bind(domain, page, port)
        domain.store32(Domain.VALID_EVTCHNS, 64)
        if abi == "fifo":
            self._enter_fifo(domain)
        self.path = core.EventPath(machine, {0: domain})
        self.path.attach_file(SLOT, page)
        self.path.attach_submission(0, self.memory["ring"], SLOT)
        ring, public = self.memory["ring"], self.memory["public"]
        self.file = core.UserFile(core.Context(page, ring, public, door, kick, 0, FilePage.BITMAP))

    @staticmethod
    def _bind(domain: Any, page: Any, port: int) -> None:
        """Pairs of ports notify each other; the last two are IPIs; the CPUs take turns."""
        peer = port + 1 if port % 2 else port - 1
        state = Port.IPI if port >= 7 else Port.INTERDOMAIN
        word = Port.pack(state, remote_port=peer, vcpu=port % VCPUS)
        domain.store64(Domain.table(Domain.PORT_WORDS, port), word)
        domain.store64(Domain.table(Domain.IRQ_WORDS, port), (SLOT + 1) | Irq.ENABLED)
        domain.fetch_or64(Domain.vcpu(port % VCPUS, Vcpu.EVTCHN_MASK), 1 << port)
        page.fetch_or64(FilePage.BITMAP, 1 << port)

    @staticmethod
    def _enter_fifo(domain: Any) -> None:
        """Control blocks in the first guest pages, a page of event words behind them, nothing masked."""
        for vcpu in range(VCPUS):
            domain.store32(Domain.vcpu(vcpu, Vcpu.CONTROL), Domain.guest_page(vcpu))
        domain.store32(Domain.ARRAY, VCPUS + 1)
        domain.store32(Domain.ARRAY_PAGES, 1)
        domain.store32(Domain.ABI, ABI_FIFO)

    # What the processes do with the results: bytes for doors.

    def send_byte(self, times: int) -> None:
        raise NotImplementedError

    def bells(self) -> tuple[int, int]:
        """Give the bytes in the door, and how often the hypervisor was kicked since the last look."""
        raise NotImplementedError

    def pages(self) -> dict[tuple[str, int], bytes]:
        """Give each page that is not empty, without what is not compared."""
        pages = {}
        for name, index, raw in self._raw():
            data = bytearray(raw)
            for offset, size in NOT_COMPARED[name]:
                first, end = max(offset - index * PAGE, 0), min(offset + size - index * PAGE, PAGE)
                if first < end:
                    data[first:end] = bytes(end - first)
            if any(data):
                pages[name, index] = bytes(data)
        return pages

    def _raw(self) -> Iterator[tuple[str, int, bytes]]:  # every page that anybody may have written
        raise NotImplementedError

    def do(self, operation: str, *arguments: int) -> object:
        """Run one operation; an OSError is a result too."""
        try:
            return getattr(self, operation)(*arguments)
        except OSError as error:
            return errno.errorcode[error.errno or 0]

    def set_pending(self, port: int) -> object:
        return self.path.set_pending(0, port)

    def unmask(self, port: int, eoi: int) -> object:
        return self.path.unmask(0, port, eoi)

    def eoi(self, port: int) -> object:
        return self.path.eoi(0, port, SLOT)

    def mask(self, port: int) -> object:
        return self.path.mask(0, port)

    def clear_pending(self, port: int) -> object:
        return self.path.clear_pending(0, port)

    def move(self, port: int, vcpu: int) -> object:
        domain, at = self.memory["domain"], Domain.table(Domain.PORT_WORDS, port)
        domain.fetch_or64(Domain.vcpu(vcpu, Vcpu.EVTCHN_MASK), 1 << port)
        return domain.store64(at, domain.load64(at) & ~(0x3F << 48) | vcpu << 48)

    def set_priority(self, port: int, priority: int) -> object:
        domain, at = self.memory["domain"], Domain.table(Domain.QUEUE_WORDS, port)
        return domain.store64(at, Fifo.with_priority(domain.load64(at), priority))

    def rebuild(self, vcpu: int) -> object:
        return self.path.fifo_rebuild(0, vcpu)

    def upcall(self, vcpu: int, budget: int) -> object:
        served = self.path.upcall(0, vcpu, budget)
        self.send_byte(len(served[1]) if served else 0)
        return served

    def drain(self, budget: int) -> object:
        drained = self.path.drain(budget)
        self.send_byte(len(drained[2]) + len(drained[3]) if drained else 0)
        return drained

    def recover(self, vcpu: int) -> object:
        return self.path.cpu_recover(0, vcpu)

    def stray_byte(self) -> object:
        self.send_byte(1)
        return None

    def cpu_may_sleep(self, vcpu: int) -> object:
        return self.path.cpu_may_sleep(0, vcpu)

    def hypervisor_may_sleep(self) -> object:
        return self.path.hypervisor_may_sleep(self.memory["public"])

    def hypervisor_awake(self) -> object:
        public = self.memory["public"]
        word = public.load32(PublicPage.HYPERVISOR_SLEEPING)
        return public.store32(PublicPage.HYPERVISOR_SLEEPING, (word | 1) + 1)

    def grow(self) -> object:
        return self.path.grow(SLOT)

    def reset(self) -> object:
        self.path.reset(SLOT)
        return self.file.context.drain_door()

    def poison(self) -> object:
        raised = self.path.poison(SLOT)
        self.send_byte(bool(raised))
        return raised

    def scribble(self, bits: int) -> object:
        # the epoch stays: with another one the reader would wait for the end of a RESET
        page = self.memory["page"]
        return page.store64(FilePage.CONS, page.load64(FilePage.CONS) ^ bits)

    def read(self, most: int) -> object:
        return self.file.read(4 * most)

    def read_ports(self, most: int) -> object:
        return self.file.read_ports(most)

    def poll(self) -> object:
        return self.file.poll(select.POLLIN | select.POLLOUT, 0)

    def notify(self, port: int) -> object:
        return self.file.notify(port)

    def notify_many(self, first: int, count: int) -> object:
        return self.file.notify_many(range(first, first + count))

    def enable(self, first: int, count: int) -> object:
        return self.file.enable(array.array("I", range(first, first + count)))


class Real(World):
    """The machine's core: memfds, a socketpair, an eventfd."""

    def __init__(self, stack: ExitStack, abi: str = "2-level") -> None:
        self.fds = {name: os.memfd_create(name) for name in SIZES}
        ours, theirs = socket.socketpair()
        self.kick = os.eventfd(0, os.EFD_NONBLOCK)
        for fd in (*self.fds.values(), self.kick):
            stack.callback(os.close, fd)
        self.door, self.byte = stack.enter_context(ours), stack.enter_context(theirs)
        self.door.setblocking(False)
        for name, size in SIZES.items():
            os.ftruncate(self.fds[name], size)
        super().__init__(_core, self.fds, self.door.fileno(), self.kick, abi)

    def send_byte(self, times: int) -> None:
        self.byte.send(b"\1" * times)

    def bells(self) -> tuple[int, int]:
        held = array.array("i", [0])
        fcntl.ioctl(self.door, termios.FIONREAD, held)
        try:
            return held[0], os.eventfd_read(self.kick)
        except BlockingIOError:
            return held[0], 0

    def _raw(self) -> Iterator[tuple[str, int, bytes]]:
        for name, fd in self.fds.items():
            at = 0
            with suppress(OSError):  # ENXIO: holes up to the end
                while True:
                    at = os.lseek(fd, at, os.SEEK_DATA)
                    yield name, at // PAGE, os.pread(fd, PAGE, at)
                    at += PAGE


class Explored(World):
    """The explorer's core: byte arrays."""

    def __init__(self, abi: str) -> None:
        self.models = {name: Bytes(size) for name, size in SIZES.items()}
        super().__init__(_core_explored, self.models, -1, -1, abi)

    def send_byte(self, times: int) -> None:
        self.models["page"].door += times

    def bells(self) -> tuple[int, int]:
        kicks, self.models["page"].kicks = self.models["page"].kicks, 0
        return self.models["page"].door, kicks

    def _raw(self) -> Iterator[tuple[str, int, bytes]]:
        for name, model in self.models.items():
            for index in model.touched:
                yield name, index, model.data[index * PAGE : (index + 1) * PAGE]


# (name, weight, arguments); ports go beyond those that are bound, on purpose
Draw = Callable[[random.Random], tuple[int, ...]]
OPERATIONS: list[tuple[str, int, Draw]] = [
    ("set_pending", 12, lambda r: (r.randint(1, 9),)),
    ("upcall", 12, lambda r: (r.randrange(VCPUS), r.choice((1, 2, 256)))),
    ("read", 6, lambda r: (r.choice((0, 1, 3, 1024)),)),
    ("read_ports", 6, lambda r: (r.choice((0, 1, 64)),)),
    ("poll", 3, lambda r: ()),
    ("notify", 5, lambda r: (r.randint(0, 9),)),
    ("notify_many", 2, lambda r: (1, r.randint(0, 8))),
    ("enable", 6, lambda r: (1, r.randint(0, 9))),
    ("drain", 8, lambda r: (r.choice((1, 4, 256)),)),
    ("eoi", 6, lambda r: (r.randint(1, 9),)),
    ("unmask", 2, lambda r: (r.randint(1, 9), r.randrange(2))),
    ("mask", 2, lambda r: (r.randint(1, 9),)),
    ("clear_pending", 1, lambda r: (r.randint(1, 9),)),
    ("move", 2, lambda r: (r.randint(1, 9), r.randrange(VCPUS))),
    ("set_priority", 2, lambda r: (r.randint(1, 9), r.randrange(Fifo.PRIORITIES))),
    ("grow", 2, lambda r: ()),
    ("reset", 1, lambda r: ()),
    ("cpu_may_sleep", 3, lambda r: (r.randrange(VCPUS),)),
    ("hypervisor_may_sleep", 4, lambda r: ()),
    ("hypervisor_awake", 2, lambda r: ()),
    ("stray_byte", 1, lambda r: ()),
]
RARE: list[tuple[str, int, Draw]] = [
    ("rebuild", 2, lambda r: (r.randrange(VCPUS),)),
    ("recover", 2, lambda r: (r.randrange(VCPUS),)),
    ("poison", 1, lambda r: ()),
    ("scribble", 2, lambda r: (r.choice((1, 1 << 20, (1 << 32) - 1)),)),
]


def script(seed: int, length: int, *, rare: bool) -> Iterator[tuple[str, tuple[int, ...]]]:
    """Give a sequence of operations; the ring mostly exists from the start."""
    draw = random.Random(seed)
    if seed % 8:
        yield "grow", ()
    for name, _, arguments in draw.choices(OPERATIONS, [weight for _, weight, _ in OPERATIONS], k=length):
        yield name, arguments(draw)
    if rare:
        for name, _, arguments in draw.choices(RARE, [weight for _, weight, _ in RARE], k=2):
            yield name, arguments(draw)
        yield from script(seed + 1, 20, rare=False)


def run_on_both(operations: Iterator[tuple[str, tuple[int, ...]]], abi: str) -> list[tuple[str, object]]:
    """Run a script on both, demand the same answers and the same pages, and give the answers."""
    answers = []
    with ExitStack() as stack:
        real, explored = Real(stack, abi), Explored(abi)
        for number, (name, arguments) in enumerate(operations):
            expected, got = real.do(name, *arguments), explored.do(name, *arguments)
            assert (got, explored.bells()) == (expected, real.bells()), f"step {number}: {name}{arguments}"
            answers.append((name, expected))
        assert explored.pages() == real.pages()
    return answers


@settings(max_examples=120, deadline=None, derandomize=True, database=None)
@given(seed=st.integers(0, 2**32), length=st.integers(1, 150), rare=st.booleans(), abi=st.sampled_from(ABIS))
def test_both_compilations_answer_alike_and_leave_the_same_pages(seed: int, length: int, rare: bool, abi: str) -> None:
    run_on_both(script(seed, length, rare=rare), abi)


@pytest.mark.parametrize("abi", ABIS)
def test_the_scripts_reach_what_they_are_for(abi: str) -> None:
    scripts = [script(seed, 100, rare=seed % 4 == 0) for seed in range(1, 40)]

    answers = [answer for operations in scripts for answer in run_on_both(operations, abi)]

    seen = {(name, answer if isinstance(answer, str) else bool(answer)) for name, answer in answers}
    assert {
        ("read", True), ("read", "EAGAIN"), ("read", "EIO"), ("read_ports", True),
        ("upcall", True), ("upcall", False), ("drain", True), ("drain", False),
        ("notify", "ENOTCONN"), ("enable", True), ("grow", True), ("recover", True), ("poison", True),
        ("cpu_may_sleep", True), ("cpu_may_sleep", False), ("hypervisor_may_sleep", False),
    } <= seen


@pytest.mark.parametrize("abi", ABIS)
def test_an_overflow_is_the_same_in_both(abi: str) -> None:
    def flood() -> Iterator[tuple[str, tuple[int, ...]]]:
        yield "grow", ()
        for number in range(80):  # the ring has 64 entries
            yield "set_pending", (1 + number % 8,)
            yield "upcall", (0, 1)
            yield "upcall", (1, 1)
            yield "eoi", (1 + number % 8,)
        yield "read", (1024,)
        yield "poll", ()
        yield "reset", ()
        yield "read", (1024,)

    answers = run_on_both(flood(), abi)

    assert [answer for name, answer in answers if name == "read"] == ["EFBIG", "EAGAIN"]
    assert (answers[-3][0], answers[-3][1]) == ("poll", select.POLLERR)


@pytest.mark.parametrize("call", ["read", "poll"])
def test_a_byte_too_many_in_the_doorbell_is_swallowed(call: str) -> None:
    with ExitStack() as stack:
        real = Real(stack)
        real.grow()
        real.stray_byte()  # an heir cannot know whether its forerunner had sent it

        answer = real.do("read", 1) if call == "read" else real.file.poll(select.POLLIN, 20)

        assert answer == ("EAGAIN" if call == "read" else 0)
        assert real.bells()[0] == 0
