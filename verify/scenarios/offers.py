# SPDX-License-Identifier: Apache-2.0
"""Offer, rescind, offer again, while the driver opens what it is given: does the last message about a relid decide (E10)?

One relid and two instances that are offered under it in turn; `a` is there from the beginning. The driver opens its channel
when it is probed, so a rescind finds it between any two messages of an open. With `timeouts` the guest gives up waiting at any
moment, and the answer comes late.
"""

from __future__ import annotations

from pvbus.verify.explorer.scenario import claimed, within
from pvbus.verify.scenarios.vmbus_pair import VmbusPair
from pvbus.verify.scenarios.vmbus_sides import INSTANCES


class Offers(VmbusPair):
    """`script` is what the toolstack does: `offer b`, `rescind a`, and `again`, when the host dies and its heir repeats a
    message.

    `opens`: the driver opens its channel in its probe. `registers`: another driver registers, and so requests the offers once
    more.
    """

    ranges = within(timeouts=(0, 16))
    name = "offers"
    claims = claimed(
        "sc", {}, {"script": "rescind a, offer a"}, {"script": "rescind a", "timeouts": 1}, {"script": "rescind a, again"},
        {"script": "rescind a, offer b, rescind b, offer a", "opens": False},
        {"script": "offer b", "registers": True, "opens": False},
    )  # fmt: skip

    def __init__(
        self, script: str = "rescind a, offer b", *, opens: bool = True, timeouts: int = 0, registers: bool = False
    ) -> None:
        commands = tuple(command.strip() for command in script.split(",") if command.strip())
        for command in commands:
            what, _, instance = command.partition(" ")
            if command != "again" and (what not in ("offer", "rescind") or instance not in INSTANCES):
                raise ValueError(f"script: {command!r} is none of again, offer X, rescind X; X is one of {', '.join(INSTANCES)}")
        super().__init__(
            toolstack=commands,
            users=(("register",),) if registers else (), seconds=(5.0,) * timeouts, opens=opens, offered="a",
        )  # fmt: skip
