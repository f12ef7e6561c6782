# SPDX-License-Identifier: Apache-2.0
"""What a tool inside a domain, or the toolstack, asks of a running machine, beside files that are open and busy."""

from __future__ import annotations

import collections
import errno
import os
import select
import signal
import struct
import threading
import time
from typing import TYPE_CHECKING, Any

import pytest

from pvbus.actors.hypervisor import operations as op
from pvbus.shm.layout import Port

if TYPE_CHECKING:
    from collections.abc import Iterator

BOUND_S = 20.0
PORTS = 32
MOVES = 60
SELF = 0x7FF0

CONFIG = """\
[[domain]]
id = 0
cpus = 2
platforms = ["xen"]
abi = "{abi}"
kernel_virqs = [0]
kernel_ports = 3

[[domain]]
id = 1
platforms = ["xen"]
abi = "{abi}"
"""


@pytest.fixture(params=["fifo", "2-level"])
def machine(request: Any, pvbus_boot: Any) -> Any:
    return pvbus_boot(CONFIG.format(abi=request.param)).machine


@pytest.fixture
def pair(machine: Any) -> Iterator[tuple[Any, Any, int, int]]:
    near, far = machine.open_evtchn(domain=0, nonblock=True), machine.open_evtchn(domain=1, nonblock=True)
    port = near.bind_unbound_port(remote_domain=1)
    peer = far.bind_interdomain(0, port)
    assert arrives(far, peer)
    yield near, far, port, peer
    near.close()
    far.close()


def arrives(file: Any, port: int) -> bool:
    """Wait for an event, which must be this port's, and write it back."""
    assert file.poll(select.POLLIN, 5000) & select.POLLIN
    got = file.read_ports(8)
    file.enable(got)
    return bool(got == [port])


def wait_until(what: str, condition: Any) -> None:
    deadline = time.monotonic() + BOUND_S
    while not condition():
        assert time.monotonic() < deadline, f"not within {BOUND_S} s: {what}"
        select.select([], [], [], 0.005)


def kill_hypervisor(machine: Any) -> None:
    def state() -> dict[str, Any]:
        return next(one for one in machine.status()["processes"] if one["name"] == "hypervisor")

    before = state()
    os.kill(before["pid"], signal.SIGKILL)
    wait_until("the heir is up", lambda: state()["restarts"] > before["restarts"] and state()["state"] == "up")


def status(machine: Any, port: int, domain: int = 0) -> tuple[int, ...]:
    answer = machine.event_channel_op(op.STATUS, struct.pack("=H2xIIIII", SELF, port, 0, 0, 0, 0), domain)
    return struct.unpack("=H2xIIIII", answer)[2:]


def alloc_unbound(machine: Any, remote: int, domain: int = 0) -> int:
    answer = machine.event_channel_op(op.ALLOC_UNBOUND, struct.pack("=HHI", SELF, remote, 0), domain)
    return int(struct.unpack("=HHI", answer)[2])


# ---- raw operations


@pytest.mark.checklist("X1")
def test_status_tells_of_ports_of_files_and_of_the_kernel(machine: Any, pair: Any) -> None:
    near, _, port, peer = pair
    virq = near.bind_virq(3)

    assert status(machine, port) == (2, 0, 1, peer)
    assert status(machine, peer, domain=1) == (2, 0, 0, port)
    assert status(machine, virq) == (4, 0, 3, 0)
    assert status(machine, 1)[0] == 4  # the kernel's timer
    assert status(machine, 2)[0] == 5  # its IPI
    assert status(machine, 63) == (0, 0, 0, 0)


@pytest.mark.checklist("X1")
def test_an_unknown_operation_and_a_bad_pointer_are_refused_as_xen_does(machine: Any) -> None:
    for number, argument, refusal in ((99, None, errno.ENOSYS), (op.SEND, None, errno.EFAULT), (op.SEND, b"\1", errno.EFAULT)):
        with pytest.raises(OSError) as refused:
            machine.event_channel_op(number, argument)
        assert refused.value.errno == refusal


@pytest.mark.checklist("X1")
def test_a_raw_send_on_a_files_port_reaches_its_peer(machine: Any, pair: Any) -> None:
    near, far, port, peer = pair

    machine.event_channel_op(op.SEND, struct.pack("=I", port))
    assert arrives(far, peer)

    machine.event_channel_op(op.SEND, struct.pack("=I", peer), 1)
    assert arrives(near, port)


@pytest.mark.checklist("X1", "X6")
def test_a_port_that_no_file_has_survives_the_hypervisor_and_a_files_does_not_survive_its_file(machine: Any, pair: Any) -> None:
    near, far, port, peer = pair
    raw = alloc_unbound(machine, remote=1)
    end = far.bind_interdomain(0, raw)
    lone = alloc_unbound(machine, remote=1)
    virq = struct.unpack("=III", machine.event_channel_op(op.BIND_VIRQ, struct.pack("=III", 2, 0, 0)))[2]
    before = [(one["port"], one["state"], one["file"]) for one in machine.ports(0)]

    kill_hypervisor(machine)

    assert [(one["port"], one["state"], one["file"]) for one in machine.ports(0)] == before
    assert [status(machine, one)[0] for one in (raw, lone, virq)] == [2, 1, 4]
    far.unbind(end)  # its peer is unbound again, and still the kernel's
    kill_hypervisor(machine)
    assert [status(machine, one)[0] for one in (raw, lone, virq)] == [1, 1, 4]
    near.bind_static(lone)
    again = far.bind_interdomain(0, lone)
    far.notify(again)
    wait_until("it arrives", lambda: lone in near.read_ports(8) if near.poll(select.POLLIN, 0) else False)
    near.close()
    assert [status(machine, one)[0] for one in (port, raw, lone, virq)] == [0, 1, 2, 4]
    machine.event_channel_op(op.CLOSE, struct.pack("=I", raw))
    assert alloc_unbound(machine, remote=1) == port  # the lowest free one
    assert alloc_unbound(machine, remote=1) == raw
    assert machine.inspector().port_word(0, lone) & Port.RAW
    assert status(machine, peer, domain=1)[0] == 1


