# SPDX-License-Identifier: Apache-2.0
"""The proof of the barriers: each labelled barrier and each ordered access is left out, and a scenario fails, or none does.

`make barriers` writes docs/barriers.md from it. For every site, and for each context that comes by it, every configuration
that is claimed to be complete is searched without it, under the models that have barriers. What fails shows that the site is
needed. Where all of them end and nothing fails, the site is redundant as far as these configurations and this model go; why it
stays all the same is said in STAYS. A search that did not end proves nothing, and is called open.
"""

from __future__ import annotations

import sys
from collections import defaultdict
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Final

from pvbus.verify import scenarios
from pvbus.verify.explorer import MODELS, Result, explore
from pvbus.verify.explorer.scenario import Scenario
from pvbus.verify.explorer.sites import ELSEWHERE, LOCKED, ORDERED, SITES, STAYS
from pvbus.verify.explorer.walk import Walker
from pvbus.verify.searching import said

WEAK_MODELS: Final = tuple(model for model in ("tso", "arm") if model in MODELS)
LOOK_SEEDS: Final = 30
LOOK_EXECUTIONS_MAX: Final = 300  # by chance: enough for every context to come by what it comes by at all, deaths included
EXECUTIONS_MAX: Final = 100_000
SECONDS_MAX: Final = 3.0
SIZE_SECONDS_MAX: Final = 1.0  # to tell small configurations from large ones
LAST_EXECUTIONS_MAX: Final = 5_000_000
LAST_SECONDS_MAX: Final = 120.0  # for the smallest, where none came to an end in that
LAST_MAX: Final = 2
CONFIGURATIONS_MAX: Final = 6  # the smallest that come by a site are searched for as long as this allows
ENDLESS_MAX: Final = 2  # of them; those behind are larger still
HUNT_EXECUTIONS_MAX: Final = 300  # and every one of them by chance before, for a failure that comes soon
HUNT_LONGER: Final = {"2l.is_pending": 5_000, "cpu_sleep@heir": 3_000, "evr_publish@heir": 3_000}  # these fail late
HUNTS: Final = ("dfs", "pct", "random")
NAMES_MAX: Final = 3  # that a cell of the table names
NEEDED, REDUNDANT, OPEN, UNSEEN = "needed", "redundant", "open", "not reached"
DOCUMENT: Final = Path(__file__).resolve().parents[1] / "docs" / "barriers.md"


@dataclass(frozen=True)
class Configuration:
    """A scenario with parameters and bounds."""

    kind: type[Scenario]
    parameters: tuple[tuple[str, Any], ...]
    bounds: tuple[tuple[str, Any], ...] = ()

    @property
    def label(self) -> str:
        """Name it."""
        return " ".join([self.kind.name, *(f"{name}={said(value)}" for name, value in (*self.parameters, *self.bounds))])

    def make(self) -> Scenario:
        """Make the scenario."""
        return self.kind(**dict(self.parameters))


@dataclass
class Finding:
    """What leaving out one site in one place has shown under one model."""

    verdict: str
    evidence: list[str] = field(default_factory=list)

    def __str__(self) -> str:
        """Say it in a cell of a table."""
        return f"{self.verdict}: {'; '.join(self.evidence)}" if self.evidence else self.verdict


Matrix = dict[str, dict[str, dict[str, Finding]]]  # site, place ("" = everywhere), model


def configurations() -> Iterator[Configuration]:
    """Give every configuration that is claimed to be complete, each once."""
    seen = set()
    for kind in scenarios.scenarios().values():
        for claim in scenarios.claims(kind):
            one = Configuration(kind, tuple(claim.parameters.items()), tuple(claim.bounds.items()))
            if one.label not in seen:
                seen.add(one.label)
                yield one


