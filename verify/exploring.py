# SPDX-License-Identifier: Apache-2.0
"""`pvbus explore`: which searches are wanted, what they found, and the list of what there is.

Exit codes as those of every verb: 0 all held, 1 something failed, 2 usage.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import os
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Final

from pvbus.verify import scenarios, zoo
from pvbus.verify.explorer import MODELS, SEARCHES, VARIANTS
from pvbus.verify.explorer.recording import BOUND_MAX
from pvbus.verify.explorer.sites import ORDERED, SITES, check
from pvbus.verify.searching import Job, Run, contexts, said, search, shortened, told, written

SCHEMA: Final = 1
HELD, BROKEN, INTERRUPTED = 0, 1, 130
LOOK_SECONDS: Final = 5.0  # for each scenario, when nothing is asked for
MODEL_SENTENCES: Final = {
    "sc": "sequential consistency: one access after the other",
    "tso": "x86: stores wait in a first-in-first-out buffer, and loads overtake them",
    "arm": "arm64: loads may see any store that coherence and barriers do not exclude; no load buffering",
}


def command(arguments: argparse.Namespace) -> int:
    """Carry out the verb. ValueError says what makes no sense."""
    if arguments.list:
        return _list(as_json=arguments.json)
    wanted = list(jobs(arguments))
    _check_contexts(wanted)
    runs: list[Run] = []
    try:
        return _carry_out(arguments, wanted, runs)
    except BrokenPipeError:  # the reader of our output has seen enough: what has failed has failed all the same
        if all(run.result.failure is None for run in runs):
            raise
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return BROKEN


def _carry_out(arguments: argparse.Namespace, wanted: list[Job], runs: list[Run]) -> int:
    files: list[Path | None] = []
    for job in wanted:
        run = search(job, show=not arguments.json)
        runs.append(run)
        files.append(_failed(arguments, run) if run.result.failure is not None else None)
        if not arguments.json:
            _say(run, files[-1])
        if run.interrupted:
            break
    interrupted = runs[-1].interrupted
    if arguments.json:
        found = {"schema": SCHEMA, **summary(runs, files), **({"interrupted": True} if interrupted else {})}
        print(json.dumps(found), flush=True)
    elif len(wanted) > 1:
        failed = sum(not run.held for run in runs)
        what = f"{failed} of them failed" if failed else "all held"
        print(f"{len(runs)} of {len(wanted)} searches, interrupted: {what}" if interrupted else f"{len(runs)} searches: {what}")
    if any(run.result.failure is not None for run in runs):
        return BROKEN
    return INTERRUPTED if interrupted else HELD if all(run.held for run in runs) else BROKEN


def _failed(arguments: argparse.Namespace, run: Run) -> Path | None:
    """Show a failure, and write its file; None where none can be written, which changes nothing about the failure."""
    assert run.result.failure is not None
    recording, walked = shortened(run.job, run.result.failure)
    if not arguments.json:
        print(told(recording, run.job.make, walked))
    try:
        return written(recording, Path())
    except OSError as error:
        print(
            f"pvbus explore: {recording.name()} cannot be written to this directory: {error.strerror}; "
            "the same command in another one finds the same failure", file=sys.stderr,
        )  # fmt: skip
        return None


def _say(run: Run, file: Path | None) -> None:
    executions, steps = f"{run.result.executions:,} executions", f"{run.result.steps:,} steps"
    print(f"{run.job.label}: {run.result.verdict}, {executions}, {steps}, {run.seconds:.1f} s", flush=True)
    if file is not None:
        print(f"replay: pvbus replay {file}", flush=True)
    elif not run.held and run.result.failure is None and not run.interrupted:
        print("  it is claimed to be complete, and that it was not is a failure", flush=True)
    if run.result.steps == 0 and run.result.failure is None:
        print("  no context came by a scheduling point: there was nothing to search", file=sys.stderr)
    missing = {site for site in run.job.drop if site not in run.result.sites_dropped}
    if missing and run.result.failure is None:
        print(f"  no context came by {', '.join(sorted(missing))}: that it was left out shows nothing here", file=sys.stderr)


def summary(runs: list[Run], files: list[Path | None]) -> dict[str, Any]:
    """Give the numbers of all runs, and of each."""
    each = [{**run.as_dict(), **({"replay": str(file)} if file else {})} for run, file in zip(runs, files, strict=True)]
    verdicts = {run.verdict for run in runs}
    verdict = next((word for word in ("failed", "bounded") if word in verdicts), "complete")
    data: dict[str, Any] = {
        "verdict": verdict, "executions": sum(run.result.executions for run in runs),
        "steps": sum(run.result.steps for run in runs), "seconds": round(sum(run.seconds for run in runs), 3),
    }  # fmt: skip
    if replays := [str(file) for file in files if file]:
        data["replay"] = replays[0]
    return {**data, "runs": each}


# ---- what is wanted


def jobs(arguments: argparse.Namespace) -> Iterator[Job]:
    """Give the searches that a command line asks for. ValueError names what makes no sense."""
    settings = _settings(arguments.set)
    models = _models(arguments.model)
    bug = _bug(arguments.variant, arguments.scenario) if arguments.variant is not None else None
    drop = tuple(check(site) for site in arguments.drop)
    bounds, within = _bounds(arguments), _within(arguments)
    if arguments.all and (settings or arguments.variant or drop or within):
        raise ValueError("--all searches what is claimed: it takes no --set, --variant, --drop, and no bounds on an execution")
    if not (arguments.scenario or arguments.all or bug is not None or {"executions", "seconds"} & set(bounds)):
        bounds["seconds"] = LOOK_SECONDS
    names = _names(arguments.scenario, bug)
    if settings and len(names) > 1:
        raise ValueError(f"--set is for one scenario, and {len(names)} are wanted: {', '.join(names)}")
    for name in names:
        kind = scenarios.find(name)
        if arguments.all:
            for claim in scenarios.claims(kind):
                if claim.model in (models or MODELS) and claim.model in MODELS:
                    make = _maker(kind, claim.parameters)
                    yield Job(
                        name, make, claim.parameters, claim.model, arguments=bounds, bounds=claim.bounds,
                        claimed=not (arguments.executions or arguments.seconds),
                    )  # fmt: skip
            continue
        given = scenarios.read_parameters(kind, settings)
        for model in models or (_shows(bug) if bug is not None and bug.scenario is kind else "sc",):
            job = _job(name, given, model, bug, drop, bounds, within)
            yield job if bug is not None or not arguments.variant else dataclasses.replace(job, variant=arguments.variant)


def _names(wanted: list[str], bug: zoo.Bug | None) -> list[str]:
    """Give the names of what is wanted, each once."""
    if not wanted:
        return [_scenario_of(bug)] if bug is not None else list(scenarios.scenarios())
    return list(dict.fromkeys(name for text in wanted for name in scenarios.names_of(text)))


def _job(
    name: str, given: dict[str, Any], model: str, bug: zoo.Bug | None, drop: tuple[str, ...],
    bounds: dict[str, Any], within: dict[str, int],
) -> Job:  # fmt: skip
    kind = scenarios.find(name)
    if bug is None or bug.scenario is not kind:
        within = {**({"deaths": 1} if scenarios.made(kind, given).mortal else {}), **within}
    if bug is None:
        return Job(name, _maker(kind, given), given, model, drop=drop, arguments=bounds, bounds=within)
    if bug.scenario is not kind:
        if bug.variant is None:
            raise ValueError(f"the variant {bug.name!r} is one of the scenario {_scenario_of(bug)}, not of {kind.name}")
        return Job(name, _maker(kind, given), given, model, variant=bug.variant, drop=drop, arguments=bounds, bounds=within)
    parameters = {**bug.parameters, **given}
    make = _maker(bug.handler or kind, parameters)
    return Job(
        name, make, parameters, model, variant=bug.variant, drop=(*bug.drop, *drop), bug=bug.name,
        arguments=bounds, bounds={**bug.search, **within},
    )  # fmt: skip


def _check_contexts(wanted: list[Job]) -> None:
    """Refuse a barrier that is to be left out of a context which no scenario has."""
    drop = [site for site in (wanted[0].drop if wanted else ()) if "@" in site]
    if not drop or (wanted[0].bug is not None and drop == list(zoo.find(wanted[0].bug).drop)):
        return
    known: dict[str, None] = {}
    for job in {job.scenario: job for job in wanted}.values():
        known |= dict.fromkeys(contexts(job))
    for site in drop:
        if (context := site.partition("@")[2]) not in known:
            raise ValueError(f"--drop {site}: no context {context!r}: {', '.join(known)}")


def _maker(kind: Any, parameters: Any) -> Any:
    scenarios.made(kind, parameters)  # a bad value is said before anything is searched
    return lambda: scenarios.made(kind, parameters)


def _settings(texts: list[str]) -> dict[str, str]:
    found: dict[str, str] = {}
    for text in texts:
        name, equals, value = text.partition("=")
        if not equals or not name:
            raise ValueError(f"--set {text!r}: write NAME=VALUE, for example events=4")
        if name in found:
            raise ValueError(f"--set {text}: {name} is {found[name]} already")
        found[name] = value
    return found


def _models(text: str | None) -> tuple[str, ...]:
    if text is None:
        return ()
    names = tuple(MODELS) if text == "all" else tuple(dict.fromkeys(text.split(",")))
    for name in names:
        if name not in MODELS:
            raise ValueError(f"no memory model {name!r}: {', '.join(MODELS)}")
    return names


def _bug(name: str, wanted: list[str]) -> zoo.Bug | None:
    """Find the bug that a variant is; None for a variant of the machine that no bug of the zoo shows, if scenarios are named."""
    for bug in zoo.bugs():
        if name in (bug.variant, bug.name):
            return bug
    if name in VARIANTS and wanted:
        return None
    raise ValueError(f"no variant {name!r}: {', '.join(item['name'] for item in variants())}")


def _scenario_of(bug: zoo.Bug) -> str:
    return str(getattr(bug.scenario, "name", bug.scenario))


def _shows(bug: zoo.Bug) -> str:
    """Give the simplest model that can show a bug."""
    return next((model for model in MODELS if bug.expected.get(model) == zoo.CAUGHT), "sc")


def _bounds(arguments: argparse.Namespace) -> dict[str, Any]:
    wanted = {name: getattr(arguments, name) for name in ("executions", "seconds", "search", "seed")}
    if wanted["search"] not in (None, *SEARCHES):
        raise ValueError(f"--search {wanted['search']!r}: {', '.join(SEARCHES)}")
    for name in ("executions", "seconds"):
        if wanted[name] is not None and not wanted[name] > 0:  # nan is not
            raise ValueError(f"--{name} {wanted[name]}: it must be more than 0")
    return {name: value for name, value in wanted.items() if value is not None}


def _within(arguments: argparse.Namespace) -> dict[str, int]:
    """Give the bounds on an execution: what lies beyond them is not searched, and the verdict says so."""
    wanted = {name: getattr(arguments, name) for name in ("preemptions", "flush_delay", "deaths")}
    for name, value in wanted.items():
        if value is not None and not 0 <= value <= BOUND_MAX:
            raise ValueError(f"--{name.replace('_', '-')} {value}: it must be from 0 to {BOUND_MAX}")
    return {name: value for name, value in wanted.items() if value is not None}


# ---- the list


def variants() -> list[dict[str, str]]:
    """Give each variant of a handler, and the scenario that shows it: the bugs of the zoo, by the name of the machine's variant
    where it has one.
    """
    found = [{"name": bug.variant or bug.name, "sentence": bug.sentence, "scenario": _scenario_of(bug)} for bug in zoo.bugs()]
    return sorted({item["name"]: item for item in reversed(found)}.values(), key=lambda item: item["name"])


def listed() -> dict[str, list[dict[str, Any]]]:
    """Give everything that a command line can name."""
    return {
        "scenarios": [
            {
                "name": name, "sentence": scenarios.sentence(kind),
                "parameters": {
                    key: list(value) if isinstance(value, tuple) else value for key, value in scenarios.defaults(kind).items()
                    if isinstance(value, scenarios.SETTABLE)
                },
                "ranges": {key: list(ends) for key, ends in kind.ranges.items() if key in scenarios.defaults(kind)},
            }
            for name, kind in scenarios.scenarios().items()
        ],
        "variants": variants(),
        "models": [{"name": name, "sentence": MODEL_SENTENCES.get(name, name)} for name in MODELS],
        "searches": [{"name": name, "sentence": sentence} for name, sentence in SEARCHES.items()],
        "sites": [{"name": name, "sentence": sentence} for name, sentence in {**SITES, **ORDERED}.items()],
    }  # fmt: skip


def _list(*, as_json: bool) -> int:
    found = listed()
    if as_json:
        print(json.dumps({"schema": SCHEMA, **found}))
        return HELD
    for kind, items in found.items():
        print(f"{kind}:")
        width = max(len(item["name"]) for item in items)
        for item in items:
            of = f" [{item['scenario']}]" if item.get("scenario") else ""
            print(f"  {item['name'].ljust(width)}  {item['sentence']}{of}")
            if item.get("parameters"):
                settings = [f"{key}={said(value)}" for key, value in item["parameters"].items()]
                print(" " * (width + 4) + "--set " + " ".join(settings))
        print()
    return HELD
