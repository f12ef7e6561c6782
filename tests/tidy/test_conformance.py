# SPDX-License-Identifier: Apache-2.0
"""Every row of the contract is shown by a test, and the report about that is the one of this tree."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

from pvbus.tests.tidy import conformance
from pvbus.tests.tidy.conformance import CHECKLIST, Marks, data, faults, ids_of, join, page, rows_of
from pvbus.view.conformance import DATA, as_dict, holes, load

COLLECT_S_MAX = 60
STALE = "run `make conformance`, and commit what it writes"
MADE_UP = """\
## A. Device
### A1 data
| # | what | detail |
|---|---|---|
| A1.1 | a `record` | of **all** a\\|b |
| A1.2 | another \\| one | |

## X. External symbols
### X, Xen
| # | symbol | must do |
|---|---|---|
| X3a | `call()` | 0 |

### X, VMBus
| # | symbol | must do |
|---|---|---|
| X11h | `hv_init()` | |

## H. Defects
| # | where | defect | pvbus |
|---|---|---|---|
| H1 | A1.1 | is **late** | fix |

## E. Scenarios
| # | scenario |
|---|---|
| E1 | two CPUs |
"""
ALL_SHOWN = {
    "A1.1": {"t.py::a": 1}, "A1.2": {"t.py::a": 3}, "X3a": {"t.py::b": 1}, "X11h": {"t.py::b": 1}, "H1": {"t.py::b": 1},
}  # fmt: skip


@pytest.fixture(scope="module")
def checklist() -> str:
    return CHECKLIST.read_text(encoding="utf-8")


@pytest.fixture(scope="module")
def marks() -> Marks:
    """Return the marks of the whole tree, whatever part of it this session runs."""
    done = subprocess.run(
        [sys.executable, conformance.__file__, "--json"],
        check=False, capture_output=True, text=True, timeout=COLLECT_S_MAX,
    )
    assert done.returncode == 0, done.stderr
    collected: Marks = json.loads(done.stdout)
    return collected


def test_every_row_is_shown_by_a_test_and_every_mark_names_a_row(checklist: str, marks: Marks) -> None:
    assert faults(checklist, marks) == []


def test_the_page_and_the_packaged_data_are_those_of_this_tree(checklist: str, marks: Marks) -> None:
    rows = join(checklist, marks)

    assert DATA.read_text(encoding="utf-8") == data(rows), STALE
    assert conformance.PAGE.read_text(encoding="utf-8") == page(rows), STALE


def test_the_report_is_about_every_row_but_the_scenarios(checklist: str) -> None:
    ids = [id_ for id_, _, _ in rows_of(checklist)]

    assert ids_of(checklist) - set(ids) == {f"E{n}" for n in range(1, 14)}
    assert {"A1.1", "A12.15", "B1.1", "B9.9", "X1", "X10c", "X11h", "X23", "H1", "H15"} <= set(ids)


def test_a_hole_and_a_wrong_id_are_seen() -> None:
    assert faults(MADE_UP, ALL_SHOWN) == []
    assert faults(MADE_UP, {**ALL_SHOWN, "A1.2": {}}) == ["A1.2: no test shows it"]
    assert faults(MADE_UP, {id_: tests for id_, tests in ALL_SHOWN.items() if id_ != "X3a"}) == [
        "X3a: no test shows it"
    ]
    assert faults(MADE_UP, {**ALL_SHOWN, "A1.99": {"t.py::c": 1}}) == [
        "A1.99: not in docs/checklist.md, but a mark of t.py::c"
    ]
    twice = MADE_UP.replace("| A1.2 |", "| A1.1 |")
    assert "A1.1: 2 rows have this id" in faults(twice, ALL_SHOWN)


def test_a_row_carries_its_heading_and_its_text_without_marks() -> None:
    assert rows_of(MADE_UP) == [
        ("A1.1", "A1 data", "a record"), ("A1.2", "A1 data", "another | one"), ("X3a", "X, Xen", "call()"),
        ("X11h", "X, VMBus", "hv_init()"), ("H1", "H. Defects", "is late"),
    ]  # fmt: skip


def test_the_files_say_what_was_joined(tmp_path: Path) -> None:
    rows = join(MADE_UP, {**ALL_SHOWN, "X3a": {}})
    path = tmp_path / "rows.json"
    path.write_text(data(rows))

    assert load(path) == rows
    assert holes(rows) == ["X3a"]
    assert as_dict(rows)["totals"] == {"rows": 5, "shown": 4, "tests": 3, "cases": 5}
    text = page(rows)
    assert "| A1.2 | another \\| one | `t.py::a` ×3 |" in text
    assert "| X3a | call() | **none** |" in text
    assert "## X, Xen" in text
