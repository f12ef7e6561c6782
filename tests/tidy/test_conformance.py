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
| # | where | defect |
|---|---|---|
| H1 | A1.1 | |
"""
ALL_SHOWN = {"A1.1": {"t.py::a": 1}, "A1.2": {"t.py::a": 3}, "X3a": {"t.py::b": 1}, "H1": {"t.py::b": 1}}


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


def test_the_report_is_about_all_of_part_a_and_what_xen_needs_of_part_x(checklist: str) -> None:
    ids = [id_ for id_, _, _ in rows_of(checklist)]

    assert {id_ for id_ in ids if id_.startswith("A")} == {id_ for id_ in ids_of(checklist) if id_.startswith("A")}
    assert [id_ for id_ in ids if not id_.startswith("A")] == [
        "X1", "X2", "X3", "X3a", "X4", "X5", "X6", "X7", "X8", "X9", "X10", "X10a", "X10b", "X10c",
    ]  # fmt: skip
    assert {"X11h", "X23", "H1", "E13"} <= ids_of(checklist) - set(ids)


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
    ]  # fmt: skip


def test_the_files_say_what_was_joined(tmp_path: Path) -> None:
    rows = join(MADE_UP, {**ALL_SHOWN, "X3a": {}})
    path = tmp_path / "rows.json"
    path.write_text(data(rows))

    assert load(path) == rows
    assert holes(rows) == ["X3a"]
    assert as_dict(rows)["totals"] == {"rows": 3, "shown": 2, "tests": 2, "cases": 4}
    text = page(rows)
    assert "| A1.2 | another \\| one | `t.py::a` ×3 |" in text
    assert "| X3a | call() | **none** |" in text
    assert "## X, Xen" in text
