# SPDX-License-Identifier: Apache-2.0
"""The fork server: a small process that has imported what children need and forks them on request.

The supervisor writes `Preload`, `Spawn` and `KillChild`, the server answers and reports each end as
`ChildExited`. It is ours and not multiprocessing's, which hides the exit status from everyone but a Process
object, keeps descriptors and a resource tracker alive in every child, imports the parent's main module again,
hides a failed preload, and takes pickle from its socket. As the parent it alone reaps, so a pid that it still
lists is that child and no other: kills go through it. Death runs down the chain: the kernel tells the server
when the supervisor dies (and its socket closes), the server kills and reaps the children and unlinks what is
left; the kernel kills the children when the server dies. Nothing that needs a thread or holds a lock may be
imported by a preload: a fork copies it as it is.
"""

from __future__ import annotations

import contextlib
import errno
import gc
import importlib
import os
import shutil
import signal
import socket
import subprocess
import sys
import threading
import time
from pathlib import Path
from typing import TYPE_CHECKING, ClassVar, NoReturn

import msgspec
from pykka import ActorRegistry

from pvbus.actors.runtime import wire
from pvbus.actors.runtime.clock import MonotonicClock
from pvbus.actors.runtime.inbox import Inbox, Peer, PeerGone, Received
from pvbus.actors.runtime.process import child_main, failure_of, set_parent_death_signal
from pvbus.actors.runtime.wire import Done, Message

if TYPE_CHECKING:
    from collections.abc import Sequence

    from pvbus.actors.runtime.peer import Then

SHM_DIRECTORY = Path("/dev/shm")
SHM_PREFIX = "pvbus-"
SHM_PREFIX_MIN = len(SHM_PREFIX) + 4
"""A prefix names one run; a shorter one could unlink another machine's segments."""
REAP_S_MAX = 5.0
"""How long killed children may take to be gone; a SIGKILL takes milliseconds."""
PRELOAD_S_MAX = 30.0
"""How long the imports may take; 0.1 s is usual, a cold disk is slow."""
SPAWN_S_MAX = 10.0
"""How long a fork may take; it is a millisecond, and a machine short of memory is slow."""


class Preload(Message, frozen=True, kw_only=True):
    """Name the modules to import, and what to remove when the supervisor is dead: directories, one run's
    segments.
    """

    fds_max: ClassVar[int | None] = 0
    modules: list[str]
    directories: list[str] = msgspec.field(default_factory=list)
    shm_prefix: str = ""


class Preloaded(Message, frozen=True, kw_only=True):
    """Answer Preload with the modules that are really loaded."""

    fds_max: ClassVar[int | None] = 0
    modules: list[str]


class Spawn(Message, frozen=True, kw_only=True):
    """Ask for a child; its control socket comes along. A spare one, for `entry`, prepares itself and waits for its
    Start without a limit.
    """

    fds_max: ClassVar[int | None] = 1
    name: str
    entry: str = ""


class Spawned(Message, frozen=True, kw_only=True):
    """Answer Spawn."""

    fds_max: ClassVar[int | None] = 0
    pid: int


class KillChild(Message, frozen=True, kw_only=True):
    """Send a signal to a child; Done(value=1) if it lived, 0 if it is gone: never to a stranger with its old
    pid.
    """

    fds_max: ClassVar[int | None] = 0
    pid: int
    signal: int


class ChildExited(Message, frozen=True, kw_only=True):
    """Report a child's end; `status` is its exit code, or minus the signal that killed it."""

    fds_max: ClassVar[int | None] = 0
    pid: int
    name: str
    status: int


