# SPDX-License-Identifier: Apache-2.0
"""The parsers of the explorer's verbs: explore, zoo, replay. They need no machine.

What they do is in pvbus.verify, which this package does not import; supervisor.py brings both together.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Protocol

if TYPE_CHECKING:
    import argparse


class MakeVerb(Protocol):
    """Adds a verb: name, what it does, whether it takes --name."""

    def __call__(self, name: str, does: str, *, of_machine: bool) -> argparse.ArgumentParser:
        """Make its parser."""


def add_verbs(verb: MakeVerb) -> None:
    """Add the parsers."""
    explore = verb("explore", "search every interleaving of the production code", of_machine=False)
    explore.add_argument("scenario", nargs="*", metavar="SCENARIO", help="which (default: that of --variant, or each for 5 s)")
    explore.add_argument(
        "--model", metavar="M", help="sc, tso or arm, several with commas, or all (default: sc, or what shows the variant)"
    )
    explore.add_argument("--search", metavar="S", help="how: dfs (default), dpor, states, random or pct")
    explore.add_argument("--variant", metavar="V", help="with a defect switched on: see --list")
    explore.add_argument(
        "--drop", action="append", default=[], metavar="SITE", help="without this barrier, or SITE@CONTEXT; may be repeated"
    )
    explore.add_argument("--seed", type=int, metavar="N", help="of the searches that draw lots")
    explore.add_argument("--executions", type=int, metavar="N", help="end after so many")
    explore.add_argument("--seconds", type=float, metavar="S", help="end after so long")
    explore.add_argument("--preemptions", type=int, metavar="N", help="only executions with at most so many")
    explore.add_argument("--flush-delay", type=int, metavar="N", help="a store reaches memory after at most so many steps")
    explore.add_argument(
        "--deaths", type=int, metavar="N", help="so many contexts may die (default: 1 where a scenario has mortal ones)"
    )
    explore.add_argument(
        "--set", action="append", default=[], metavar="NAME=VALUE", help="a parameter of the scenario, for example events=4"
    )
    explore.add_argument("--all", action="store_true", help="everything that is claimed to be complete, to its end")
    explore.add_argument("--list", action="store_true", help="say what there is: scenarios, variants, models, sites")
    verb("zoo", "put each known bug back, and see it caught", of_machine=False)
    replay = verb("replay", "run a recorded failure again", of_machine=False)
    replay.add_argument("file", metavar="FILE", help="what `pvbus explore` wrote")
    replay.add_argument("--until", type=int, metavar="N", help="the first N choices only")
    replay.add_argument("--then", choices=["random", "step"], help="and from there by chance, or by your choice")
    replay.add_argument("--seed", type=int, default=0, metavar="N", help="of --then random (default: 0)")
