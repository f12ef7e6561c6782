# SPDX-License-Identifier: Apache-2.0
"""Stay near who asks: a request and its answer are two wake-ups, which cost several times as much from one processor to another.

A server that also wakes others is not moved by the scheduler to the one caller that keeps it busy. So it moves itself, when the
same thread has asked many times in a row, and stays free to be moved on.
"""

from __future__ import annotations

import os

IN_A_ROW = 256  # two looks at processors cost as much as three requests

_all = os.sched_getaffinity(0)


def processor_of(thread: int) -> int:
    """Give the processor on which a thread last ran."""
    with open(f"/proc/{thread}/stat", "rb") as stat:  # noqa: PTH123 -- often enough: no Path for it
        return int(stat.read().rpartition(b")")[2].split()[36])


def follow(thread: int) -> None:
    """Go to the processor of a thread, if we may and are not there."""
    try:
        theirs = processor_of(thread)
        if theirs in _all and theirs != processor_of(os.getpid()):
            os.sched_setaffinity(0, {theirs})
            os.sched_setaffinity(0, _all)
    except OSError:  # it has ended, or may not be looked at
        return
