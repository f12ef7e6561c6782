# SPDX-License-Identifier: Apache-2.0
"""A channel is closed, rescinded, or left by the whole driver, in any state and while its device writes: does anything of it
live on (E11)?

A process opens the channel and ends it; what ends it from the other side comes at any moment. Behind the end no ring may be
lost, freed twice or written, no function may wait, and what is opened once more has to work as it did the first time.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from pvbus.verify.explorer.scenario import claimed, within
from pvbus.verify.scenarios.vmbus_pair import VmbusPair

if TYPE_CHECKING:
    from pvbus.verify.explorer.model import Model


class Teardown(VmbusPair):
    """A process calls open and then `ends`: `close`, `exit`, or `reopen` (close, and open once more).

    `rescind`: the host withdraws the device meanwhile. `ticks`: how often the device writes of its own accord. `reads`: another
    process reads the attributes. `timeouts`: how often the guest gives up waiting.
    """

    ranges = within(ticks=(0, 64), timeouts=(0, 16))
    name = "teardown"
    claims = claimed(
        "sc", {}, {"ends": "exit"}, {"ends": "reopen", "ticks": 0}, {"rescind": True, "ticks": 0},
        {"ends": "exit", "rescind": True, "ticks": 0}, {"reads": True, "ticks": 0}, {"timeouts": 1, "ticks": 0},
    )  # fmt: skip
    ENDS = {"close": ("open", "close"), "exit": ("open", "exit"), "reopen": ("open", "close", "open"), "": ("open",)}  # noqa: RUF012 # a table

    def __init__(
        self, *, ends: str = "close", rescind: bool = False, ticks: int = 1, reads: bool = False, timeouts: int = 0
    ) -> None:
        if ends not in self.ENDS:
            raise ValueError(f"nobody ends a channel by {ends!r}: {', '.join(filter(None, self.ENDS))}")
        self.ends = ends
        toolstack = ("tick",) * ticks + ("rescind a",) * rescind
        users = (self.ENDS[ends],) + ((("read",),) if reads else ())
        super().__init__(toolstack=toolstack, users=users, seconds=(5.0,) * timeouts, offered="a")

    def wrong(self, model: Model) -> str | None:
        """Each time that it was opened the device has signalled, and the doorbell was rung."""
        opens = sum(device.opens for device in self.host.devices.values())
        if not self.seconds and len(self.events) < opens:
            return f"the channel was opened {opens} times, and {len(self.events)} events came"
        return None
