# SPDX-License-Identifier: Apache-2.0
"""Whatever process of a running machine is killed: its heir goes on, and nothing is lost or doubled."""

from __future__ import annotations

import collections
import errno
import os
import select
import signal
import threading
import time
from typing import TYPE_CHECKING, Any

import pytest

if TYPE_CHECKING:
    from collections.abc import Iterator

BOUND_S = 20.0
STORM_PORTS = 500
STORM_KILLS = 3  # below what stops the machine


def process(machine: Any, name: str) -> dict[str, Any]:
    found: dict[str, Any] = next(one for one in machine.status()["processes"] if one["name"] == name)
    return found


def wait_until(what: str, condition: Any) -> None:
    deadline = time.monotonic() + BOUND_S
    while not condition():
        assert time.monotonic() < deadline, f"not within {BOUND_S} s: {what}"
        select.select([], [], [], 0.005)


def kill_and_wait_for_heir(machine: Any, name: str) -> None:
    before = process(machine, name)
    os.kill(before["pid"], signal.SIGKILL)

    def is_back() -> bool:
        now = process(machine, name)
        return now["restarts"] > before["restarts"] and now["state"] == "up" and now["pid"] not in (0, before["pid"])

    wait_until(f"{name} is back", is_back)


CONFIG = """\
[[domain]]
id = 0
platforms = ["xen"]
abi = "{abi}"

[[domain]]
id = 1
platforms = ["xen"]
abi = "{abi}"
"""


@pytest.fixture(params=["fifo", "2-level"])
def pair(request: Any, pvbus_boot: Any) -> Iterator[tuple[Any, Any, Any, int, int]]:
    machine = pvbus_boot(CONFIG.format(abi=request.param)).machine
    near, far = machine.open_evtchn(domain=0, nonblock=True), machine.open_evtchn(domain=1, nonblock=True)
    port = near.bind_unbound_port(remote_domain=1)
    peer = far.bind_interdomain(0, port)
    assert far.poll(select.POLLIN, 2000)
    assert far.enable(far.read_ports(8)) == 1
    yield machine, near, far, port, peer
    near.close()
    far.close()


@pytest.mark.checklist("A11.3", "A11.5")
@pytest.mark.parametrize("victim", ["cpu/0.0", "hypervisor"])
def test_an_event_under_way_when_a_process_is_killed_arrives_once(pair: Any, victim: str) -> None:
    machine, near, far, port, peer = pair
    os.kill(process(machine, victim)["pid"], signal.SIGSTOP)
    far.notify(peer)

    kill_and_wait_for_heir(machine, victim)

    assert near.poll(select.POLLIN, 5000) & select.POLLIN
    machine.settle()
    assert near.read_ports(8) == [port]
    assert near.enable([port]) == 1
    machine.settle()
    assert near.poll(select.POLLIN, 0) == 0


@pytest.mark.parametrize("victim", ["cpu/0.0", "hypervisor"])
def test_an_event_delivered_before_a_kill_is_neither_lost_nor_doubled(pair: Any, victim: str) -> None:
    machine, near, far, port, peer = pair
    far.notify(peer)
    machine.settle()

    kill_and_wait_for_heir(machine, victim)

    machine.settle()
    assert near.read_ports(8) == [port]
    far.notify(peer)  # masked: kept until it is written back
    machine.settle()
    assert near.poll(select.POLLIN, 0) == 0
    near.enable([port])
    assert near.poll(select.POLLIN, 5000) & select.POLLIN
    machine.settle()
    assert near.read_ports(8) == [port]


@pytest.mark.parametrize("victim", ["cpu/0.0", "hypervisor"])
def test_a_write_back_under_way_when_a_process_is_killed_counts(pair: Any, victim: str) -> None:
    machine, near, far, port, peer = pair
    far.notify(peer)
    machine.settle()
    assert near.read_ports(8) == [port]
    far.notify(peer)
    machine.settle()
    os.kill(process(machine, victim)["pid"], signal.SIGSTOP)
    near.enable([port])

    kill_and_wait_for_heir(machine, victim)

    assert near.poll(select.POLLIN, 5000) & select.POLLIN
    machine.settle()
    assert near.read_ports(8) == [port]


def test_after_the_hypervisor_was_killed_every_call_works_again(pair: Any) -> None:
    machine, near, far, port, peer = pair

    kill_and_wait_for_heir(machine, "hypervisor")

    third = near.bind_unbound_port(remote_domain=1)
    fourth = far.bind_interdomain(0, third)
    assert third not in (0, port)
    near.notify(third)
    machine.settle()
    assert fourth in far.read_ports(8)
    near.unbind(port)
    assert {one["port"]: one["state"] for one in machine.ports(1)}[peer] == "unbound"
    with machine.open_evtchn(domain=0, nonblock=True) as fresh:
        assert fresh.bind_unbound_port(remote_domain=0) == port