def passed(configuration: Configuration, sites: Sequence[str]) -> set[str]:
    """Give the sites that the contexts of a configuration come by, as SITE and as SITE@CONTEXT."""
    names = Walker(configuration.make, model="sc").along(()).names
    wanted = [*sites, *(f"{site}@{name}" for site in sites for name in names)]
    found: set[str] = set()
    for model, seeds in (("sc", 1), (WEAK_MODELS[-1], LOOK_SEEDS)):  # without any barrier a walk soon fails, and ends there
        for seed in range(seeds):
            result = explore(
                configuration.make(), model=model, drop=wanted, search="random", seed=seed,
                executions=LOOK_EXECUTIONS_MAX // seeds, **dict(configuration.bounds),
            )  # fmt: skip
            found |= result.sites_dropped
    return found


def sizes(where: Sequence[Configuration], model: str) -> dict[Configuration, int]:
    """Give the executions that each configuration takes with every barrier in place, those that do not end behind the others;
    RuntimeError if one fails so.
    """
    found = {}
    for configuration in where:
        result = explore(
            configuration.make(), model=model, executions=EXECUTIONS_MAX, seconds=SIZE_SECONDS_MAX, **dict(configuration.bounds)
        )
        if result.failure is not None:
            raise RuntimeError(f"{configuration.label} fails under {model} as it is: {result.failure.message}")
        found[configuration] = result.executions + EXECUTIONS_MAX * (not _ended(result, EXECUTIONS_MAX, SIZE_SECONDS_MAX))
    return found


def examined(site: str, model: str, where: Sequence[Configuration]) -> Finding:
    """Search configurations without the site, until one fails."""
    ended: list[str] = []
    unfinished: list[str] = []
    hunt_max = HUNT_LONGER.get(site, HUNT_LONGER.get(site.partition("@")[0], HUNT_EXECUTIONS_MAX))
    for configuration in where:
        for search in HUNTS:
            result = explore(
                configuration.make(), model=model, drop=[site], search=search, executions=hunt_max,
                **dict(configuration.bounds),
            )  # fmt: skip
            if result.failure is not None:
                return Finding(NEEDED, [f"{configuration.label}, {result.failure.kind} ({result.executions:,}, {search})"])
    tries = [(configuration, EXECUTIONS_MAX, SECONDS_MAX) for configuration in where[:CONFIGURATIONS_MAX]]
    tries += [(configuration, LAST_EXECUTIONS_MAX, LAST_SECONDS_MAX) for configuration in where[:LAST_MAX]]
    for configuration, executions, seconds in tries:
        last = executions == LAST_EXECUTIONS_MAX
        if last and ended:
            break
        if not last and len(unfinished) == ENDLESS_MAX:
            continue
        result = explore(
            configuration.make(), model=model, drop=[site], executions=executions, seconds=seconds, **dict(configuration.bounds)
        )
        if result.failure is not None:
            return Finding(NEEDED, [f"{configuration.label}, {result.failure.kind} ({result.executions:,}, dfs)"])
        (ended if _ended(result, executions, seconds) else unfinished).append(configuration.label)
    unfinished = [label for label in dict.fromkeys(unfinished) if label not in ended]
    evidence = [f"{word} {_listed(names)}" for word, names in (("complete in", ended), ("no end in", unfinished)) if names]
    return Finding(REDUNDANT if ended else OPEN if unfinished else UNSEEN, evidence)


def _ended(result: Result, executions: int, seconds: float) -> bool:
    return result.executions < executions and not result.verdict.startswith(f"bounded ({seconds}")


def _listed(names: Sequence[str]) -> str:
    more = len(names) - NAMES_MAX
    return ", ".join(names[:NAMES_MAX]) + (f" and {more} more" if more > 0 else "")


def matrix(sites: Sequence[str], *, say: Any = None) -> Matrix:
    """Examine sites, everywhere and in each context."""
    by_place: Mapping[str, list[Configuration]] = defaultdict(list)
    for configuration in configurations():
        for place in passed(configuration, sites):
            by_place[place].append(configuration)
    reached = sorted({one for ones in by_place.values() for one in ones}, key=lambda one: one.label)
    known = {model: sizes(reached, model) for model in WEAK_MODELS}
    found: Matrix = {}
    for site in sites:
        contexts = sorted(place for place in by_place if place.startswith(f"{site}@"))
        for model in WEAK_MODELS:
            for place in (site, *contexts):
                where = sorted(by_place.get(place, []), key=known[model].__getitem__)
                finding = examined(place, model, where)
                found.setdefault(site, {}).setdefault(place.partition("@")[2], {})[model] = finding
                if say is not None:
                    print(f"{place} under {model}: {finding}", file=say, flush=True)
                if place == site and finding.verdict != NEEDED:
                    break
    return found


