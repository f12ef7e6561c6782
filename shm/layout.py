# SPDX-License-Identifier: Apache-2.0
"""The shared pages, drawn. Offsets in bytes, sizes as written; `shm/native/layout.h` is the same in C, and a test compares them.

Three kinds of segment belong to the machine and are mapped by its own processes only::

    pvbus-<run>-m   machine    0 header | 4096 open files, 256 B each | submission rings, 64 B each
    pvbus-<run>-dN  domain N   0 header, VIRQ map, 3584 event array (page numbers) | 4096 shared info | 8192 vCPUs, 1 KiB each |
                               40960 tables of 131072 64-bit words: port words | irq words | pending since (ns) | served at (ns) |
                               FIFO queue words | late EOI at (ns) | late-EOI words,
                               7380992 arrivals (2-level): for each vCPU a log of 4096 ports (u32) in the order in which they were
                               raised, 7905280 bitmap of late EOIs that wait, 7921664 guest pages: control blocks, event array

Two are sealed memfds, handed to the users of a file; what users write there is read once and checked::

    file page        0 header | 64 P, size | 128 C | 192 door | 4096 bitmap of bound ports | 20480 event ring
    submission ring  0 header | 64 tail (user) | 128 head (machine) | 4096 entries: op << 30 | port

One memfd, the public page, is mapped read-only by users: 64 hypervisor sleeping, 72 machine state.

Words that carry the event path::

    port word   63      54 53   48 47 41 40          24 23            8 7    3 2   0
                |  unused  | vCPU |      | remote port |  remote domain | S| C |state|
                S static (made by the configuration), C unbound because its peer has closed
    irq word    63               32 31 30 29  24 23 22 21 20 19 18 17 16 15 14 12 11    0
                | times served     |W |D | CPU  |K |S |V |P |T |X |A |E |L |    |file + 1|
                W late EOI waits, D by an upcall loop that ran too long, K kernel's own, S static, V in service,
                P/T/X mask reasons EOI_PENDING/TEMPORARY/EXPLICIT, A active, E enabled,
                L lost: a variant has had the file forget it, so nobody will close it
    event word  31 30 29 28 27   17 16                0     (FIFO; u32, in the guest's event array)
                |P |M |L |B |       |    next port     |     pending, masked, linked, busy
    P           63                34 33 32 31                                         0      (C: the same, without flags)
                |     epoch         |po|ov|              producer index               |
"""

from typing import Final

LAYOUT_VERSION: Final = 3
VCPUS_MAX: Final = 32
NR_VIRQS: Final = 24
FILES_MAX: Final = 1024
SUBMISSIONS_MAX: Final = 2048
SUBMISSION_ENTRIES: Final = 8192
DOMAINS_MAX: Final = 16
PORTS_2L: Final = 4096
PORTS_FIFO: Final = 131072
PORTS_MAX: Final = PORTS_FIFO
ABI_2L: Final = 0
ABI_FIFO: Final = 1
TICK_NS: Final = 4_000_000  # HZ = 250

MAGIC_DOMAIN: Final = 0x444F4D31
MAGIC_MACHINE: Final = 0x4D414331
MAGIC_FILE: Final = 0x46494C31
MAGIC_SUBMISSION: Final = 0x53554231
MAGIC_PUBLIC: Final = 0x50554231


