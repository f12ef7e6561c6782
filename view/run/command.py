# SPDX-License-Identifier: Apache-2.0
"""`pvbus run`: find or boot a machine, make the room, start the command in it, be its exit code, leave nothing behind.

The first process is ours to the end: it waits for the command and passes signals on. If it is killed, a guard in the same
namespaces kills what is left there, and a machine that was booted for the run stops by itself.
"""

from __future__ import annotations

import contextlib
import functools
import os
import signal
import subprocess
import sys
from typing import TYPE_CHECKING, NamedTuple

from pvbus.actors.client import MachineNotFoundError, attach
from pvbus.actors.runtime import rundir
from pvbus.view.fuse import mount
from pvbus.view.run import boot
from pvbus.view.run.evtchn import XenDevices
from pvbus.view.run.fitting import Fitting, close_all, fork_server
from pvbus.view.run.room import Room, sweep
from pvbus.view.run.seccomp import SeccompFrontend
from pvbus.view.run.sysfs import Sysfs
from pvbus.view.run.xenstore import Xenstore

if TYPE_CHECKING:
    import argparse
    from collections.abc import Callable, Sequence

EXIT_NOT_EXECUTABLE = 126
EXIT_NOT_FOUND = 127
EXIT_SIGNALLED = 128  # plus the signal, as a shell says it

FRONTENDS: dict[str, Callable[[], list[Fitting]]] = {
    "fuse": lambda: [XenDevices()],
    "seccomp": lambda: [XenDevices(), SeccompFrontend()],
}
"""What is put in place for each --frontend."""
FITTINGS: list[Callable[[argparse.Namespace], Fitting | None]] = [
    lambda _: Sysfs(),
    lambda arguments: Xenstore() if arguments.xenstore else None,
]
"""What else there is: each gives a fitting, or None if the arguments do not ask for it."""

PASSED_ON = (
    signal.SIGTERM, signal.SIGINT, signal.SIGHUP, signal.SIGQUIT, signal.SIGUSR1, signal.SIGUSR2, signal.SIGWINCH,
    signal.SIGALRM, signal.SIGCONT,
)  # fmt: skip
_OF_THE_KERNEL = 0x80  # si_code of what the terminal sends to the whole group: the command has it already


class Running(NamedTuple):
    """The processes of a run."""

    command: subprocess.Popen[bytes]
    servers: dict[int, str]
    daemons: dict[int, str]


def run(arguments: argparse.Namespace) -> int:
    """Be the verb. EnvironmentLacksError, and any other OSError, says in a sentence what is missing here."""
    closed = _fill_standard_streams()
    with _machine(arguments.name) as name:
        _check_domain(name, arguments.domain)
        fittings = FRONTENDS[arguments.frontend]() + [made for make in FITTINGS if (made := make(arguments)) is not None]
        room = Room(name, arguments.domain)
        room.in_child += [functools.partial(os.close, fd) for fd in closed]  # the command finds them as we did
        return _in_room(room, fittings, arguments.command)


def _fill_standard_streams() -> list[int]:
    """Put /dev/null where a standard stream is closed, lest a pipe of ours gets its number; give which were."""
    closed = []
    for fd in range(3):
        try:
            os.fstat(fd)
        except OSError:
            closed.append(os.open(os.devnull, os.O_RDWR))  # the lowest number that is free
            os.set_inheritable(fd, True)
    return closed


def _machine(name: str | None) -> contextlib.AbstractContextManager[str]:
    """Find the machine that is meant, or boot one of that name for as long as this lasts."""
    try:
        with attach(name) as machine:
            return contextlib.nullcontext(machine.name)
    except MachineNotFoundError:
        alive = [found.name for found in rundir.list_machines() if found.alive]
        wanted = name or os.environ.get("PVBUS_MACHINE")
        if wanted is None and alive:  # several: it says which
            raise
        return boot.booted(wanted or f"run-{os.getpid()}")


def _check_domain(name: str, domain: int) -> None:
    with attach(name) as machine:
        domains = sorted(spec["id"] for spec in machine.status()["domains"])
    if domain not in domains:
        raise ValueError(f"--domain {domain}: machine {name!r} has domains {', '.join(map(str, domains))}")


