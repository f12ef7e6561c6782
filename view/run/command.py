# SPDX-License-Identifier: Apache-2.0
"""`pvbus run`: find or boot a machine, make the room, start the command in it, be its exit code, leave nothing behind.

The first process is ours to the end: it waits for the command and passes signals on. If it is killed, a guard in the same
namespaces kills what is left there, and a machine that was booted for the run stops by itself.
"""

from __future__ import annotations

import contextlib
import errno
import functools
import os
import shutil
import signal
import subprocess
import sys
from typing import TYPE_CHECKING, NamedTuple

from pvbus.actors.client import MachineNotFoundError, attach
from pvbus.actors.runtime import rundir
from pvbus.view.fuse import mount
from pvbus.view.run import boot, regular, seccomp
from pvbus.view.run.evtchn import XenDevices
from pvbus.view.run.fitting import Fitting, close_all, fork_server
from pvbus.view.run.room import Room
from pvbus.view.run.sysfs import Sysfs
from pvbus.view.run.territory import Territory
from pvbus.view.run.xenstore import Xenstore

if TYPE_CHECKING:
    import argparse
    from collections.abc import Callable, Sequence

EXIT_NOT_EXECUTABLE = 126
EXIT_NOT_FOUND = 127
EXIT_SIGNALLED = 128  # plus the signal, as a shell says it
SHELL = "/bin/sh"  # runs what the kernel does not know how to, as execvp(3) has it

FRONTENDS: dict[str, Callable[[], list[Fitting]]] = {"fuse": regular.fittings, "seccomp": seccomp.fittings}
"""What filter is put over the device's file for each --frontend."""
FITTINGS: list[Callable[[argparse.Namespace], Fitting | None]] = [
    lambda _: Sysfs(),
    lambda arguments: Xenstore() if arguments.xenstore else None,
]
"""What else there is: each gives a fitting, or None if the arguments do not ask for it."""

PASSED_ON = signal.valid_signals() - {
    signal.SIGKILL, signal.SIGSTOP, signal.SIGCHLD,  # nobody can pass these on; who has a fault of its own ends by it
    signal.SIGSEGV, signal.SIGBUS, signal.SIGILL, signal.SIGFPE, signal.SIGTRAP, signal.SIGSYS, signal.SIGABRT,
}  # fmt: skip
_OF_THE_KERNEL = 0x80  # si_code of what the terminal sends to the whole group: the command has it already
_OF_A_HANGUP = {signal.SIGHUP, signal.SIGCONT}  # the terminal's to the leader of its session alone


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
        fittings = [XenDevices(), *_filter(arguments)] + [made for make in FITTINGS if (made := make(arguments)) is not None]
        room = Room(name, arguments.domain)
        room.in_child += [functools.partial(os.close, fd) for fd in closed]  # the command finds them as we did
        return _in_room(room, fittings, [arguments.program, *arguments.words])


def _filter(arguments: argparse.Namespace) -> list[Fitting]:
    if not arguments.no_filter:
        return FRONTENDS[arguments.frontend]()
    if arguments.frontend != "fuse":
        raise ValueError(f"--no-filter: there is no --frontend {arguments.frontend} without a filter")
    return []


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
    territory = Territory()
    for fitting in fittings:
        fitting.prepare(room)
    served = {fork_server(fitting, room, fittings): fitting for fitting in fittings if fitting.title}
    servers, last = {pid: fitting.obituary for pid, fitting in served.items()}, {pid for pid in served if served[pid].is_last}
    for fitting in fittings:
        close_all(fitting)
    guard, lifeline = _guard(room, territory, last)  # behind the servers, which would otherwise hold its lifeline
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
            territory.sweep(frozenset(last & servers.keys()))  # if the guard could not
        except TimeoutError as error:
            print(f"pvbus run: {error}", file=sys.stderr)
        else:
            for pid in servers:
                with contextlib.suppress(ProcessLookupError):
                    os.kill(pid, signal.SIGKILL)  # those that were left to themselves
                _reap(pid)


