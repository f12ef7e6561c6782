# SPDX-License-Identifier: Apache-2.0
"""A12.7: a descriptor that another process gets, by SCM_RIGHTS or through an exec, is one more reference to the open file."""

import ast
import contextlib
import fcntl
import multiprocessing
import os
import signal
import socket
import subprocess
import sys
from collections.abc import Callable, Iterator
from multiprocessing import reduction
from typing import Any

import pytest

from pvbus.tests.contract.support import WAIT_S_MAX, bound, connect, errno_of, pack, take, wait_until
from pvbus.view.pytest_plugin import BootedMachine, environment

Opened = Callable[..., Any]

STRANGER = """
import errno, fcntl, os, socket, sys
from pvbus.actors.client import attach
sock, names = socket.socket(fileno=int(sys.argv[2])), {"machine": attach(sys.argv[1]), "fcntl": fcntl, "os": os}
sock.send(b"'ready'")
while True:
    text, fds, _, _ = socket.recv_fds(sock, 65536, 1)
    if not text:
        break
    if fds:
        names["fd"] = fds[0]
    try:
        name, _, expression = text.decode().rpartition(" := ")
        value = eval(expression, names)
        if name:
            names[name], value = value, None
    except OSError as error:
        value = errno.errorcode[error.errno]
    sock.send(repr(value).encode())
"""


class Stranger:
    """A process that has nothing of ours but a socket; it evaluates what it is told, and gives the value or an errno's name."""

    def __init__(self, name: str, pass_fds: tuple[int, ...] = ()) -> None:
        self.sock, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        command = [sys.executable, "-c", STRANGER, name, str(theirs.fileno())]
        self.process = subprocess.Popen(command, pass_fds=(theirs.fileno(), *pass_fds), env=environment())
        theirs.close()
        self.sock.settimeout(4 * WAIT_S_MAX)
        assert self.answer() == "ready"

    def answer(self) -> Any:
        """Wait for the value."""
        text = self.sock.recv(65536)
        assert text, "the stranger has died"
        return ast.literal_eval(text.decode())

    def do(self, expression: str, fds: tuple[int, ...] = ()) -> Any:
        """Have an expression evaluated, `name := expression` too; a descriptor that goes with it is called `fd` there."""
        socket.send_fds(self.sock, [expression.encode()], fds)
        return self.answer()

    def take_file(self, file: Any) -> None:
        """Pass it a file, which is called `file` there."""
        assert self.do("file := machine.fdopen_evtchn(fd)", (file.fileno(),)) is None

    def close(self) -> None:
        """Let it end."""
        self.sock.close()
        try:
            self.process.wait(4 * WAIT_S_MAX)
        finally:
            self.process.kill()
            self.process.wait()


@pytest.fixture
def stranger(pvbus_shared_machine: BootedMachine) -> Iterator[Stranger]:
    """Return a process that was passed nothing yet."""
    with contextlib.closing(Stranger(pvbus_shared_machine.name)) as it:
        yield it


@pytest.mark.checklist("A12.7", "A1.1")
def test_a_stranger_shares_ring_ports_and_restriction(machine: Any, opened: Opened, stranger: Stranger) -> None:
    pair = connect(machine, opened(), opened())
    stranger.take_file(pair.rx)
    pair.send()

    assert stranger.do("file.read(4096)") == pack(pair.rx_port)
    assert errno_of(pair.rx.read, 4096) == "EAGAIN"
    assert stranger.do(f"file.write({pack(pair.rx_port)!r})") == 4
    pair.send()
    assert take(machine, pair.rx) == [pair.rx_port]

    assert stranger.do(f"file.notify({pair.rx_port})") is None
    assert take(machine, pair.tx) == [pair.tx_port]
    theirs = stranger.do("file.bind_unbound_port(0)")
    assert errno_of(pair.rx.notify, theirs) == ""
    pair.rx.unbind(theirs)
    assert stranger.do(f"file.notify({theirs})") == "ENOTCONN"
    stranger.do("file.restrict_domid(1)")
    assert errno_of(pair.rx.bind_unbound_port, 0) == "EACCES"


