# SPDX-License-Identifier: Apache-2.0
"""A user process that binds, notifies, unbinds, closes and opens again, and checks every step of it.

Both ends of its channels are its own, in two files, so it needs no tally: what must arrive is known at each
step, and anything else is a violation. Its word of the tally counts cycles.
"""

from __future__ import annotations

import errno
import select
import struct
import time
from contextlib import ExitStack

from pvbus.verify.launch import OpenFile
from pvbus.verify.users import WAIT_S_MAX, User, at_rest, say

PORTS_MAX = 8  # a cycle: few, so that there are many cycles


class Side:
    """One file of the two."""

    def __init__(self, user: User, domain: int) -> None:
        self.file: OpenFile = user.machine.open_evtchn(domain=domain, nonblock=True)
        self.domain = domain
        self.name = user.job["name"]

    def expect(self, ports: set[int], why: str) -> bool:
        """Wait until each of `ports` was read once and nothing else; write back what came."""
        missing = set(ports)
        deadline = time.monotonic() + WAIT_S_MAX
        while missing:
            left_ms = int((deadline - time.monotonic()) * 1000)
            if left_ms <= 0 or not self.file.poll(select.POLLIN, timeout_ms=left_ms) & select.POLLIN:
                where = ", ".join(f"{self.domain}:{port}" for port in sorted(missing))
                say(violation=f"{self.name}: port {where} not seen within {WAIT_S_MAX:.0f} s ({why}): lost")
                return False
            data = self.file.read(4096)
            for (port,) in struct.iter_unpack("=I", data):
                if port not in missing:
                    say(violation=f"{self.name}: port {self.domain}:{port} came and was not raised ({why})")
                    return False
                missing.discard(port)
            self.file.write(data)
        return True

    def expect_refusal(self, port: int) -> bool:
        """Demand ENOTCONN for a port that is gone."""
        try:
            self.file.notify(port)
        except OSError as error:
            if error.errno == errno.ENOTCONN:
                return True
            say(violation=f"{self.name}: notify of port {self.domain}:{port}, unbound: errno {error.errno}")
            return False
        say(violation=f"{self.name}: notify of port {self.domain}:{port}, unbound: accepted")
        return False


def _cycle(user: User, left: Side, right: Side) -> bool:
    rng = user.rng
    offered = [left.file.bind_unbound_port(right.domain) for _ in range(rng.randint(1, PORTS_MAX))]
    pairs = [(port, right.file.bind_interdomain(left.domain, port)) for port in offered]
    if not right.expect({mine for _, mine in pairs}, "the birth event"):
        return False
    for _ in range(rng.randint(1, 3)):
        for theirs, _ in pairs:
            left.file.notify(theirs)
        if not right.expect({mine for _, mine in pairs}, "one notify each"):
            return False
    for _, mine in pairs:
        right.file.notify(mine)
    if not left.expect(set(offered), "one notify each, the other way"):
        return False
    for theirs, mine in pairs:
        last_words = rng.random() < 0.5
        if last_words:
            left.file.notify(theirs)  # ring and calls keep their order: this must survive the unbind
        left.file.unbind(theirs)
        if last_words and not right.expect({mine}, "notify, then unbind of the sender's end"):
            return False
        if not left.expect_refusal(theirs):
            return False
        right.file.notify(mine)  # to a peer that is gone: accepted, and no effect
        if rng.random() < 0.7:
            right.file.unbind(mine)  # the rest goes with the file
    return True


def churn(user: User) -> None:
    """Go round until told to stop, with new files now and then."""
    domains = user.job["domain"], user.job["peer_domain"]
    held = True
    while held and user.running():
        with ExitStack() as stack:
            left, right = Side(user, domains[0]), Side(user, domains[1])
            stack.callback(left.file.close)
            stack.callback(right.file.close)
            for _ in range(user.rng.randint(1, 20)):
                held = held and user.running() and _cycle(user, left, right)
                user.words[user.job["own_word"]] += 1
    at_rest([])
