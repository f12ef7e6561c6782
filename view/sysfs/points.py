# SPDX-License-Identifier: Apache-2.0
"""Where the trees stand in /sys, and the number that the event-channel device has there."""

from __future__ import annotations

from pathlib import Path

BUS, PARENT = "bus/vmbus", "devices/VMBUS:00"
MISC_NAME = "xen!evtchn"  # a slash is a ! in /sys
MISC = f"devices/virtual/misc/{MISC_NAME}"
MISC_MAJOR = 10
MISC_MINOR_MAX = 127  # of those that the kernel gives to whoever asks for any: it counts down


def free_minors(numbers: Path = Path("/sys/dev/char")) -> list[int]:
    """Give the numbers that misc devices would get which ask for any, the next one first. OSError: there is none."""
    taken = {path.name for path in numbers.iterdir()}
    free = [minor for minor in range(MISC_MINOR_MAX, -1, -1) if f"{MISC_MAJOR}:{minor}" not in taken]
    if not free:
        raise OSError(f"each of the {MISC_MINOR_MAX + 1} numbers in {numbers} is taken")
    return free
