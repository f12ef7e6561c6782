# SPDX-License-Identifier: Apache-2.0
"""Zoo 25: closing a channel stops its events, and opening it again does not start them."""

from collections.abc import Callable
from typing import TYPE_CHECKING, Any

from pvbus.actors.workqueue import waits
from pvbus.verify.scenarios.teardown import Teardown
from pvbus.verify.scenarios.vmbus_sides import GuestSide
from pvbus.verify.zoo import CAUGHT, Bug

if TYPE_CHECKING:
    from pvbus.verify.explorer.model import Model


class ListensOnce(GuestSide):
    """Has the doorbell wired by the first open, and unwired by every close."""

    listened = False

    def ask(self, wait: waits.Wait, answer: Callable[[Any], None]) -> None:
        """Leave the doorbell as it is, if it was wired before."""
        if isinstance(wait, waits.Listen) and self.listened:
            answer(None)
            return
        self.listened |= isinstance(wait, waits.Listen)
        super().ask(wait, answer)


class Deaf(Teardown):
    """A guest whose close is not undone by its next open."""

    def make_guest(self, model: "Model") -> GuestSide:
        """Make the guest."""
        return ListensOnce(self, model)


BUG = Bug(
    number=25,
    name="deaf-after-reopen",
    sentence="close switches a channel's events off, and nobody switches them on again: a reopened channel hears nothing",
    scenario=Teardown,
    parameters={"ends": "reopen", "ticks": 0},
    handler=Deaf,
    expected={"sc": CAUGHT, "tso": CAUGHT, "arm": CAUGHT},
    story=(
        "Closing a channel must first make sure that its callback neither runs nor starts: else the callback meets rings "
        "that are freed. So close disables the event tasklet, or, with us, unwires the doorbell. One version of the driver "
        "forgot to enable it at the end; the channel opened again without a word and every later event was ignored. What is "
        "quiesced for a teardown belongs to the next open's list of things to do, before the host is told."
    ),
    citation=(
        "'serialize process_chn_event() and vmbus_close_internal()', 2015; the tasklet left disabled: 2017, 6463a4571cee; "
        "'Reset the channel callback in vmbus_onoffer_rescind()', 2018."
    ),
)
