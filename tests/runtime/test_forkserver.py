# SPDX-License-Identifier: Apache-2.0
"""The fork server with real processes: start, exit statuses, descriptors, and death in every direction."""

from __future__ import annotations

import errno
import os
import select
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from pvbus.actors.runtime.clock import MonotonicClock
from pvbus.actors.runtime.forkserver import ChildExited, ForkServer, Preloaded, Spawned
from pvbus.actors.runtime.inbox import Inbox, Peer, Received
from pvbus.actors.runtime.process import (
    EXIT_BROKEN,
    EXIT_ORPHANED,
    EXIT_START_FAILED,
    Start,
    Started,
    Stop,
)
from pvbus.actors.runtime.wire import Done, Failure, Message

HERE = Path(__file__).parent
sys.path.insert(0, str(HERE))
from children import EchoCall, EchoFds  # type: ignore[import-not-found]  # noqa: E402

ENTRY = "children:EchoProcess"
WAIT_S = 10.0


class Machine:
    """A supervisor in small: an inbox that is driven until a condition holds."""

    def __init__(self) -> None:
        self.inbox = Inbox(MonotonicClock(), "test")
        self.exits: dict[int, int] = {}
        self.hangups: list[str] = []
        self.inbox.on_hangup = lambda peer: self.hangups.append(peer.name)
        self.server = ForkServer(self.inbox)
        self.pids: dict[str, int] = {}

    def until(self, holds: Callable[[], Any]) -> None:
        alarm = self.inbox.call_at(time.monotonic_ns() + int(WAIT_S * 1e9), self._too_late)
        stop = object()
        original = self.inbox.idle
        machine = self

        class Watch:
            def work(self) -> bool:
                if holds():
                    machine.inbox.put(_local(stop))
                return False

            def may_sleep(self) -> bool:
                return not holds()

            def awake(self) -> None:
                pass

        self.inbox.idle = Watch()
        while not holds():
            message = self.inbox.get().message
            if isinstance(message, Received) and isinstance(message.message, ChildExited):
                self.exits[message.message.pid] = message.message.status
        self.inbox.idle = original
        alarm.cancel()

    def _too_late(self) -> None:
        raise AssertionError("the condition did not come true")

    def ask(self, peer: Peer, message: Message, fds: tuple[int, ...] = ()) -> tuple[Message, list[int]]:
        answers: list[tuple[Message, list[int]]] = []
        peer.ask(message, lambda reply, got: answers.append((reply, got)), fds=fds)
        self.until(lambda: answers)
        return answers[0]

    def preload(self, **more: Any) -> Message:
        answers: list[Message] = []
        modules = more.pop("modules", ["children"])
        self.server.preload(modules, lambda reply, _: answers.append(reply), **more)
        self.until(lambda: answers)
        return answers[0]

    def fork(self, name: str, spare_for: str = "") -> Peer:
        ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        answers: list[Message] = []
        self.server.spawn(name, theirs, lambda reply, _: answers.append(reply), entry=spare_for)
        theirs.close()
        self.until(lambda: answers)
        spawned = answers[0]
        assert isinstance(spawned, Spawned)
        self.pids[name] = spawned.pid
        return self.inbox.add_peer(ours, name)

    def start(self, name: str, fds: dict[str, int] | None = None, **arguments: Any) -> tuple[Peer, Message]:
        peer = self.fork(name)
        named = fds or {}
        message = Start(name=name, entry=ENTRY, arguments=arguments, fds=list(named))
        return peer, self.ask(peer, message, tuple(named.values()))[0]

    def exit_of(self, name: str) -> int:
        self.until(lambda: self.pids[name] in self.exits)
        return self.exits[self.pids[name]]


def _local(message: object) -> Any:
    from pykka._envelope import Envelope

    return Envelope(message)


@pytest.fixture
def machine() -> Iterator[Machine]:
    made = Machine()
    yield made
    made.server.close()
    made.inbox.close()


def test_a_child_starts_answers_and_stops_with_status_0(machine: Machine) -> None:
    loaded = machine.preload()
    assert loaded == Preloaded(modules=["children"])
    peer, reply = machine.start("echo/1")
    assert reply == Started(pid=machine.pids["echo/1"])
    assert machine.ask(peer, EchoCall(value=7))[0] == Done(value=7)
    assert machine.ask(peer, Stop())[0] == Done()
    assert machine.exit_of("echo/1") == 0


