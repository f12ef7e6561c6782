# SPDX-License-Identifier: Apache-2.0
"""The host, or the CPU, is killed at any step of a message's way: does each message come out, and is it handled once (E12 of E6)?

Claim, do, release: a buffer holds a message until it has been delivered, OFFERED and TAKEN say which message is, or was, in the
slot, and an entry of the work ring says who has claimed it. The heir begins when its forerunner has died, and does what its
process does when it is reborn. What comes twice into the work ring comes under its number, by which the workqueue drops it.
"""

from __future__ import annotations

from collections.abc import Iterable
from functools import partial
from typing import TYPE_CHECKING

from pvbus.shm.hyperv import Header, Slot, Vp, Work
from pvbus.verify.explorer.scenario import Start, claimed, within
from pvbus.verify.scenarios.synic_messages import SynicMessages

if TYPE_CHECKING:
    from pvbus.actors.hypervisor.synic import Synic
    from pvbus.verify.explorer.model import Model


class SynicDeath(SynicMessages):
    """`messages` have been posted through one port when it begins; `dies` is `cpu0` or `host`."""

    ranges = within(messages=(1, 12))
    name = "synic-death"
    claims = (
        *claimed("sc tso arm", {"messages": 1}, {"dies": "host"}, deaths=1),
        *claimed("sc tso", {}, deaths=1),
    )

    def __init__(self, *, messages: int = 2, dies: str = "cpu0") -> None:
        if dies not in ("cpu0", "host"):
            raise ValueError(f"{dies!r} does not die here: cpu0, host")
        super().__init__(messages=messages, posters=1, ahead=messages)
        self.mortal = (dies,)

    def prepare(self, model: Model, variants: int) -> None:
        """Make the pages, and a doorbell for births."""
        self.births = model.bell("births")
        super().prepare(model, variants)

    def start(self, model: Model) -> Iterable[Start]:
        """Give host, CPU, and the heir of one of them."""
        yield from super().start(model)
        yield "heir", partial(self._heir, model), True

    def _heir(self, model: Model) -> None:
        (dead,) = self.mortal
        model.await_death(dead)
        if dead == "host":
            host = self._host(model)
            self._make_ports(host)
            self.recover_host(host)
            host.attend_eoms()
            self._serve(model, host)
        model.ring(self.births, "cpu up")
        model.ring(self.exits, "cpu up")
        self.recover_cpu()
        self._cpu(model, 0)

    def attend(self, model: Model, host: Synic) -> None:
        """Answer EOMs, and look at the slot of a CPU that was born again."""
        if model.take(self.births, "cpu up"):
            self.welcome(host)
        else:
            host.attend_eoms()

    def welcome(self, host: Synic) -> None:
        """The hypervisor hears of the CPU's new process."""
        host.cpu_reborn(0)

    def recover_host(self, host: Synic) -> None:
        """Deliver what is queued; interrupt once more for what may have been delivered without."""
        host.recover()

    def recover_cpu(self) -> None:
        """Give up what was claimed, and look at the slot again."""
        self.path.hv_recover(0, 0)

    def broken(self, model: Model, stuck: list[str]) -> str | None:
        """The workqueue handles each message once, in order."""
        handled, last = [], 0
        for index in range(self.hv.load32(Header.WORK_TAIL)):
            state, number = self.hv.load32(Work.at(index, Work.STATE)), self.hv.load32(Work.at(index, Work.NUMBER))
            if state != Work.FILLED:
                return f"entry {index} of the work ring was claimed and is not filled: nothing behind it is handled"
            if self.hv.load32(Work.at(index, Work.MESSAGE + Slot.TYPE)) and number != last:
                handled.append(self.hv.load64(Work.at(index, Work.MESSAGE + Slot.PAYLOAD)))
                last = number
        posted = list(range(1, self.messages + 1))
        if handled == posted:
            return None
        owed = self.hv.load64(Vp.at(0, Vp.EOM)) - self.hv.load64(Vp.at(0, Vp.EOM_SEEN))
        return f"messages {posted} were posted, and {handled} handled; {owed} EOMs are unanswered"
