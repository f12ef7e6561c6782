# SPDX-License-Identifier: Apache-2.0
"""One search as the command line wants it: what to search, how it went, and the file that replays what failed.

`exploring.py` and `zooing.py` decide what is searched; the search itself is pvbus.verify.explorer's.
"""

from __future__ import annotations

import errno
import time
import traceback
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pvbus.verify.explorer import Failure, Result, explore
from pvbus.verify.explorer.progress import Progress
from pvbus.verify.explorer.recording import Recording, fingerprint
from pvbus.verify.explorer.search import FAIR_FROM, Bounds, Explorer, SearchInterrupted
from pvbus.verify.explorer.shrink import shrink
from pvbus.verify.explorer.trace import table
from pvbus.verify.explorer.verdicts import forbidden_by
from pvbus.verify.explorer.walk import Walked, Walker

if TYPE_CHECKING:
    from pvbus.verify.explorer.scenario import Scenario


class ScenarioError(ValueError):
    """A scenario has raised something where it prepares, starts or judges an execution."""


@dataclass(frozen=True)
class Job:
    """A scenario with everything that its search needs to know. `arguments` are further ones of explore()."""

    scenario: str
    make: Callable[[], Scenario]
    parameters: Mapping[str, Any]
    model: str
    variant: str | None = None
    drop: tuple[str, ...] = ()
    bug: str | None = None
    arguments: Mapping[str, Any] = field(default_factory=dict)
    bounds: Mapping[str, Any] = field(default_factory=dict)
    claimed: bool = False  # that its search ends and nothing fails

    @property
    def label(self) -> str:
        """Name it in a line."""
        parameters = [f"{name}={said(value)}" for name, value in {**self.parameters, **self.bounds}.items()]
        switches = [*([self.variant] if self.variant else []), *(f"-{site}" for site in self.drop)]
        return " ".join([self.bug or self.scenario, *parameters, *switches, f"under {self.model}"])


@dataclass(frozen=True)
class Run:
    """How a search went."""

    job: Job
    result: Result
    seconds: float
    interrupted: bool = False

    @property
    def held(self) -> bool:
        """Whether nothing failed; and for what is claimed to be complete, whether it was, within the bounds of the claim."""
        return self.result.failure is None and (not self.job.claimed or self.result.verdict in ("complete", self._claim))

    @property
    def _claim(self) -> str:
        """The verdict of a search that ended, and was bounded by nothing but what its claim says."""
        allowed = {name: limit for name, limit in self.job.bounds.items() if name in ("deaths", "preemptions", "flush_delay")}
        return f"bounded ({', '.join(Bounds(**allowed).said())})"

    def as_dict(self) -> dict[str, Any]:
        """Give the numbers."""
        return {
            "scenario": self.job.scenario, "parameters": dict(self.job.parameters), "model": self.job.model,
            "variant": self.job.variant, "drop": list(self.job.drop), "dropped": sorted(self.result.sites_dropped),
            "verdict": self.verdict, "bounds": self.result.verdict,
            "executions": self.result.executions, "steps": self.result.steps, "seconds": round(self.seconds, 3),
        }  # fmt: skip

    @property
    def verdict(self) -> str:
        """Give it in a word: complete, bounded or failed."""
        return self.result.verdict.partition(" ")[0]


def said(value: Any) -> str:
    """Write a parameter as `--set` reads it."""
    if isinstance(value, bool):
        return "yes" if value else "no"
    if isinstance(value, tuple | list):
        return ",".join(":".join(map(str, item)) if isinstance(item, tuple | list) else str(item) for item in value)
    return str(value)


def search(job: Job, *, show: bool) -> Run:
    """Search; `show` how it gets on. An interrupt ends it as a bound does: see Run.interrupted. ValueError when the scenario
    cannot be run at all.
    """
    arguments: dict[str, Any] = {**job.arguments, **job.bounds}
    progress = None
    if show:
        progress = Progress(job.label, executions_max=arguments.get("executions"), seconds=arguments.get("seconds"))
        arguments["progress"] = progress
    began_s = time.monotonic()
    try:
        result = explore(job.make(), model=job.model, variant=job.variant, drop=job.drop, **arguments)
    except SearchInterrupted as stop:
        return Run(job, stop.result, time.monotonic() - began_s, interrupted=True)
    except (ValueError, OSError):
        raise
    except MemoryError:
        raise OSError(errno.ENOMEM, f"{job.label}: no memory for more states; --search dpor keeps none") from None
    except Exception as error:  # what contexts raise is a failure that is found: this comes from the scenario around them
        where = traceback.extract_tb(error.__traceback__)[-1]
        text = f"{type(error).__name__}: {error} ({Path(where.filename).name}, line {where.lineno})"
        raise ScenarioError(f"{job.label} cannot be searched, there is a mistake in the scenario itself: {text}") from error
    finally:
        if progress is not None:
            progress.close()
    return Run(job, result, time.monotonic() - began_s)


def contexts(job: Job) -> list[str]:
    """Give the names of the contexts of a search."""
    return Explorer(job.make(), job.model, None, ()).executions.contexts()


def recorded(job: Job, failure: Failure) -> Recording:
    """Shorten a failure, and make its recording."""
    return shortened(job, failure)[0]


def shortened(job: Job, failure: Failure) -> tuple[Recording, Walked]:
    """Shorten a failure; give its recording, and the walk that this was made of."""
    walker = Walker(
        job.make, model=job.model, variant=job.variant, drop=job.drop, shared=failure.shared, bounds=job.bounds,
    )  # fmt: skip
    short = shrink(walker, failure.choices, failure.kind)
    chosen = short.choices[:FAIR_FROM]  # from there on everybody has a turn, and nobody chooses
    recording = Recording(
        scenario=job.scenario, parameters=dict(job.parameters), model=job.model, choices=chosen, shared=failure.shared,
        kind=failure.kind, message=short.message, variant=job.variant, drop=job.drop, bug=job.bug, bounds=dict(job.bounds),
        fingerprint=fingerprint(job.scenario),
    )  # fmt: skip
    return recording, short


def written(recording: Recording, directory: Path) -> Path:
    """Write the file, and give its path."""
    path = directory / recording.name()
    recording.write(path)
    return path


def told(recording: Recording, make: Callable[[], Scenario], walked: Walked | None = None) -> str:
    """Say what failed: the trace with a column a context, and what would forbid it."""
    walked = walked or Walker.of(make, recording).to_the_end(recording.choices)
    lines = [f"{walked.kind}: {walked.message}", "", drawn(walked), "", "this trace is forbidden by"]
    sentences = forbidden_by(make, recording, walked) or ["nothing that was tried"]
    return "\n".join([*lines, *(f"  {sentence}" for sentence in sentences)])


def drawn(walked: Walked) -> str:
    """Draw the steps of a walk, and what waits in store buffers behind each."""
    beside = []
    for waiting in walked.pending():
        said_of = [f"{name}: " + ", ".join(f"{s.where} := {s.value}" for s in stores) for name, stores in waiting.items()]
        beside.append("; ".join(said_of))
    return table(walked.rows, walked.names, beside, "waits in store buffers")
