# SPDX-License-Identifier: Apache-2.0
"""As many ports as the ABI has: tens of thousands in one file under a storm, the last number there is, and how they go."""

from __future__ import annotations

import collections
import contextlib
import errno
import os
import select
import signal
import threading
import time
from typing import TYPE_CHECKING, Any

import pytest

from pvbus.shm.layout import PORTS_2L, PORTS_FIFO, Domain, Fifo
from pvbus.shm.memory import now_ns

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

PORTS = 65_536
ROUNDS = 4
STORM_S_MAX = 60.0
RELEASE_S_MAX = 10.0
PING_S_MAX = 1.0  # a stranger's round trip during a release, of which a turn takes about a millisecond
MANY = 10_000
KILL_AT_PORT = 3_000
READ_PORTS_MAX = 1024
NOTIFY_PORTS_MAX = 4096

ONE_DOMAIN = '[[domain]]\nid = 0\nplatforms = ["xen"]\nabi = "{abi}"\n'


@contextlib.contextmanager
def child(work: Callable[[], None]) -> Iterator[int]:
    """Do some work in a forked process, and demand that it ends well."""
    pid = os.fork()
    if pid == 0:
        code = 1
        try:
            work()
            code = 0
        finally:
            os._exit(code)
    yield pid
    assert os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) == 0


def receive(file: Any, count: int) -> collections.Counter[int]:
    """Read and write back until so many events have come; then nothing more may be there."""
    seen: collections.Counter[int] = collections.Counter()
    deadline = time.monotonic() + STORM_S_MAX
    while seen.total() < count:
        assert file.poll(select.POLLIN, 10_000) & select.POLLIN, f"{seen.total()} of {count} events came"
        assert time.monotonic() < deadline
        ports = file.read_ports(READ_PORTS_MAX)
        seen.update(ports)
        file.enable(ports)
    return seen


def connected(machine: Any) -> tuple[Any, Any, int, int]:
    """Two blocking files with a channel between them, its birth event taken."""
    near, far = machine.open_evtchn(domain=0), machine.open_evtchn(domain=1)
    port = near.bind_unbound_port(remote_domain=1)
    peer = far.bind_interdomain(0, port)
    assert far.read_ports(1) == [peer]
    far.enable([peer])
    return near, far, port, peer


@pytest.mark.checklist("A11.1", "A6.1", "A6.5", "A10.4")
def test_65536_ports_in_one_file_carry_a_storm_without_a_loss_and_go_without_holding_up_others(pvbus_machine: Any) -> None:
    machine = pvbus_machine.machine
    near, far = machine.open_evtchn(domain=0, nonblock=True), machine.open_evtchn(domain=1, nonblock=True)
    ports = near.bind_unbound_ports(1, PORTS)
    peers = far.bind_interdomain_ports(0, ports)
    assert (len(ports), len(peers)) == (PORTS, PORTS)
    assert receive(far, PORTS) == dict.fromkeys(peers, 1)  # born pending
    order = [peers[at * 40_503 % PORTS] for at in range(PORTS)]  # odd: each once, far apart

    for _ in range(ROUNDS):

        def storm() -> None:
            for at in range(0, PORTS, NOTIFY_PORTS_MAX):
                far.notify_many(order[at : at + NOTIFY_PORTS_MAX])

        with child(storm):
            assert receive(near, PORTS) == dict.fromkeys(ports, 1)
        machine.settle()
        assert near.poll(select.POLLIN, 0) == 0  # nothing doubled, no overflow

    assert near.poll(select.POLLIN | select.POLLOUT, 0) == select.POLLOUT
    file = next(one for one in machine.status()["files"] if one["domain"] == 0)
    assert (file["ports"], file["dropped"], file["overflow"]) == (PORTS, 0, False)
    assert file["delivered"] == PORTS * ROUNDS
    _release_under_traffic(machine, near)
    far.close()
    assert machine.ports() == []


def _release_under_traffic(machine: Any, file: Any) -> None:
    """Close a file of many ports while two strangers play ping-pong: neither takes long."""
    near, far, port, peer = connected(machine)
    closer = threading.Thread(target=file.close)
    longest_ns = trips = 0
    begin_ns = now_ns()
    closer.start()
    while closer.is_alive():
        sent_ns = now_ns()
        far.notify(peer)
        near.enable(near.read_ports(1))
        near.notify(port)
        far.enable(far.read_ports(1))
        longest_ns = max(longest_ns, now_ns() - sent_ns)
        trips += 1
    closer.join()
    assert now_ns() - begin_ns < RELEASE_S_MAX * 1e9
    assert trips > 10  # they went on meanwhile
    assert longest_ns < PING_S_MAX * 1e9
    near.close()
    far.close()