@pytest.mark.checklist("A12.7", "A12.9")
def test_an_event_lets_one_of_two_processes_return(machine: Any, opened: Opened, stranger: Stranger) -> None:
    pair = connect(machine, opened(nonblock=False), opened())
    stranger.take_file(pair.rx)
    socket.send_fds(stranger.sock, [b"file.read(4096)"], ())
    socket.send_fds(stranger.sock, [b"file.read(4096)"], ())

    for _ in range(2):
        pair.send()
        assert stranger.answer() == pack(pair.rx_port)
        pair.enable()


@pytest.mark.checklist("A12.7", "A12.2", "A4.6")
def test_access_mode_and_o_nonblock_belong_to_the_open_file(opened: Opened, stranger: Stranger) -> None:
    for flags, answers in ((os.O_RDONLY, ("EAGAIN", "EBADF")), (os.O_WRONLY, ("EBADF", 4)), (os.O_RDWR, ("EAGAIN", 4))):
        stranger.take_file(opened(flags=flags))
        assert (stranger.do("file.read(4)"), stranger.do("file.write(bytes(4))")) == answers

    ours = opened(nonblock=False)
    stranger.take_file(ours)
    assert stranger.do("os.get_blocking(file.fileno())") is True
    stranger.do("os.set_blocking(file.fileno(), False)")
    assert fcntl.fcntl(ours.fileno(), fcntl.F_GETFL) & os.O_NONBLOCK
    assert errno_of(ours.read, 4) == "EAGAIN"


@pytest.mark.checklist("A12.7", "A10.4")
def test_the_last_of_two_processes_releases_and_its_close_returns_after_that(
    machine: Any, opened: Opened, stranger: Stranger
) -> None:
    pair = connect(machine, opened(), opened())
    stranger.take_file(pair.rx)

    pair.rx.close()
    pair.send()
    assert stranger.do("file.read(4096)") == pack(pair.rx_port)
    stranger.do("file.close()")

    assert pair.rx_port not in bound(machine)
    assert opened().bind_unbound_port(remote_domain=0) == pair.rx_port
    assert stranger.do("file.read(4096)") == "EBADF"


@pytest.mark.checklist("A12.7", "A10.4")
def test_a_descriptor_on_its_way_between_two_processes_keeps_the_file(machine: Any, opened: Opened) -> None:
    pair = connect(machine, opened(), opened())
    ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    with ours, theirs:
        socket.send_fds(ours, [b"file"], [pair.rx.fileno()])
        pair.rx.close()
        pair.send()
        _, (fd,), _, _ = socket.recv_fds(theirs, 16, 1)
        again = machine.fdopen_evtchn(fd)
        assert take(machine, again) == [pair.rx_port]
        socket.send_fds(ours, [b"file"], [again.fileno()])
        again.close()
        machine.settle()
        assert pair.rx_port in bound(machine)

    wait_until(lambda: pair.rx_port not in bound(machine), "what only a queue held is released with it")


@pytest.mark.checklist("A12.7", "A10.4", "A11.5")
@pytest.mark.parametrize("used", [True, False], ids=["used", "only held"])
def test_a_killed_holder_of_the_last_reference_releases(
    machine: Any, opened: Opened, stranger: Stranger, used: bool
) -> None:
    pair = connect(machine, opened(), opened())
    stranger.do("file := machine.fdopen_evtchn(fd)" if used else "fd", (pair.rx.fileno(),))
    pair.rx.close()
    pair.send()
    assert pair.rx_port in bound(machine)

    stranger.process.send_signal(signal.SIGKILL)

    wait_until(lambda: pair.rx_port not in bound(machine), "the killed process's port is free")
    assert opened().bind_unbound_port(remote_domain=0) == pair.rx_port


