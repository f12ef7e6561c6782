# SPDX-License-Identifier: Apache-2.0
"""The command line: its parser, and what each verb does with a machine that runs.

`up` and `stress` are carried out by the supervisor's module, which alone may import what they need; every
other verb is here, and goes through the client. Imported by `main()` only: children of a machine never load
it.

Exit codes: 0 held, 1 a property broken, 2 usage, 3 the environment lacks something, 4 time-out, 130
interrupted.
"""

from __future__ import annotations

import argparse
import errno
import os
import sys
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING

from pvbus.actors.client import MachineNotFoundError, attach
from pvbus.actors.runtime import rundir
from pvbus.shm.layout import NR_VIRQS
from pvbus.view import cli_explorer, cli_vmbus
from pvbus.view.tables import bold, print_json, table

if TYPE_CHECKING:
    from pvbus.actors.client import Machine

Verb = Callable[[argparse.Namespace], int]

HELD, BROKEN, USAGE, ENVIRONMENT, TIMED_OUT, INTERRUPTED = 0, 1, 2, 3, 4, 130
DOWN_S_MAX = 15.0  # an ordered stop of every process, each of which has 5 s, several at a time
DOWN_LOOK_S = 0.01
PORT_COLUMNS = (
    "domain",
    "port",
    "state",
    "remote_domain",
    "remote_port",
    "static",
    "virq",
    "vcpu",
    "file",
    "pending",
    "masked",
)
FILE_COLUMNS = (
    "file",
    "name",
    "opener_pid",
    "ports",
    "ring_size",
    "delivered",
    "dropped",
    "wakes",
    "overflow",
    "poisoned",
)
DOMAIN_COLUMNS = ("domain", "platforms", "abi", "cpus", "affinity")
VCPU_COLUMNS = ("cpu", "upcalls", "events", "unhandled", "sleeping", "generation")
FRONTENDS = ("fuse", "seccomp")  # of view/run/command.py, which is not loaded for every verb
EPILOG = """\
exit codes: 0 held, 1 a property broken, 2 usage, 3 the environment lacks something,
            4 time-out, 130 interrupted.       $PVBUS_MACHINE is the default of --name.
"""


class _Help(argparse.RawDescriptionHelpFormatter):
    """Leaves room for the longest verb: argparse forgets that verbs are indented once more than options."""

    def __init__(self, prog: str) -> None:
        super().__init__(prog)
        self._action_max_length = len("    conformance")

    def _format_action(self, action: argparse.Action) -> str:
        """The verbs stand under their title, without a line that says VERB once more: all of it fits a screen."""
        if isinstance(action, argparse._SubParsersAction):  # noqa: SLF001 - it has no public name
            return "".join(map(super()._format_action, self._iter_indented_subactions(action)))
        return super()._format_action(action)


class UsageError(ValueError):
    """An argument makes no sense for this machine; the text names its value."""


# ---- the parser