class Domain:
    """A domain's segment. The hypervisor writes header, ports and pending bits, its CPU processes the rest of the event path."""

    VERSION: Final = 0
    MAGIC: Final = 4
    PORTS_MAX: Final = 8
    VCPUS: Final = 12
    DOMID: Final = 16
    ABI: Final = 20
    VALID_EVTCHNS: Final = 24  # one past the highest port ever handed out
    ARRAY_PAGES: Final = 28
    EOI_NEXT_NS: Final = 32
    VIRQ: Final = 512
    ARRAY: Final = 3584
    SHARED_INFO: Final = 4096
    VCPU_INFO_BYTES: Final = 64
    UPCALL_PENDING: Final = 0
    UPCALL_MASK: Final = 1
    PENDING_SEL: Final = 8
    EVTCHN_PENDING: Final = SHARED_INFO + 2048
    EVTCHN_MASK: Final = SHARED_INFO + 2560
    VCPU_AREA: Final = 8192
    VCPU_BYTES: Final = 1024
    TABLES: Final = VCPU_AREA + VCPUS_MAX * VCPU_BYTES
    PORT_WORDS, IRQ_WORDS, PENDING_SINCE, SERVED_AT, QUEUE_WORDS, EOI_AT, EOI_WORDS, TABLE_COUNT = range(8)
    ARRIVALS: Final = TABLES + TABLE_COUNT * 8 * PORTS_FIFO
    ARRIVALS_ENTRIES: Final = 4096
    EOI_WAITING: Final = ARRIVALS + VCPUS_MAX * ARRIVALS_ENTRIES * 4
    GUEST: Final = EOI_WAITING + PORTS_FIFO // 8
    GUEST_PAGES: Final = VCPUS_MAX + 128 + 32
    BYTES: Final = GUEST + GUEST_PAGES * 4096

    @staticmethod
    def virq(vcpu: int, virq: int) -> int:
        """Give the offset of the 32-bit port that `virq` is bound to; per-domain and global VIRQs stand in row 0."""
        return Domain.VIRQ + (vcpu * NR_VIRQS + virq) * 4

    @staticmethod
    def table(which: int, port: int) -> int:
        """Give the offset of `port`'s 64-bit word in one of the tables."""
        return Domain.TABLES + (which * PORTS_FIFO + port) * 8

    @staticmethod
    def guest_page(gfn: int) -> int:
        """Give the offset of a page of the guest: what it gives to Xen by its number, and reaches at the same place."""
        return Domain.GUEST + gfn * 4096

    @staticmethod
    def vcpu_info(vcpu: int, field: int) -> int:
        """Give the offset of a field of struct vcpu_info."""
        return Domain.SHARED_INFO + vcpu * Domain.VCPU_INFO_BYTES + field

    @staticmethod
    def vcpu(vcpu: int, field: int) -> int:
        """Give the offset of a field (class Vcpu) of the guest's per-vCPU area."""
        return Domain.VCPU_AREA + vcpu * Domain.VCPU_BYTES + field


class Vcpu:
    """The guest's per-vCPU area. Written by the vCPU's process; SLEEPING is taken back by the hypervisor when it rings.

    From ARRIVALS_TAIL on the hypervisor's own: what both write in turn would travel between their caches with every event.
    """

    EVTCHN_MASK: Final = 0
    SLEEPING: Final = 512
    GENERATION: Final = 516
    LAST_WORD: Final = 520
    LAST_BIT: Final = 524
    UPCALLS: Final = 528
    EVENTS: Final = 536
    UNHANDLED: Final = 544
    SPURIOUS: Final = 552
    WARNINGS: Final = 560
    MIGRATIONS: Final = 568
    HEARTBEAT_NS: Final = 576
    ARRIVALS_HEAD: Final = 584
    IRQ_EPOCH: Final = 588
    LOOP_STARTED_NS: Final = 592
    LOOP_EVENTS: Final = 600
    FIFO_READY: Final = 604
    FIFO_HEAD: Final = 608
    ARRIVALS_TAIL: Final = 704
    ARRIVALS_SEEN: Final = 708
    CONTROL: Final = 712
    FIFO_DROPPED: Final = 720
    EOIS_PUT_OFF: Final = 728
    FIFO_TAIL: Final = 768


