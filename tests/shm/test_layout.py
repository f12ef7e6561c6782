# SPDX-License-Identifier: Apache-2.0
"""The drawing of the shared pages against the C declarations: every number, in both directions."""

import functools
import operator
import re

import pytest

from pvbus.shm import _core, _core_explored, layout
from pvbus.shm.layout import Domain, Fifo, File, FilePage, Irq, Machine, Port, PublicPage, Submission, SubmissionRing, Vcpu

# C structure -> the class that draws it. What has another name there stands in OTHER_NAMES.
DRAWN = {
    "pv_domain_header": Domain, "pv_vcpu": Vcpu, "pv_machine_header": Machine, "pv_file": File,
    "pv_submission": Submission, "pv_file_page": FilePage, "pv_submission_ring": SubmissionRing,
    "pv_public_page": PublicPage,
}
OTHER_NAMES = {
    "pv_vcpu_info": Domain.VCPU_INFO_BYTES,
    "pv_vcpu_info.evtchn_upcall_pending": Domain.UPCALL_PENDING,
    "pv_vcpu_info.evtchn_upcall_mask": Domain.UPCALL_MASK,
    "pv_vcpu_info.evtchn_pending_sel": Domain.PENDING_SEL,
    "pv_shared_info.vcpu_info": Domain.vcpu_info(0, 0) - Domain.SHARED_INFO,
    "pv_shared_info.evtchn_pending": Domain.EVTCHN_PENDING - Domain.SHARED_INFO,
    "pv_shared_info.evtchn_mask": Domain.EVTCHN_MASK - Domain.SHARED_INFO,
    "pv_file_page.bitmap": FilePage.BITMAP_AT,
    "pv_file_page.ring": FilePage.RING_AT,
    "pv_vcpu": Domain.VCPU_BYTES,
    "pv_file": Machine.FILE_BYTES,
    "pv_submission": Machine.SUBMISSION_BYTES,
    "PV_DOMAIN_SHARED_INFO": Domain.SHARED_INFO,
    "PV_DOMAIN_VCPUS": Domain.VCPU_AREA,
    "PV_DOMAIN_TABLES": Domain.TABLES,
    "PV_DOMAIN_ARRIVALS": Domain.ARRIVALS,
    "PV_ARRIVALS": Domain.ARRIVALS_ENTRIES,
    "PV_DOMAIN_EOI_WAITING": Domain.EOI_WAITING,
    "PV_DOMAIN_GUEST": Domain.GUEST,
    "PV_GUEST_PAGES": Domain.GUEST_PAGES,
    "PV_TABLE_PORT": Domain.PORT_WORDS,
    "PV_TABLE_IRQ": Domain.IRQ_WORDS,
    "PV_TABLE_PENDING_SINCE": Domain.PENDING_SINCE,
    "PV_TABLE_SERVED_AT": Domain.SERVED_AT,
    "PV_TABLE_QUEUE": Domain.QUEUE_WORDS,
    "PV_TABLE_EOI_AT": Domain.EOI_AT,
    "PV_TABLE_EOI": Domain.EOI_WORDS,
    "PV_TABLES": Domain.TABLE_COUNT,
    "pv_fifo_control": Fifo.CONTROL_BYTES,
    "pv_fifo_control.ready": Fifo.READY,
    "pv_fifo_control.head": Fifo.HEAD,
    "PV_DOMAIN_BYTES": Domain.BYTES,
    "PV_MACHINE_FILES": Machine.FILES,
    "PV_MACHINE_SUBMISSIONS": Machine.SUBMISSIONS,
    "PV_MACHINE_BYTES": Machine.BYTES,
    "PV_PAGE_BITMAP": FilePage.BITMAP,
    "PV_PAGE_RING": FilePage.RING,
    "PV_SUBMISSION_DATA": SubmissionRing.DATA,
    "PV_SUBMISSION_BYTES": SubmissionRing.BYTES,
    "PV_OVERFLOW": FilePage.OVERFLOW,
    "PV_POISONED": FilePage.POISONED,
    "PV_EPOCH_SHIFT": FilePage.EPOCH_SHIFT,
    "PV_LOCK_FILE": File.LOCK_FILE,
    "PV_VARIANT_DRIVER_WAKEUP": Machine.VARIANT_DRIVER_WAKEUP,
    "PV_VARIANT_DUPLICATE_DROPS": Machine.VARIANT_DUPLICATE_DROPS,
    "PV_VARIANT_LEAK_ON_ENOMEM": Machine.VARIANT_LEAK_ON_ENOMEM,
    "PV_VARIANT_DOUBLE_CLOSE": Machine.VARIANT_DOUBLE_CLOSE,
    "PV_VARIANT_STRICT_STATIC": Machine.VARIANT_STRICT_STATIC,
    "PV_VARIANT_ONE_TASKLET_PAIR": Machine.VARIANT_ONE_TASKLET_PAIR,
    "PV_VARIANT_OFFERS_STALL": Machine.VARIANT_OFFERS_STALL,
    "PV_VARIANT_LEAVES_DIRTY": Machine.VARIANT_LEAVES_DIRTY,
    "PV_VARIANT_WORK_ALLOCATION_RETRIES": Machine.VARIANT_WORK_ALLOCATION_RETRIES,
    "PV_VARIANT_WRONG_SIGNAL_WORD": Machine.VARIANT_WRONG_SIGNAL_WORD,
    "PV_VARIANT_RESCIND_QUEUE": Machine.VARIANT_RESCIND_QUEUE,
    "PV_VARIANT_WORK_PER_CPU": Machine.VARIANT_WORK_PER_CPU,
}
# The guest's ABI that nobody draws because nobody reads it; sizes of headers; a mark that only C makes.
WIRE_FACTS = {
    "pv_vcpu_info.arch": 16, "pv_vcpu_info.time": 32, "pv_shared_info.wall_clock": 3072, "PV_CLAIM_VALID": 1 << 63,
}
HEADERS = {"pv_domain_header": Domain.SHARED_INFO, "pv_machine_header": Machine.FILES}
# Numbers of the drawing that are no offsets of a C structure, and have been compared under their C name above.
NO_FIELDS = {
    "CLOSING",
    "VCPU_INFO_BYTES", "UPCALL_PENDING", "UPCALL_MASK", "PENDING_SEL", "SHARED_INFO", "EVTCHN_PENDING", "EVTCHN_MASK",
    "VCPU_AREA", "VCPU_BYTES", "TABLES", "ARRIVALS", "ARRIVALS_ENTRIES", "BYTES", "PORT_WORDS", "IRQ_WORDS",
    "PENDING_SINCE", "SERVED_AT", "QUEUE_WORDS", "EOI_AT", "EOI_WORDS", "TABLE_COUNT", "EOI_WAITING", "GUEST", "GUEST_PAGES",
    "FILES", "FILE_BYTES", "SUBMISSIONS", "SUBMISSION_BYTES", "VARIANT_DRIVER_WAKEUP",
    "VARIANT_DUPLICATE_DROPS", "VARIANT_LEAK_ON_ENOMEM", "VARIANT_DOUBLE_CLOSE", "VARIANT_STRICT_STATIC",
    "VARIANT_ONE_TASKLET_PAIR", "VARIANT_OFFERS_STALL", "VARIANT_LEAVES_DIRTY", "VARIANT_WORK_ALLOCATION_RETRIES",
    "VARIANT_WRONG_SIGNAL_WORD", "VARIANT_RESCIND_QUEUE", "VARIANT_WORK_PER_CPU",
    "NAME_BYTES", "LOCK_FILE", "FREE", "OPEN", "DEAD", "ATTACHED", "POISONED", "BITMAP_AT", "RING_AT", "BITMAP", "RING",
    "OVERFLOW", "EPOCH_SHIFT", "DATA", "NOTIFY", "ENABLE", "REARM", "BOOTING", "READY", "STOPPING",
}


