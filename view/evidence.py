# SPDX-License-Identifier: Apache-2.0
"""What is known of one port at one moment: every word that its interrupt passes, read while everything runs.

Collects and does not judge (explain.py does). Reads the machine's segments through the inspector, the page of
the open file, /proc, and `Machine.status()`; writes nothing. The words of a port are read again until its irq
word stood still meanwhile: they belong together then, or the port is busy, and any of its states was true a
moment ago.
"""

from __future__ import annotations

from dataclasses import dataclass

from pvbus.actors.client import Machine as RunningMachine
from pvbus.actors.client.inspector import Inspector
from pvbus.shm import channel
from pvbus.shm.layout import (
    SUBMISSIONS_MAX,
    VCPUS_MAX,
    Domain,
    Fifo,
    File,
    FilePage,
    Irq,
    Machine,
    Port,
    Submission,
    Vcpu,
)
from pvbus.shm.memory import Memory, now_ns
from pvbus.shm.segment import read_text
from pvbus.view import processes, submissions
from pvbus.view.processes import Process, User

LOOKS_MAX = 16  # a port that moves between any two looks is not stuck: the last look is as good as any
USERS_SHOWN_MAX = 8


@dataclass(frozen=True)
class Ring:
    """The event ring of the port's file: `positions` are the port's, from 1, among `unread` entries."""

    unread: int
    size: int
    positions: tuple[int, ...]
    door: bool


@dataclass(frozen=True)
class OpenFile:
    """The open file that the port is bound to."""

    slot: int
    name: str
    label: str
    is_open: bool
    overflowed: bool
    poisoned: bool
    dropped: int
    opened_ns: int
    process: Process
    users: tuple[User, ...]
    ring: Ring | None
    waiting: submissions.Waiting | None

    def __str__(self) -> str:
        return f"{self.name} ({self.label})" if self.label else self.name


@dataclass(frozen=True)
class Evidence:
    """Everything about one port."""

    domain: int
    port: int
    state: int
    peer_closed: bool
    static: bool  # made by the configuration
    raw: bool  # made by a hypercall of the domain's kernel itself
    remote_domain: int
    remote_port: int  # of a VIRQ its number
    irq: int
    pending: bool
    masked: bool
    pending_since_ns: int
    served_at_ns: int
    now_ns: int
    file: OpenFile | None
    hypervisor: Process
    cpus: tuple[Process, ...]  # those that serve the port
    cpu_asleep: bool
    upcall_pending: bool
    server: Process | None  # who has it in service
    sender: submissions.Waiting | None
    sender_name: str
    driver_order: bool
    fifo: bool
    linked: bool  # FIFO: its word is in a queue
    queue: tuple[int, int]  # FIFO: the virtual CPU and the priority of that queue, or of the one that it goes to next
    put_off_ns: int  # how long its late EOI still has to wait; 0 = it does not

    @property
    def name(self) -> str:
        """Name the port as people type it."""
        return f"{self.domain}:{self.port}"

    @property
    def queue_name(self) -> str:
        """Name the queue of the FIFO ABI."""
        return f"queue of priority {self.queue[1]} of cpu/{self.domain}.{self.queue[0]}"

    @property
    def active(self) -> bool:
        """Whether it was delivered and not written back."""
        return bool(self.irq & Irq.ACTIVE)

    @property
    def raised_for_file(self) -> bool:
        """Whether it was raised since its file was opened."""
        opened = self.file.opened_ns if self.file is not None else 0
        return self.pending_since_ns > opened


def collect(machine: RunningMachine, domid: int, port: int) -> Evidence:
    """Read everything about a port; the domain and the port must exist."""
    look = machine.inspector()
    status = machine.status()
    known = processes.of_machine(status)
    slot = (look.irq_word(domid, port) & Irq.SLOT) - 1
    page = _page(machine, slot)
    try:
        for _ in range(LOOKS_MAX):
            before = look.irq_word(domid, port)
            file = _file(look, known, page, slot, port)
            evidence = _words(look, known, file, domid, port)
            if (before & Irq.SLOT) - 1 != slot:  # bound anew meanwhile
                if page is not None:
                    page.close()
                slot = (before & Irq.SLOT) - 1
                page = _page(machine, slot)
            elif look.irq_word(domid, port) == before:
                break
        return evidence
    finally:
        if page is not None:
            page.close()


def _page(machine: RunningMachine, slot: int) -> Memory | None:
    if slot < 0:
        return None
    try:
        return machine.file_page(slot)
    except LookupError:  # its process is gone, its release under way
        return None


def _queue(pages: Memory, port: int, vcpu: int) -> tuple[int, int]:
    """FIFO: the virtual CPU and the priority of the queue that a port is in, or will be in when it is raised."""
    priority, was_on, was_priority = Fifo.queue(pages.load64(Domain.table(Domain.QUEUE_WORDS, port)))
    return (was_on, was_priority) if channel.state(pages, port).linked else (vcpu, priority)


def _put_off_ns(look: Inspector, pages: Memory, port: int, irq: int) -> int:
    """Say how long a late EOI still waits, on the machine's clock, which tests move; at least 1 while it does."""
    if not irq & Irq.DELAYED:
        return 0
    now = now_ns() + look.machine.load64(Machine.CLOCK_OFFSET_NS)
    return max(1, pages.load64(Domain.table(Domain.EOI_AT, port)) - now)