# ---- affinity


@pytest.mark.checklist("X2", "A11.3")
def test_ports_that_move_between_cpus_under_a_storm_lose_and_double_nothing(machine: Any) -> None:
    near, far = machine.open_evtchn(domain=0, nonblock=True), machine.open_evtchn(domain=1, nonblock=True)
    ports = near.bind_unbound_ports(1, PORTS)
    peers = dict(zip(ports, far.bind_interdomain_ports(0, ports), strict=True))
    machine.settle()
    far.enable(far.read_ports(1024))
    done = threading.Event()
    moved: list[int] = []

    def move() -> None:
        try:
            for turn in range(MOVES):
                for port in ports[turn % 4 :: 4]:
                    machine.set_affinity(0, port, (turn // 4 + port) % 2)
                moved.append(turn)
        finally:
            done.set()

    mover = threading.Thread(target=move)
    sent, seen = dict.fromkeys(ports, 0), collections.Counter[int]()
    mover.start()
    while not done.is_set() or seen.total() < sum(sent.values()):
        for port in ports:
            if not done.is_set() and seen[port] == sent[port]:  # one at a time: each must be seen just once
                sent[port] += 1
                far.notify(peers[port])
        if near.poll(select.POLLIN, 10_000) & select.POLLIN:
            got = near.read_ports(1024)
            seen.update(got)
            near.enable(got)
        elif done.is_set():
            break
    mover.join()
    machine.settle()

    assert len(moved) == MOVES
    assert near.poll(select.POLLIN, 0) == 0
    assert seen == sent
    assert min(sent.values()) > 1
    cpus = machine.status()["domains"][0]["vcpus"]
    assert all(one["events"] > 0 for one in cpus)
    near.close()
    far.close()


@pytest.mark.checklist("X2")
def test_what_cannot_move_says_so(machine: Any, pair: Any) -> None:
    near, _, port, _ = pair
    cases = ((7, port, 0, errno.ESRCH), (0, port, 2, errno.ENOENT), (0, 2, 1, errno.EINVAL), (0, 4000, 1, errno.EINVAL))
    for domain, number, vcpu, refusal in cases:
        with pytest.raises(OSError) as refused:
            machine.set_affinity(domain, number, vcpu)
        assert refused.value.errno == refusal
    machine.set_affinity(0, port, 1)
    assert next(one["vcpu"] for one in machine.ports(0) if one["port"] == port) == 1
    assert near.poll(select.POLLIN, 0) == 0


# ---- VIRQs and another kernel


@pytest.mark.checklist("X4")
def test_a_global_virq_goes_to_the_domain_that_was_made_its_handler(machine: Any, pair: Any) -> None:
    near, far, _, _ = pair
    old = near.bind_virq(3)
    machine.set_virq_handler(3, 1)
    with pytest.raises(OSError) as silent:
        machine.raise_virq(3)
    assert silent.value.errno == errno.ENOENT

    heard = far.bind_virq(3)

    assert machine.raise_virq(3, domain=0) == heard
    assert arrives(far, heard)
    machine.settle()
    assert near.poll(select.POLLIN, 0) == 0
    near.unbind(old)
    with pytest.raises(OSError) as refused:
        near.bind_virq(3)
    assert refused.value.errno == errno.EBUSY


@pytest.mark.checklist("X3", "A12.14")
def test_after_a_soft_reset_old_files_are_dead_peers_unbound_and_new_files_work(machine: Any, pair: Any) -> None:
    near, far, port, peer = pair
    raw = alloc_unbound(machine, remote=1)
    far.notify(peer)  # under way, and then nobody's

    machine.soft_reset(0)

    assert [one["port"] for one in machine.ports(0)] == [1, 2, 3]  # what the new kernel has bound
    assert status(machine, raw)[0] == status(machine, port)[0] == 0
    assert status(machine, peer, domain=1) == (1, 0, 0, 0)
    for call, argument in ((near.bind_unbound_port, 1), (near.notify, port), (near.enable, [port])):
        with pytest.raises(OSError) as dead:
            call(argument)
        assert dead.value.errno == errno.EIO
    far.notify(peer)  # to nobody: accepted
    with machine.open_evtchn(domain=0, nonblock=True) as fresh:
        again = fresh.bind_unbound_port(remote_domain=1)
        assert again == 4
        end = far.bind_interdomain(0, again)
        assert arrives(far, end)
        far.notify(end)
        assert arrives(fresh, again)
    assert far.bind_unbound_port(remote_domain=0)  # the other domain goes on
