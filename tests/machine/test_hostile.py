# SPDX-License-Identifier: Apache-2.0
"""Bad input at every border: an error to the offender, and nobody else notices."""

from __future__ import annotations

import contextlib
import errno
import os
import select
import signal
import socket
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any

import msgpack  # type: ignore[import-untyped]
import pytest

from pvbus.actors.runtime import messages as m
from pvbus.actors.runtime import rundir, wire
from pvbus.actors.runtime.asking import ask_blocking
from pvbus.shm.layout import FilePage, SubmissionRing

if TYPE_CHECKING:
    from collections.abc import Iterator


BOUND_S = 20.0


@pytest.fixture
def machine(pvbus_shared_machine: Any) -> Any:
    return pvbus_shared_machine.machine


@pytest.fixture
def pair(machine: Any) -> Iterator[tuple[Any, Any, int, int]]:
    """A victim's connected ports, which must work throughout."""
    near, far = machine.open_evtchn(domain=0, nonblock=True), machine.open_evtchn(domain=1, nonblock=True)
    port = near.bind_unbound_port(remote_domain=1)
    peer = far.bind_interdomain(0, port)
    assert far.poll(select.POLLIN, 2000)
    far.enable(far.read_ports(8))
    yield near, far, port, peer
    for _ in range(100):
        far.notify(peer)
        assert near.poll(select.POLLIN, 5000) & select.POLLIN
        assert near.enable(near.read(4096)) == 1
    near.close()
    far.close()


def connection(machine: Any) -> socket.socket:
    return rundir.connect_machine(rundir.run_directory(machine.name))


FOREIGN = {
    "nothing that is msgpack": b"\xc1",
    "truncated": wire.encode(m.Hello(), 7)[:-2],
    "text": b"GET / HTTP/1.1\r\n\r\n",
    "not an array": msgpack.packb({"version": 1}),
    "another version": msgpack.packb([99, "Hello", 7, False, {}]),
    "an unknown kind": msgpack.packb([1, "Reboot", 7, False, {}]),
    "a wrong type": msgpack.packb([1, "OpenEvtchn", 7, False, {"domain": "zero"}]),
    "a field too many": msgpack.packb([1, "Hello", 7, False, {"version": 1, "root": True}]),
    "a lying length": b"\x95\x01\xdb\xff\xff\xff\xff",
    "deeply nested": b"\x91" * 5000,
}


@pytest.mark.parametrize("frame", FOREIGN.values(), ids=FOREIGN.keys())
def test_a_foreign_frame_is_answered_with_an_error_and_the_next_one_is_served(machine: Any, pair: Any, frame: bytes) -> None:
    sock = connection(machine)

    sock.sendall(frame)

    sock.settimeout(5)
    data, _ = wire.recv_frame(sock)
    reply = wire.decode(data).message
    assert isinstance(reply, wire.Failure)
    assert reply.errno == errno.EBADMSG
    welcome, _ = ask_blocking(sock, m.Hello())
    assert isinstance(welcome, m.Welcome)
    sock.close()


def test_a_frame_that_is_too_long_is_refused(machine: Any, pair: Any) -> None:
    sock = connection(machine)

    sock.send(b"\x00" * (wire.FRAME_BYTES_MAX + 1))

    sock.settimeout(5)
    data, _ = wire.recv_frame(sock)
    assert isinstance(wire.decode(data).message, wire.Failure)
    sock.close()


@pytest.mark.parametrize("message", [m.Rewire(), m.Released(), m.CpuUp(domain=0, vcpu=0), m.AllocUnbound(remote_domain=0)])
def test_a_user_may_not_say_what_only_the_machine_says(machine: Any, pair: Any, message: wire.Message) -> None:
    sock = connection(machine)

    with pytest.raises(OSError) as refused:
        ask_blocking(sock, message)

    assert refused.value.errno in (errno.ENOSYS, errno.EPERM)
    sock.close()


