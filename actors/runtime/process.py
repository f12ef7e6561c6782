# SPDX-License-Identifier: Apache-2.0
"""An actor that is a process: pykka's actor in the main thread, its inbox an epoll set, its crash an exit
status.

The supervisor writes `Start` and `Stop` on the control socket, the child answers there. pykka runs an actor
in a thread and swallows its crashes (an exception in a tell ends it silently, one in an ask lets it live on),
so we replace four of its private hooks: `_create_actor_inbox`, `_create_future`, `_start_actor_loop`,
`_stop`. That is why pykka is pinned below 4.6. What the actors do must not be added here.
"""

from __future__ import annotations

import contextlib
import errno
import faulthandler
import importlib
import os
import signal
import socket
import sys
import threading
import traceback
from typing import TYPE_CHECKING, Any, ClassVar, NoReturn

import msgspec
import pykka
from pykka import ActorDeadError, ActorRegistry, ThreadingFuture

from pvbus.actors.runtime import wire
from pvbus.actors.runtime.clock import Clock, MonotonicClock
from pvbus.actors.runtime.inbox import Inbox, InvariantError, Peer, PeerGone, Received
from pvbus.actors.runtime.wire import FDS_MAX, DescriptorsLostError, Done, Failure, Message, WireError
from pvbus.shm.memory import enter_gate

if TYPE_CHECKING:
    from collections.abc import Callable

    from pykka import Future

__all__ = [
    "InvariantError",
    "Peer",
    "PeerGone",
    "ProcessActor",
    "Received",
    "Start",
    "Started",
    "Stop",
]

EXIT_BROKEN = 70
"""A broken invariant, or anything else untyped; the traceback is on stderr."""
EXIT_ORPHANED = 71
"""The supervisor's end of the control socket closed: the machine is gone, and nobody is left to stop us in
order.
"""
EXIT_START_FAILED = 72
"""The entry could not be imported or built, or `on_ready` raised; the supervisor has the reason as a Failure.
"""

START_WAIT_S = 30.0
"""How long a forked child waits for its Start, which the supervisor sends at once."""
_inboxes: list[Inbox] = []
"""What a forked child has made before it knows whose it will be; its actor takes it."""
TEXT_MAX = 512
"""Letters of an exception in a Failure; the whole traceback is on stderr."""


class Start(Message, frozen=True, kw_only=True):
    """Tell a forked child what it is; `fds` names the descriptors that come along, in their order."""

    fds_max: ClassVar[int | None] = FDS_MAX
    name: str
    entry: str
    arguments: dict[str, Any] = msgspec.field(default_factory=dict)
    fds: list[str] = msgspec.field(default_factory=list)


class Started(Message, frozen=True, kw_only=True):
    """Answer Start, when `on_ready` has returned."""

    fds_max: ClassVar[int | None] = 0
    pid: int


class Stop(Message, frozen=True, kw_only=True):
    """Ask a child to end in order; answered with Done after `on_stop`."""

    fds_max: ClassVar[int | None] = 0
    moot_when_stopped: ClassVar[bool] = True


