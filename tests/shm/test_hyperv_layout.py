# SPDX-License-Identifier: Apache-2.0
"""The drawing of the Hyper-V segment against the C declarations, in both directions, and against the specification."""

import re
import secrets
from pathlib import Path

import pytest

from pvbus.shm import _core, _core_explored, hyperv
from pvbus.shm.hyperv import Buffer, Frame, Header, Sint, Slot, Vp, Work, flag_word
from pvbus.shm.pages import MachinePages
from pvbus.shm.segment import LayoutError, check

DRAWN: dict[str, type] = {
    "pv_hv_header": Header, "pv_hv_vp": Vp, "pv_hv_slot": Slot, "pv_hv_buffer": Buffer, "pv_hv_work": Work,
}
NUMBERS = {
    "pv_hv_slot": Slot.BYTES, "pv_hv_buffer": Buffer.BYTES, "pv_hv_work": Work.BYTES,
    "PV_HV_VPS_MAX": hyperv.VPS_MAX, "PV_HV_SINTS": hyperv.SINTS, "PV_HV_FLAGS": hyperv.FLAGS, "PV_HV_PAGE": hyperv.PAGE,
    "PV_HV_MAGIC": hyperv.MAGIC, "PV_HV_BYTES": hyperv.BYTES, "PV_HV_VP_HOST": hyperv.VP_HOST,
    "PV_HV_FRAMES_A_VP": Frame.A_VP, "PV_HV_FRAMES_SPARE": Frame.SPARE_COUNT, "PV_HV_FRAMES": Frame.COUNT,
    "PV_HV_FRAME_VPS": Frame.VPS, "PV_HV_FRAME_INTERRUPT": Frame.INTERRUPT, "PV_HV_FRAME_MONITOR": Frame.MONITOR,
    "PV_HV_FRAME_BUFFERS": Frame.BUFFERS, "PV_HV_FRAME_WORK": Frame.WORK, "PV_HV_FRAME_SPARE": Frame.SPARE,
    "PV_HV_FRAME_CHANNELS": Frame.CHANNELS,
    "PV_HV_PAGE_STATE": Frame.STATE, "PV_HV_PAGE_MESSAGES": Frame.MESSAGES, "PV_HV_PAGE_FLAGS": Frame.EVENT_FLAGS,
    "PV_HV_PAGE_SPARE": Frame.UNUSED,
    "PV_HV_TASKLET_MESSAGE": Vp.TASKLET_MESSAGE, "PV_HV_TASKLET_EVENT": Vp.TASKLET_EVENT,
    "PV_HV_META_SIZE": Slot.META_SIZE, "PV_HV_META_PENDING": Slot.META_PENDING,
    "PV_HV_BUFFER_ROWS": Buffer.ROWS, "PV_HV_BUFFERS_A_PORT": Buffer.A_PORT,
    "PV_HV_BUFFER_FREE": Buffer.FREE, "PV_HV_BUFFER_QUEUED": Buffer.QUEUED,
    "PV_HV_WORK_ENTRIES": Work.ENTRIES, "PV_HV_WORK_FREE": Work.FREE, "PV_HV_WORK_FILLED": Work.FILLED,
    "PV_HV_WORK_TAKEN": Work.TAKEN, "PV_HV_WORK_CLAIMED": Work.CLAIMED,
    "PV_HV_SINT_VECTOR": Sint.VECTOR, "PV_HV_SINT_MASKED": Sint.MASKED, "PV_HV_SINT_AUTO_EOI": Sint.AUTO_EOI,
    "PV_HV_SINT_POLLING": Sint.POLLING, "PV_HV_SINT_VMBUS": hyperv.SINT_VMBUS,
    "PV_HV_MESSAGE_VMBUS": hyperv.MESSAGE_VMBUS, "PV_HV_VECTOR_OF_IRQ0": hyperv.VECTOR_OF_IRQ0,
    "PV_HV_VP(31, taken)": Vp.at(31, Vp.TAKEN),
    "PV_HV_SLOT(126, 15, payload)": Slot.at(126, 15, Slot.PAYLOAD),
    "PV_HV_FLAG_WORD(127, 15, 2047)": flag_word(127, 15, 2047),
    "PV_HV_BUFFER(15, 15, message)": Buffer.at(15, 15, Buffer.MESSAGE),
    "PV_HV_WORK(511, message)": Work.at(511, Work.MESSAGE),
}  # fmt: skip
SIZES_CHECKED_BELOW = {"pv_hv_header", "pv_hv_vp"}
# Numbers of the drawing's classes that are no fields of a C structure; compared above, under their C names.
NO_FIELDS = {
    "BYTES", "PAYLOAD_BYTES", "META_SIZE", "META_PENDING", "FREE", "QUEUED", "FILLED", "ROWS", "A_PORT", "ENTRIES",
    "TASKLET_MESSAGE", "TASKLET_EVENT", "TAKEN", "CLAIMED", "STATE_MASK", "SERIAL_SHIFT", "SERIALS",
}  # fmt: skip