def _reap(pid: int) -> None:
    with contextlib.suppress(ChildProcessError):  # its end has been heard of already
        os.waitpid(pid, 0)


def _guard(room: Room, territory: Territory, last: set[int]) -> tuple[int, int]:
    """Fork the guard, which leaves `last` to themselves; give its pid, and the descriptor whose end it waits for. Signals to the
    whole group stay blocked in it.
    """
    read_end, write_end = os.pipe2(os.O_CLOEXEC)
    pid = os.fork()
    if pid:
        os.close(read_end)
        return pid, write_end
    try:
        os.close(write_end)
        from setproctitle import setproctitle

        setproctitle(f"pvbus: run/{room.machine}")
        os.read(read_end, 1)
        with contextlib.suppress(TimeoutError):  # the first process says so, if it lives
            territory.sweep(frozenset({os.getppid(), *last}))
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
            command, env={**os.environ, **room.environment}, preexec_fn=in_child,  # noqa: PLW1509 -- two system calls
            close_fds=False,  # all of ours close themselves, and it gets what we were given
        )  # fmt: skip
    except FileNotFoundError:
        if os.path.lexists(command[0]):
            print(f"pvbus run: {command[0]!r} cannot be executed: it needs a file that is not there", file=sys.stderr)
            return EXIT_NOT_EXECUTABLE
        print(f"pvbus run: there is no command {command[0]!r}", file=sys.stderr)
        return EXIT_NOT_FOUND
    except OSError as error:
        found = shutil.which(command[0])
        if error.errno == errno.ENOEXEC and found is not None and command[0] != SHELL:  # a script without a first line
            return _start([SHELL, found, *command[1:]], room)
        print(f"pvbus run: {command[0]!r} cannot be executed: {error.strerror}", file=sys.stderr)
        return EXIT_NOT_EXECUTABLE


def _wait(running: Running) -> int:
    """Wait for the command's end; pass signals on meanwhile, and stop when it stops."""
    command = running.command
    while True:
        caught = signal.sigwaitinfo([*PASSED_ON, signal.SIGCHLD])
        if caught.si_signo != signal.SIGCHLD:
            if not _has_it_already(command.pid, caught):
                with contextlib.suppress(ProcessLookupError):
                    os.kill(command.pid, caught.si_signo)
            continue
        for group, what in ((running.servers, "{}"), (running.daemons, "{} has died; its files answer with errors")):
            for pid, said in list(group.items()):
                if os.waitid(os.P_PID, pid, os.WEXITED | os.WNOHANG) is not None:
                    del group[pid]
                    print(f"pvbus run: {what.format(said)}", file=sys.stderr)
        code = command.poll()
        if code is not None:
            return code if code >= 0 else EXIT_SIGNALLED - code
        if _changed(command.pid, os.WSTOPPED) and _has_terminal():
            os.kill(os.getpid(), signal.SIGSTOP)  # the shell that has started us goes on, and continues us


def _has_it_already(command: int, caught: signal.struct_siginfo) -> bool:
    """Whether a signal has come to the command as well."""
    if caught.si_signo == signal.SIGCONT and _changed(command, os.WCONTINUED):
        return True
    leads = caught.si_signo in _OF_A_HANGUP and os.getsid(0) == os.getpid()
    return caught.si_code == _OF_THE_KERNEL and not leads


def _changed(pid: int, how: int) -> bool:
    """Whether a child has stopped, or has been continued, since it was last asked."""
    try:
        return os.waitid(os.P_PID, pid, how | os.WNOHANG) is not None
    except ChildProcessError:  # it has just ended
        return False


def _has_terminal() -> bool:
    try:
        os.close(os.open("/dev/tty", os.O_RDWR | os.O_NOCTTY | os.O_CLOEXEC))
    except OSError:
        return False
    return True