def test_a_call_that_fails_with_an_errno_harms_nobody(machine: Machine) -> None:
    machine.preload()
    peer, _ = machine.start("echo")
    assert machine.ask(peer, EchoCall(value=1, how="oserror"))[0] == Failure(errno=errno.EEXIST, text="taken")
    unknown, _ = machine.ask(peer, Started(pid=1))
    assert isinstance(unknown, Failure)
    peer.tell(EchoCall(value=1, how="oserror"))
    assert machine.ask(peer, EchoCall(value=2))[0] == Done(value=2)
    machine.ask(peer, Stop())
    assert machine.exit_of("echo") == 0


@pytest.mark.parametrize(
    ("how", "status"),
    [("invariant", EXIT_BROKEN), ("exception", EXIT_BROKEN), ("kill", -signal.SIGKILL)],
)
def test_a_broken_actor_is_an_exit_status_and_its_callers_see_a_hang_up(
    machine: Machine, how: str, status: int
) -> None:
    machine.preload()
    peer, _ = machine.start("echo")
    assert machine.ask(peer, EchoCall(value=1, how=how))[0] == Failure(errno=errno.EPIPE)
    assert machine.exit_of("echo") == status
    assert machine.hangups == ["echo"]
    other, _ = machine.start("echo/heir")
    assert machine.ask(other, EchoCall(value=2))[0] == Done(value=2)


def test_a_tell_that_breaks_an_actor_ends_it_as_an_ask_does(machine: Machine) -> None:
    machine.preload()
    peer, _ = machine.start("echo")
    peer.tell(EchoCall(value=1, how="exception"))
    assert machine.exit_of("echo") == EXIT_BROKEN


@pytest.mark.parametrize(
    ("fail", "number", "text"),
    [("init", errno.ENODEV, "no platform"), ("ready", errno.EIO, "InvariantError: not ready")],
)
def test_a_failed_start_says_why(machine: Machine, fail: str, number: int, text: str) -> None:
    machine.preload()
    _, reply = machine.start("echo", fail=fail)
    assert reply == Failure(errno=number, text=text)
    assert machine.exit_of("echo") == EXIT_START_FAILED


@pytest.mark.parametrize("entry", ["no.such.module:X", "children:Nobody", "children:EchoCall", ""])
def test_an_entry_that_is_none_fails_the_start(machine: Machine, entry: str) -> None:
    peer = machine.fork("echo")
    reply, _ = machine.ask(peer, Start(name="echo", entry=entry))
    assert isinstance(reply, Failure)
    assert machine.exit_of("echo") == EXIT_START_FAILED


def test_a_foreign_frame_to_a_child_is_answered_and_it_lives_on(machine: Machine) -> None:
    machine.preload()
    peer, _ = machine.start("echo")
    peer.sock.send(b"\xc1")
    machine.until(lambda: peer.complaints == 1)
    assert machine.ask(peer, EchoCall(value=2))[0] == Done(value=2)


def test_a_child_has_its_own_descriptors_and_no_other(machine: Machine) -> None:
    machine.preload()
    reading, writing = os.pipe()
    machine.fork("sibling/1")
    peer, _ = machine.start("echo/fds", {"mark": writing}, text="hello")
    os.close(writing)
    answer, fds = machine.ask(peer, EchoCall(value=0, how="fds"))
    assert isinstance(answer, EchoFds)
    # 0, 1, 2, the control socket, epoll, its eventfd, the two ends that signals wake it through, the mark.
    assert answer == EchoFds(open_fds=9, argument="hello", title="pvbus: echo/fds")
    os.write(fds[0], b"shared ")
    os.close(fds[0])
    assert machine.ask(peer, Stop())[0] == Done()
    assert machine.exit_of("echo/fds") == 0
    assert os.read(reading, 100) == b"shared stopped"
    assert os.read(reading, 100) == b""
    os.close(reading)


