# SPDX-License-Identifier: Apache-2.0
"""Zoo 21: a ring that is doubled keeps its old contents in one half only."""

from pvbus.shm.layout import File, FilePage, Machine
from pvbus.verify.scenarios.ring_growth import RingGrowth
from pvbus.verify.zoo import CAUGHT, Bug


class CopiedOnce(RingGrowth):
    """Doubles the ring and leaves its contents where they are: the lower half."""

    def grow(self) -> None:
        """Store the new size under the lock."""
        self.machine.compare_exchange32(Machine.file(0, File.LOCK), 0, File.LOCK_FILE, "evr_lock")
        size = self.machine.load32(Machine.file(0, File.SIZE), "evr.size")
        self.page.store32_release(FilePage.SIZE, 2 * size, "evr_grow")
        self.machine.store32(Machine.file(0, File.SIZE), 2 * size, "evr.size")
        self.machine.store32_release(Machine.file(0, File.LOCK), 0, "evr_lock")


BUG = Bug(
    number=21,
    name="ring-copied-once",
    sentence="a ring that is doubled keeps its entries in one half: an index in the other half reads an empty slot",
    scenario=RingGrowth,
    handler=CopiedOnce,
    parameters={"entries": 2, "at": 2, "unread": 1, "events": 0},
    expected={"sc": CAUGHT, "tso": CAUGHT, "arm": CAUGHT},
    story=(
        "Indices of the ring are never taken modulo its size when it grows: entry i lies at i modulo the size. After a "
        "doubling an unread entry may have to be found in the upper half, or, when the indices have wrapped, in both. The "
        "first version copied one stretch of the old ring, nothing at all when it was full. Copying the old contents into "
        "both halves makes every index right, whatever consumer and producer are."
    ),
    citation=(
        "'fix ring resize when binding new events', Jan Beulich, 2016; the growth itself: David Vrabel, November 2015."
    ),
)
