# SPDX-License-Identifier: Apache-2.0
"""Zoo 4: one pair of tasklets for all CPUs, whose pages are a CPU's own."""

from pvbus.verify.scenarios.event_flags import EventFlags
from pvbus.verify.zoo import CAUGHT, Bug

BUG = Bug(
    number=4,
    name="one-tasklet-pair",
    sentence="an interrupt on CPU 1 finds the tasklet scheduled, on CPU 0: what lies in CPU 1's page stays there",
    scenario=EventFlags,
    parameters={"cpus": 2, "signals": 2},
    variant="one-tasklet-pair",
    expected={"sc": CAUGHT, "tso": CAUGHT, "arm": CAUGHT},
    story=(
        "Slots and event flags are pages of each virtual CPU; the driver has one message tasklet and one event tasklet for "
        "all of them. The interrupt handler of CPU 0 schedules one. Before it runs, the handler of CPU 1 schedules it, too: "
        "that is a no-op, and when it runs on CPU 0 it reads CPU 0's page only. A flag of CPU 1 waits for the next interrupt "
        "there, and a message for ever, because a slot that is full gets none. Tasklets have to be a CPU's own, as their "
        "pages are."
    ),
    citation=(
        "Live in the driver of 2012, harmless on hosts that interrupt CPU 0 only. Fixed by 'Support handling messages on "
        "multiple CPUs', K. Y. Srinivasan, February 2016, d81274aae61c."
    ),
)