def drawn(name: str) -> int | None:
    """Return what the drawing says of a number of the C table; None if it does not know it."""
    if name in OTHER_NAMES | WIRE_FACTS:
        return (OTHER_NAMES | WIRE_FACTS)[name]
    struct, _, field = name.partition(".")
    if field:
        number = getattr(DRAWN[struct], field.upper(), None) if struct in DRAWN else None
    elif name.startswith("PV_IRQ_"):
        number = getattr(Irq, name.removeprefix("PV_IRQ_"), None)
    elif name.startswith("PV_FIFO_"):
        number = getattr(Fifo, name.removeprefix("PV_FIFO_"), None)
    elif name.startswith("PV_QUEUE_"):
        number = getattr(Fifo, name.removeprefix("PV_"), None)
    elif name.startswith("PV_PORT_"):
        number = getattr(Port, name.removeprefix("PV_PORT_"), None)
    else:
        number = getattr(layout, name.removeprefix("PV_"), None)
    return number if isinstance(number, int) else None


def test_every_number_of_the_c_declarations_is_in_the_drawing_and_equal() -> None:
    table = {name: value for name, value in _core.LAYOUT.items() if name not in HEADERS}

    assert {name: drawn(name) for name in table} == table


def test_every_field_of_the_drawing_is_in_the_c_declarations() -> None:
    missing = [
        f"{struct}.{field.lower()}"
        for struct, page in DRAWN.items()
        for field, value in vars(page).items()
        if re.fullmatch("[A-Z_0-9]+", field) and isinstance(value, int)
        and field not in NO_FIELDS | ({"EVTCHN_MASK"} if page is not Vcpu else set())
        and f"{struct}.{field.lower()}" not in _core.LAYOUT
    ]

    assert missing == []