def test_many_children_asked_for_at_once_do_not_inherit_each_others_sockets(machine: Machine) -> None:
    machine.preload()
    pairs = [socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET) for _ in range(8)]
    spawned: list[Message] = []
    for number, (_, theirs) in enumerate(pairs):
        machine.server.spawn(f"echo/{number}", theirs, lambda reply, _: spawned.append(reply))
        theirs.close()
    machine.until(lambda: len(spawned) == len(pairs))
    peers = [machine.inbox.add_peer(ours, f"echo/{number}") for number, (ours, _) in enumerate(pairs)]
    # The hang-up of one is seen although all others live.
    machine.ask(peers[0], Start(name="echo/0", entry=ENTRY))
    peers[0].tell(EchoCall(value=1, how="kill"))
    machine.until(lambda: machine.hangups)
    assert machine.hangups == ["echo/0"]


def test_sigterm_stops_in_order_and_sigint_is_the_supervisors(machine: Machine) -> None:
    machine.preload()
    reading, writing = os.pipe()
    peer, _ = machine.start("echo", {"mark": writing})
    os.close(writing)
    pid = machine.pids["echo"]
    machine.server.kill(pid, signal.SIGINT)
    assert machine.ask(peer, EchoCall(value=1))[0] == Done(value=1)
    machine.server.kill(pid, signal.SIGTERM)
    assert machine.exit_of("echo") == 0
    assert os.read(reading, 100) == b"stopped"
    os.close(reading)


def test_a_stop_that_fails_is_a_broken_actor(machine: Machine) -> None:
    machine.preload()
    peer, _ = machine.start("echo", fail="stop")
    assert machine.ask(peer, Stop())[0] == Failure(errno=errno.EPIPE)
    assert machine.exit_of("echo") == EXIT_BROKEN


def test_a_child_whose_supervisor_hangs_up_ends(machine: Machine) -> None:
    machine.preload()
    peer, _ = machine.start("echo")
    peer.close()
    assert machine.exit_of("echo") == EXIT_ORPHANED


def test_a_kill_goes_to_children_only_and_not_to_the_dead(machine: Machine) -> None:
    machine.preload()
    machine.start("echo")
    answers: list[Message] = []
    pid = machine.pids["echo"]
    machine.server.kill(pid, signal.SIGKILL, lambda reply, _: answers.append(reply))
    assert machine.exit_of("echo") == -signal.SIGKILL
    machine.server.kill(pid, signal.SIGKILL, lambda reply, _: answers.append(reply))
    machine.server.kill(os.getpid(), signal.SIGKILL, lambda reply, _: answers.append(reply))
    machine.until(lambda: len(answers) == 3)
    assert answers == [Done(value=1), Done(value=0), Done(value=0)]


def test_a_preload_that_fails_is_said_and_not_hidden(machine: Machine, tmp_path: Path) -> None:
    reply = machine.preload(modules=["children", "no_such_module"])
    assert isinstance(reply, Failure)
    assert reply.errno == errno.ENOENT
    assert "preload of no_such_module: ModuleNotFoundError" in reply.text
    reply = machine.preload(shm_prefix="pvbus-")
    assert isinstance(reply, Failure)
    assert reply.errno == errno.EINVAL


def test_a_preload_that_starts_a_thread_is_refused(
    machine_with_path: Callable[[Path], Machine], tmp_path: Path
) -> None:
    (tmp_path / "starts_a_thread.py").write_text(
        "import threading\nthreading.Thread(target=threading.Event().wait, daemon=True).start()\n"
    )
    reply = machine_with_path(tmp_path).preload(modules=["starts_a_thread"])
    assert isinstance(reply, Failure)
    assert reply.errno == errno.EBUSY


@pytest.fixture
def machine_with_path(monkeypatch: pytest.MonkeyPatch) -> Iterator[Callable[[Path], Machine]]:
    made: list[Machine] = []

    def make(path: Path) -> Machine:
        monkeypatch.syspath_prepend(str(path))
        made.append(Machine())
        return made[0]

    yield make
    for machine in made:
        machine.server.close()
        machine.inbox.close()


SUPERVISOR = """
import sys, time
sys.path.insert(0, {here!r})
from test_forkserver import Machine
machine = Machine()
machine.preload(directories=[{directory!r}], shm_prefix={prefix!r})
machine.start("echo/1")
machine.start("echo/2")
machine.fork("not started")
print(machine.server.pid, *machine.pids.values(), flush=True)
machine.until(lambda: {stuck})
"""


