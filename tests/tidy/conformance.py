# SPDX-License-Identifier: Apache-2.0
"""Write docs/conformance.md and view/conformance.json: each row of the contract with the tests that show it.

    make conformance        (python tests/tidy/conformance.py: write both)

The rows are those of docs/checklist.md under the headings of `SECTIONS`; the tests are those that carry a row's id in
`@pytest.mark.checklist`, as pytest itself collects them: what runs is what is counted. `test_conformance.py` collects
in a process of its own (`--json`), and holds the result against the rows and the two committed files.
"""

import contextlib
import json
import re
import sys
from collections import Counter, defaultdict
from collections.abc import Mapping
from pathlib import Path

import pytest

from pvbus.view import conformance
from pvbus.view.conformance import Row, Shown

ROOT = Path(__file__).resolve().parent.parent.parent
PAGE = ROOT / "docs" / "conformance.md"
CHECKLIST = ROOT / "docs" / "checklist.md"
SECTIONS = re.compile(r"[AB]\d+ .*|X, .*|H\. .*")     # all but E, which explorer and heirs show
DEFECT = "defect"    # the column that says what a row is about, where there is one; else the one behind the id
CELL = re.compile(r"(?<!\\)\|")
# By id, file and function: the number of cases.
Marks = dict[str, Counter[str]]

HEAD = """\
<!-- SPDX-License-Identifier: Apache-2.0 -->
# Conformance

Each row of [the contract](checklist.md), parts A, B, X and H, with the tests that show it. `make conformance` writes this
page from the marks of the tests, and `make test` fails when it is not up to date or a row has no test. ×n: the test runs
n cases. `pvbus conformance` prints the same. What differs from the drivers on purpose stands in
[divergences.md](divergences.md): where it names a row, the tests here show what pvbus does instead.
"""


class Collector:
    """A plugin of pytest: notes which test functions carry which ids."""

    def __init__(self) -> None:
        self.marks: Marks = defaultdict(Counter)

    def pytest_collection_modifyitems(self, items: list[pytest.Item]) -> None:
        """Count the cases of each function that carries an id."""
        for item in items:
            name = item.nodeid.partition("[")[0]
            for id_ in {str(id_) for mark in item.iter_markers("checklist") for id_ in mark.args}:
                self.marks[id_][name] += 1


def collect() -> Marks:
    """Collect every test of the tree; what pytest says goes to standard error. Once a process: it imports them all."""
    collector = Collector()
    with contextlib.redirect_stdout(sys.stderr):
        code = pytest.main(
            # Nothing is run: rewriting every assert would be two thirds of the time.
            ["--collect-only", "-qq", "--assert=plain", "-p", "no:cacheprovider",
             f"--rootdir={ROOT}", str(ROOT / "tests")],
            plugins=[collector],
        )
    if code != pytest.ExitCode.OK:
        raise SystemExit(f"the tests cannot be collected: {code!r}")
    return collector.marks


def rows_of(checklist: str) -> list[tuple[str, str, str]]:
    """Return (id, heading, what) of the rows that the report is about, in the order of the page."""
    found, part, column = [], "", 1
    for line in checklist.splitlines():
        if line.startswith("#"):
            part = line.lstrip("#").strip()
        elif line.startswith("| ") and SECTIONS.fullmatch(part):
            cells = [cell.strip() for cell in CELL.split(line)[1:]]
            if cells[0] == "#":
                column = cells.index(DEFECT) if DEFECT in cells else 1
            else:
                what = cells[column].replace("`", "").replace("**", "").replace("\\|", "|")
                found.append((cells[0], part, what))
    return found


def ids_of(checklist: str) -> set[str]:
    """Return every id of the checklist, whatever its part."""
    return set(re.findall(r"^\| ([ABXHE]\d[\w.]*) \|", checklist, re.MULTILINE))


def join(checklist: str, marks: Mapping[str, Mapping[str, int]]) -> list[Row]:
    """Put the tests to their rows."""
    return [
        Row(id_, part, what, tuple(Shown(test, cases) for test, cases in sorted(marks.get(id_, {}).items())))
        for id_, part, what in rows_of(checklist)
    ]


def faults(checklist: str, marks: Mapping[str, Mapping[str, int]]) -> list[str]:
    """Return what is wrong: rows without a test, marks with an id that no row has, ids that stand there twice."""
    rows = Counter(id_ for id_, _, _ in rows_of(checklist))
    wrong = sorted(set(marks) - ids_of(checklist))
    return [
        *(f"{id_}: no test shows it" for id_ in rows if not marks.get(id_)),
        *(f"{id_}: not in docs/checklist.md, but a mark of {test}" for id_ in wrong for test in sorted(marks[id_])),
        *(f"{id_}: {count} rows have this id" for id_, count in rows.items() if count > 1),
    ]


def data(rows: list[Row]) -> str:
    """Return the packaged file: a line a test, so that two changes seldom meet in one."""
    texts = []
    for row in conformance.as_dict(rows)["rows"]:
        tests = ",".join("\n    " + json.dumps(shown) for shown in row.pop("tests"))
        texts.append(f'  {json.dumps(row, ensure_ascii=False)[:-1]}, "tests": [{tests}]}}')
    return '{"rows": [\n' + ",\n".join(texts) + "\n]}\n"


def page(rows: list[Row]) -> str:
    """Return docs/conformance.md."""
    lines, part = [HEAD, f"{conformance.summary(rows)}."], ""
    for row in rows:
        if row.part != part:
            part = row.part
            lines += ["", f"## {part}", "", "| # | what | tests |", "|---|---|---|"]
        shown = "<br>".join(
            f"`{one.test.removeprefix('tests/')}`" + (f" ×{one.cases}" if one.cases > 1 else "") for one in row.tests
        )
        lines.append(f"| {row.id} | {row.what.replace('|', chr(92) + '|')} | {shown or '**none**'} |")
    return "\n".join(lines) + "\n"


def main() -> int:
    """Write both files, or print what was collected (--json)."""
    marks = collect()
    if "--json" in sys.argv[1:]:
        print(json.dumps(marks))
        return 0
    checklist = CHECKLIST.read_text(encoding="utf-8")
    rows = join(checklist, marks)
    conformance.DATA.write_text(data(rows), encoding="utf-8")
    PAGE.write_text(page(rows), encoding="utf-8")
    print(conformance.summary(rows))
    for fault in faults(checklist, marks):
        print(fault, file=sys.stderr)
    return 1 if faults(checklist, marks) else 0


if __name__ == "__main__":
    sys.exit(main())
