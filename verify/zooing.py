# SPDX-License-Identifier: Apache-2.0
"""`pvbus zoo`: every known bug, put back into our handlers, under every model that has something to say about it.

A bug is caught when its search fails within the zoo's bound; the production code must pass the same search, to its end.
"""

from __future__ import annotations

import argparse
import json
from typing import Any, Final

from pvbus.verify import zoo
from pvbus.verify.explorer import MODELS
from pvbus.verify.searching import Job, Run, search

SCHEMA: Final = 1
HELD, BROKEN = 0, 1
PRODUCTION_EXECUTIONS_MAX: Final = 100_000  # of a bug's scenario, a model; `explore --all` goes to the end of what is claimed


def command(arguments: argparse.Namespace) -> int:
    """Carry out the verb."""
    found = []
    for bug in zoo.bugs():
        one = shown(bug, show=not arguments.json)
        found.append(one)
        if not arguments.json:
            _say(bug, one)
    held = all(as_expected(one) for one in found)
    if arguments.json:
        print(json.dumps({"schema": SCHEMA, "held": held, "bugs": found}))
    else:
        print(f"{len(found)} bugs: {'each is caught where it can be, and ours is clean' if held else 'not as expected'}")
    return HELD if held else BROKEN


def shown(bug: zoo.Bug, *, show: bool = False, production_executions_max: int = PRODUCTION_EXECUTIONS_MAX) -> dict[str, Any]:
    """Search for a bug, and search the production code; give both."""
    models, productions = [], []
    for model, expected in bug.expected.items():
        if model not in MODELS:
            continue
        run = searched(_job(bug, model, broken=True), show=show)
        verdict = zoo.CAUGHT if run.result.failure is not None else zoo.CLEAN
        models.append({
            "model": model, "verdict": verdict, "expected": expected, "executions": run.result.executions,
            "seconds": round(run.seconds, 3),
        })  # fmt: skip
        productions.append(searched(_job(bug, model, broken=False, executions=production_executions_max), show=show))
    return {
        "bug": bug.name, "number": bug.number, "sentence": bug.sentence, "models": models, "production": _worst(productions),
    }  # fmt: skip


def searched(job: Job, *, show: bool) -> Run:
    """Search; half a search says nothing about a bug, so an interrupt ends the verb."""
    run = search(job, show=show)
    if run.interrupted:
        raise KeyboardInterrupt
    return run


def as_expected(one: dict[str, Any]) -> bool:
    """Whether a bug showed what its file says, and the production code nothing."""
    return all(model["verdict"] == model["expected"] for model in one["models"]) and not one["production"].startswith("failed")


def _job(bug: zoo.Bug, model: str, *, broken: bool, executions: int = zoo.EXECUTIONS_MAX) -> Job:
    name = str(getattr(bug.scenario, "name", bug.name))
    arguments = {"executions": executions}
    if broken:
        return Job(
            name, bug.broken, bug.parameters, model, variant=bug.variant, drop=bug.drop, bug=bug.name,
            arguments=arguments, bounds=bug.search,
        )  # fmt: skip
    return Job(name, bug.production, bug.parameters, model, arguments=arguments, bounds=bug.search)


def _worst(runs: list[Run]) -> str:
    order = {"failed": 0, "bounded": 1, "complete": 2}
    worst = min(runs, key=lambda run: order[run.verdict])
    return worst.result.verdict if worst.verdict == "complete" else f"{worst.result.verdict} under {worst.job.model}"


def _say(bug: zoo.Bug, one: dict[str, Any]) -> None:
    verdicts = ", ".join(
        f"{model['model']} {model['verdict']} ({model['executions']:,})"
        + ("" if model["verdict"] == model["expected"] else f", expected {model['expected']}")
        for model in one["models"]
    )
    print(f"{bug.number:2} {bug.name}: {verdicts}; ours: {one['production']}", flush=True)
