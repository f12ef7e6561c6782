# SPDX-License-Identifier: Apache-2.0
"""`pvbus replay`: a recorded failure again, all of it, or as far as one wants, and from there by chance or step by step."""

from __future__ import annotations

import argparse
import json
import random
import sys
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

from pvbus.verify import scenarios, zoo
from pvbus.verify.explorer import ReplayError
from pvbus.verify.explorer.recording import Recording, RecordingError, read
from pvbus.verify.explorer.trace import table
from pvbus.verify.explorer.verdicts import forbidden_by
from pvbus.verify.explorer.walk import Chooser, Walked, Walker, stop_there

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
    choices = recording.choices if arguments.until is None else recording.choices[: arguments.until]
    then = _chooser(arguments.then, arguments.seed, sys.stderr if arguments.json else sys.stdout)
    try:
        walked = Walker.of(make(), recording).along(choices, then=then, traced=True)
    except ReplayError as error:
        raise ValueError(f"{arguments.file} does not fit here: {error}") from None
    if arguments.json:
        print(json.dumps({"schema": SCHEMA, **_as_dict(recording, walked, differs)}))
    else:
        _tell(recording, make, walked, whole=arguments.until is None)
    return HELD if walked.kind is None else BROKEN


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
            kind = zoo.find(recording.bug).handler or kind
        except KeyError as error:
            raise RecordingError(str(error.args[0])) from None
    scenarios.made(kind, recording.parameters)
    return lambda: scenarios.made(kind, recording.parameters)


def _as_dict(recording: Recording, walked: Walked, differs: str | None) -> dict[str, Any]:
    return {
        "scenario": recording.scenario, "model": recording.model, "verdict": "failed" if walked.kind else "held",
        "kind": walked.kind, "message": walked.message, "choices": list(walked.choices), "ended": walked.ended,
        "same_code": differs is None, "trace": [row._asdict() for row in walked.rows],
    }  # fmt: skip


def _tell(recording: Recording, make: Callable[[], Scenario], walked: Walked, *, whole: bool) -> None:
    print(table(walked.rows, walked.names))
    print()
    if walked.kind is not None:
        print(f"{walked.kind}: {walked.message}")
        if whole:
            for sentence in forbidden_by(make, recording):
                print(f"forbidden by {sentence}")
    elif walked.ended:
        print("nothing fails: everyone has come to an end or sleeps, as it should be")
    else:
        print(f"after {len(walked.choices)} of {len(recording.choices)} choices; go on with --then random or --then step")


# ---- who goes on


def _chooser(then: str | None, seed: int, out: Any) -> Chooser:
    if then == "random":
        chance = random.Random(seed)
        return lambda choices, _last: chance.choice(choices)
    return _Steps(out) if then == "step" else stop_there


class _Steps:
    """Ask, before each step, who goes on: a number, or nothing for the first; the end of the input ends the walk."""

    def __init__(self, out: Any) -> None:
        self.out = out

    def __call__(self, choices: list[str], _last: str) -> str | None:
        while True:
            offered = "  ".join(f"{number} {choice}" for number, choice in enumerate(choices, 1))
            print(f"who goes on?  {offered}  (a number, q ends) ", end="", file=self.out, flush=True)
            line = sys.stdin.readline()
            answer = line.strip()
            if not line or answer == "q":
                print(file=self.out)
                return None
            if not answer:
                return choices[0]
            if answer.isascii() and answer.isdecimal() and 1 <= int(answer) <= len(choices):
                return choices[int(answer) - 1]
            print(f"{answer!r} is none of 1 to {len(choices)}", file=self.out)