def test_a_descriptor_that_is_no_open_file_is_refused_and_not_kept(machine: Any, pair: Any) -> None:
    supervisor = next(one["pid"] for one in machine.status()["processes"] if one["name"] == "supervisor")
    sock = connection(machine)
    ask_blocking(sock, m.Hello())
    ours, theirs = socket.socketpair()
    pipe = os.pipe()
    before = len(list(Path(f"/proc/{supervisor}/fd").iterdir()))
    refused = []

    for fds in ((), (ours.fileno(),), (pipe[0],), (sock.fileno(),)):
        with pytest.raises(OSError) as answer:
            ask_blocking(sock, m.Reopen(), fds)
        refused.append(answer.value.errno)

    assert refused == [errno.EBADMSG, errno.EINVAL, errno.EINVAL, errno.EINVAL]
    assert len(list(Path(f"/proc/{supervisor}/fd").iterdir())) == before
    for one in (ours, theirs, sock):
        one.close()
    wire.close_fds(pipe)


def test_a_user_cannot_keep_a_file_by_hiding_its_descriptor_in_its_own_doorbell(machine: Any, pair: Any) -> None:
    file = machine.open_evtchn(domain=0, nonblock=True)
    port = file.bind_unbound_port(remote_domain=0)
    doorbell = socket.socket(fileno=os.dup(file.fileno()))

    with doorbell, pytest.raises(BrokenPipeError):
        socket.send_fds(doorbell, [b"x"], [file.fileno()])
    file.close()

    assert port not in [one["port"] for one in machine.ports(0)]


def test_a_user_that_passes_a_file_and_dies_before_the_answer_leaves_nothing(machine: Any, pair: Any) -> None:
    file = machine.open_evtchn(domain=0, nonblock=True)
    port = file.bind_unbound_port(remote_domain=0)
    for _ in range(20):
        sock = connection(machine)
        wire.send_frame(sock, wire.encode(m.Reopen(), 1), (file.fileno(),))
        sock.close()

    file.close()

    deadline = time.monotonic() + BOUND_S
    while port in [one["port"] for one in machine.ports(0)]:
        assert time.monotonic() < deadline
        select.select([], [], [], 0.005)


def test_a_confused_user_loses_its_connection_and_nobody_elses(machine: Any, pair: Any) -> None:
    sock = connection(machine)
    sock.settimeout(5)

    with pytest.raises((ConnectionError, AssertionError)):
        for _ in range(100):
            sock.sendall(b"\xc1")
            data, _ = wire.recv_frame(sock)
            assert data

    assert machine.status()["state"] == "ready"
    sock.close()


def test_a_user_that_dies_in_mid_call_harms_nobody(machine: Any, pair: Any) -> None:
    for _ in range(20):
        sock = connection(machine)
        sock.sendall(wire.encode(m.OpenEvtchn(domain=0, comm="short"), 1))
        sock.close()

    deadline = time.monotonic() + BOUND_S
    while len(machine.status()["files"]) != 2 or len(files_processes(machine)) != 2:
        assert time.monotonic() < deadline, machine.status()["files"]
        select.select([], [], [], 0.005)


def files_processes(machine: Any) -> list[str]:
    return [one["name"] for one in machine.status()["processes"] if one["name"].startswith("file/") and one["state"] != "spare"]


def scribbled(near: Any, at: int, value: int) -> None:
    """Write where the user can write, as a user gone mad does."""
    near._shared.page.store64(at, value)