def parser() -> argparse.ArgumentParser:
    """Build the parser; the verb stands in `verb`."""
    top = argparse.ArgumentParser(
        prog="pvbus",
        description="Xen event channels and Hyper-V VMBus as Linux processes: boot a machine, look at it, stress it.",
        epilog=EPILOG,
        formatter_class=_Help,
        add_help=False,
    )
    top.add_argument("-h", "--help", action="help", help=argparse.SUPPRESS)
    verbs = top.add_subparsers(title="verbs", dest="verb", metavar="VERB", required=True)

    def verb(
        name: str, does: str, *, of_machine: bool = True, which: str = "$PVBUS_MACHINE, or the one that runs"
    ) -> argparse.ArgumentParser:
        one = verbs.add_parser(name, help=does, description=f"{does[0].upper()}{does[1:]}.")
        if of_machine:
            one.add_argument("--name", metavar="N", help=f"the machine ({which})")
        one.add_argument("--json", action="store_true", help="one JSON object with a schema number")
        return one

    up = verb(
        "up",
        "boot a machine, and print `ready` once it can be attached to",
        which="default: as its configuration says, else `default`",
    )
    up.add_argument(
        "--config", type=Path, metavar="FILE.toml", help="its configuration (default: two Xen domains, FIFO ABI)"
    )
    up.add_argument("--detach", action="store_true", help="leave it running in the background")
    verb("down", "stop a machine in order, and wait until it is gone")
    verb("status", "show processes, domains, open files and counters")
    ports = verb("ports", "list the ports that are not free")
    ports.add_argument("--domain", type=int, metavar="D", help="of this domain only")
    virq = verb("virq", "raise a VIRQ, as the hypervisor does")
    virq.add_argument("virq", type=int, metavar="VIRQ", help=f"its number, 0 to {NR_VIRQS - 1}")
    virq.add_argument("--domain", type=int, default=0, metavar="D")
    virq.add_argument("--vcpu", type=int, default=0, metavar="V")
    affinity = verb("affinity", "have a virtual CPU serve a port (smp_affinity)")
    affinity.add_argument("port", metavar="D:P", help="domain and port, for example 0:5")
    affinity.add_argument("vcpu", type=int, metavar="V", help="the number of the virtual CPU")
    soft_reset = verb("soft-reset", "boot another kernel in a domain: its files and ports go")
    soft_reset.add_argument("domain", type=int, metavar="D")
    cli_vmbus.add_verbs(verb)
    explain = verb("explain", "say where an interrupt stands, and what would move it on")
    explain.add_argument("what", choices=["port"], metavar="port")
    explain.add_argument("port", metavar="D:P", help="domain and port, for example 0:5")
    stress = verb("stress", "stress a machine and judge it", which="default: one of its own")
    stress.add_argument("--seconds", type=float, default=10.0, metavar="S")
    stress.add_argument(
        "--seed", type=int, default=1, metavar="N", help="what all random decisions come from"
    )
    cli_explorer.add_verbs(verb)
    demo = verb("demo", "show a machine of its own at work", of_machine=False)
    demo.add_argument("--seconds", type=float, default=6.0, metavar="S")
    doctor = verb("doctor", "look at what a machine needs here, and at what dead ones left")
    doctor.add_argument("--clean", action="store_true", help="take away what is left")
    run_ = verb("run", "run a command with the devices of a machine in place", which="one that runs, else one of its own")
    run_.add_argument("--domain", type=int, default=0, metavar="D", help="whose devices")
    run_.add_argument("--frontend", choices=sorted(FRONTENDS), default="fuse", help="how /dev/xen/evtchn is presented")
    run_.add_argument("--no-filter", action="store_true", help="no seccomp filter over the FUSE file")
    run_.add_argument("--xenstore", action="store_true", help="with a xenstored, and /dev/xen/xenbus to it")
    run_.add_argument("program", metavar="COMMAND", help="with its arguments; what follows it is its own")
    run_.add_argument("words", nargs=argparse.REMAINDER, metavar="…", help=argparse.SUPPRESS).required = False
    verb("conformance", "show which test shows which row of the contract", of_machine=False)
    return top


# ---- the way in


def run(arguments: argparse.Namespace, others: Mapping[str, Verb] | None = None) -> int:
    """Carry out a verb; give the exit code. Errors become a sentence on standard error.

    `others` are verbs that need what this module may not import.
    """
    try:
        code = {**_VERBS, **(others or {})}[arguments.verb](arguments)
        if sys.stdout is not None:  # it was closed when we were started
            sys.stdout.flush()
    except KeyboardInterrupt:
        return INTERRUPTED
    except MachineNotFoundError as error:
        return _fail(arguments, ENVIRONMENT, str(error))
    except BrokenPipeError:  # the reader of our output has seen enough
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return HELD
    except TimeoutError as error:
        return _fail(arguments, TIMED_OUT, error.strerror or str(error))
    except ValueError as error:  # a name that is none, UsageError
        return _fail(arguments, USAGE, str(error))
    except OSError as error:
        return _fail(arguments, ENVIRONMENT, error.strerror or str(error))
    return code


