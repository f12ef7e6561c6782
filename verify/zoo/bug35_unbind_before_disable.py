# SPDX-License-Identifier: Apache-2.0
"""Zoo 35: the handler's data go first, and only then is the interrupt disabled."""

from pvbus.actors.hypervisor.irqs import IrqLayer
from pvbus.verify.explorer.model import Model
from pvbus.verify.scenarios.unbinding import Unbinding
from pvbus.verify.zoo import CAUGHT, Bug


class WrongWayRound(Unbinding):
    """Closes the channel before it sees to it that no handler runs."""

    def call(self, model: Model, irqs: IrqLayer) -> None:
        """Unbind, then disable and wait."""
        for port in list(irqs.ports_of(0, 0)):
            irqs.channels.close(0, port)
            while irqs.disable(0, port):
                model.spin("again")
            irqs.unbind(0, port)


BUG = Bug(
    number=35,
    name="unbind-before-disable",
    sentence="the channel is closed before its interrupt is disabled: its last event is lost, or somebody else's",
    scenario=Unbinding,
    handler=WrongWayRound,
    parameters={"release": False, "before": (1,)},
    expected={"sc": CAUGHT, "tso": CAUGHT, "arm": CAUGHT},
    story=(
        "Unbinding has an order: deliver what was raised, disable, wait for a handler that runs, unbind, close, free. With "
        "the close in front, an event that was raised before the call is wiped out with the pending bit, and a handler that "
        "is just being entered finds its port closed under it. The driver of today disables first; older ones did not."
    ),
    citation="drivers/xen/evtchn.c: the order of NOTIFY and UNBIND against the handler; disable, unbind, free since 2013.",
)
