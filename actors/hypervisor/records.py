# SPDX-License-Identifier: Apache-2.0
"""The records of open files and submission rings in the machine's segment: written by the hypervisor only."""

from __future__ import annotations

from typing import TYPE_CHECKING

from pvbus.shm.layout import FILES_MAX, SUBMISSIONS_MAX, File, Machine, Submission
from pvbus.shm.memory import now_ns

if TYPE_CHECKING:
    from collections.abc import Container, Iterator

    from pvbus.shm.memory import Memory


def format_file(machine: Memory, slot: int, domid: int) -> None:
    """Begin the record of a file that is opened now. What its own process writes (pids, name) stays."""
    for at in range(0, Machine.FILE_BYTES, 8):
        if at != File.OPENER_PID and not File.NAME <= at < File.NAME + File.NAME_BYTES:
            machine.store64(Machine.file(slot, at), 0)
    machine.store32(Machine.file(slot, File.DOMAIN), domid)
    machine.store32(Machine.file(slot, File.RESTRICTED), 0xFFFF)
    machine.store64(Machine.file(slot, File.OPENED_NS), now_ns())
    machine.store32_release(Machine.file(slot, File.STATE), File.OPEN)


def format_submission(machine: Memory, index: int, slot: int, pid: int) -> None:
    """Begin the record of a submission ring."""
    machine.store32(Machine.submission(index, Submission.HEAD), 0)
    machine.store64(Machine.submission(index, Submission.CLAIM), 0)
    machine.store64(Machine.submission(index, Submission.TAKEN), 0)
    machine.store32(Machine.submission(index, Submission.SLOT), slot)
    machine.store32(Machine.submission(index, Submission.PID), pid)
    machine.store32_release(Machine.submission(index, Submission.STATE), Submission.ATTACHED)


def abandoned_files(machine: Memory, known: Container[int]) -> Iterator[tuple[int, int]]:
    """For an heir: find files that the pages call open, or half released, and that nobody has handed over: (slot, domain)."""
    for slot in range(FILES_MAX):
        if slot not in known and machine.load32(Machine.file(slot, File.STATE)) in (File.OPEN, File.CLOSING):
            machine.store32_release(Machine.file(slot, File.STATE), File.CLOSING)
            yield slot, machine.load32(Machine.file(slot, File.DOMAIN))


def free_abandoned_rings(machine: Memory, attached: Container[int], files: Container[int]) -> None:
    """For an heir: free the records of submission rings whose file has gone."""
    for index in range(SUBMISSIONS_MAX):
        at = Machine.submission(index, Submission.STATE)
        owner = machine.load32(Machine.submission(index, Submission.SLOT))
        if index not in attached and owner not in files and machine.load32(at) != Submission.FREE:
            machine.store32(at, Submission.FREE)


def free_rings_of(machine: Memory, slot: int) -> None:
    """Free every record of a submission ring of this slot's file, also one that never came back after a rebirth."""
    for index in range(SUBMISSIONS_MAX):
        if machine.load32(Machine.submission(index, Submission.SLOT)) == slot:
            machine.store32(Machine.submission(index, Submission.STATE), Submission.FREE)