class ProcessActor(pykka.Actor):
    """Run an actor in the main thread of its own process; a room subclasses it in its `process.py`.

    `run` returns the exit code. `start`, pykka's class method, would block until the end likewise; use `run`.
    """

    actor_inbox: Inbox

    def __init__(self, name: str, control: socket.socket, clock: Clock | None = None) -> None:
        super().__init__()
        self.name = name
        self.exit_code = 0
        self.start_request = 0
        self.inbox = self.actor_inbox
        self.inbox.name = name
        self.inbox.clock = clock or self.inbox.clock
        self.inbox.on_hangup = self._on_peer_hangup
        self.supervisor = self.inbox.add_peer(control, "supervisor")
        enter_gate(name)

    # What a room overrides; pykka's `on_stop` is one more.

    @classmethod
    def rehearse(cls) -> None:
        """Get ready for a Start that comes later, in a spare child."""

    def on_ready(self) -> None:
        """Do what is left before the supervisor hears that we are up; an exception fails the start."""

    def on_message(self, received: Received) -> Message | None:
        """Handle one message; return its reply, or None to reply later (`received.peer.reply`).

        An OSError becomes a Failure with its errno. Any other exception says that we are broken and ends the
        process.
        """
        raise OSError(errno.ENOSYS, f"{self.name} does not know {type(received.message).__name__}")

    def on_hangup(self, peer: Peer) -> None:
        """Learn that a peer other than the supervisor has hung up; its asks have failed already."""

    def leave(self, then: Callable[[], None]) -> None:
        """Do in order what takes messages, before the end; call `then`. Who takes long is killed."""
        then()

    # pykka's hooks.

    @staticmethod
    def _create_actor_inbox() -> Inbox:
        return _inboxes.pop() if _inboxes else Inbox(MonotonicClock())

    @staticmethod
    def _create_future() -> Future[Any]:
        return ThreadingFuture()

    def _start_actor_loop(self) -> None:
        try:
            self.on_ready()
        except BaseException as error:
            self._die(error, EXIT_START_FAILED)
            self.supervisor.reply(self.start_request, failure_of(error))
        else:
            self.supervisor.reply(self.start_request, Started(pid=os.getpid()))
            try:
                # Not `_actor_loop`: its teardown takes what is left out of the inbox and tells nobody.
                self._actor_loop_running()
            except BaseException as error:
                self._die(error, EXIT_BROKEN)
        try:
            self.inbox.close(answer=self.exit_code == 0)
        except BaseException as error:
            self._die(error, EXIT_BROKEN)
        ActorRegistry.unregister(self.actor_ref)

    def _stop(self) -> None:
        if self.actor_stopped.is_set():
            return
        self.actor_stopped.set()
        ActorRegistry.unregister(self.actor_ref)
        if self.exit_code == 0:
            try:
                self.on_stop()
            except BaseException as error:
                self._die(error, EXIT_BROKEN)

    def on_receive(self, message: Any) -> None:
        """Serve pykka's loop; rooms override `on_message`."""
        try:
            if not isinstance(message, Received):
                text = f"{self.name} got a {type(message).__name__} through a pykka reference"
                raise InvariantError(text)
            if isinstance(message.message, Stop):
                self._on_stop_message(message)
            else:
                self._answer(message)
        except BaseException as error:
            self._die(error, EXIT_BROKEN)

    def _answer(self, received: Received) -> None:
        try:
            reply = self.on_message(received)
        except OSError as error:
            reply = failure_of(error)
            wire.close_fds(received.fds)  # refused: what came along is nobody's
            if received.request == 0:
                print(f"{self.name}: {type(received.message).__name__}: {error}", file=sys.stderr, flush=True)
        if reply is not None:
            received.peer.reply(received.request, reply)

    def _on_stop_message(self, received: Received) -> None:
        if received.peer is not self.supervisor:
            received.peer.reply(
                received.request, Failure(errno=errno.EPERM, text="only the supervisor stops an actor")
            )
            return
        later = False  # `then` comes from a callback: the loop waits for a message, and stops with one

        def then() -> None:
            if not later:
                self._stop()
            if self.exit_code == 0:
                received.peer.reply(received.request, Done())
            if later:
                self._end_soon()

        self.leave(then)
        later = True

    def _on_peer_hangup(self, peer: Peer) -> None:
        if peer is self.supervisor:
            self.exit_code = self.exit_code or EXIT_ORPHANED
            self._end_soon()
        else:
            self.on_hangup(peer)

    def _end_soon(self) -> None:
        with contextlib.suppress(ActorDeadError):
            self.stop()

    def _die(self, error: BaseException, code: int) -> None:
        self.exit_code = code
        self.actor_stopped.set()
        print(f"{self.name}: exit {code}", file=sys.stderr)
        traceback.print_exception(error)
        sys.stderr.flush()

    def run(self) -> int:
        """Run until stopped, broken or orphaned; return the exit code.

        In a main thread SIGINT is ignored (a terminal's Ctrl-C goes to the supervisor, which stops us in
        order) and SIGTERM stops us in order.
        """
        if threading.current_thread() is threading.main_thread():
            signal.signal(signal.SIGINT, signal.SIG_IGN)
            signal.signal(signal.SIGTERM, lambda *_: self.inbox.call_soon(self._end_soon))
            self.inbox.wake_on_signals()
        ActorRegistry.register(self.actor_ref)
        self._start_actor_loop()
        return self.exit_code