@pytest.mark.checklist("A12.7")
def test_an_exec_keeps_what_was_passed_or_opened_without_cloexec(
    pvbus_shared_machine: BootedMachine, machine: Any, opened: Opened
) -> None:
    passed, inherited, not_inherited = opened(), opened(cloexec=False), opened()
    ports = [file.bind_unbound_port(remote_domain=0) for file in (passed, inherited, not_inherited)]
    fds = [file.fileno() for file in (passed, inherited, not_inherited)]
    assert [os.get_inheritable(fd) for fd in fds] == [False, True, False]

    with contextlib.closing(Stranger(pvbus_shared_machine.name, pass_fds=(fds[0], fds[1]))) as child:
        for file in (passed, inherited, not_inherited):
            file.close()
        assert child.do(f"machine.fdopen_evtchn({fds[0]}).notify({ports[0]})") is None
        assert child.do(f"file := machine.fdopen_evtchn({fds[1]})") is None
        assert child.do(f"file.unbind({ports[1]})") is None
        assert not set(ports) & bound(machine)  # the first was closed as its last reference went out of sight there


@pytest.mark.checklist("A12.7", "A10.4")
def test_a_child_that_only_executes_something_keeps_nothing_open(machine: Any, opened: Opened) -> None:
    kept, closed = opened(cloexec=False), opened()
    ports = [file.bind_unbound_port(remote_domain=0) for file in (kept, closed)]
    with subprocess.Popen(["/bin/cat"], stdin=subprocess.PIPE, close_fds=False):
        kept.close()
        closed.close()
        assert [port in bound(machine) for port in ports] == [True, False]

    wait_until(lambda: ports[0] not in bound(machine), "what an exec inherited is released with it")


@pytest.mark.checklist("A12.7")
def test_multiprocessing_passes_the_descriptor(machine: Any, opened: Opened) -> None:
    pair = connect(machine, opened(), opened())
    ours, theirs = multiprocessing.Pipe()
    with ours, theirs:
        reduction.send_handle(ours, pair.rx.fileno(), os.getpid())
        again = machine.fdopen_evtchn(reduction.recv_handle(theirs))
    pair.rx.close()
    pair.send()

    with again:
        assert take(machine, again) == [pair.rx_port]


@pytest.mark.checklist("A12.7")
def test_a_process_that_uses_the_file_already_gets_one_more_reference(machine: Any, opened: Opened) -> None:
    pair = connect(machine, opened(), opened())
    fd = os.dup(pair.rx.fileno())

    with machine.fdopen_evtchn(fd) as again:
        assert again.fileno() == fd
        assert again.context is pair.rx.context
        pair.rx.close()
        pair.send()
        assert take(machine, again) == [pair.rx_port]

    assert pair.rx_port not in bound(machine)
    assert errno_of(os.fstat, fd) == "EBADF"


@pytest.mark.checklist("A12.7")
def test_what_is_no_open_file_of_this_machine_is_refused_and_stays_the_callers(machine: Any, opened: Opened) -> None:
    ours, theirs = socket.socketpair()
    read_end, write_end = os.pipe()
    with ours, theirs:
        refused = [errno_of(machine.fdopen_evtchn, fd) for fd in (-1, 1 << 20, read_end, ours.fileno())]
        assert [errno_of(os.fstat, fd) for fd in (read_end, ours.fileno())] == ["", ""]
    os.close(read_end)
    os.close(write_end)

    assert refused == ["EBADF", "EBADF", "EINVAL", "EINVAL"]


@pytest.mark.checklist("A12.7")
def test_the_file_of_another_machine_is_refused(machine: Any, pvbus_boot: Any) -> None:
    other = pvbus_boot("[[domain]]\nid = 0\n").machine
    with other.open_evtchn(domain=0) as file:
        fd = os.dup(file.fileno())
        file._shared.cookie = 0  # so that this process does not know it
        try:
            with pytest.raises(OSError, match=f"open on machine {machine.name}"):
                machine.fdopen_evtchn(fd)
            with other.fdopen_evtchn(os.dup(fd)) as again:
                assert again.bind_unbound_port(0) == file.bind_unbound_port(0) - 1
        finally:
            os.close(fd)
