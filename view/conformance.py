# SPDX-License-Identifier: Apache-2.0
"""Which test shows which row of the contract: `pvbus conformance`.

The data lies beside this module in `conformance.json`, so that an installed pvbus, which has no tests, can answer.
`make conformance` writes it, and docs/conformance.md, from the marks of the tests (tests/tidy/conformance.py); a test
holds both against the tree. Reads only; no machine is needed.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pvbus.view.tables import print_json, table

DATA = Path(__file__).with_name("conformance.json")
WHAT_MAX = 48  # letters of a row's text in the table; --json has all of it


@dataclass(frozen=True)
class Shown:
    """A test function (`file::name`), and how many cases it runs."""

    test: str
    cases: int


@dataclass(frozen=True)
class Row:
    """A row of the contract: its id, the heading that it stands under, its text, and the tests that show it."""

    id: str
    part: str
    what: str
    tests: tuple[Shown, ...]


def load(path: Path = DATA) -> list[Row]:
    """Read the packaged data."""
    return [
        Row(row["id"], row["part"], row["what"], tuple(Shown(**shown) for shown in row["tests"]))
        for row in json.loads(path.read_text(encoding="utf-8"))["rows"]
    ]


def holes(rows: list[Row]) -> list[str]:
    """Return the ids of the rows that no test shows."""
    return [row.id for row in rows if not row.tests]


def totals(rows: list[Row]) -> dict[str, int]:
    """Count rows, rows that are shown, test functions and their cases: a test that shows three rows counts once."""
    distinct = {shown for row in rows for shown in row.tests}
    return {
        "rows": len(rows),
        "shown": len(rows) - len(holes(rows)),
        "tests": len(distinct),
        "cases": sum(shown.cases for shown in distinct),
    }


def summary(rows: list[Row]) -> str:
    """Say in a sentence how much of the contract is shown."""
    count = totals(rows)
    return (
        f"{count['shown']} of {count['rows']} rows of parts A, B, X and H are shown by {count['tests']} tests "
        f"({count['cases']} cases)"
    )


def as_dict(rows: list[Row]) -> dict[str, Any]:
    """Return what --json prints, without its schema number."""
    listed = [
        {
            "id": row.id,
            "part": row.part,
            "what": row.what,
            "tests": [{"test": shown.test, "cases": shown.cases} for shown in row.tests],
        }
        for row in rows
    ]
    return {"rows": listed, "holes": holes(rows), "totals": totals(rows)}


def report(rows: list[Row]) -> str:
    """Return the table, the holes if there are any, and the summary."""
    lines = [
        {
            "id": row.id,
            "what": row.what if len(row.what) <= WHAT_MAX else row.what[: WHAT_MAX - 1] + "…",
            "tests": len(row.tests),
            "first_test": row.tests[0].test if row.tests else None,
        }
        for row in rows
    ]
    parts = [table(lines, ("id", "what", "tests", "first_test")), ""]
    if holes(rows):
        parts.append("no test shows " + ", ".join(holes(rows)))
    return "\n".join([*parts, summary(rows)])


def command(*, as_json: bool, rows: list[Row] | None = None) -> int:
    """Print the report; give the exit code: 1 when a row is shown by no test."""
    found = load() if rows is None else rows
    if as_json:
        print_json(as_dict(found))
    else:
        print(report(found))
    return 1 if holes(found) else 0