def _serving(pages: Memory, port: int, vcpu: int) -> list[int]:
    """2-level: who looks at the port's bit. FIFO: on whose queue it is, or will be."""
    if channel.is_fifo(pages):
        return [_queue(pages, port, vcpu)[0]]
    return [
        number
        for number in range(min(pages.load32(Domain.VCPUS) or VCPUS_MAX, VCPUS_MAX))
        if pages.load64(Domain.vcpu(number, Vcpu.EVTCHN_MASK) + port // 64 * 8) >> port % 64 & 1
    ]


def _words(
    look: Inspector, known: dict[str, Process], file: OpenFile | None, domid: int, port: int
) -> Evidence:
    pages = look.domain_pages[domid]
    word = look.port_word(domid, port)
    state, remote_domain, remote_port, vcpu = Port.unpack(word)
    irq = look.irq_word(domid, port)
    sender, sender_name = _sender(look, state, (remote_domain, remote_port), (domid, port))
    serving = _serving(pages, port, vcpu)
    first = serving[0] if serving else vcpu
    in_service = processes.named(known, f"cpu/{domid}.{irq >> 24 & 0x3F}") if irq & Irq.IN_SERVICE else None
    return Evidence(
        domain=domid,
        port=port,
        state=state,
        peer_closed=bool(word & Port.PEER_CLOSED),
        static=bool(word & Port.STATIC),
        raw=bool(word & Port.RAW),
        remote_domain=remote_domain,
        remote_port=remote_port,
        irq=irq,
        pending=look.is_pending(domid, port),
        masked=look.is_masked(domid, port),
        pending_since_ns=pages.load64(Domain.table(Domain.PENDING_SINCE, port)),
        served_at_ns=pages.load64(Domain.table(Domain.SERVED_AT, port)),
        now_ns=now_ns(),
        file=file,
        hypervisor=processes.named(known, "hypervisor"),
        cpus=tuple(processes.named(known, f"cpu/{domid}.{number}") for number in serving),
        cpu_asleep=bool(pages.load32(Domain.vcpu(first, Vcpu.SLEEPING))),
        upcall_pending=bool(pages.load8(Domain.vcpu_info(first, Domain.UPCALL_PENDING))),
        server=in_service,
        sender=sender,
        sender_name=sender_name,
        driver_order=bool(look.machine.load32(Machine.VARIANTS) & Machine.VARIANT_DRIVER_WAKEUP),
        fifo=channel.is_fifo(pages),
        linked=channel.state(pages, port).linked,
        queue=_queue(pages, port, vcpu),
        put_off_ns=_put_off_ns(look, pages, port, irq),
    )


def _sender(
    look: Inspector, state: int, peer: tuple[int, int], own: tuple[int, int]
) -> tuple[submissions.Waiting | None, str]:
    """Find what waits in the submission rings of the file that notifies this port."""
    if state == Port.IPI:
        peer = own
    elif state != Port.INTERDOMAIN or peer[0] not in look.domain_pages:
        return None, ""
    slot = (look.irq_word(*peer) & Irq.SLOT) - 1
    if slot < 0:
        return None, ""
    pid = look.machine.load32(Machine.file(slot, File.PROCESS_PID))
    return submissions.waiting(pid), f"file/{peer[0]}.{slot}"


def _file(
    look: Inspector, known: dict[str, Process], page: Memory | None, slot: int, port: int
) -> OpenFile | None:
    if slot < 0:
        return None

    def field(at: int) -> int:
        return look.machine.load32(Machine.file(slot, at))

    name = f"file/{field(File.DOMAIN)}.{slot}"
    prod = look.machine.load64_acquire(Machine.file(slot, File.PROD))
    return OpenFile(
        slot=slot,
        name=name,
        label=read_text(look.machine, Machine.file(slot, File.NAME), File.NAME_BYTES),
        is_open=field(File.STATE) == File.OPEN,
        overflowed=bool(prod & FilePage.OVERFLOW),
        poisoned=bool(prod & FilePage.POISONED),
        dropped=look.machine.load64(Machine.file(slot, File.DROPPED)),
        opened_ns=look.machine.load64(Machine.file(slot, File.OPENED_NS)),
        process=processes.named(known, name),
        users=_users(look, slot, field(File.OPENER_PID)),
        ring=_ring(page, prod, field(File.SIZE), port) if page is not None else None,
        waiting=submissions.waiting(field(File.PROCESS_PID)),
    )


def _users(look: Inspector, slot: int, opener: int) -> tuple[User, ...]:
    """Look at the processes with a submission ring of this file; without one, at who opened it."""
    pids = {
        look.machine.load32(Machine.submission(index, Submission.PID))
        for index in range(SUBMISSIONS_MAX)
        if look.machine.load32(Machine.submission(index, Submission.STATE)) != Submission.FREE
        and look.machine.load32(Machine.submission(index, Submission.SLOT)) == slot
    }
    return tuple(processes.user_of(pid) for pid in sorted(pids or {opener})[:USERS_SHOWN_MAX])


def _ring(page: Memory, prod: int, size: int, port: int) -> Ring | None:
    """Find the port among what is unread. None when P and C do not fit: a RESET half way, or nonsense."""
    cons = page.load64_acquire(FilePage.CONS)
    unread = prod - cons & 0xFFFFFFFF
    if (
        prod >> FilePage.EPOCH_SHIFT != cons >> FilePage.EPOCH_SHIFT
        or unread > size
        or FilePage.RING + 4 * size > page.size
    ):
        return None
    at = [FilePage.RING + 4 * ((cons + index & 0xFFFFFFFF) % size) for index in range(unread)]
    positions = tuple(index for index, offset in enumerate(at, start=1) if page.load32(offset) == port)
    return Ring(unread, size, positions, bool(page.load32(FilePage.DOOR)))
