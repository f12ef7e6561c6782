# SPDX-License-Identifier: Apache-2.0
"""Races between processes that a review has found, each made to happen by stopping whom it needs to be late."""

from __future__ import annotations

import contextlib
import errno
import os
import select
import signal
import socket
import threading
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest

from pvbus.actors.file.process import USERS_MAX
from pvbus.actors.runtime import messages as m
from pvbus.actors.runtime import rundir, wire
from pvbus.actors.runtime.asking import ask_blocking
from pvbus.actors.supervisor.pool import SPARES

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator
    from types import FrameType

BOUND_S = 20.0


def pid_of(machine: Any, name: str) -> int:
    return next(one["pid"] for one in machine.status()["processes"] if one["name"] == name)  # type: ignore[no-any-return]


def wait_until(what: str, condition: Callable[[], bool]) -> None:
    deadline = time.monotonic() + BOUND_S
    while not condition():
        assert time.monotonic() < deadline, f"not within {BOUND_S} s: {what}"
        select.select([], [], [], 0.005)


def everything_is_up(machine: Any, restarts: int) -> bool:
    processes = machine.status()["processes"]
    hypervisor = next(one for one in processes if one["name"] == "hypervisor")
    return hypervisor["restarts"] >= restarts and all(one["state"] in {"up", "spare"} for one in processes)


@contextlib.contextmanager
def stopped(pid: int) -> Iterator[None]:
    os.kill(pid, signal.SIGSTOP)
    try:
        yield
    finally:
        with contextlib.suppress(ProcessLookupError):
            os.kill(pid, signal.SIGCONT)


def connected(machine: Any, file: Any) -> tuple[int, int]:
    port = file.bind_unbound_port(remote_domain=0)
    peer = file.bind_interdomain(0, port)
    assert file.poll(select.POLLIN, 5000)
    machine.settle()
    file.enable(file.read_ports(64))
    return port, peer


def test_no_file_is_forgotten_when_the_hypervisor_dies_under_a_call(pvbus_machine: Any) -> None:
    machine = pvbus_machine.machine
    files = [machine.open_evtchn(domain=0, nonblock=True) for _ in range(24)]
    pairs = [connected(machine, file) for file in files]
    hypervisor = pid_of(machine, "hypervisor")
    os.kill(hypervisor, signal.SIGSTOP)
    reset = threading.Thread(target=files[0].reset)
    reset.start()

    os.kill(hypervisor, signal.SIGKILL)

    reset.join(BOUND_S)
    wait_until("all is up", lambda: everything_is_up(machine, 1))
    for file, (port, peer) in zip(files, pairs, strict=True):
        file.notify(peer)
        assert file.poll(select.POLLIN, 5000) & select.POLLIN
        assert file.read_ports(8) == [port]
        file.close()
    wait_until("all is released", lambda: machine.ports() == [])


def test_what_a_user_notified_before_it_closed_arrives_although_the_hypervisor_was_dead(pvbus_machine: Any) -> None:
    machine = pvbus_machine.machine
    near, far = machine.open_evtchn(domain=0, nonblock=True), machine.open_evtchn(domain=0, nonblock=True)
    port = near.bind_unbound_port(remote_domain=0)
    peer = far.bind_interdomain(0, port)
    machine.settle()

    os.kill(pid_of(machine, "hypervisor"), signal.SIGKILL)
    far.notify(peer)
    far.close()

    wait_until("all is up", lambda: everything_is_up(machine, 1))
    assert near.poll(select.POLLIN, 5000) & select.POLLIN
    assert near.read_ports(8) == [port]
    wait_until("the far end is free", lambda: [one["state"] for one in machine.ports()] == ["unbound"])
    near.close()


@pytest.mark.checklist("A11.5")
def test_a_port_that_a_dying_file_was_just_given_is_not_leaked(pvbus_machine: Any) -> None:
    machine = pvbus_machine.machine
    file = machine.open_evtchn(domain=0, nonblock=True)
    process = next(one["process_pid"] for one in machine.status()["files"])
    failed: list[int | None] = []

    def bind() -> None:
        try:
            file.bind_unbound_port(remote_domain=1)
        except OSError as error:
            failed.append(error.errno)

    with stopped(pid_of(machine, "hypervisor")):
        binder = threading.Thread(target=bind)
        binder.start()
        wait_until("the call is under way", lambda: len(file._shared.under_way) == 1)
        os.kill(process, signal.SIGKILL)
    binder.join(BOUND_S)

    assert failed
    file.close()
    wait_until("no port is left", lambda: machine.ports() == [])


