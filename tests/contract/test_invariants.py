# SPDX-License-Identifier: Apache-2.0
"""A11: what holds however calls and events are mixed, and when processes die."""

import contextlib
import os
import random
import signal
import subprocess
import sys
from collections.abc import Callable
from typing import Any

import pytest

from pvbus.tests.contract.support import (
    bound,
    connect,
    connect_many,
    errno_of,
    take,
    unpack,
    wait_until,
    write_all,
)
from pvbus.view.pytest_plugin import BootedMachine, environment

Opened = Callable[..., Any]

USER = """
import sys
from pvbus.actors.client import attach
with attach(name=sys.argv[1]) as machine:
    file = machine.open_evtchn(domain=0, nonblock=True)
    print(*[file.bind_unbound_port(remote_domain=0) for _ in range(3)], flush=True)
    sys.stdin.read()
"""


@pytest.mark.checklist("A11.1")
def test_a_reader_that_writes_after_reading_sees_each_port_at_most_once(machine: Any, opened: Opened) -> None:
    rx, tx = opened(), opened()
    pairs = connect_many(machine, rx, tx, 64)
    tx_ports = [pair.tx_port for pair in pairs]

    for _ in range(5):
        for _ in range(3):
            tx.notify_many(tx_ports)
        assert sorted(take(machine, rx)) == [pair.rx_port for pair in pairs]
        write_all(rx, [pair.rx_port for pair in pairs])
        machine.settle()
        coalesced = take(machine, rx)
        assert len(coalesced) == len(set(coalesced))
        write_all(rx, coalesced)
        assert take(machine, rx) == []


@pytest.mark.checklist("A11.3")
def test_events_sent_while_a_port_is_masked_come_as_one_when_it_is_written(
    machine: Any, opened: Opened
) -> None:
    pair = connect(machine, opened(), opened())
    pair.send()
    assert take(machine, pair.rx) == [pair.rx_port]

    for _ in range(100):
        pair.tx.notify(pair.tx_port)
    assert take(machine, pair.rx) == []

    pair.enable()
    assert take(machine, pair.rx) == [pair.rx_port]
    pair.enable()
    assert take(machine, pair.rx) == []


@pytest.mark.checklist("A11.4", "A8.2")
def test_after_unbind_no_entry_is_added_and_those_in_the_ring_stay(machine: Any, opened: Opened) -> None:
    rx, tx = opened(), opened()
    queued, raised = connect_many(machine, rx, tx, 2)
    queued.send()

    queued.rx.unbind(queued.rx_port)
    raised.rx.unbind(raised.rx_port)
    queued.send()
    raised.send()

    assert take(machine, rx) == [queued.rx_port]


@pytest.mark.checklist("A11.4")
def test_a_new_binding_of_a_number_does_not_inherit_the_events_of_the_old(
    machine: Any, opened: Opened
) -> None:
    pair = connect(machine, opened(), opened())
    pair.send()
    assert take(machine, pair.rx) == [pair.rx_port]
    pair.send()  # pending and masked

    pair.rx.unbind(pair.rx_port)
    port = pair.rx.bind_unbound_port(remote_domain=0)

    assert port == pair.rx_port
    assert take(machine, pair.rx) == []
    peer = pair.tx.bind_interdomain(0, port)
    pair.tx.notify(peer)
    assert take(machine, pair.rx) == [port]


@pytest.mark.checklist("A11.1", "A11.3")
@pytest.mark.parametrize("seed", [1, 2, 3])
def test_nothing_is_lost_and_nothing_is_invented_under_random_use(
    machine: Any, opened: Opened, seed: int
) -> None:
    """A model of three sets says after each step what must lie in the ring."""
    rng = random.Random(seed)
    rx, tx = opened(), opened()
    peer_of = {pair.rx_port: pair.tx_port for pair in connect_many(machine, rx, tx, 16)}
    in_ring: set[int] = set()
    unwritten: set[int] = set()  # read, and masked until written back
    pending: set[int] = set()  # raised while masked

    def write_back() -> None:
        write_all(rx, sorted(unwritten))
        in_ring.update(pending & unwritten)
        pending.difference_update(unwritten)
        unwritten.clear()
        machine.settle()

    for _ in range(200):
        action = rng.choice(["notify", "notify", "read", "write back"])
        if action == "notify":
            port = rng.choice(list(peer_of))
            tx.notify(peer_of[port])
            machine.settle()
            (pending if port in in_ring | unwritten else in_ring).add(port)
        elif action == "read" and in_ring:
            count = rng.randint(1, 8)
            got = unpack(rx.read(4 * count))
            assert len(got) == min(count, len(in_ring))
            assert set(got) <= in_ring
            in_ring.difference_update(got)
            unwritten.update(got)
        else:
            write_back()

    for _ in range(3):
        assert sorted(take(machine, rx)) == sorted(in_ring)
        unwritten |= in_ring
        in_ring.clear()
        write_back()
    assert not in_ring | pending