def _fail(arguments: argparse.Namespace, code: int, why: str) -> int:
    print(f"pvbus {arguments.verb}: {why}", file=sys.stderr)
    if arguments.json and sys.stdout is not None:
        try:
            print_json({"error": why, "exit_code": code})
            sys.stdout.flush()
        except OSError:  # there is no room for it, or nobody reads it: the sentence above has to do
            os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
    return code


# ---- verbs


def _down(arguments: argparse.Namespace) -> int:
    with attach(arguments.name) as machine:
        name, run_id = machine.name, machine.run_id
        machine.shutdown()
    deadline_s = time.monotonic() + DOWN_S_MAX
    while any(left.name == name and left.run_id == run_id and left.held for left in rundir.list_machines()):
        if time.monotonic() > deadline_s:
            raise TimeoutError(f"machine {name!r} still runs {DOWN_S_MAX:.0f} s after it was told to stop")
        time.sleep(DOWN_LOOK_S)
    if arguments.json:
        print_json({"name": name, "run_id": run_id, "state": "stopped"})
    else:
        print(f"{name} is stopped")
    return HELD


def _status(arguments: argparse.Namespace) -> int:
    with attach(arguments.name) as machine:
        data = machine.status()
    if arguments.json:
        print_json(data)
        return HELD
    counters = ", ".join(f"{name} {value}" for name, value in data["counters"].items())
    print(f"{bold(data['name'])} is {data['state']}, run {data['run_id']}; {counters}")
    print(f"profile {data['profile']}; variants: {', '.join(data['variants']) or 'none'}")
    print("\n" + table(data["processes"], ("name", "pid", "restarts", "state")))
    domains = [{"domain": domain["id"], **domain} for domain in data["domains"]]
    print("\n" + table(domains, DOMAIN_COLUMNS))
    vcpus = [
        {"cpu": f"{domain['id']}.{cpu['vcpu']}", **cpu}
        for domain in data["domains"]
        for cpu in domain["vcpus"]
    ]
    print("\n" + table(vcpus, VCPU_COLUMNS))
    if data["files"]:
        print("\n" + table(data["files"], FILE_COLUMNS))
    return HELD


def _ports(arguments: argparse.Namespace) -> int:
    with attach(arguments.name) as machine:
        if arguments.domain is not None:
            _known_domain(machine, arguments.domain)
        found = machine.ports(arguments.domain)
        name = machine.name
    if arguments.json:
        print_json({"name": name, "ports": found})
    else:
        print(table(found, PORT_COLUMNS) if found else "no port is bound")
    return HELD


def _virq(arguments: argparse.Namespace) -> int:
    virq, domain, vcpu = arguments.virq, arguments.domain, arguments.vcpu
    if not 0 <= virq < NR_VIRQS:
        raise UsageError(f"VIRQ {virq}: there are VIRQs 0 to {NR_VIRQS - 1}")
    with attach(arguments.name) as machine:
        cpus = _known_domain(machine, domain)
        if not 0 <= vcpu < cpus:
            raise UsageError(f"--vcpu {vcpu}: domain {domain} has vCPUs 0 to {cpus - 1}")
        try:
            port = machine.raise_virq(virq, domain, vcpu)
        except FileNotFoundError as error:
            raise OSError(f"{error.strerror}, so nobody can hear it: bind it first (bind_virq)") from None
    if arguments.json:
        print_json({"virq": virq, "domain": domain, "vcpu": vcpu, "port": port})
    else:
        print(f"VIRQ {virq} is raised on port {port}")
    return HELD


def _affinity(arguments: argparse.Namespace) -> int:
    domain, port = parse_place(arguments.port)
    with attach(arguments.name) as machine:
        cpus = _known_domain(machine, domain)
        if not 0 <= arguments.vcpu < cpus:
            raise UsageError(f"vCPU {arguments.vcpu}: domain {domain} has vCPUs 0 to {cpus - 1}")
        try:
            machine.set_affinity(domain, port, arguments.vcpu)
        except OSError as error:
            if error.errno == errno.EINVAL:
                raise UsageError(f"port {domain}:{port} cannot be moved: {error.strerror}") from None
            raise
    if arguments.json:
        print_json({"domain": domain, "port": port, "vcpu": arguments.vcpu})
    else:
        print(f"port {domain}:{port} is served by cpu/{domain}.{arguments.vcpu}")
    return HELD


