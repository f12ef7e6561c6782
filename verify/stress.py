# SPDX-License-Identifier: Apache-2.0
"""`pvbus stress`: real user processes over many ports, kill -9 among them, and a judgement at the end.

What is checked, and how:

* *Nothing comes that was not raised.* A sender counts before it notifies; a receiver, at every event, that
  it has not seen more than was raised (one more for a port that is born pending). Exact: a port whose
  sender waits until the last event was seen must have seen just as many as were raised, so a doubled event
  shows at once, also across a kill.
* *Nothing is lost.* A receiver notes, after every read of a port, how many had been raised by then. When
  all senders have stopped and the machine has settled, that note must be the last notify: otherwise a
  notify came after the last event, and nobody was told.
* *A killed cpu comes back*, within a bound, and both of the above hold across it.
* *A killed user's ports are free* within a bound, its peers are unbound, and what it had raised before
  still arrives.

Every random decision comes from `random.Random(seed)`; the schedule of the kernel does not, so a replay
repeats the plan and not the interleaving. The judge reads the tally (tally.py); users.py and churn.py are
what runs.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import sys
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from dataclasses import asdict, dataclass, field
from typing import Any

from pvbus.actors.client import attach
from pvbus.verify.crew import Crew, CrewError
from pvbus.verify.fleet import Fleet, Load
from pvbus.verify.launch import TWO_DOMAINS, LaunchError, launched
from pvbus.verify.strikes import Striker, plan_strikes
from pvbus.verify.tally import Tally

SCHEMA = 1
SECONDS_MAX = 86_400.0
VIOLATIONS_MAX = 200  # beyond it the run ends: it will not get clearer
ABIS = (("2-level", "2-level"), ("fifo", "fifo"), ("fifo", "2-level"))  # of domains 0 and 1: the seed says which
HELD, BROKEN, USAGE, ENVIRONMENT, INTERRUPTED = 0, 1, 2, 3, 130


@dataclass
class Report:
    """What a run has shown. `held` is the verdict; the rest says how much weight it has."""

    seconds: float
    seed: int
    replay: str
    abis: str = ""  # of a machine of its own
    held: bool = True
    violations: list[str] = field(default_factory=list)
    explanations: list[str] = field(default_factory=list)
    notifies: int = 0
    events: int = 0
    churn_cycles: int = 0
    cpu_kills: int = 0
    user_kills: int = 0
    cpu_back_ms_max: float = 0.0
    user_ports_free_ms_max: float = 0.0

    def lines(self) -> list[str]:
        """Say it in a few lines."""
        said = [f"ABI of domains 0 and 1: {self.abis}"] if self.abis else []
        said += [
            f"{self.notifies} notifies, {self.events} events read and written back",
            f"{self.churn_cycles} cycles of bind, notify and unbind",
            f"{self.cpu_kills} cpus killed, back within {self.cpu_back_ms_max:.0f} ms",
            f"{self.user_kills} users killed, their ports free within {self.user_ports_free_ms_max:.0f} ms",
        ]
        said += [f"violation: {text}" for text in self.violations]
        said += [f"explain: {text}" for text in self.explanations]
        broken = f"BROKEN: {len(self.violations)} violations"
        said.append("held: nothing lost, nothing doubled" if self.held else broken)
        return said


def replay_line(seconds: float, seed: int, name: str | None) -> str:
    """Return the command that repeats a run."""
    machine = f" --name {name}" if name else ""
    return f"pvbus stress --seconds {seconds:g} --seed {seed}{machine}"


def config_of(abis: tuple[str, str]) -> str:
    """Return the configuration of a machine whose domains have these ABIs."""
    before, between, after = TWO_DOMAINS.split('abi = "2-level"')
    return f'{before}abi = "{abis[0]}"{between}abi = "{abis[1]}"{after}'


def _drive(machine: Any, name: str, report: Report, load: Load) -> None:
    """Run users and strikes on an attached machine, and fill in the report."""
    rng = random.Random(report.seed)
    tally = Tally.make(load.links_max(report.seconds))
    crew = Crew(report.violations)
    with ExitStack() as stack:
        stack.callback(tally.close)
        stack.callback(crew.close)
        fleet = Fleet(machine, name, crew, tally, rng, load)
        fleet.start()
        striker = Striker(machine, fleet, crew, report.violations)
        stack.callback(striker.close)
        striker.run(plan_strikes(report.seconds, rng), report.seconds, VIOLATIONS_MAX)
        report.cpu_kills, report.user_kills = striker.cpu_kills, striker.user_kills
        report.cpu_back_ms_max = striker.cpu_back_ms_max
        report.user_ports_free_ms_max = striker.user_free_ms_max
        fleet.bring_to_rest()
        report.violations += fleet.judge()
        report.notifies, report.events, report.churn_cycles = fleet.counts()
        report.explanations = fleet.explain()


def run(
    seconds: float,
    seed: int,
    machine_name: str | None = None,
    *,
    load: Load | None = None,
    say: Callable[[str], None] = print,
) -> Report:
    """Stress a machine for that long, its own unless one is named, and judge it.

    The first line said replays the run.
    """
    report = Report(seconds, seed, replay_line(seconds, seed, machine_name))
    say(f"replay: {report.replay}")
    with ExitStack() as stack:
        name = machine_name or f"stress-{os.getpid()}"
        if machine_name is None:
            abis = ABIS[seed % len(ABIS)]
            report.abis = ", ".join(abis)
            stack.enter_context(launched(name, config_of(abis)))
        machine = stack.enter_context(attach(name=name))
        try:
            _drive(machine, name, report, load or Load())
        except (CrewError, OSError) as error:
            report.violations.append(f"the run could not go on: {type(error).__name__}: {error}")
    del report.violations[VIOLATIONS_MAX:]
    report.held = not report.violations
    return report


def command(seconds: float, seed: int, machine_name: str | None = None, as_json: bool = False) -> int:
    """Do what `pvbus stress` does, return its exit code. With JSON, the replay line goes to stderr."""

    def say_error(text: str) -> None:
        print(text, file=sys.stderr, flush=True)

    def say_out(text: str) -> None:
        print(text, flush=True)

    if not 0 < seconds <= SECONDS_MAX:
        say_error(f"--seconds {seconds:g}: must be more than 0 and at most {SECONDS_MAX:.0f}")
        return USAGE
    try:
        report = run(seconds, seed, machine_name, say=say_error if as_json else say_out)
    except (LaunchError, OSError, ValueError) as error:
        say_error(f"no machine to stress: {error}")
        return ENVIRONMENT
    except KeyboardInterrupt:
        return INTERRUPTED
    if as_json:
        print(json.dumps({"schema": SCHEMA, **asdict(report)}))
    else:
        for line in report.lines():
            print(line)
    return HELD if report.held else BROKEN


def main(arguments: Sequence[str] | None = None) -> int:
    """Read a command line of its own: `python -m pvbus.verify.stress`."""
    parser = argparse.ArgumentParser(prog="pvbus stress", description="Stress a machine and judge it.")
    parser.add_argument("--seconds", type=float, default=10.0)
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--name", help="a machine that runs already (default: one of its own)")
    parser.add_argument("--json", action="store_true")
    options = parser.parse_args(arguments)
    return command(options.seconds, options.seed, options.name, options.json)


if __name__ == "__main__":
    sys.exit(main())