@pytest.mark.parametrize("value", [1, 5 << FilePage.EPOCH_SHIFT, 2**64 - 1, 0x7FFFFFFF], ids=hex)
def test_an_impossible_consumer_index_poisons_that_file_only(machine: Any, pair: Any, value: int) -> None:
    a, b = machine.open_evtchn(domain=0, nonblock=True), machine.open_evtchn(domain=0, nonblock=True)
    port = a.bind_unbound_port(remote_domain=0)
    peer = b.bind_interdomain(0, port)
    machine.settle()
    slot = next(f["slot"] for f in machine.status()["files"] if f["file"] == machine.inspector().port(0, port)["file"])

    scribbled(a, FilePage.CONS, value)
    b.notify(peer)
    machine.settle()

    with pytest.raises(OSError) as poisoned:
        a.read(4096)
    assert poisoned.value.errno == errno.EIO
    assert a.poll(select.POLLIN, 0) & select.POLLERR
    assert next(file for file in machine.status()["files"] if file["slot"] == slot)["poisoned"]
    assert b.read_ports(8) == [peer]
    a.close()
    b.close()


@pytest.mark.parametrize("jump", [SubmissionRing.BYTES, 2**31, 2**32 - 1])
def test_an_impossible_submission_tail_poisons_that_ring_only(machine: Any, pair: Any, jump: int) -> None:
    a = machine.open_evtchn(domain=0, nonblock=True)
    a.bind_unbound_port(remote_domain=0)
    before = machine.status()["counters"]["poisoned"]

    ring = a._shared.ring
    ring.store32(SubmissionRing.TAIL, jump)
    machine.settle()

    assert machine.status()["counters"]["poisoned"] == before + 1
    with pytest.raises(OSError) as poisoned:
        a.read(4096)
    assert poisoned.value.errno == errno.EIO
    a.close()


def test_garbage_in_a_submission_ring_is_refused_and_counted(machine: Any, pair: Any) -> None:
    near, far, port, peer = pair
    a = machine.open_evtchn(domain=0, nonblock=True)
    own = a.bind_unbound_port(remote_domain=1)
    before = machine.status()["counters"]["refused"]
    ring = a._shared.ring
    entries = [port, 1 << 30 | port, 0, 4096, 0x3FFFFFFF, 3 << 30, 0xFFFFFFFF, peer, own]

    for i, entry in enumerate(entries):
        ring.store32(SubmissionRing.DATA + 4 * i, entry)
    ring.store32_release(SubmissionRing.TAIL, len(entries))
    machine.settle()

    assert machine.status()["counters"]["refused"] > before
    assert near.poll(select.POLLIN, 0) == 0
    assert far.poll(select.POLLIN, 0) == 0
    a.close()


def test_a_users_page_cannot_be_truncated(machine: Any, pair: Any) -> None:
    a = machine.open_evtchn(domain=0, nonblock=True)
    truncated = []

    for path in Path("/proc/self/map_files").iterdir():
        name = ""
        with contextlib.suppress(FileNotFoundError):  # unmapped meanwhile: a forgotten file of another test
            name = str(path.readlink())
        if f"memfd:pvbus-{machine.run_id}" in name or "-submission" in name:
            with pytest.raises(OSError) as sealed:
                os.truncate(path, 0)
                pytest.fail(f"{path.readlink()} was truncated")
            truncated.append(sealed.value.errno)
    assert len(truncated) >= 3  # two pages of open files and one submission ring at least
    assert set(truncated) <= {errno.EPERM, errno.EACCES}
    a.close()


def test_a_user_stopped_in_the_middle_of_everything_holds_up_nobody(machine: Any, pair: Any) -> None:
    child = os.fork()
    if child == 0:
        try:
            mine = machine.open_evtchn(domain=0)
            mine.bind_unbound_port(remote_domain=0)
            mine.read(4)
        finally:
            os._exit(0)
    try:
        deadline = time.monotonic() + BOUND_S
        while len(machine.ports(0)) != 2:
            assert time.monotonic() < deadline
            select.select([], [], [], 0.005)
        os.kill(child, signal.SIGSTOP)
        with machine.open_evtchn(domain=0, nonblock=True) as other:
            assert other.bind_unbound_port(remote_domain=0) > 0
    finally:
        os.kill(child, signal.SIGKILL)
        os.waitpid(child, 0)