class ForkServer:
    """Be the supervisor's side: start the server and talk to it through the supervisor's inbox, never
    blocking.

    Start it from the supervisor's main thread: the parent-death signal follows the thread. `ChildExited`
    arrives as an ordinary message whose `received.peer` is `peer`; the server's own death is that peer's
    hang-up.
    """

    def __init__(self, inbox: Inbox, output: int | None = None) -> None:
        """Start the server; it and its children write to the descriptor `output`, or where we do."""
        ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        # -P and an explicit path: the same modules as here, from a wheel, an editable install or the tree
        # itself.
        # An entry that is no path stays as it is: editable installs put names there that their own hook knows.
        path = [str(Path(entry).absolute()) if Path(entry).exists() else entry for entry in sys.path]
        code = (
            f"import sys; sys.path[:] = {path!r}; "
            f"from pvbus.actors.runtime.forkserver import main; main({theirs.fileno()})"
        )
        # SPT_NOENV: setproctitle then leaves /proc/PID/environ alone, by which `doctor` knows whose a process
        # is.
        self.process = subprocess.Popen(
            [sys.executable, "-P", "-c", code],
            stdin=subprocess.DEVNULL,
            stdout=output,
            stderr=output,
            pass_fds=(theirs.fileno(),),
            start_new_session=True,
            env={**os.environ, "SPT_NOENV": "1"},
        )
        theirs.close()
        self.pid = self.process.pid
        self.peer: Peer = inbox.add_peer(ours, "forkserver")

    def preload(
        self, modules: Sequence[str], then: Then, *, directories: Sequence[str] = (), shm_prefix: str = ""
    ) -> None:
        """Import modules there; `then` gets Preloaded, or the Failure that names the module."""
        message = Preload(modules=list(modules), directories=list(directories), shm_prefix=shm_prefix)
        self.peer.ask(message, then, PRELOAD_S_MAX)

    def spawn(self, name: str, sock: socket.socket, then: Then, *, entry: str = "") -> None:
        """Fork a child with `sock` as its control socket (close yours afterwards); `then` gets Spawned or a
        Failure. With an `entry` it is a spare one: it gets ready for that, and waits for its Start without a
        limit.
        """
        self.peer.ask(Spawn(name=name, entry=entry), then, SPAWN_S_MAX, fds=(sock.fileno(),))

    def kill(self, pid: int, number: int, then: Then | None = None) -> None:
        """Send a signal to a child that still lives; `then` gets Done(value=0) if it does not."""
        self.peer.ask(KillChild(pid=pid, signal=number), then or (lambda _reply, _fds: None))

    def close(self, timeout_s: float = 2 * REAP_S_MAX) -> int:
        """Hang up, so that the server kills what is left of the children and cleans up; return its exit
        status.
        """
        self.peer.close()
        try:
            return self.process.wait(timeout_s)
        except subprocess.TimeoutExpired:
            self.process.kill()
            return self.process.wait(timeout_s)


class _Leftover:
    """A directory to remove, recognised by an open descriptor: by then another machine may use its name."""

    def __init__(self, path: str) -> None:
        self.path = path
        self.fd = os.open(path, os.O_PATH | os.O_DIRECTORY | os.O_NOFOLLOW | os.O_CLOEXEC)

    def remove(self) -> None:
        with contextlib.suppress(OSError):
            if os.path.samestat(os.lstat(self.path), os.fstat(self.fd)):
                shutil.rmtree(self.path, ignore_errors=True)