class Fifo:
    """The FIFO ABI: bits of an event word, the control block, and the hypervisor's queue word of a port."""

    PENDING: Final = 1 << 31
    MASKED: Final = 1 << 30
    LINKED: Final = 1 << 29
    BUSY: Final = 1 << 28
    LINK: Final = 0x1FFFF
    LINK_BITS: Final = 17
    PRIORITIES: Final = 16
    PRIORITY_DEFAULT: Final = 7
    WORDS_A_PAGE: Final = 1024
    PAGES_MAX: Final = 128
    CONTROL_BYTES: Final = 72
    READY: Final = 0
    HEAD: Final = 8
    QUEUE_LINKED: Final = 1 << 12
    QUEUE_PENDING: Final = 1 << 13

    @staticmethod
    def queue(word: int) -> tuple[int, int, int]:
        """Split a queue word into (priority, and of the last time it was linked: vCPU, priority)."""
        set_to = word >> 16 & 0x1F
        return set_to - 1 if set_to else Fifo.PRIORITY_DEFAULT, word & 0xFF, word >> 8 & 0xF

    @staticmethod
    def with_priority(word: int, priority: int) -> int:
        """Give the queue word with another priority."""
        return word & ~(0x1F << 16) | priority + 1 << 16


class Port:
    """Fields of a port word: the hypervisor's view of a port."""

    FREE, RESERVED, UNBOUND, INTERDOMAIN, PIRQ, VIRQ, IPI = range(7)
    PEER_CLOSED: Final = 1 << 3  # on an unbound port: it had a peer; for those who ask why nothing arrives
    STATIC: Final = 1 << 4  # made by the configuration before anything ran
    RAW: Final = 1 << 5  # made by a hypercall of the domain's kernel itself, for no file
    KEPT: Final = STATIC | RAW  # as long as it is bound: no heir closes it, whether it has a handler or not

    @staticmethod
    def pack(state: int, *, remote_domain: int = 0, remote_port: int = 0, vcpu: int = 0) -> int:
        """Build a port word; `remote_port` is the number of the VIRQ for a VIRQ."""
        return state | remote_domain << 8 | remote_port << 24 | vcpu << 48

    @staticmethod
    def unpack(word: int) -> tuple[int, int, int, int]:
        """Split a port word into (state, remote domain, remote port or VIRQ, notify vCPU)."""
        return word & 7, word >> 8 & 0xFFFF, word >> 24 & 0x1FFFF, word >> 48 & 0x3F


class Irq:
    """Bits of an irq word: the guest kernel's view, where a port stands between pending and written back."""

    SLOT: Final = 0xFFF
    LOST: Final = 1 << 15  # with a file: its record is forgotten; without: its channel has leaked
    ENABLED: Final = 1 << 16
    ACTIVE: Final = 1 << 17
    EXPLICIT: Final = 1 << 18
    TEMPORARY: Final = 1 << 19
    EOI_PENDING: Final = 1 << 20
    REASONS: Final = EXPLICIT | TEMPORARY | EOI_PENDING
    IN_SERVICE: Final = 1 << 21
    STATIC: Final = 1 << 22
    KERNEL: Final = 1 << 23
    DEFER: Final = 1 << 30
    DELAYED: Final = 1 << 31
    SERVED_ONE: Final = 1 << 32


