# SPDX-License-Identifier: Apache-2.0
"""Static ports on a running machine: events both ways, closing that closes nothing, a hypervisor that dies in between."""

from __future__ import annotations

import errno
import os
import select
from typing import TYPE_CHECKING, Any

import pytest

from pvbus.tests.machine.test_kills import kill_and_wait_for_heir
from pvbus.view.explain import explain

if TYPE_CHECKING:
    from collections.abc import Iterator

CONFIG = """
[[domain]]
id = 0
cpus = {cpus}
affinity = "spread"
kernel_virqs = [0]
kernel_ports = 3

[[domain]]
id = 1
cpus = {cpus}
affinity = "spread"

[[static_evtchn]]
domain = 0
port = 20
remote_domain = 1
remote_port = 21

[[static_evtchn]]
domain = 0
port = 4
remote_domain = 0
remote_port = 4095
"""
PAIRS = {"two domains": (0, 20, 1, 21), "loopback": (0, 4, 0, 4095)}
WAIT_MS = 10_000


class Ends:
    """Two files that have bound the two ends of a static channel."""

    def __init__(self, machine: Any, domain: int, port: int, remote_domain: int, remote_port: int) -> None:
        self.machine, self.port, self.remote_port = machine, port, remote_port
        self.near = machine.open_evtchn(domain=domain, nonblock=True)
        self.far = machine.open_evtchn(domain=remote_domain, nonblock=True)
        self.near.bind_static(port)
        self.far.bind_static(remote_port)

    def events_flow(self) -> bool:
        """Send one event each way, and see exactly it."""
        for sender, own, receiver, number in (
            (self.near, self.port, self.far, self.remote_port),
            (self.far, self.remote_port, self.near, self.port),
        ):
            sender.notify(own)
            assert receiver.poll(select.POLLIN, WAIT_MS) & select.POLLIN
            assert receiver.read_ports(8) == [number]
            receiver.enable([number])
        self.machine.settle()
        return not self.near.poll(select.POLLIN, 0) and not self.far.poll(select.POLLIN, 0)

    def close(self) -> None:
        self.near.close()
        self.far.close()


@pytest.fixture(scope="module", params=[1, 2], ids=["1 cpu", "2 cpus"])
def pvbus_config(request: pytest.FixtureRequest) -> str:
    return CONFIG.format(cpus=request.param)


@pytest.fixture
def machine(pvbus_shared_machine: Any) -> Any:
    return pvbus_shared_machine.machine


@pytest.fixture(params=PAIRS)
def ends(machine: Any, request: pytest.FixtureRequest) -> Iterator[Ends]:
    both = Ends(machine, *PAIRS[request.param])
    yield both
    both.close()


def static_ports(machine: Any) -> dict[tuple[int, int], tuple[str, int, int]]:
    return {
        (row["domain"], row["port"]): (row["state"], row["remote_domain"], row["remote_port"])
        for row in machine.ports() if row["static"]
    }  # fmt: skip


CONNECTED = {
    (0, 20): ("interdomain", 1, 21), (1, 21): ("interdomain", 0, 20),
    (0, 4): ("interdomain", 0, 4095), (0, 4095): ("interdomain", 0, 4),
}  # fmt: skip


@pytest.mark.checklist("A9.5")
def test_events_flow_both_ways_and_the_first_bind_finds_none(ends: Ends) -> None:
    ends.machine.settle()
    assert not ends.near.poll(select.POLLIN, 0)
    assert not ends.far.poll(select.POLLIN, 0)

    assert ends.events_flow()


@pytest.mark.checklist("A9.5", "A8.2", "A10.4")
def test_neither_unbind_nor_close_ends_a_static_channel(ends: Ends) -> None:
    machine = ends.machine

    ends.near.unbind(ends.port)
    ends.far.notify(ends.remote_port)       # nobody has a handler: it waits
    machine.settle()
    assert static_ports(machine) == CONNECTED
    ends.near.bind_static(ends.port)
    assert ends.near.poll(select.POLLIN, WAIT_MS) & select.POLLIN
    assert ends.near.read_ports(8) == [ends.port]
    ends.near.enable([ends.port])
    ends.far.close()

    assert static_ports(machine) == CONNECTED
    domain = next(domid for domid, port in CONNECTED if port == ends.remote_port)
    ends.far = machine.open_evtchn(domain=domain, nonblock=True)
    ends.far.bind_static(ends.remote_port)
    assert ends.events_flow()


@pytest.mark.checklist("A9.5", "E12")
def test_static_channels_outlive_the_hypervisor_with_and_without_handlers(ends: Ends) -> None:
    machine = ends.machine
    ends.near.unbind(ends.port)

    kill_and_wait_for_heir(machine, "hypervisor")

    assert static_ports(machine) == CONNECTED
    ends.near.bind_static(ends.port)
    assert ends.events_flow()
    ends.far.notify(ends.remote_port)
    kill_and_wait_for_heir(machine, "hypervisor")
    assert ends.near.poll(select.POLLIN, WAIT_MS) & select.POLLIN
    machine.settle()
    assert ends.near.read_ports(8) == [ends.port]
    ends.near.enable([ends.port])
    assert ends.events_flow()


@pytest.mark.checklist("A11.5", "A9.5")
def test_the_death_of_a_files_process_leaves_its_static_port(ends: Ends) -> None:
    machine = ends.machine
    slot = next(row["file"] for row in machine.ports() if row["port"] == ends.port)
    pid = next(row["process_pid"] for row in machine.status()["files"] if row["file"] == slot)
    os.kill(pid, 9)
    assert ends.near.poll(select.POLLIN, WAIT_MS) & select.POLLHUP
    with pytest.raises(OSError) as dead:
        ends.near.unbind(ends.port)
    assert dead.value.errno == errno.EIO
    domain = next(domid for domid, port in CONNECTED if port == ends.port)
    ends.near.close()
    ends.near = machine.open_evtchn(domain=domain, nonblock=True)

    ends.near.bind_static(ends.port)

    assert static_ports(machine) == CONNECTED
    assert ends.events_flow()


@pytest.mark.checklist("A9.5", "A12.14")
def test_a_static_port_is_nobody_elses(machine: Any) -> None:
    with machine.open_evtchn(domain=0) as file, machine.open_evtchn(domain=0) as other:
        file.bind_static(20)
        with pytest.raises(OSError) as taken:
            other.bind_static(20)
        assert taken.value.errno == errno.EBUSY
        with pytest.raises(OSError) as not_unbound:
            other.bind_interdomain(1, 21)
        assert not_unbound.value.errno == errno.EINVAL
        numbers = [other.bind_unbound_port(remote_domain=0) for _ in range(17)]
        assert numbers == [*range(5, 20), 21, 22]
        assert explain(machine, 0, 20).state == "never-raised"
        free = explain(machine, 0, 4)
    assert (free.state, free.next) == ("no-handler", "a file binds it (bind_static)")
    assert "static channel" in free.text
    assert free.steps[0]["detail"] == "static interdomain port, its peer is 0:4095"
