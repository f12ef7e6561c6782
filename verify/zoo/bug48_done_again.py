# SPDX-License-Identifier: Apache-2.0
"""Zoo 48, our own: an heir of the hypervisor does what its forerunner had claimed once more, to be sure."""

from pvbus.shm._core_explored import EventPath
from pvbus.shm.layout import Domain, Machine, Submission
from pvbus.verify.scenarios.hypervisor_death import HypervisorDeath
from pvbus.verify.zoo import CAUGHT, Bug


class AgainToBeSure(HypervisorDeath):
    """An heir that asks only whether the port has been served since."""

    def attach(self, path: EventPath) -> None:
        """Take the ring over; a claim whose port was not served since is forgotten, and its entry executed again."""
        at = Machine.submission(0, Submission.CLAIM)
        noted = self.machine.load64(at, "sub.claim")
        if self.domain.load64(Domain.table(Domain.IRQ_WORDS, 1), "irq") >> 32 == noted & 0xFFFFFFFF:
            self.machine.store64(at, 0, "sub.claim")
        super().attach(path)


BUG = Bug(
    number=48,
    name="done-again",
    sentence="an heir repeats what its forerunner had executed: a CPU serves the port in between, and the event comes twice",
    scenario=HypervisorDeath,
    handler=AgainToBeSure,
    parameters={"cpu": "once"},
    search={"deaths": 1},
    expected={"sc": CAUGHT, "tso": CAUGHT, "arm": CAUGHT},
    story=(
        "A hypervisor that is killed leaves an entry claimed, and nobody knows whether it was executed. The claim says how "
        "often the port had been served; if that has not changed, doing it again seems harmless: pending is a bit. But a CPU "
        "is at work meanwhile: it may serve the port between the heir's look and the second execution, and then the event "
        "comes twice, or, for a port that was written back, is ended before its user has read it. What was done has to be "
        "recognised by its trace: pending (looked at before the count of services, which a CPU raises before it clears "
        "pending), or the port being enabled."
    ),
    citation="pvbus itself: the search of the scenario `hypervisor-death` found it in the heir's own code.",
)
