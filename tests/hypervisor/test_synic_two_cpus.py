# SPDX-License-Identifier: Apache-2.0
"""Messages to two virtual CPUs at once: each CPU's own tasklet takes its own, in whatever order they run (H10, zoo 4)."""

from __future__ import annotations

import itertools
import os

import pytest

from pvbus.actors.hypervisor import synic_msrs
from pvbus.actors.hypervisor.synic import Synic, request_interrupt
from pvbus.actors.workqueue.work import WorkRing
from pvbus.shm import hyperv
from pvbus.shm.hyperv import Frame, Slot, Vp
from pvbus.shm.layout import Domain, Machine
from pvbus.shm.memory import EventPath, Memory

CPUS = 2
VECTOR = 0x37
ROUNDS = 8


def memory(size: int) -> Memory:
    fd = os.memfd_create("pvbus-test", os.MFD_CLOEXEC)
    os.ftruncate(fd, size)
    try:
        return Memory(fd, size)
    finally:
        os.close(fd)


class Guest:
    """A domain of two CPUs whose SynIC is on; interrupts are requested, and taken when a test says so."""

    def __init__(self, variants: int = 0) -> None:
        machine, self.segment = memory(Machine.BYTES), memory(hyperv.BYTES)
        machine.store32(Machine.VARIANTS, variants)
        self.path = EventPath(machine, {0: memory(Domain.BYTES)})
        self.path.set_hyperv(0, self.segment, -1)
        self.synic = Synic(self.segment, CPUS, self.interrupt)
        for vp in range(CPUS):
            self.segment.store32(Vp.at(vp, Vp.VECTOR), VECTOR)
            frame = Frame.of_vp(vp, Frame.MESSAGES)
            self.synic.write_msr(vp, synic_msrs.SIMP, frame << 12 | 1)
            self.synic.write_msr(vp, synic_msrs.SINT0 + hyperv.SINT_VMBUS, VECTOR)
            self.synic.write_msr(vp, synic_msrs.SCONTROL, 1)
            self.synic.create_message_port(vp + 1, hyperv.SINT_VMBUS, vp)
        self.work = WorkRing(self.segment)

    def interrupt(self, vp: int, vector: int) -> None:
        request_interrupt(self.segment, vp, vector)

    def taken(self) -> list[bytes]:
        found = []
        while (payload := self.work.take()) is not None:
            found.append(payload.rstrip(b"\0"))
            self.work.done()
        return found


@pytest.mark.checklist("H10", "B4.2", "B5.3", "B5.5", "X19")
@pytest.mark.parametrize("order", list(itertools.permutations(range(CPUS))))
def test_messages_to_two_cpus_at_once_strand_none(order: tuple[int, ...]) -> None:
    guest = Guest()
    for turn in range(ROUNDS):
        for vp in range(CPUS):
            assert guest.synic.post(vp + 1, hyperv.MESSAGE_VMBUS, b"to %d, %d" % (vp, turn)) == 0

        for vp in order:
            guest.path.hv_run(0, vp)
            guest.synic.attend_eoms()

        assert sorted(guest.taken()) == [b"to %d, %d" % (vp, turn) for vp in range(CPUS)]
        for vp in range(CPUS):
            frame = Frame.of_vp(vp, Frame.MESSAGES)
            assert guest.segment.load32(Slot.at(frame, hyperv.SINT_VMBUS, Slot.TYPE)) == 0