def _in_room(room: Room, fittings: list[Fitting], command: Sequence[str]) -> int:
    signal.pthread_sigmask(signal.SIG_BLOCK, [*PASSED_ON, signal.SIGCHLD])
    room.environment |= {"PVBUS_MACHINE": room.machine, "PVBUS_RUN_ROOT": str(rundir.run_root().absolute())}
    os.environ |= room.environment
    room.enter()
    for fitting in fittings:
        fitting.prepare(room)
    servers = {fork_server(fitting, room, fittings): fitting.title for fitting in fittings if fitting.title}
    for fitting in fittings:
        close_all(fitting)
    guard, lifeline = _guard(room)  # behind the servers, which would otherwise hold its lifeline
    try:
        for fitting in fittings:
            fitting.dress(room)
        room.place_sys()
        for fitting in fittings:
            fitting.start(room)
        started = _start(command, room)
        return started if isinstance(started, int) else _wait(Running(started, servers, room.daemons))
    finally:
        for pid in room.daemons:  # they may have a mount namespace of their own, where the guard does not look
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)
            _reap(pid)
        os.close(lifeline)  # the guard ends the servers, and whatever the command has left running
        _reap(guard)
        try:
            sweep()  # if the guard could not
        except TimeoutError as error:
            print(f"pvbus run: {error}", file=sys.stderr)
        else:
            for pid in servers:
                _reap(pid)


def _reap(pid: int) -> None:
    with contextlib.suppress(ChildProcessError):  # its end has been heard of already
        os.waitpid(pid, 0)


def _guard(room: Room) -> tuple[int, int]:
    """Fork the guard; give its pid, and the descriptor whose end it waits for."""
    read_end, write_end = os.pipe2(os.O_CLOEXEC)
    pid = os.fork()
    if pid:
        os.close(read_end)
        return pid, write_end
    try:
        os.close(write_end)
        for number in (signal.SIGINT, signal.SIGHUP, signal.SIGQUIT, signal.SIGTERM):
            signal.signal(number, signal.SIG_IGN)
        from setproctitle import setproctitle

        setproctitle(f"pvbus: run/{room.machine}")
        os.read(read_end, 1)
        with contextlib.suppress(TimeoutError):  # the first process says so, if it lives
            sweep(frozenset({os.getppid()}))
    finally:
        os._exit(0)


def _start(command: Sequence[str], room: Room) -> subprocess.Popen[bytes] | int:
    def in_child() -> None:
        mount.die_with_parent(signal.SIGKILL)
        signal.pthread_sigmask(signal.SIG_SETMASK, [])
        for hook in room.in_child:
            hook()

    if not command[0]:  # for exec it would be each directory of PATH in turn
        print("pvbus run: there is no command ''", file=sys.stderr)
        return EXIT_NOT_FOUND
    try:
        return subprocess.Popen(
            command, env={**os.environ, **room.environment}, preexec_fn=in_child  # noqa: PLW1509 -- two system calls
        )  # fmt: skip
    except FileNotFoundError:
        if os.path.lexists(command[0]):
            print(f"pvbus run: {command[0]!r} cannot be executed: it needs a file that is not there", file=sys.stderr)
            return EXIT_NOT_EXECUTABLE
        print(f"pvbus run: there is no command {command[0]!r}", file=sys.stderr)
        return EXIT_NOT_FOUND
    except OSError as error:
        print(f"pvbus run: {command[0]!r} cannot be executed: {error.strerror}", file=sys.stderr)
        return EXIT_NOT_EXECUTABLE


def _wait(running: Running) -> int:
    """Wait for the command's end; pass signals on meanwhile."""
    command = running.command
    while True:
        caught = signal.sigwaitinfo([*PASSED_ON, signal.SIGCHLD])
        if caught.si_signo != signal.SIGCHLD:
            if caught.si_code != _OF_THE_KERNEL:
                with contextlib.suppress(ProcessLookupError):
                    os.kill(command.pid, caught.si_signo)
            continue
        for group, what in ((running.servers, "the server of {}"), (running.daemons, "{}")):
            for pid, title in list(group.items()):
                if os.waitid(os.P_PID, pid, os.WEXITED | os.WNOHANG) is not None:
                    del group[pid]
                    print(f"pvbus run: {what.format(title)} has died; its files answer with errors", file=sys.stderr)
        code = command.poll()
        if code is not None:
            return code if code >= 0 else EXIT_SIGNALLED - code