def test_both_compilations_have_the_same_layout() -> None:
    assert _core.LAYOUT == _core_explored.LAYOUT


def test_headers_end_before_what_follows_them() -> None:
    assert {name for name, end in HEADERS.items() if _core.LAYOUT[name] > end} == set()


@pytest.mark.parametrize(
    ("struct", "size"), [("pv_vcpu", 1024), ("pv_file", 256), ("pv_submission", 64), ("pv_vcpu_info", 64)],
)
def test_structures_have_the_size_that_offsets_are_computed_with(struct: str, size: int) -> None:
    assert _core.LAYOUT[struct] == size


def test_the_shared_info_page_is_the_guest_abi() -> None:
    assert Domain.EVTCHN_PENDING - Domain.SHARED_INFO == 2048
    assert Domain.EVTCHN_MASK - Domain.SHARED_INFO == 2560
    assert [Domain.vcpu_info(v, 0) - Domain.SHARED_INFO for v in (0, 1, 31)] == [0, 64, 1984]
    assert (Domain.UPCALL_PENDING, Domain.UPCALL_MASK, Domain.PENDING_SEL) == (0, 1, 8)


def test_the_numbers_in_the_drawing_are_those_of_the_classes() -> None:
    text = layout.__doc__ or ""

    for number in (Machine.FILES, Machine.FILE_BYTES, Domain.SHARED_INFO, Domain.VCPU_AREA, Domain.TABLES,
                   Domain.ARRIVALS, FilePage.BITMAP, FilePage.RING, FilePage.CONS, SubmissionRing.DATA):
        assert re.search(rf"\b{number}\b", text), number


def test_tables_do_not_overlap() -> None:
    assert Domain.virq(layout.VCPUS_MAX - 1, layout.NR_VIRQS - 1) + 4 <= Domain.SHARED_INFO
    assert Domain.vcpu(layout.VCPUS_MAX - 1, Domain.VCPU_BYTES) == Domain.TABLES
    assert Domain.table(Domain.EOI_WORDS, layout.PORTS_MAX) == Domain.ARRIVALS
    assert Domain.ARRAY + 4 * Fifo.PAGES_MAX == Domain.SHARED_INFO
    assert Domain.GUEST % 4096 == 0
    assert Vcpu.FIFO_HEAD + 4 * Fifo.PRIORITIES <= Vcpu.ARRIVALS_TAIL
    assert Vcpu.ARRIVALS_TAIL // 64 > (Vcpu.FIFO_HEAD + 4 * Fifo.PRIORITIES - 1) // 64  # the hypervisor's lines
    assert Machine.file(layout.FILES_MAX, 0) == Machine.SUBMISSIONS
    assert Machine.submission(layout.SUBMISSIONS_MAX, 0) == Machine.BYTES
    assert layout.FILES_MAX <= Irq.SLOT     # the field holds file + 1


def test_irq_fields_do_not_overlap() -> None:
    fields = [Irq.SLOT, Irq.LOST, Irq.ENABLED, Irq.ACTIVE, Irq.EXPLICIT, Irq.TEMPORARY, Irq.EOI_PENDING, Irq.IN_SERVICE,
              Irq.STATIC, Irq.KERNEL, 0x3F << 24, Irq.DEFER, Irq.DELAYED, 0xFFFFFFFF << 32]

    assert sum(fields) == functools.reduce(operator.or_, fields)
    assert Irq.REASONS == Irq.EXPLICIT | Irq.TEMPORARY | Irq.EOI_PENDING


@pytest.mark.parametrize("state", range(7))
def test_a_port_word_holds_what_was_packed(state: int) -> None:
    word = Port.pack(state, remote_domain=0xFFFF, remote_port=0x1FFFF, vcpu=63)

    assert Port.unpack(word) == (state, 0xFFFF, 0x1FFFF, 63)
