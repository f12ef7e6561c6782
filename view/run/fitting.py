# SPDX-License-Identifier: Apache-2.0
"""What a room is fitted with: a device tree or a daemon, served by a process of its own.

A fitting is made of steps that `pvbus run` takes in this order: `prepare` (in the namespaces, nobody serves yet: mounts, entries
of /sys), `serve` (in a process of its own, forked now), `dress` (back in the first process: what needs its own server to answer)
and `start` (/sys is in place: daemons, as children). Add a fitting to FITTINGS in command.py.
"""

from __future__ import annotations

import math
import os
import resource
import select
import signal
import sys
import time
import traceback
from typing import TYPE_CHECKING

from pvbus.actors.runtime import rundir
from pvbus.actors.runtime.clock import MonotonicClock
from pvbus.actors.runtime.inbox import Inbox
from pvbus.view.fuse import mount
from pvbus.view.fuse.eager import Eager

if TYPE_CHECKING:
    from collections.abc import Iterable

    from pvbus.actors.runtime.peer import Peer
    from pvbus.view.fuse.session import Session
    from pvbus.view.run.room import Room


class Fitting:
    """One device tree of a room, or one daemon. Override what it needs."""

    title = ""
    """What its process is called; without a title it has none."""

    is_last = False
    """Whether its process is needed until everything else of the run has ended, and ends by itself then."""

    def __init__(self) -> None:
        self.fds: list[int] = []
        """Descriptors that only its server may hold: what a mount answers through, for its death to be an error to all."""

    def prepare(self, room: Room) -> None:
        """Mount, and make entries in /sys."""

    def serve(self, room: Room) -> None:
        """Serve until the end: its own process, which dies with the run."""

    def dress(self, room: Room) -> None:
        """Do what needs the server."""

    def start(self, room: Room) -> None:
        """Start daemons; what they are is killed at the end of the run."""

    @property
    def obituary(self) -> str:
        """What is said when its process has died."""
        return f"the server of {self.title} has died; its files answer with errors"

    # ---- for subclasses

    def mount_fuse(self, target: str, options: str) -> int:
        """Mount a FUSE directory; its descriptor is this fitting's."""
        fd = mount.mount_fuse(target, options=options)
        self.fds.append(fd)
        return fd


def fork_server(fitting: Fitting, room: Room, others: Iterable[Fitting]) -> int:
    """Fork the server of a fitting; give its pid. Signals to the whole group are for the command: they stay blocked."""
    parent = os.getpid()
    pid = os.fork()
    if pid:
        return pid
    code = 1
    try:
        if not fitting.is_last:
            mount.die_with_parent(signal.SIGKILL)
        if os.getppid() != parent:  # it has died before it could be asked for
            os._exit(code)
        for other in others:
            if other is not fitting:
                close_all(other)
        from setproctitle import setproctitle

        setproctitle(f"pvbus: {fitting.title}/{room.machine}")
        _, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
        resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))  # four descriptors an open file
        fitting.serve(room)
        code = 0
    except BaseException:
        traceback.print_exc()
    finally:
        sys.stderr.flush()
        os._exit(code)


def close_all(fitting: Fitting) -> None:
    """Close what only its server may hold."""
    for fd in fitting.fds:
        os.close(fd)
    fitting.fds.clear()


def connect(inbox: Inbox, machine: str) -> Peer:
    """Connect a server's inbox to a machine's supervisor."""
    return inbox.add_peer(rundir.connect_machine(rundir.run_directory(machine)), machine)


def new_inbox(name: str) -> Inbox:
    """Make the inbox of a server."""
    return Inbox(MonotonicClock(), name)


def serve_session(inbox: Inbox, session: Session) -> None:
    """Serve a mounted tree in an inbox until it is unmounted.

    Requests that are answered at once do not leave the inbox's sleep: they cost two system calls more than their own.
    """
    both = select.epoll()
    both.register(session.fd, select.EPOLLIN)
    eager = Eager(both, 2)
    wait, serve, requests_only = eager.wait, session.serve_on, [(session.fd, select.EPOLLIN)]
    watched = False

    def sleep(inbox_fd: int, timeout_ms: int) -> None:
        nonlocal watched
        if not watched:
            both.register(inbox_fd, select.EPOLLIN)
            watched = True
        kept = session.kept
        timeout_s = None if timeout_ms < 0 else timeout_ms / 1000
        until_s = math.inf if timeout_s is None else time.monotonic() + timeout_s
        while session.kept == kept and not session.closed:
            ready = wait(timeout_s)
            if eager.has_slept:
                eager.has_slept = False
                session.slept()
            if ready == requests_only:
                serve()
                if timeout_s is None:
                    continue
                timeout_s = until_s - time.monotonic()
                if timeout_s > 0:
                    continue  # else a timer is due, however much is asked
            elif any(fd == session.fd for fd, _ in ready):
                serve()
            break
        if session.closed:
            inbox.call_soon(_leave)

    inbox.sleep_in(sleep)
    try:
        while True:
            inbox.get()  # answers are handled inside; nobody sends us messages of other kinds
    except _Unmounted:
        both.close()


class _Unmounted(Exception):
    """The tree that is served is mounted nowhere any more."""


def _leave() -> None:
    raise _Unmounted