def run_supervisor(directory: Path, prefix: str) -> tuple[subprocess.Popen[str], list[int]]:
    code = SUPERVISOR.format(here=str(HERE), directory=str(directory), prefix=prefix, stuck="False")
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(path for path in sys.path if path)}
    process = subprocess.Popen(
        [sys.executable, "-c", code], stdout=subprocess.PIPE, text=True, env=environment
    )
    assert process.stdout is not None
    pids = [int(word) for word in process.stdout.readline().split()]
    assert len(pids) == 4
    return process, pids


def wait_gone(pidfds: list[int]) -> None:
    for fd in pidfds:
        assert select.select([fd], [], [], WAIT_S)[0], "a process outlived its supervisor"
        os.close(fd)


def test_sigkill_of_the_supervisor_takes_everything_with_it_and_its_leftovers(tmp_path: Path) -> None:
    directory = tmp_path / "run"
    directory.mkdir()
    (directory / "machine.sock").write_text("")
    prefix = f"pvbus-test{os.getpid()}-"
    segment = Path(f"/dev/shm/{prefix}info")
    segment.write_bytes(b"page")
    process, pids = run_supervisor(directory, prefix)
    pidfds = [os.pidfd_open(pid) for pid in pids]
    process.kill()
    wait_gone(pidfds)
    process.wait(WAIT_S)
    assert process.stdout is not None
    process.stdout.close()
    assert not directory.exists()
    assert not segment.exists()


def test_a_directory_that_is_another_machines_by_now_is_not_removed(tmp_path: Path) -> None:
    directory = tmp_path / "run"
    directory.mkdir()
    process, pids = run_supervisor(directory, "")
    directory.rename(tmp_path / "moved")
    directory.mkdir()
    pidfds = [os.pidfd_open(pid) for pid in pids]
    process.kill()
    wait_gone(pidfds)
    process.wait(WAIT_S)
    assert process.stdout is not None
    process.stdout.close()
    assert directory.exists()


def test_sigkill_of_the_fork_server_kills_its_children_and_is_seen(machine: Machine) -> None:
    machine.preload()
    machine.start("echo")
    child = os.pidfd_open(machine.pids["echo"])
    machine.server.process.kill()
    wait_gone([child])
    machine.until(lambda: sorted(machine.hangups) == ["echo", "forkserver"])
    assert machine.server.process.wait(WAIT_S) == -signal.SIGKILL


def test_closing_the_fork_server_ends_children_that_are_left() -> None:
    machine = Machine()
    machine.preload()
    machine.start("echo")
    child = os.pidfd_open(machine.pids["echo"])
    assert machine.server.close() == 0
    wait_gone([child])
    machine.inbox.close()


def test_a_spare_child_is_titled_waits_and_becomes_what_its_start_says(machine: Machine) -> None:
    machine.preload()
    peer = machine.fork("file/spare.0", ENTRY)
    title = Path(f"/proc/{machine.pids['file/spare.0']}/cmdline")
    deadline = time.monotonic() + WAIT_S
    while not title.read_bytes().startswith(b"pvbus: file/spare.0"):
        assert time.monotonic() < deadline
        select.select([], [], [], 0.001)
    started, _ = machine.ask(peer, Start(name="file/0.3", entry=ENTRY))
    assert started == Started(pid=machine.pids["file/spare.0"])
    assert title.read_bytes().startswith(b"pvbus: file/0.3")
    assert machine.ask(peer, Stop())[0] == Done()
    assert machine.exit_of("file/spare.0") == 0


def test_a_spare_child_stops_when_it_is_told_to(machine: Machine) -> None:
    machine.preload()
    peer = machine.fork("file/spare.0", ENTRY)
    assert machine.ask(peer, Stop())[0] == Done()
    assert machine.exit_of("file/spare.0") == 0


def test_a_spare_child_of_an_entry_that_is_none_ends(machine: Machine) -> None:
    machine.preload()
    machine.fork("file/spare.0", "no.such.module:X")
    assert machine.exit_of("file/spare.0") == EXIT_BROKEN
