# SPDX-License-Identifier: Apache-2.0
"""Offer, rescind, offer again, while the driver opens what it is given: does the last message about a relid decide (E10)?

One relid, two instances that are offered under it in turn. The driver opens its channel when it is probed, so a rescind finds it
between any two messages of an open; and with `timeouts` the guest gives up waiting at any moment, and the answer comes late.
"""

from __future__ import annotations

from pvbus.verify.scenarios.vmbus_pair import VmbusPair


class Offers(VmbusPair):
    """`rescinds` times an offer is withdrawn and followed by another: of the other instance, or, with `same`, of this one.

    `again`: the host dies behind its last message, and its heir repeats it.
    """

    name = "offers"

    def __init__(
        self, *, rescinds: int = 1, same: bool = False, opens: bool = True, timeouts: int = 0, again: bool = False
    ) -> None:
        toolstack = []
        for turn in range(rescinds):
            letter, next_one = ("a", "a") if same else ("ab"[turn % 2], "ba"[turn % 2])
            toolstack += [f"rescind {letter}", f"offer {next_one}"]
        if again:
            toolstack.append("again")
        super().__init__(toolstack=tuple(toolstack), seconds=(5.0,) * timeouts, opens=opens, offered="a")