@pytest.mark.checklist("H15", "A9.6")
def test_a_notify_does_not_wait_behind_a_slow_bind_of_its_file(pvbus_machine: Any) -> None:
    machine = pvbus_machine.machine
    file = machine.open_evtchn(domain=0, nonblock=True)
    ours = next(one["process_pid"] for one in machine.status()["files"])
    far = machine.open_evtchn(domain=0, nonblock=True)
    port = far.bind_unbound_port(remote_domain=0)
    peer = file.bind_interdomain(0, port)
    file.notify(peer)
    assert far.poll(select.POLLIN, 5000)
    far.enable(far.read_ports(64))
    bound: list[int] = []
    binder = threading.Thread(target=lambda: bound.append(file.bind_unbound_port(remote_domain=0)))

    with stopped(ours):
        binder.start()
        wait_until("the bind is under way", lambda: len(file._shared.under_way) == 1)
        file.notify(peer)
        assert far.poll(select.POLLIN, 5000) & select.POLLIN
        assert (far.read_ports(8), bound) == ([port], [])
    binder.join(BOUND_S)

    assert len(bound) == 1
    file.close()
    far.close()


def test_a_close_in_one_thread_waits_for_the_call_of_another(pvbus_machine: Any) -> None:
    machine = pvbus_machine.machine
    file = machine.open_evtchn(domain=0, nonblock=True)
    got: list[object] = []

    def bind() -> None:
        try:
            got.append(file.bind_unbound_port(remote_domain=0))
        except OSError as error:
            got.append(error)

    with stopped(pid_of(machine, "hypervisor")):
        binder = threading.Thread(target=bind)
        binder.start()
        wait_until("the call is under way", lambda: len(file._shared.under_way) == 1)
        file.close()
        assert not got
    binder.join(BOUND_S)

    assert got == [1]
    wait_until("and then it is released", lambda: machine.ports() == [])


@pytest.mark.checklist("A12.7", "A12.8")
def test_a_forked_child_can_close_although_a_thread_of_its_parent_reads(pvbus_machine: Any) -> None:
    machine = pvbus_machine.machine
    file = machine.open_evtchn(domain=0)
    port = file.bind_unbound_port(remote_domain=0)
    reader = threading.Thread(target=lambda: file.read(4), daemon=True)
    reader.start()
    wait_until("it reads", lambda: file.context.inflight == 1)
    child = os.fork()
    if child == 0:
        code = 1
        try:
            file.close()
            code = 0 if file._shared.door == -1 else 2
        finally:
            os._exit(code)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0

    with machine.open_evtchn(domain=0, nonblock=True) as other:
        other.notify(other.bind_interdomain(0, port))
        reader.join(BOUND_S)
    assert not reader.is_alive()
    file.close()


def test_descriptors_of_refused_messages_are_closed(pvbus_machine: Any) -> None:
    machine = pvbus_machine.machine
    supervisor = pvbus_machine.process.pid
    sock = rundir.connect_machine(rundir.run_directory(machine.name))
    ask_blocking(sock, m.Hello())  # it has taken the connection
    wait_until("the pool is full", lambda: spares(machine) == SPARES)
    before = len(os.listdir(f"/proc/{supervisor}/fd"))  # noqa: PTH208
    pipe = os.pipe()

    for number in range(1, 31):
        wire.send_frame(sock, wire.encode(m.FileUp(slot=0, domain=0), number), (pipe[0], pipe[0], pipe[1]))
        assert isinstance(wire.decode(wire.recv_frame(sock)[0]).message, wire.Failure)

    wait_until("they are closed", lambda: len(os.listdir(f"/proc/{supervisor}/fd")) <= before)  # noqa: PTH208
    for fd in pipe:
        os.close(fd)
    sock.close()


def test_a_user_cannot_take_more_than_one_submission_ring_a_connection(pvbus_machine: Any) -> None:
    machine = pvbus_machine.machine
    file = machine.open_evtchn(domain=0, nonblock=True)
    connection = file._shared.connection
    hypervisor = pid_of(machine, "hypervisor")
    before = len(os.listdir(f"/proc/{hypervisor}/fd"))  # noqa: PTH208

    for number in range(1000, 1040):
        wire.send_frame(connection, wire.encode(m.Attach(pid=os.getpid()), number))
    answers = [wire.decode(wire.recv_frame(connection)[0]).message for _ in range(40)]

    assert all(isinstance(answer, wire.Failure) for answer in answers)
    assert len(os.listdir(f"/proc/{hypervisor}/fd")) == before  # noqa: PTH208
    file.close()


@pytest.mark.checklist("A12.7")
def test_a_process_joins_a_file_although_the_hypervisor_dies_under_it(pvbus_machine: Any) -> None:
    machine = pvbus_machine.machine
    file = machine.open_evtchn(domain=0, nonblock=True)
    port, peer = connected(machine, file)
    hypervisor, process = pid_of(machine, "hypervisor"), machine.status()["files"][0]["process_pid"]
    before = descriptors(process)
    child = -1
    try:
        with stopped(hypervisor):
            child = os.fork()
            if child == 0:
                code = 1
                try:
                    file.notify(peer)
                    code = 0
                finally:
                    os._exit(code)
            wait_until("its file has asked for a submission ring", lambda: descriptors(process) >= before + 3)
            os.kill(hypervisor, signal.SIGKILL)
    finally:
        status = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])

    assert status == 0
    assert file.poll(select.POLLIN, 5000)
    assert file.read_ports(8) == [port]
    file.close()
    wait_until("all is released", lambda: machine.ports() == [])


def spares(machine: Any) -> int:
    return [one["state"] for one in machine.status()["processes"]].count("spare")


