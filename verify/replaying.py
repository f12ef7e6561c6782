# SPDX-License-Identifier: Apache-2.0
"""`pvbus replay`: a recorded failure again, all of it, or as far as one wants, and from there by chance or step by step."""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final, TextIO

from pvbus.verify import scenarios, zoo
from pvbus.verify.explorer import ReplayError
from pvbus.verify.explorer.recording import Recording, RecordingError, read
from pvbus.verify.explorer.sites import check
from pvbus.verify.explorer.walk import Walked, Walker
from pvbus.verify.searching import drawn, told

if TYPE_CHECKING:
    from pvbus.verify.explorer.scenario import Scenario

SCHEMA: Final = 1
HELD, BROKEN = 0, 1


def command(arguments: argparse.Namespace) -> int:
    """Carry out the verb. ValueError says what makes no sense; exit code 1 says that it still fails."""
    recording = load(Path(arguments.file))
    make = maker(recording)
    if arguments.until is not None and not 0 <= arguments.until <= len(recording.choices):
        raise ValueError(f"--until {arguments.until}: the recording has {len(recording.choices)} choices")
    if arguments.then is not None and arguments.until is None:
        raise ValueError(f"--then {arguments.then} needs --until N: from where on")
    if (differs := recording.differs()) is not None:
        print(f"pvbus replay: {differs}", file=sys.stderr)
    try:
        walked = _walk(Walker.of(make, recording), recording, arguments)
    except ReplayError as error:
        raise ValueError(f"{arguments.file} does not fit here: {error}") from None
    if arguments.json:
        print(json.dumps({"schema": SCHEMA, **_as_dict(recording, walked, differs)}))
    else:
        _tell(recording, make, walked, whole=arguments.until is None)
    return HELD if walked.kind is None else BROKEN


def _walk(walker: Walker, recording: Recording, arguments: argparse.Namespace) -> Walked:
    if arguments.until is None:
        return walker.to_the_end(recording.choices)
    choices = recording.choices[: arguments.until]
    if arguments.then == "random":
        return walker.along(choices, then="random", seed=arguments.seed)
    walked = walker.along(choices)
    if arguments.then == "step":
        asked = _Steps(sys.stderr if arguments.json else sys.stdout)
        while walked.open and (choice := asked.choose(walked)) is not None:
            walked = walker.along([*walked.choices, choice])
    return walked


def load(path: Path) -> Recording:
    """Read a recording; ValueError for a file that is none, or that nobody can read."""
    try:
        return read(path)
    except OSError as error:
        raise RecordingError(f"{path}: {error.strerror}") from None


def maker(recording: Recording) -> Callable[[], Scenario]:
    """Give what makes the scenario of a recording, a bug's handler in it if it has one. ValueError."""
    kind: Any = scenarios.find(recording.scenario)
    if recording.bug is not None:
        try:
            bug = zoo.find(recording.bug)
        except KeyError as error:
            raise RecordingError(str(error.args[0])) from None
        if bug.scenario is not kind:
            raise RecordingError(f"the bug {recording.bug} is none of the scenario {recording.scenario}")
        kind = bug.handler or kind
    for site in recording.drop:
        check(site)
    known = scenarios.defaults(scenarios.find(recording.scenario))
    for name, value in recording.parameters.items():
        if name in known and type(value) is not type(known[name]):
            raise RecordingError(f"the recording has {name}={value!r}, {recording.scenario} wants one like {known[name]!r}")
    scenarios.made(kind, recording.parameters)
    return lambda: scenarios.made(kind, recording.parameters)


def _as_dict(recording: Recording, walked: Walked, differs: str | None) -> dict[str, Any]:
    return {
        "scenario": recording.scenario, "model": recording.model, "verdict": "failed" if walked.kind else "held",
        "kind": walked.kind, "message": walked.message, "choices": list(walked.choices), "open": list(walked.open),
        "same_code": differs is None, "trace": [row._asdict() for row in walked.rows],
    }  # fmt: skip


def _tell(recording: Recording, make: Callable[[], Scenario], walked: Walked, *, whole: bool) -> None:
    if whole and walked.kind is not None:
        print(told(recording, make, walked))
        if walked.kind != recording.kind:
            print(f"another failure than the one that was recorded, which was {recording.kind}: {recording.message}")
        return
    print(drawn(walked))
    print()
    if walked.kind is not None:
        print(f"{walked.kind}: {walked.message}")
    elif walked.open:
        print(f"after {len(walked.choices)} of {len(recording.choices)} choices; go on with --then random or --then step")
    else:
        print("nothing fails: everyone has come to an end or sleeps, as it should be")


class _Steps:
    """Ask, before each step, who goes on: a number, or nothing for the first; the end of the input ends the walk."""

    def __init__(self, out: TextIO) -> None:
        self.out = out
        self.shown = 0

    def choose(self, walked: Walked) -> str | None:
        """Show what has happened since the last question, and ask."""
        for row in walked.rows[self.shown :]:
            if not row.text.startswith("["):
                print(f"  {row.context}: {row.text}", file=self.out)
                self.shown += 1
        offered = "  ".join(f"{number} {choice}" for number, choice in enumerate(walked.open, 1))
        while True:
            print(f"who goes on?  {offered}  (a number, q ends) ", end="", file=self.out, flush=True)
            line = sys.stdin.readline()
            answer = line.strip()
            if not line or answer == "q":
                print(file=self.out)
                return None
            if not answer:
                return walked.open[0]
            if answer.isascii() and answer.isdecimal() and 1 <= int(answer) <= len(walked.open):
                return walked.open[int(answer) - 1]
            print(f"{answer!r} is none of 1 to {len(walked.open)}", file=self.out)