def test_a_call_that_the_hypervisor_dies_under_is_made_again_by_its_heir(pair: Any) -> None:
    machine, near, _far, port, _peer = pair
    stopped = process(machine, "hypervisor")
    os.kill(stopped["pid"], signal.SIGSTOP)
    child = os.fork()
    if child == 0:  # kills it while the parent's call waits
        try:
            select.select([], [], [], 0.2)
            os.kill(stopped["pid"], signal.SIGKILL)
        finally:
            os._exit(0)

    fresh = near.bind_unbound_port(remote_domain=1)

    os.waitpid(child, 0)
    assert fresh == port + 1
    machine.settle()
    assert [one["port"] for one in machine.ports(0)] == [port, fresh]


@pytest.mark.checklist("A11.3")
@pytest.mark.parametrize("victim", ["cpu/0.0", "hypervisor"])
def test_killing_a_process_in_a_storm_loses_and_doubles_nothing(pair: Any, victim: str) -> None:
    machine, near, far, _, _ = pair
    ports = near.bind_unbound_ports(1, STORM_PORTS)
    peers = dict(zip(ports, far.bind_interdomain_ports(0, ports), strict=True))
    machine.settle()
    far.enable(far.read_ports(1024))
    sent, seen = dict.fromkeys(ports, 0), collections.Counter[int]()

    def kill() -> None:
        for number in range(1, STORM_KILLS + 1):
            wait_until("every port was served since the last kill", lambda: min(sent.values()) > number)  # noqa: B023 -- at once
            kill_and_wait_for_heir(machine, victim)

    killer = threading.Thread(target=kill)
    killer.start()
    while killer.is_alive() or seen.total() < sum(sent.values()):
        if killer.is_alive():
            idle = [port for port in ports if seen[port] == sent[port]]  # one at a time: each must be seen just once
            sent.update({port: sent[port] + 1 for port in idle})
            far.notify_many([peers[port] for port in idle])
        if near.poll(select.POLLIN, 10_000) & select.POLLIN:
            got = near.read_ports(1024)
            seen.update(got)
            near.enable(got)
        else:
            break
    killer.join()
    machine.settle()

    assert near.poll(select.POLLIN, 0) == 0
    assert seen == sent
    assert min(sent.values()) > STORM_KILLS


@pytest.mark.checklist("A11.5")
def test_a_killed_file_process_frees_its_ports_and_its_user_gets_eio(pair: Any) -> None:
    machine, near, _far, port, peer = pair
    file = next(one for one in machine.status()["files"] if one["domain"] == 0)

    os.kill(file["process_pid"], signal.SIGKILL)

    wait_until("its ports are free", lambda: machine.ports(0) == [])
    assert {one["port"]: one["state"] for one in machine.ports(1)}[peer] == "unbound"
    with pytest.raises(OSError) as failed:
        near.bind_unbound_port(remote_domain=0)
    assert failed.value.errno == errno.EIO
    for call, argument in ((near.notify, port), (near.write, port.to_bytes(4, "little")), (near.enable, [port])):
        with pytest.raises(OSError) as dead:
            call(argument)
        assert dead.value.errno == errno.EIO
    assert near.poll(select.POLLIN, 1000) & (select.POLLERR | select.POLLHUP)


def test_killing_a_process_too_often_stops_the_machine_with_a_clear_error(pvbus_boot: Any) -> None:
    booted = pvbus_boot('[[domain]]\nid = 0\ncpus = 1\nplatforms = ["xen"]\n')
    booted.exit_code_expected = 1
    machine = booted.machine
    with pytest.raises(OSError) as stopped:
        for _ in range(64):
            kill_and_wait_for_heir(machine, "cpu/0.0")

    assert isinstance(stopped.value, ConnectionError)
    assert booted.process.wait(20) == 1
    assert "cpu/0.0 died too often" in booted.log


def test_a_killed_fork_server_ends_the_machine_with_a_clear_error(pvbus_boot: Any) -> None:
    booted = pvbus_boot('[[domain]]\nid = 0\nplatforms = ["xen"]\n')
    booted.exit_code_expected = 1
    machine = booted.machine
    file = machine.open_evtchn(domain=0, nonblock=True)

    os.kill(process(machine, "forkserver")["pid"], signal.SIGKILL)

    assert booted.process.wait(BOUND_S) == 1
    assert "the fork server died" in booted.log
    assert file.poll(select.POLLIN, 5000) & select.POLLHUP
    with pytest.raises(OSError) as dead:
        file.bind_unbound_port(remote_domain=0)
    assert dead.value.errno == errno.EIO


def test_notifying_a_dead_machine_ends_in_eio_as_soon_as_there_is_no_room(pvbus_boot: Any) -> None:
    booted = pvbus_boot('[[domain]]\nid = 0\nplatforms = ["xen"]\n')
    booted.exit_code_expected = -signal.SIGKILL
    file = booted.machine.open_evtchn(domain=0, nonblock=True)
    port = file.bind_unbound_port(remote_domain=0)
    booted.process.kill()
    booted.process.wait(BOUND_S)
    assert file.poll(select.POLLIN, 5000) & select.POLLHUP

    begin = time.monotonic()
    with pytest.raises(OSError) as dead:
        for _ in range(3 * 8192):
            file.notify(port)

    assert dead.value.errno == errno.EIO
    assert time.monotonic() - begin < 5  # not the ten seconds that a live hypervisor is waited for