def descriptors(pid: int) -> int:
    return len(list(Path(f"/proc/{pid}/fd").iterdir()))


@pytest.mark.checklist("A12.7")
def test_the_process_that_is_one_too_many_is_refused_and_its_parent_goes_on(pvbus_machine: Any) -> None:
    machine = pvbus_machine.machine
    file = machine.open_evtchn(domain=0, nonblock=True)
    port = file.bind_unbound_port(remote_domain=0)
    connections = []
    for _ in range(USERS_MAX - 1):
        ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        wire.send_frame(file._shared.connection, wire.encode(m.Adopt()), (theirs.fileno(),))
        theirs.close()
        connections.append(ours)
        _, fds = ask_blocking(ours, m.Attach(pid=os.getpid()))
        wire.close_fds(fds)

    child = os.fork()
    if child == 0:
        code = 1
        try:
            file.notify(port)
        except OSError as error:
            code = error.errno or 1
        finally:
            os._exit(code)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == errno.EMFILE

    file.unbind(port)
    for connection in connections:
        connection.close()
    child = os.fork()
    if child == 0:
        code = 1
        try:
            file.bind_unbound_port(remote_domain=0)
            code = 0
        finally:
            os._exit(code)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0
    file.close()


@pytest.mark.checklist("A12.10", "A9.4")
def test_a_signal_handler_calls_the_file_and_the_machine_while_a_call_waits(pvbus_machine: Any) -> None:
    machine = pvbus_machine.machine
    file = machine.open_evtchn(domain=0, nonblock=True)
    hypervisor, main = pid_of(machine, "hypervisor"), threading.main_thread().ident
    first = file.bind_unbound_port(remote_domain=0)
    assert main is not None
    entered, states = threading.Event(), []

    def handler(_number: int, _frame: FrameType | None) -> None:
        states.append(machine.status()["state"])
        entered.set()
        file.unbind(first)
        machine.settle()

    def interrupt() -> None:
        wait_until("the call is under way", lambda: len(file._shared.under_way) == 1)
        signal.pthread_kill(main, signal.SIGUSR1)
        entered.wait(BOUND_S)
        os.kill(hypervisor, signal.SIGCONT)

    previous = signal.signal(signal.SIGUSR1, handler)
    helper = threading.Thread(target=interrupt)
    try:
        with stopped(hypervisor):
            helper.start()
            second = file.bind_unbound_port(remote_domain=0)
    finally:
        signal.signal(signal.SIGUSR1, previous)
        helper.join(BOUND_S)

    assert states == ["ready"]
    assert [port["port"] for port in machine.ports()] == [second]


@pytest.mark.checklist("A12.7", "A12.8")
def test_a_thread_of_a_forked_child_closes_while_another_joins(pvbus_machine: Any) -> None:
    machine = pvbus_machine.machine
    file = machine.open_evtchn(domain=0, nonblock=True)
    process = machine.status()["files"][0]["process_pid"]
    before = descriptors(process)
    child = -1
    try:
        with stopped(pid_of(machine, "hypervisor")):
            child = os.fork()
            if child == 0:
                code = 1
                try:
                    answers: list[object] = []
                    joiner = threading.Thread(target=lambda: answers.append(errno_of(file)))
                    joiner.start()
                    wait_until("it joins", lambda: len(file._shared.under_way) == 1)
                    file.close()
                    joiner.join(BOUND_S)
                    code = 0 if answers == [errno.EBADF] and file._shared.door == -1 else 2
                finally:
                    os._exit(code)
            wait_until("its file has asked for a submission ring", lambda: descriptors(process) >= before + 3)
    finally:
        status = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])

    assert status == 0
    assert file.bind_unbound_port(remote_domain=0) == 1


def errno_of(file: Any) -> int | None:
    try:
        file.notify(1)
    except OSError as error:
        return error.errno
    return 0


@pytest.mark.checklist("A10.3")
@pytest.mark.parametrize("what", ["open", "settle", "advance"])
def test_an_open_a_settle_and_an_advance_outlive_the_hypervisor_that_died_under_them(pvbus_machine: Any, what: str) -> None:
    machine = pvbus_machine.machine
    hypervisor, supervisor = pid_of(machine, "hypervisor"), pvbus_machine.process.pid
    wait_until("the pool is full", lambda: spares(machine) == SPARES)
    before = descriptors(supervisor)
    failed: list[BaseException] = []

    def advance() -> None:
        machine.advance(0.001)

    def ask() -> None:
        try:
            {"open": lambda: machine.open_evtchn(domain=0).close(), "settle": machine.settle, "advance": advance}[what]()
        except BaseException as problem:
            failed.append(problem)

    asker = threading.Thread(target=ask)
    with stopped(hypervisor):
        asker.start()
        if what == "open":
            wait_until("the supervisor opens", lambda: descriptors(supervisor) > before)
        else:
            wait_until("the question is under way", lambda: machine._asking == asker.ident)
        os.kill(hypervisor, signal.SIGKILL)
    asker.join(BOUND_S)

    assert failed == []
    wait_until("all is up, and nothing is left", lambda: everything_is_up(machine, 1) and not machine.status()["files"])
