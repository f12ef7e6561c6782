# SPDX-License-Identifier: Apache-2.0
"""Zoo 47, our own: the hypervisor looks whether a CPU sleeps before it looks whether it has an upcall."""

from pvbus.shm.layout import Domain, Vcpu
from pvbus.verify.scenarios.unbinding import Unbinding
from pvbus.verify.zoo import CAUGHT, Bug


class SleepFirst(Unbinding):
    """Takes a CPU for idle in the wrong order."""

    def is_idle(self, vcpu: int) -> bool:
        """Look at the announcement, then at the flag."""
        if not self.domain.load32_acquire(Domain.vcpu(vcpu, Vcpu.SLEEPING), "idle.sleeping"):
            return False
        return not self.domain.load8(Domain.vcpu_info(vcpu, Domain.UPCALL_PENDING), "idle.flag")


BUG = Bug(
    number=47,
    name="idle-by-its-announcement",
    sentence="a CPU that has just taken an upcall counts as idle: its port is closed before the event came",
    scenario=Unbinding,
    handler=SleepFirst,
    parameters={"ports": (1,)},
    expected={"sc": CAUGHT, "tso": CAUGHT, "arm": CAUGHT},
    story=(
        "Before a port is unbound, what was notified has to be delivered, so the hypervisor waits until the CPU is idle: it "
        "has announced its sleep, and no upcall is pending. A CPU that finds an upcall behind its announcement takes the "
        "announcement back and then the flag. Looked at in the same order, the announcement is still there and the flag no "
        "longer: idle, while the handler has not begun. The port is disabled, the CPU finds it masked, and the event that "
        "came before the unbind is lost. Looked at the other way round, a flag that is gone means that the announcement is "
        "gone, too, or is a new one."
    ),
    citation="pvbus itself: the search of the scenario `unbinding` found it in the hypervisor's own code, in 900 executions.",
)