@pytest.mark.checklist("A12.14", "A9.3")
@pytest.mark.parametrize(("abi", "ports_max"), [("fifo", PORTS_FIFO), ("2-level", PORTS_2L)])
def test_the_last_port_of_the_abi_can_be_bound_and_none_after_it(pvbus_boot: Any, abi: str, ports_max: int) -> None:
    machine = pvbus_boot(ONE_DOMAIN.format(abi=abi)).machine
    file = machine.open_evtchn(domain=0, nonblock=True)

    ports = file.bind_unbound_ports(0, ports_max + 1)  # fewer come: the first failure ends it

    assert ports == list(range(1, ports_max))
    with pytest.raises(OSError) as full:
        file.bind_unbound_port(remote_domain=0)
    assert full.value.errno == errno.ENOSPC
    with pytest.raises(OSError) as none:
        file.bind_unbound_ports(0, 2)
    assert none.value.errno == errno.ENOSPC
    last = ports_max - 1
    file.unbind(last - 1)
    peer = file.bind_interdomain(0, last)
    assert peer == last - 1
    file.notify(peer)
    assert file.poll(select.POLLIN, 5000) & select.POLLIN
    machine.settle()
    assert sorted(file.read_ports(8)) == [peer, last]
    file.close()
    assert machine.ports() == []


@pytest.mark.checklist("A11.5")
def test_a_hypervisor_that_is_killed_under_many_binds_costs_none_and_leaves_none_twice(pvbus_machine: Any) -> None:
    machine = pvbus_machine.machine
    file = machine.open_evtchn(domain=0, nonblock=True)
    first = file.bind_unbound_ports(0, 10)
    hypervisor = next(one["pid"] for one in machine.status()["processes"] if one["name"] == "hypervisor")
    valid = machine.inspector().domain_pages[0]

    def kill() -> None:
        while valid.load32(Domain.VALID_EVTCHNS) < KILL_AT_PORT:
            os.sched_yield()
        os.kill(hypervisor, signal.SIGKILL)

    with child(kill):
        ports = file.bind_unbound_ports(0, MANY)

    assert first + ports == list(range(1, MANY + 11))
    assert [one["port"] for one in machine.ports(0)] == first + ports
    hypervisors = [one for one in machine.status()["processes"] if one["name"] == "hypervisor"]
    assert hypervisors[0]["restarts"] == 1
    file.close()
    assert machine.ports() == []


@pytest.mark.checklist("A12.14")
def test_the_toolstacks_limit_ends_what_all_files_of_a_domain_can_bind(pvbus_boot: Any) -> None:
    machine = pvbus_boot(ONE_DOMAIN.format(abi="fifo") + "max_event_channels = 100\n").machine
    one, other = machine.open_evtchn(domain=0, nonblock=True), machine.open_evtchn(domain=0, nonblock=True)

    assert one.bind_unbound_ports(0, 90) == list(range(1, 91))
    assert other.bind_unbound_ports(0, 90) == list(range(91, 101))  # the limit is the highest number

    with pytest.raises(OSError) as full:
        one.bind_virq(3)
    assert full.value.errno == errno.ENOSPC
    other.close()
    assert one.bind_virq(3) == 91
    one.close()


@pytest.mark.checklist("A12.13", "A12.15", "A9.4")
def test_the_limit_of_unbind_follows_the_event_array_up_and_never_down(pvbus_boot: Any) -> None:
    machine = pvbus_boot(ONE_DOMAIN.format(abi="fifo")).machine
    pages = machine.inspector().domain_pages[0]
    file = machine.open_evtchn(domain=0, nonblock=True)
    first = file.bind_unbound_port(remote_domain=0)

    def refusal(call: Callable[[int], object], port: int) -> int | None:
        with pytest.raises(OSError) as refused:
            call(port)
        return refused.value.errno

    assert refusal(file.unbind, Fifo.WORDS_A_PAGE - 1) == errno.ENOTCONN
    assert refusal(file.unbind, Fifo.WORDS_A_PAGE) == errno.EINVAL
    file.bind_static(5000)
    assert refusal(file.unbind, 5 * Fifo.WORDS_A_PAGE - 1) == errno.ENOTCONN
    assert refusal(file.unbind, 5 * Fifo.WORDS_A_PAGE) == errno.EINVAL
    assert refusal(file.bind_static, PORTS_FIFO) == errno.ENOMEM
    assert refusal(file.unbind, 5 * Fifo.WORDS_A_PAGE) == errno.EINVAL  # a refused one adds nothing

    file.bind_static(PORTS_FIFO - 1)

    assert pages.load32(Domain.ARRAY_PAGES) == Fifo.PAGES_MAX
    file.unbind(5000)
    file.unbind(PORTS_FIFO - 1)
    assert refusal(file.unbind, PORTS_FIFO - 1) == errno.ENOTCONN
    assert refusal(file.unbind, PORTS_FIFO) == errno.EINVAL
    file.close()
    with machine.open_evtchn(domain=0, nonblock=True) as later:  # of the domain, not of the file
        assert refusal(later.unbind, PORTS_FIFO - 1) == errno.ENOTCONN
        assert later.bind_unbound_port(remote_domain=0) == first
