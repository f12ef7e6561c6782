# SPDX-License-Identifier: Apache-2.0
"""The registers of the SynIC: reset values, bits that a write changes and bits that it does not, faults."""

import pytest

from pvbus.actors.hypervisor import synic_msrs as msr
from pvbus.actors.hypervisor.synic import HvFault
from pvbus.shm.hyperv import Frame, Header, Sint
from pvbus.tests.hypervisor.synic_rig import SynicRig

M64 = 2**64 - 1
PAGE = Frame.of_vp(1, Frame.MESSAGES) << 12
SINTS = range(msr.SINT0, msr.SINT0 + 16)


@pytest.fixture
def rig() -> SynicRig:
    return SynicRig(vcpus=2, on=())


@pytest.mark.checklist("X11s")
def test_registers_begin_with_their_reset_values(rig: SynicRig) -> None:
    read = rig.synic.read_msr

    assert [read(1, n) for n in (msr.SCONTROL, msr.SVERSION, msr.SIEFP, msr.SIMP, msr.EOM, msr.TPR)] == [0, 1, 0, 0, 0, 0]
    assert [read(1, n) for n in SINTS] == [0x10000] * 16
    assert [read(0, msr.STIMER0_CONFIG + n) for n in range(8)] == [0] * 8
    assert [read(0, n) for n in (msr.GUEST_OS_ID, msr.HYPERCALL)] == [0, 0]
    assert [read(vp, msr.VP_INDEX) for vp in (0, 1)] == [0, 1]


@pytest.mark.checklist("X11s")
@pytest.mark.parametrize(
    ("number", "written", "read"),
    [
        (msr.SCONTROL, M64, 1),
        (msr.SIMP, PAGE | 0xFFF, PAGE | 1),
        (msr.SIEFP, PAGE | 0xFFE, PAGE),
        (msr.SINT0 + 2, M64, 0x700FF),
        (msr.SINT0 + 15, 16, 16),
        (msr.SINT0 + 3, 15 | Sint.MASKED, 15 | Sint.MASKED),
        (msr.STIMER0_CONFIG, M64, 0xF1FFF),
        (msr.STIMER0_CONFIG + 7, M64, M64),
        (msr.TPR, 0xFF, 0xFF),
        (msr.GUEST_OS_ID, M64, M64),
        (msr.SIMP, 2**50 << 12, 2**50 << 12 & M64),  # off: any frame
    ],
)
def test_a_write_changes_the_bits_that_are_defined(rig: SynicRig, number: int, written: int, read: int) -> None:
    rig.synic.write_msr(1, number, written)

    assert rig.synic.read_msr(1, number) == read


@pytest.mark.parametrize(
    ("number", "value"),
    [
        (msr.SVERSION, 1), (msr.VP_INDEX, 0), (msr.TIME_REF_COUNT, 0), (msr.ICR, 0), (0x40000100, 0), (0x40000003, 0),
        (msr.SINT0, 15), (msr.SINT0 + 2, 0), (msr.TPR, 0x100), (msr.SCONTROL, -1),
        *[(msr.SIMP, frame << 12 | 1) for frame in (0, 1, 5, Frame.BUFFERS, Frame.WORK, Frame.SPARE - 1, Frame.COUNT, 2**50)],
        (msr.SIEFP, 1),
    ],
)
def test_a_write_that_cannot_be_faults_and_changes_nothing(rig: SynicRig, number: int, value: int) -> None:
    before = [rig.synic.read_msr(0, n) for n in (msr.SIMP, msr.SIEFP, msr.SCONTROL, msr.TPR, *SINTS)]

    with pytest.raises(HvFault, match="#GP"):
        rig.synic.write_msr(0, number, value)

    assert [rig.synic.read_msr(0, n) for n in (msr.SIMP, msr.SIEFP, msr.SCONTROL, msr.TPR, *SINTS)] == before


@pytest.mark.parametrize("number", [msr.EOI, msr.ICR, msr.SINT0 + 16, 0x1B])
def test_a_register_that_is_not_there_or_only_written_cannot_be_read(rig: SynicRig, number: int) -> None:
    with pytest.raises(HvFault, match="#GP"):
        rig.synic.read_msr(0, number)


@pytest.mark.parametrize("vp", [-1, 2])
def test_a_processor_that_the_domain_has_not_is_an_error_of_the_caller(rig: SynicRig, vp: int) -> None:
    with pytest.raises(ValueError, match="no virtual processor"):
        rig.synic.read_msr(vp, msr.SCONTROL)
    with pytest.raises(ValueError, match="no virtual processor"):
        rig.synic.write_msr(vp, msr.SCONTROL, 1)


@pytest.mark.checklist("X11h")
def test_a_hypercall_page_needs_a_guest_that_has_said_who_it_is(rig: SynicRig) -> None:
    write, read = rig.synic.write_msr, rig.synic.read_msr

    write(0, msr.HYPERCALL, PAGE | 1)
    assert read(0, msr.HYPERCALL) == PAGE
    write(0, msr.GUEST_OS_ID, 2976579765 << 32)
    write(0, msr.HYPERCALL, PAGE | 1)
    assert read(1, msr.HYPERCALL) == PAGE | 1


@pytest.mark.checklist("X11c")
def test_a_guest_that_goes_takes_its_hypercall_page_with_it_and_leaves_the_synic(rig: SynicRig) -> None:
    rig.enable(0)
    rig.synic.write_msr(0, msr.GUEST_OS_ID, 1)
    rig.synic.write_msr(0, msr.HYPERCALL, PAGE | 1)

    rig.synic.write_msr(0, msr.GUEST_OS_ID, 0)

    assert rig.synic.read_msr(0, msr.HYPERCALL) == PAGE
    assert rig.synic.read_msr(0, msr.SCONTROL) == 1


def test_the_reference_time_counts_100_ns_from_the_first_boot_and_survives_an_heir(rig: SynicRig) -> None:
    rig.clock += 12_345
    rig.reborn()

    assert rig.synic.read_msr(1, msr.TIME_REF_COUNT) == 123


def test_a_reset_gives_the_reset_values_and_discards_what_is_queued() -> None:
    rig = SynicRig()
    for number in range(3):
        rig.synic.post(1, 1, bytes([number]))
    rig.synic.write_msr(0, msr.GUEST_OS_ID, 1)

    rig.synic.reset()

    assert [rig.synic.read_msr(0, n) for n in (msr.SCONTROL, msr.SIMP, msr.SINT0 + 2, msr.GUEST_OS_ID)] == [0, 0, 0x10000, 0]
    rig.memory.store32(rig.slot(), 0)
    rig.enable(0)
    rig.synic.write_msr(0, msr.EOM, 0)
    assert rig.type_in_slot() == 0
    assert rig.count(Header.DELIVERED) == 1