class _Server:
    def __init__(self, control: socket.socket) -> None:
        self.inbox = Inbox(MonotonicClock(), "forkserver")
        self.supervisor = self.inbox.add_peer(control, "supervisor")
        self.inbox.on_hangup = lambda _peer: self._end()
        self.children: dict[int, str] = {}
        self.leftovers: list[_Leftover] = []
        self.shm_prefix = ""

    def run(self) -> NoReturn:
        signal.signal(signal.SIGINT, signal.SIG_IGN)
        signal.signal(signal.SIGCHLD, lambda *_: self.inbox.call_soon(self._reap))
        signal.signal(signal.SIGTERM, lambda *_: self.inbox.call_soon(self._end))
        self.inbox.wake_on_signals()
        # SIGTERM and not SIGKILL: we have something to clean up.
        set_parent_death_signal(signal.SIGTERM)
        while True:
            received = self.inbox.get().message
            if isinstance(received, Received):
                try:
                    reply = self._handle(received)
                except Exception as error:
                    reply = failure_of(error)
                wire.close_fds(received.fds)
                received.peer.reply(received.request, reply)

    def _handle(self, received: Received) -> Message:
        message = received.message
        if isinstance(message, Spawn):
            return self._spawn(message, received.fds)
        if isinstance(message, Preload):
            return self._preload(message)
        if isinstance(message, KillChild):
            alive = message.pid in self.children
            if alive:
                os.kill(message.pid, message.signal)
            return Done(value=int(alive))
        raise OSError(errno.ENOSYS, f"the fork server does not know {type(message).__name__}")

    def _preload(self, message: Preload) -> Message:
        prefix = message.shm_prefix
        if prefix and (not prefix.startswith(SHM_PREFIX) or len(prefix) < SHM_PREFIX_MIN or "/" in prefix):
            raise OSError(errno.EINVAL, f"not a run's segment prefix: {prefix!r}")
        self.shm_prefix = prefix
        self.leftovers += [_Leftover(path) for path in message.directories]
        for name in message.modules:
            try:
                importlib.import_module(name)
            except Exception as error:
                raise OSError(errno.ENOENT, f"preload of {name}: {type(error).__name__}: {error}") from error
        # A fork copies one thread only, and the others' locks as they are.
        threads = threading.active_count()
        tasks = len(list(Path("/proc/self/task").iterdir()))
        if threads != 1 or tasks != 1 or ActorRegistry.get_all():
            raise OSError(
                errno.EBUSY, f"a preload started something: {threads} threads, {tasks} tasks, or an actor"
            )
        gc.freeze()  # What is loaded stays shared: the collector does not write into its pages.
        return Preloaded(modules=[name for name in message.modules if name in sys.modules])

    def _spawn(self, message: Spawn, fds: list[int]) -> Message:
        if len(fds) != 1:
            raise OSError(errno.EINVAL, "Spawn comes with the child's control socket")
        own_pid = os.getpid()
        pid = os.fork()
        if pid == 0:
            self._be_child(fds[0], own_pid, message)
        self.children[pid] = message.name
        return Spawned(pid=pid)

    def _be_child(self, control_fd: int, parent_pid: int, spawn: Spawn) -> NoReturn:
        try:
            signal.signal(signal.SIGCHLD, signal.SIG_DFL)
            signal.signal(signal.SIGTERM, signal.SIG_DFL)
            self.inbox.abandon()
            wire.close_fds(leftover.fd for leftover in self.leftovers)
            child_main(socket.socket(fileno=control_fd), parent_pid, spawn.name, spawn.entry)
        finally:
            os._exit(70)

    def _reap(self) -> None:
        while self.children:
            try:
                pid, status = os.waitpid(-1, os.WNOHANG)
            except ChildProcessError:
                return
            if pid == 0:
                return
            name = self.children.pop(pid, "")
            report = ChildExited(pid=pid, name=name, status=os.waitstatus_to_exitcode(status))
            with contextlib.suppress(PeerGone):
                self.supervisor.tell(report)

    def _end(self) -> NoReturn:
        for pid in self.children:
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)
        deadline_s = time.monotonic() + REAP_S_MAX
        while self.children and time.monotonic() < deadline_s:
            self._reap()
            time.sleep(0.001 if self.children else 0)
        for leftover in self.leftovers:
            leftover.remove()
        if self.shm_prefix:
            for path in SHM_DIRECTORY.glob(f"{self.shm_prefix}*"):
                path.unlink(missing_ok=True)
        sys.stderr.flush()
        os._exit(0 if not self.children else 70)


def main(fd: int) -> NoReturn:
    """Be the fork server on this control socket until the supervisor hangs up; see `ForkServer` for the
    command line.
    """
    os.set_inheritable(fd, False)
    with contextlib.suppress(ImportError):
        from setproctitle import setproctitle

        setproctitle("pvbus: forkserver")
    _Server(socket.socket(fileno=fd)).run()