# ---- the document


def document(found: Matrix) -> str:
    """Write the matrix as docs/barriers.md has it."""
    models = " and ".join(f"`{model}`" for model in WEAK_MODELS)
    searches = ", ".join(f"`{search}`" for search in HUNTS)
    bounds = {
        "most": CONFIGURATIONS_MAX, "seconds": SECONDS_MAX, "last": LAST_SECONDS_MAX, "endless": ENDLESS_MAX,
        "hunts": HUNT_EXECUTIONS_MAX,
    }  # fmt: skip
    lines = [HEAD.format(models=models, searches=searches, **bounds)]
    for title, sites in (("Labelled barriers", SITES), ("Ordered accesses without a label", ORDERED)):
        lines += [f"## {title}\n", "| site | left out | " + " | ".join(WEAK_MODELS) + " |"]
        lines.append("|---|---|" + "---|" * len(WEAK_MODELS))
        for site in sites:
            if (apart := _apart(site)) is not None and site not in found:
                lines.append("| " + " | ".join([f"`{site}`", "everywhere", *[apart] * len(WEAK_MODELS)]) + " |")
                continue
            for place, by_model in found.get(site, {"": {}}).items():
                missing = Finding("" if place else UNSEEN)
                cells = [f"`{site}`" if not place else "", place or "everywhere"]
                cells += [str(by_model.get(model, missing)) for model in WEAK_MODELS]
                lines.append("| " + " | ".join(cells) + " |")
        lines.append("")
    lines += ["## Why the redundant ones stay\n"]
    lines += [f"* `{site}`: {why}" for site, why in STAYS.items()]
    return "\n".join(lines) + "\n"


def _apart(site: str) -> str | None:
    """Say of a label that is no access of its own why nothing can be left out."""
    if site in LOCKED:
        return f"locked: nothing to leave out, see `{LOCKED[site]}`"
    if site in ELSEWHERE:
        return f"left out as {', '.join(f'`{name}`' for name in ELSEWHERE[site])}"
    return None


HEAD: Final = """\
<!-- SPDX-License-Identifier: Apache-2.0 -->
<!-- Written by `make barriers` (verify/barriers.py): do not edit. -->
# The proof of the barriers

Each labelled barrier and each ordered access of [memory-model.md](memory-model.md) is left out of the production code, and
the configurations that are claimed to be complete (`pvbus explore --all`) and come by it are searched under {models}:

* **needed**: a scenario fails without it; the number of executions until then, and the search, stand behind the kind of failure.
  See it with `pvbus explore SCENARIO --model M --drop SITE --search S`.
* **redundant**: nothing fails in any configuration that comes by it. Those named as complete came to their end, which proves it
  for them; the {most} smallest are given {seconds:.0f} s each, until {endless} of them have not ended (the smallest
  two {last:.0f} s where none ends), and every one {hunts} executions of each of {searches} (a site that is known to fail late has
  more). That is a statement about these configurations and this model. On x86 most orders come for free: redundant under `tso`
  and needed under `arm` is usual.
* **open**: nothing fails, but no search ended within its bound: shown by nobody, neither way.
* **not reached**: no configuration comes by it. That is a hole, and is said here so that it is seen.
* **locked**: the label stands on locked operations only, which no model can leave out; the test that is named puts something
  weaker in their place. **left out as**: the accesses of the label have names of their own, and rows below.

"Everywhere" leaves a site out on both sides. Where that fails, the contexts stand below, each alone: which side needs it.
"""


def main() -> None:
    """Write docs/barriers.md."""
    found = matrix([site for site in (*SITES, *ORDERED) if _apart(site) is None], say=sys.stderr)
    DOCUMENT.write_text(document(found), encoding="utf-8")


if __name__ == "__main__":
    main()