def drawn(name: str) -> int | None:
    """Return what the drawing says of a number of the C table; None if it does not know it."""
    struct, _, field = name.partition(".")
    number = getattr(DRAWN.get(struct), field.upper(), None) if field else NUMBERS.get(name)
    return number if isinstance(number, int) else None


def test_every_number_of_the_c_declarations_is_in_the_drawing_and_equal() -> None:
    table = {name: value for name, value in _core.HYPERV_LAYOUT.items() if name not in SIZES_CHECKED_BELOW}

    assert {name: drawn(name) for name in table} == table


def test_every_field_of_the_drawing_is_in_the_c_declarations() -> None:
    missing = [
        f"{struct}.{field.lower()}"
        for struct, page in DRAWN.items()
        for field, value in vars(page).items()
        if re.fullmatch("[A-Z_0-9]+", field) and isinstance(value, int)
        and field not in NO_FIELDS | ({"TAKEN"} if page is Work else set())
        and f"{struct}.{field.lower()}" not in _core.HYPERV_LAYOUT
    ]

    assert missing == []


def test_both_compilations_have_the_same_layout() -> None:
    assert _core.HYPERV_LAYOUT == _core_explored.HYPERV_LAYOUT


def test_regions_follow_each_other_without_overlap() -> None:
    page = hyperv.PAGE

    assert max(_core.HYPERV_LAYOUT[name] for name in SIZES_CHECKED_BELOW) <= page
    assert Frame.of_vp(hyperv.VPS_MAX, Frame.STATE) == Frame.INTERRUPT
    assert Frame.MONITOR + 2 == Frame.BUFFERS
    assert Buffer.at(Buffer.ROWS, 0, 0) == Frame.WORK * page
    assert Work.at(Work.ENTRIES - 1, Work.BYTES) == Frame.SPARE * page
    assert page == hyperv.SINTS * Slot.BYTES
    assert flag_word(0, hyperv.SINTS, 0) == page
    assert Slot.PAYLOAD + Slot.PAYLOAD_BYTES == Slot.BYTES == Buffer.BYTES - Buffer.MESSAGE
    assert Work.MESSAGE + Slot.BYTES <= Work.BYTES


def test_a_message_slot_is_that_of_the_specification() -> None:
    assert (Slot.TYPE, Slot.META, Slot.SENDER, Slot.PAYLOAD, Slot.BYTES) == (0, 4, 8, 16, 256)
    assert Slot.META_PENDING == 1 << 8  # flags are byte 5


def test_the_numbers_in_the_drawing_are_those_of_the_classes() -> None:
    text = hyperv.__doc__ or ""

    for number in (Frame.INTERRUPT, Frame.MONITOR, Frame.BUFFERS, Frame.WORK, Frame.SPARE, Frame.SPARE_COUNT, Buffer.BYTES,
                   Work.BYTES, Work.ENTRIES, Slot.PAYLOAD, Slot.PAYLOAD_BYTES):
        assert re.search(rf"\b{number}\b", text), number


def test_the_guest_may_use_its_own_frames_only() -> None:
    ours = [frame for frame in range(Frame.COUNT + 2) if not Frame.is_guest(frame)]

    assert ours == [
        0, *range(1, 129, 4), *range(Frame.BUFFERS, Frame.SPARE), Frame.COUNT, Frame.COUNT + 1,
    ]


def test_a_machine_has_a_segment_for_each_domain_on_the_platform_and_removes_it() -> None:
    run = secrets.token_hex(6)
    pages = MachinePages(run, {0: 1, 1: 2}, 0, {1})
    path = Path("/dev/shm", f"pvbus-{run}-h1")
    try:
        memory = pages.hyperv(1)
        assert path.stat().st_size == hyperv.BYTES
        assert "hyperv1" in pages.fds()
        check(memory, hyperv.MAGIC, "the segment")
        assert (memory.load32(Header.VCPUS), memory.load32(Header.DOMID)) == (2, 1)
        assert [memory.load64(Vp.sint(vp, 15)) for vp in range(3)] == [Sint.MASKED, Sint.MASKED, 0]
        with pytest.raises(KeyError):
            pages.hyperv(0)
        with pytest.raises(LayoutError):
            check(pages.domain(1), hyperv.MAGIC, "a domain's segment")
    finally:
        pages.close()
    assert not path.exists()
