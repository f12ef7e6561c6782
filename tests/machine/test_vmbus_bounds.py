# SPDX-License-Identifier: Apache-2.0
"""How much of one user may wait, and how much it may have: the rest is refused at once, and nobody else notices."""

from __future__ import annotations

import contextlib
import errno
import os
import signal
from typing import TYPE_CHECKING, Any

import pytest

from pvbus.actors.client import attach
from pvbus.actors.runtime import messages as m
from pvbus.actors.runtime import vmbus_messages as vm
from pvbus.actors.runtime.wire import Done, Failure, close_fds, decode, encode, recv_frame, send_frame
from pvbus.actors.supervisor.workqueues import CONNECTS_A_USER_MAX, SETTLES_A_USER_MAX
from pvbus.actors.workqueue.process import CALLS_A_USER_MAX, DRIVERS_A_USER_MAX
from pvbus.tests.machine.vmbus_support import BOUND_S, ECHO, HEARTBEAT, config, drive, echo, process

if TYPE_CHECKING:
    import socket
    from collections.abc import Iterator

    from pvbus.actors.runtime.wire import Message


@pytest.fixture(scope="module")
def pvbus_config() -> str:
    return config()


@pytest.fixture
def machine(pvbus_shared_machine: Any) -> Any:
    machine = pvbus_shared_machine.machine
    machine.settle()
    return machine


@contextlib.contextmanager
def stopped(machine: Any, name: str) -> Iterator[None]:
    """Let a process stand still."""
    pid = process(machine, name)["pid"]
    os.kill(pid, signal.SIGSTOP)
    try:
        yield
    finally:
        os.kill(pid, signal.SIGCONT)


def answer(sock: socket.socket) -> tuple[int, Message]:
    """Take the next answer; uevents and calls of drivers are none."""
    sock.settimeout(BOUND_S)
    while True:
        data, fds = recv_frame(sock)
        close_fds(fds)
        frame = decode(data)
        if frame.reply:
            return frame.request, frame.message


@pytest.mark.parametrize(("message", "most"), [
    (vm.ConnectBus(domain=0), CONNECTS_A_USER_MAX), (m.Settle(), SETTLES_A_USER_MAX),
])  # fmt: skip
def test_so_many_requests_of_a_user_wait_and_the_next_is_refused(machine: Any, message: Message, most: int) -> None:
    with attach(name=machine.name) as other:
        sock = other._connected()
        for turn in range(2):   # what has been answered does not count
            with stopped(machine, "workqueue/0"):
                for number in range(1, most + 2):
                    send_frame(sock, encode(message, number))
                number, refusal = answer(sock)
                assert (number, isinstance(refusal, Failure) and refusal.errno) == (most + 1, errno.EAGAIN), turn
                with attach(name=machine.name) as third:
                    assert third.channels() == []   # and others are heard
            answers = dict(answer(sock) for _ in range(most))
            assert sorted(answers) == list(range(1, most + 1))
            assert all(isinstance(one, Done | vm.BusConnection) for one in answers.values())


def test_a_user_has_so_many_drivers_and_others_have_theirs(machine: Any) -> None:
    with attach(name=machine.name) as other:
        connection = other.bus()._connection
        table = [HEARTBEAT.bytes_le]
        for number in range(DRIVERS_A_USER_MAX):
            connection.ask(vm.RegisterDriver(name=f"driver{number}", id_table=table))
        with pytest.raises(OSError, match="are registered") as refused:
            connection.ask(vm.RegisterDriver(name="one more", id_table=table))
        assert refused.value.errno == errno.ENOSPC
        connection.ask(vm.UnregisterDriver(name="driver7"))
        connection.ask(vm.RegisterDriver(name="one more", id_table=table))

        relid = machine.offer("echo")
        echo(drive(machine).channel, 20)
        machine.unregister_driver("echo")
        machine.rescind(relid)


def test_so_many_calls_of_a_user_wait_for_its_bus_and_the_next_is_refused(machine: Any) -> None:
    with attach(name=machine.name) as other:
        sock = other._connect_bus(0)[0]
        with sock:
            send = (encode(vm.RegisterDriver(name=f"x{number}", id_table=[ECHO.bytes_le]), number)
                    for number in range(1, CALLS_A_USER_MAX + 2))
            with stopped(machine, "hypervisor"):    # which each of them asks for the offers
                for data in send:
                    send_frame(sock, data)
                number, refusal = answer(sock)
            assert (number, isinstance(refusal, Failure) and refusal.errno) == (CALLS_A_USER_MAX + 1, errno.EAGAIN)
            assert {type(answer(sock)[1]) for _ in range(CALLS_A_USER_MAX)} == {Done}