class Machine:
    """The machine's segment: header, what of open files their users must not write, heads of submission rings."""

    VERSION: Final = 0
    MAGIC: Final = 4
    CLOCK_OFFSET_NS: Final = 8
    VARIANTS: Final = 16
    HYPERVISOR_GENERATION: Final = 20
    NOTIFIES: Final = 24
    ENABLES: Final = 32
    REFUSED: Final = 40
    POISONED: Final = 48
    KICKS: Final = 56
    DRAINS: Final = 64
    HYPERVISOR_CORE: Final = 72
    VIRQ_HANDLER: Final = 128
    FILES: Final = 4096
    FILE_BYTES: Final = 256
    SUBMISSIONS: Final = FILES + FILES_MAX * FILE_BYTES
    SUBMISSION_BYTES: Final = 64
    BYTES: Final = SUBMISSIONS + SUBMISSIONS_MAX * SUBMISSION_BYTES
    VARIANT_DRIVER_WAKEUP: Final = 1
    VARIANT_DUPLICATE_DROPS: Final = 2
    VARIANT_LEAK_ON_ENOMEM: Final = 4
    VARIANT_DOUBLE_CLOSE: Final = 8
    VARIANT_STRICT_STATIC: Final = 16
    VARIANT_ONE_TASKLET_PAIR: Final = 32
    VARIANT_OFFERS_STALL: Final = 64
    VARIANT_LEAVES_DIRTY: Final = 128
    VARIANT_WORK_ALLOCATION_RETRIES: Final = 256
    VARIANT_WRONG_SIGNAL_WORD: Final = 512
    VARIANT_RESCIND_QUEUE: Final = 1024
    VARIANT_WORK_PER_CPU: Final = 2048

    @staticmethod
    def file(slot: int, field: int) -> int:
        """Give the offset of a field (class File) of an open file's record."""
        return Machine.FILES + slot * Machine.FILE_BYTES + field

    @staticmethod
    def submission(index: int, field: int) -> int:
        """Give the offset of a field (class Submission) of a submission ring's record."""
        return Machine.SUBMISSIONS + index * Machine.SUBMISSION_BYTES + field


class File:
    """An open file's record in the machine's segment. STATE by the hypervisor, the ring's words under the producer lock."""

    FREE, OPEN, DEAD, CLOSING = range(4)  # closing: its release is under way
    STATE: Final = 0
    DOMAIN: Final = 4
    LOCK: Final = 8
    SIZE: Final = 12
    PROD: Final = 16
    CLAIM: Final = 24
    DELIVERED: Final = 32
    DROPPED: Final = 40
    WAKES: Final = 48
    IMPOSSIBLE: Final = 56
    PORTS: Final = 64
    RESTRICTED: Final = 68
    OPENER_PID: Final = 72
    PROCESS_PID: Final = 76
    NAME: Final = 80
    NAME_BYTES: Final = 32
    OPENED_NS: Final = 112
    CONS_SEEN: Final = 120
    LOCK_FILE: Final = 0x8000


class Submission:
    """A submission ring's record in the machine's segment: written by the hypervisor only."""

    FREE, ATTACHED, POISONED = range(3)
    STATE: Final = 0
    SLOT: Final = 4
    HEAD: Final = 8
    PID: Final = 12
    CLAIM: Final = 16
    TAKEN: Final = 24


class FilePage:
    """The page of an open file that its users map."""

    VERSION: Final = 0
    MAGIC: Final = 4
    CAPACITY: Final = 8
    PORTS_MAX: Final = 12
    BITMAP_AT: Final = 16
    RING_AT: Final = 20
    DOMAIN: Final = 24
    RELEASED: Final = 28
    PROD: Final = 64
    SIZE: Final = 72
    CONS: Final = 128
    DOOR: Final = 192
    BITMAP: Final = 4096
    RING: Final = 20480
    BYTES: Final = RING + 4 * PORTS_FIFO  # the largest ring; the page is sparse
    OVERFLOW: Final = 1 << 32
    POISONED: Final = 1 << 33
    EPOCH_SHIFT: Final = 34


class SubmissionRing:
    """The ring through which a user process hands ports to the hypervisor."""

    VERSION: Final = 0
    MAGIC: Final = 4
    ENTRIES: Final = 8
    TAIL: Final = 64
    CORE: Final = 68
    HEAD: Final = 128
    DATA: Final = 4096
    BYTES: Final = DATA + 4 * SUBMISSION_ENTRIES
    NOTIFY, ENABLE, REARM = range(3)


class PublicPage:
    """What every user may read: is the hypervisor asleep, is the machine ready."""

    VERSION: Final = 0
    MAGIC: Final = 4
    HYPERVISOR_SLEEPING: Final = 64
    HYPERVISOR_CPU: Final = 68
    MACHINE_STATE: Final = 72
    BYTES: Final = 4096
    BOOTING, READY, STOPPING = range(3)
