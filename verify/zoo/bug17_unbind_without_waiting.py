# SPDX-License-Identifier: Apache-2.0
"""Zoo 17: a channel is removed while its event is being handled."""

from pvbus.actors.hypervisor.irqs import IrqLayer
from pvbus.verify.explorer.model import Model
from pvbus.verify.scenarios.unbinding import Unbinding
from pvbus.verify.zoo import CAUGHT, Bug


class Impatient(Unbinding):
    """Disables the ports and unbinds them at once, without a look whether a handler runs."""

    def call(self, model: Model, irqs: IrqLayer) -> None:
        """Release the file."""
        for port in irqs.ports_of(0, 0):
            irqs.disable(0, port)
        for port in list(irqs.ports_of(0, 0)):
            irqs.unbind(0, port)


BUG = Bug(
    number=17,
    name="unbind-without-waiting",
    sentence="a port is unbound while its handler runs: the handler writes into what has been freed",
    scenario=Unbinding,
    handler=Impatient,
    parameters={"release": True, "ports": (1,), "pending": (1,), "before": ()},
    expected={"sc": CAUGHT, "tso": CAUGHT, "arm": CAUGHT},
    story=(
        "The upcall loop has found a port and is about to handle it; on another CPU the port's channel is closed and what "
        "belonged to it is freed; the loop goes on with the pointer that it holds. Masking does not help: it keeps the next "
        "event away, not the one that is being handled. Disable, wait until no handler runs, then free, in this order: what "
        "waits has to be the one who frees. In Linux a lock around the whole loop was the first repair, and deadlocked "
        "(zoo 18); it is RCU today."
    ),
    citation="XSA-331, Juergen Gross, September 2020, reported by Marek Marczykowski-Górecki and Jinoh Kang.",
)
