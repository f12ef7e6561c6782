# SPDX-License-Identifier: Apache-2.0
"""Zoo 20: a late end of interrupt that is due before all others waits for them."""

from pvbus.shm.layout import Domain
from pvbus.verify.scenarios.late_eoi import LateEoi
from pvbus.verify.zoo import CAUGHT, Bug


class NeverFirst(LateEoi):
    """Sets the timer for the first end of interrupt that is put off, and never for an earlier one."""

    def write_back(self, port: int) -> None:
        """End the port's interrupt, and leave the timer as it was if it was set."""
        was = self.domain.load64(Domain.EOI_NEXT_NS, "eoi.next")
        super().write_back(port)
        if was:
            self.domain.store64(Domain.EOI_NEXT_NS, was, "eoi.next")


BUG = Bug(
    number=20,
    name="never-at-the-head",
    sentence="a late end of interrupt is never put in front of those that wait: its port stays masked far too long",
    scenario=LateEoi,
    handler=NeverFirst,
    expected={"sc": CAUGHT, "tso": CAUGHT, "arm": CAUGHT},
    story=(
        "Ends of interrupt that are put off wait in the order of their times, and a timer is set for the first. The insertion "
        "compared with the second element and those behind it, never with the head: one that is due before all others went "
        "behind the head, and its port stayed masked until the head's time had come, up to a second later. Nothing is lost, "
        "so no test for lost events sees it; one needs a clock, and the demand that each deadline is kept. There are no two "
        "processes in this bug, but it was in this code."
    ),
    citation="'fix delayed eoi list handling', Juergen Gross, October 2023.",
)