def _soft_reset(arguments: argparse.Namespace) -> int:
    with attach(arguments.name) as machine:
        _known_domain(machine, arguments.domain)
        machine.soft_reset(arguments.domain)
    if arguments.json:
        print_json({"domain": arguments.domain, "state": "reset"})
    else:
        print(f"domain {arguments.domain} has booted another kernel")
    return HELD


def _known_domain(machine: Machine, domain: int) -> int:
    """Give the number of CPUs of a domain; UsageError without it."""
    domains = {spec["id"]: spec["cpus"] for spec in machine.status()["domains"]}
    if domain not in domains:
        raise UsageError(
            f"--domain {domain}: machine {machine.name!r} has domains {', '.join(map(str, sorted(domains)))}"
        )
    return int(domains[domain])


def parse_place(text: str) -> tuple[int, int]:
    """Read D:P, domain and port. UsageError."""
    domain, colon, port = text.partition(":")
    if not (colon and domain.isascii() and domain.isdecimal() and port.isascii() and port.isdecimal()):
        raise UsageError(f"{text!r} is no port: write domain and port as D:P, for example 0:5")
    return int(domain), int(port)


def _explain(arguments: argparse.Namespace) -> int:
    from pvbus.view.explain import explain

    domain, port = parse_place(arguments.port)
    with attach(arguments.name) as machine:
        found = explain(machine, domain, port)
    if not found.found:
        raise UsageError(found.text)
    if arguments.json:
        print_json(found.as_dict())
        return HELD
    print(f"{found.text} Next: {found.next}.")
    if sys.stdout.isatty():
        width = max(len(step["where"]) for step in found.steps)
        for step in found.steps:
            line = f"  {'▶' if step['holds'] else '·'} {step['where'].ljust(width)}  {step['detail']}"
            print(bold(line) if step["holds"] else line)
    return HELD


def _demo(arguments: argparse.Namespace) -> int:
    from pvbus.view import demo

    return demo.command(arguments.seconds, arguments.json)


def _conformance(arguments: argparse.Namespace) -> int:
    from pvbus.view import conformance

    return conformance.command(as_json=arguments.json)


def _doctor(arguments: argparse.Namespace) -> int:
    from pvbus.view import doctor

    if arguments.name is not None:
        rundir.run_directory(arguments.name)  # ValueError for what is no name
    found = doctor.examine(arguments.name, take_away=arguments.clean)
    if arguments.json:
        print_json(found)
    else:
        _print_findings(found)
    if any(check["level"] == "lacking" for check in found["checks"]):
        return ENVIRONMENT
    return HELD if found["ok"] else BROKEN


def _print_findings(found: dict[str, list[dict[str, str]]]) -> None:
    for check in found["checks"]:
        advice = f": {check['advice']}" if check["advice"] else ""
        print(f"{check['level']:8}  {check['name']:14}  {check['found']}{advice}")
    for path in found["removed"]:
        print(f"removed   {path}")
    for text in found["kept"]:
        print(f"kept      {text}")
    for item in found["leftovers"]:
        of = f" of dead machine {item['machine']}" if item["machine"] else ""
        print(f"left      {item['kind']}{of}: {item['path']}")
    if found["leftovers"] and not found["kept"]:
        print("take away what is left with: pvbus doctor --clean")


def _run(arguments: argparse.Namespace) -> int:
    from pvbus.view.run import command

    return command.run(arguments)


_VERBS: dict[str, Verb] = {
    **cli_vmbus.VERBS,
    "down": _down,
    "status": _status,
    "ports": _ports,
    "virq": _virq,
    "affinity": _affinity,
    "soft-reset": _soft_reset,
    "explain": _explain,
    "run": _run,
    "demo": _demo,
    "doctor": _doctor,
    "conformance": _conformance,
}
