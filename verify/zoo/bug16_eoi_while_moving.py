# SPDX-License-Identifier: Apache-2.0
"""Zoo 16: moving a port to another CPU unmasks it while its interrupt has not ended."""

from pvbus.actors.hypervisor import kernel
from pvbus.actors.hypervisor.irqs import IrqLayer
from pvbus.shm.layout import Domain, Irq
from pvbus.verify.scenarios.port_life import PortLife
from pvbus.verify.zoo import CAUGHT, Bug


class OneReason(PortLife):
    """Moves a port as if moving were the only reason to be masked."""

    def move(self, irqs: IrqLayer, port: int) -> None:
        """Mask, re-bind, and unmask whatever else keeps the port masked; it is not active on the new CPU."""
        self.path.mask(0, port)
        irqs.channels.bind_vcpu(0, port, self.cpus - 1)
        kernel.serve_on(self.domain, port, self.cpus - 1, range(self.cpus))
        kept = ~(Irq.ACTIVE | Irq.EOI_PENDING) & 2**64 - 1
        self.domain.fetch_and64(Domain.table(Domain.IRQ_WORDS, port), kept, "irq.move")
        irqs.channels.unmask_and_raise(0, port)


BUG = Bug(
    number=16,
    name="eoi-while-moving",
    sentence="moving a port to another CPU unmasks it while its event is being handled: both CPUs handle it",
    scenario=PortLife,
    handler=OneReason,
    parameters={"script": (("raise", 1), ("await", 1), ("move", 1), ("raise", 1)), "cpus": 2},
    expected={"sc": CAUGHT, "tso": CAUGHT, "arm": CAUGHT},
    story=(
        "A port is masked for three reasons that come and go independently: its driver has disabled it, its end of interrupt "
        "is due, it is being moved. With one mask bit and no record of the reasons, the end of the move unmasks a port whose "
        "event a user still has; the next event is then handled on the new CPU while the old one is not finished: the "
        "handler runs twice at once, and the ring gets the port twice. The first repair cleared the mark of a port that is "
        "active too early for events that users handle, and had to be repaired itself. Ours keeps the reasons in one word "
        "and unmasks when the last one goes."
    ),
    citation=(
        "Juergen Gross, 2021, reported by Julien Grall: 25da4618af24, b6622798bc50, 9e77d96b8e27, and the repair of the "
        "repair, 3de218ff39b9."
    ),
)
