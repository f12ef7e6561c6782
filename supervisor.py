# SPDX-License-Identifier: Apache-2.0
"""The entry: command line, configuration, exit code. `pvbus up` becomes the supervisor; every other verb attaches to one."""

from __future__ import annotations

import contextlib
import importlib.util
import json
import os
import resource
import select
import subprocess
import sys
import time
from pathlib import Path
from typing import TYPE_CHECKING

from pvbus.actors.hypervisor import kernel
from pvbus.actors.hypervisor.ports import DomainState, EventChannels
from pvbus.actors.runtime import config as configuration
from pvbus.actors.runtime import rundir
from pvbus.actors.supervisor.process import Supervisor
from pvbus.shm.memory import EventPath

if TYPE_CHECKING:
    import argparse
    from collections.abc import Callable, Sequence

    from pvbus.shm.pages import MachinePages

EXIT_BROKEN = 1
EXIT_USAGE = 2
EXIT_ENVIRONMENT = 3
EXIT_TIMED_OUT = 4
BROKEN = 70  # of actors/runtime/process.py: a broken invariant, its traceback on standard error
DETACH_S_MAX = 30.0  # a boot takes a fifth of a second
DETACHED = "PVBUS_DETACHED"  # set for the process that `up --detach` leaves behind


def give_to_kernels(config: configuration.MachineConfig, pages: MachinePages) -> None:
    """Bind what each domain's own kernel holds, and connect the static ports, before anything runs."""
    states = {domain.id: DomainState(domain.id, domain.cpus, pages.domain(domain.id)) for domain in config.domain}
    path = EventPath(pages.machine, {domid: state.memory for domid, state in states.items()})
    channels = EventChannels(states, path, lambda _domid, _vcpu: None, machine=pages.machine)
    for domain in config.domain:
        for virq in domain.global_virqs:
            channels.set_virq_handler(virq, domain.id)
    for domain in config.domain:
        kernel.boot(channels, domain.id, abi=domain.abi, kernel_ports=domain.kernel_ports, kernel_virqs=domain.kernel_virqs)
    for pair in config.static_evtchn:
        channels.bind_static_pair(pair.domain, pair.port, pair.remote_domain, pair.remote_port)


def up(config: configuration.MachineConfig, ready: Callable[[], None]) -> int:
    """Run a machine until it is stopped; give the exit code. OSError when it cannot start here."""
    _, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))  # a thousand open files are some thousand descriptors
    os.environ["SPT_NOENV"] = "1"  # setproctitle then leaves /proc/PID/environ alone, by which doctor knows whose a process is
    from setproctitle import setproctitle

    setproctitle(f"pvbus: supervisor/{config.name}")
    supervisor = Supervisor(config, give_to_kernels, ready)
    if os.environ.get(DETACHED):  # nobody reads our descriptors: what the machine has to say lies in the run directory
        log = rundir.run_directory(config.name) / "log"
        supervisor.output = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_APPEND | os.O_CLOEXEC, 0o600)
    code = supervisor.run()
    return EXIT_BROKEN if code == BROKEN else code


def _up(arguments: argparse.Namespace) -> int:
    try:
        config = configuration.load(arguments.config, arguments.name)
    except configuration.ConfigError as error:
        return _failed(arguments, EXIT_USAGE, str(error))
    if arguments.detach:
        return _detach(arguments, config.name)
    try:
        return up(config, lambda: _say_ready(config.name, as_json=arguments.json))
    except OSError as error:
        return _failed(arguments, EXIT_ENVIRONMENT, f"cannot start: {error.strerror or error} {error.filename or ''}".rstrip())


def _failed(arguments: argparse.Namespace, code: int, why: str) -> int:
    print(f"pvbus up: {why}", file=sys.stderr)
    if arguments.json:
        print(json.dumps({"schema": 1, "error": why, "exit_code": code}))
    return code


def _say_ready(name: str, *, as_json: bool) -> None:
    print(json.dumps({"schema": 1, "state": "ready", "name": name, "pid": os.getpid()}) if as_json else "ready", flush=True)
    if os.environ.pop(DETACHED, None):
        log = os.open(rundir.run_directory(name) / "log", os.O_WRONLY | os.O_APPEND | os.O_CLOEXEC)
        os.dup2(log, 1)
        os.dup2(log, 2)


def _detach(arguments: argparse.Namespace, name: str) -> int:
    """Start the machine in a session of its own, wait until it is ready, leave it running."""
    command = [sys.executable, "-P", "-m", "pvbus.supervisor", "up", "--name", name]
    command += ["--config", str(Path(arguments.config).absolute())] if arguments.config else []
    command += ["--json"] if arguments.json else []
    path = os.pathsep.join(entry for entry in sys.path if entry)
    environment = {**os.environ, DETACHED: "1", "PYTHONPATH": path}
    child = subprocess.Popen(
        command, env=environment, start_new_session=True, stdin=subprocess.DEVNULL, stdout=subprocess.PIPE
    )
    assert child.stdout is not None
    deadline = time.monotonic() + DETACH_S_MAX
    line = b""
    while not line.endswith(b"\n"):
        readable, _, _ = select.select([child.stdout], [], [], max(0.0, deadline - time.monotonic()))
        piece = os.read(child.stdout.fileno(), 4096) if readable else b""
        if not readable:
            child.terminate()
            print(f"pvbus: {name} was not ready after {DETACH_S_MAX:.0f} s", file=sys.stderr)
            return EXIT_TIMED_OUT
        if not piece:
            return child.wait(DETACH_S_MAX)
        line += piece
    sys.stdout.write(line.decode())
    child.returncode = 0  # it lives on, and is not ours to wait for
    return 0


def _stress(arguments: argparse.Namespace) -> int:
    from pvbus.verify import stress

    return stress.command(arguments.seconds, arguments.seed, arguments.name, as_json=arguments.json)


def _explorer(arguments: argparse.Namespace) -> int:
    if importlib.util.find_spec("greenlet") is None:
        raise OSError("the explorer needs greenlet, which is not installed here: pip install 'pvbus[explorer]'")
    from pvbus.verify import exploring, replaying, zooing

    commands = {"explore": exploring.command, "zoo": zooing.command, "replay": replaying.command}
    return commands[arguments.verb](arguments)


def main(argv: Sequence[str] | None = None) -> int:
    """Be the command `pvbus`."""
    with contextlib.suppress(KeyboardInterrupt):
        from pvbus.view import cli

        arguments = cli.parser().parse_args(argv)
        if arguments.verb == "up":
            return _up(arguments)
        return cli.run(arguments, {"stress": _stress, "explore": _explorer, "zoo": _explorer, "replay": _explorer})
    return 130


if __name__ == "__main__":
    sys.exit(main())