def failure_of(error: BaseException) -> Failure:
    """Return what a caller is told of an exception: an OSError's errno, EIO for anything else."""
    if isinstance(error, OSError):
        if error.errno == errno.EMFILE and error.strerror == os.strerror(errno.EMFILE):
            return Failure(errno=errno.EMFILE, text="a process of the machine has no descriptor left (ulimit -n)")
        return Failure(errno=error.errno or errno.EIO, text=(error.strerror or str(error))[:TEXT_MAX])
    return Failure(errno=errno.EIO, text=f"{type(error).__name__}: {error}"[:TEXT_MAX])


def set_parent_death_signal(number: int) -> None:
    """Have the kernel send us `number` when the thread that forked us dies (prctl PR_SET_PDEATHSIG)."""
    import ctypes

    libc = ctypes.CDLL(None, use_errno=True)
    if libc.prctl(1, number, 0, 0, 0) != 0:
        raise OSError(ctypes.get_errno(), "prctl(PR_SET_PDEATHSIG)")


def child_main(control: socket.socket, parent_pid: int | None = None, name: str = "", entry: str = "") -> NoReturn:
    """Be a forked child until the process ends: receive Start, build the actor, run it.

    With an `entry` it is a spare one, forked ahead: it gets ready for that, and waits as long as it takes.
    """
    code = EXIT_BROKEN
    try:
        if entry:
            _get_ready(name, entry)
        code = _run_child(control, parent_pid, None if entry else START_WAIT_S)
    except BaseException as error:
        traceback.print_exception(error)
    finally:
        with contextlib.suppress(Exception):
            sys.stdout.flush()
            sys.stderr.flush()
        os._exit(code)


def _run_child(control: socket.socket, parent_pid: int | None, wait_s: float | None) -> int:
    set_parent_death_signal(signal.SIGKILL)
    if parent_pid is not None and os.getppid() != parent_pid:
        return EXIT_ORPHANED
    faulthandler.enable()
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    control.settimeout(wait_s)
    try:
        data, fds = wire.recv_frame(control)
    except DescriptorsLostError as error:
        return _refuse(control, error.request, OSError(error.number, str(error)))
    if not data:
        return EXIT_ORPHANED
    frame = wire.decode(data)
    if isinstance(frame.message, Stop):  # not wanted any more
        wire.send_frame(control, wire.encode(Done(), frame.request, reply=True))
        return 0
    try:
        actor = _build(frame.message, control, fds)
    except BaseException as error:
        return _refuse(control, frame.request, error)
    actor.start_request = frame.request
    return actor.run()


def _get_ready(name: str, entry: str) -> None:
    """Do what a child can do before it knows whose it is; an exception ends it."""
    from setproctitle import setproctitle

    setproctitle(f"pvbus: {name}")
    _class_of(entry).rehearse()
    inbox = Inbox(MonotonicClock())
    inbox.wake_on_signals()
    _inboxes.append(inbox)


def _class_of(entry: str) -> Any:
    module_name, _, class_name = entry.partition(":")
    return getattr(importlib.import_module(module_name), class_name)


def _refuse(control: socket.socket, request: int, error: BaseException) -> int:
    """Tell who starts us why we cannot; what is no OSError leaves its trace, too."""
    if not isinstance(error, OSError):
        traceback.print_exception(error)
    control.settimeout(START_WAIT_S)
    wire.send_frame(control, wire.encode(failure_of(error), request, reply=True))
    return EXIT_START_FAILED


def _build(start: Message, control: socket.socket, fds: list[int]) -> ProcessActor:
    if not isinstance(start, Start) or len(start.fds) != len(fds):
        text = f"a child's first message is Start with its descriptors, not {start!r} with {len(fds)}"
        raise WireError(text)
    from setproctitle import setproctitle

    setproctitle(f"pvbus: {start.name}")
    actor = _class_of(start.entry)(start.name, control, start.arguments, dict(zip(start.fds, fds, strict=True)))
    if not isinstance(actor, ProcessActor):
        text = f"{start.entry} made a {type(actor).__name__}, not a ProcessActor"
        raise TypeError(text)
    actor.inbox.wake_on_signals()  # here, where it may still fail for want of descriptors
    return actor