@pytest.mark.checklist("A12.12")
def test_on_one_cpu_events_arrive_in_the_order_of_their_notifies(machine: Any, opened: Opened) -> None:
    rx, tx = opened(), opened()
    pairs = connect_many(machine, rx, tx, 16)
    random.Random(7).shuffle(pairs)

    for pair in pairs:
        pair.tx.notify(pair.tx_port)

    assert take(machine, rx) == [pair.rx_port for pair in pairs]


@pytest.mark.checklist("A11.5", "A12.7", "A12.14")
def test_the_ports_of_a_killed_user_are_free_and_its_peers_unbound(
    pvbus_shared_machine: BootedMachine, machine: Any, opened: Opened
) -> None:
    command = [sys.executable, "-c", USER, pvbus_shared_machine.name]
    file = opened()
    with subprocess.Popen(
        command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, env=environment()
    ) as user:
        try:
            assert user.stdout is not None
            ports = [int(word) for word in user.stdout.readline().split()]
            peer = file.bind_interdomain(0, ports[0])
            assert take(machine, file) == [peer]
        finally:
            user.kill()

    wait_until(lambda: not bound(machine) & set(ports), "the dead user's ports are free")
    assert [file.bind_unbound_port(remote_domain=0) for _ in ports] == ports
    assert errno_of(file.notify, peer) == ""
    state = next(port for port in machine.ports() if (port["domain"], port["port"]) == (0, peer))
    assert state["state"] == "unbound"


@pytest.mark.checklist("A11.5")
def test_the_death_of_a_file_process_is_a_release_and_its_user_gets_eio(
    machine: Any, opened: Opened
) -> None:
    tx = opened()
    before = file_processes(machine)
    rx = opened()
    (victim,) = set(file_processes(machine)) - set(before)
    pair = connect(machine, rx, tx)

    os.kill(file_processes(machine)[victim], signal.SIGKILL)
    wait_until(lambda: pair.rx_port not in bound(machine), "the dead file's port is free")

    assert errno_of(rx.bind_unbound_port, 0) == "EIO"
    assert errno_of(rx.read, 4096) == "EIO"
    assert errno_of(tx.notify, pair.tx_port) == ""
    port = tx.bind_interdomain(0, tx.bind_unbound_port(remote_domain=0))
    assert take(machine, tx) == [port]


@pytest.mark.checklist("A11.3")
@pytest.mark.parametrize("when", ["pending", "in the ring", "masked"])
def test_the_death_of_a_cpu_loses_nothing_and_doubles_nothing(
    pvbus_boot: Callable[[str], BootedMachine], pvbus_config: str, when: str
) -> None:
    """Each on a machine of its own: the number of restarts in a time is bounded."""
    machine = pvbus_boot(pvbus_config).machine
    rx, tx = (machine.open_evtchn(domain=0, nonblock=True) for _ in range(2))
    with contextlib.closing(rx), contextlib.closing(tx):
        pair = connect(machine, rx, tx)
        if when != "pending":
            pair.send()
        if when == "masked":
            assert take(machine, rx) == [pair.rx_port]
            pair.send()
        cpu = process(machine, "cpu/0.0")

        os.kill(cpu["pid"], signal.SIGKILL)
        if when == "pending":
            tx.notify(pair.tx_port)
        wait_until(lambda: reborn(machine, cpu), "the cpu is back")

        if when == "masked":
            assert take(machine, rx) == []
            pair.enable()
        assert take(machine, rx) == [pair.rx_port]
        pair.enable()
        assert take(machine, rx) == []


def process(machine: Any, name: str) -> Any:
    """Return the status of the process with this name."""
    return next(each for each in machine.status()["processes"] if each["name"] == name)


def file_processes(machine: Any) -> dict[str, int]:
    """Return the processes of open files: their pids by name."""
    everyone = machine.status()["processes"]
    return {each["name"]: each["pid"] for each in everyone if each["name"].startswith("file/") and each["state"] != "spare"}


def reborn(machine: Any, before: Any) -> bool:
    """Say whether the process runs again, as another one."""
    names = [each["name"] for each in machine.status()["processes"]]
    if before["name"] not in names:
        return False
    now = process(machine, before["name"])
    return bool(now["pid"] not in (0, None, before["pid"]) and now["restarts"] > before["restarts"])
