# SPDX-License-Identifier: Apache-2.0
"""Zoo 23: a file is released by somebody who holds the lock that the handler waits for."""

from pvbus.actors.hypervisor.irqs import IrqLayer
from pvbus.shm.layout import File, Machine
from pvbus.verify.explorer.model import Model
from pvbus.verify.scenarios.unbinding import Unbinding
from pvbus.verify.zoo import CAUGHT, Bug


class UnderTheLock(Unbinding):
    """Takes the ring's lock to have it for itself, and then waits for handlers to end."""

    def call(self, model: Model, irqs: IrqLayer) -> None:
        """Lock, release, unlock."""
        lock = Machine.file(0, File.LOCK)
        while self.machine.compare_exchange32(lock, 0, File.LOCK_FILE, "evr_lock") != 0:
            model.spin("evr.lock.spin")
        super().call(model, irqs)
        self.machine.store32_release(lock, 0, "evr_lock")


BUG = Bug(
    number=23,
    name="waiting-under-the-lock",
    sentence="release waits for a handler while it holds the lock that the handler waits for: a deadlock",
    scenario=Unbinding,
    handler=UnderTheLock,
    parameters={"release": True, "ports": (1,), "pending": (1,), "before": ()},
    expected={"sc": CAUGHT, "tso": CAUGHT, "arm": CAUGHT},
    story=(
        "Releasing a file needs its ring to be quiet, so it is natural to take the ring's lock first. But unbinding waits "
        "for running handlers, and a handler takes that lock to queue its event. The drivers of 2010 to 2013 called what "
        "sleeps and waits under the one port spinlock; or freed the ring while a handler on another CPU was waiting for the "
        "lock, which then wrote into it. Right is: interrupts off, wait, unbind, and free last, with no lock held while "
        "waiting."
    ),
    citation="drivers/xen/evtchn.c of 2010 to 2013; per-user locks: David Vrabel, July 2013.",
)
