# SPDX-License-Identifier: Apache-2.0
"""The back-off of late end-of-interrupt on a running machine: an upcall loop that runs too long, and its ports."""

from __future__ import annotations

import collections
import os
import select
import signal
import time
from typing import Any

import pytest

from pvbus.shm.layout import Domain, Irq, Vcpu
from pvbus.tests.view.support import stopped
from pvbus.view.explain import Explanation, explain

PORTS = 1000
BOUND_S = 60.0
TICK_S = 0.004
LOOP_S_MAX = 2 * TICK_S
LATE_EOI_S = 10 * TICK_S
READS_A_TURN = 16
READ_PORTS_MAX = 1024
LOOK_EVENTS = 256  # an upcall loop looks at the clock no more often

CONFIG = """\
[[domain]]
id = 0
platforms = ["xen"]
abi = "{abi}"

[[domain]]
id = 1
platforms = ["xen"]
"""


class Storm:
    """A forked process that notifies all ports without end."""

    def __init__(self, file: Any, peers: list[int]) -> None:
        self.pid = os.fork()
        if self.pid == 0:
            try:
                while True:
                    file.notify_many(peers)
            finally:
                os._exit(1)

    def end(self) -> None:
        os.kill(self.pid, signal.SIGKILL)
        os.waitpid(self.pid, 0)


def with_bit(machine: Any, ports: list[int], bit: int) -> int:
    """Find a port whose irq word has a bit, or 0."""
    look = machine.inspector()
    return next((port for port in ports if look.irq_word(0, port) & bit), 0)


class LoopHeld:
    """Stops the CPU's process in the middle of an upcall loop, and lets it go on with a clock that says that it ran too long."""

    def __init__(self, machine: Any, near: Any, ports: list[int]) -> None:
        self.machine, self.near, self.ports = machine, near, ports
        self.vcpu = machine.inspector().domain_pages[0]
        self.pid = next(one["pid"] for one in machine.status()["processes"] if one["name"] == "cpu/0.0")

    def is_long(self) -> bool:
        """Whether a loop is open that has served so many that it looks at the clock."""
        started = self.vcpu.load64(Domain.vcpu(0, Vcpu.LOOP_STARTED_NS))
        return bool(started) and self.vcpu.load32(Domain.vcpu(0, Vcpu.LOOP_EVENTS)) >= LOOK_EVENTS

    def explained(self) -> Explanation:
        """Read and write back under a storm until a loop can be held, and a port of it is put off; say what `explain` says."""
        deadline = time.monotonic() + BOUND_S
        while time.monotonic() < deadline:
            for _ in range(READS_A_TURN):
                self.near.enable(self.near.read_ports(256))
            with stopped(self.pid):
                if not self.is_long():
                    continue
                self.machine.advance(LOOP_S_MAX + TICK_S)
            self.near.enable(self.near.read_ports(READ_PORTS_MAX))
            with stopped(self.pid):  # its loop does not end meanwhile, if it has not yet
                if with_bit(self.machine, self.ports, Irq.DEFER) and self.near.poll(select.POLLIN, 0) & select.POLLIN:
                    self.near.enable(self.near.read_ports(READ_PORTS_MAX))
                    self.machine.advance(0)  # behind it the hypervisor has taken them
                port = with_bit(self.machine, self.ports, Irq.DELAYED)
                found = explain(self.machine, 0, port) if port else None
            if found is not None and found.state == "eoi-put-off":
                return found
        raise AssertionError("no late EOI was put off")


@pytest.mark.checklist("X3")
@pytest.mark.parametrize("abi", ["fifo", "2-level"])
def test_late_eois_of_a_storm_are_put_off_said_so_and_end_when_their_time_has_come(pvbus_boot: Any, abi: str) -> None:
    machine = pvbus_boot(CONFIG.format(abi=abi)).machine
    near, far = machine.open_evtchn(domain=0), machine.open_evtchn(domain=1)
    ports = near.bind_unbound_ports(1, PORTS)
    peers = far.bind_interdomain_ports(0, ports)
    machine.settle()
    far.enable(far.read_ports(1024))
    storm = Storm(far, peers)
    try:
        found = LoopHeld(machine, near, ports).explained()
    finally:
        storm.end()

    assert "late EOI is put off until" in found.text
    assert any(step["where"] == "late EOI" and step["holds"] for step in found.steps)
    assert machine.status()["domains"][0]["vcpus"][0]["eois_put_off"] > 0
    os.set_blocking(near.fileno(), False)
    drain(machine, near, ports)
    assert with_bit(machine, ports, Irq.DELAYED) == 0
    far.notify_many(peers)  # and all of them are as they were
    machine.settle()
    assert drain(machine, near, ports) == dict.fromkeys(ports, 1)
    near.close()
    far.close()


def drain(machine: Any, file: Any, ports: list[int]) -> collections.Counter[int]:
    """Read and write back until nothing is left, and no EOI waits whose time has not come."""
    seen: collections.Counter[int] = collections.Counter()
    while True:
        machine.settle()
        if file.poll(select.POLLIN, 0) & select.POLLIN:
            got = file.read_ports(1024)
            seen.update(got)
            file.enable(got)
        elif with_bit(machine, ports, Irq.DELAYED):
            machine.advance(LATE_EOI_S)
        else:
            return seen
