# SPDX-License-Identifier: Apache-2.0
"""The report about the contract: its table, its holes, its exit code. That it is true is shown in tests/tidy."""

import json
from typing import Any

import pytest

from pvbus.view import cli, conformance
from pvbus.view.conformance import Row, Shown

LONG = "w" * 60
FULL = [
    Row("A1.1", "A1 data", LONG, (Shown("tests/t.py::one", 2), Shown("tests/t.py::two", 1))),
    Row("X3a", "X, Xen", "call()", (Shown("tests/t.py::one", 2),)),
]
WITH_A_HOLE = [*FULL, Row("X10", "X, Xen", "irq", ())]


def test_the_table_has_a_line_a_row_and_a_sum(capsys: pytest.CaptureFixture[str]) -> None:
    code = conformance.command(as_json=False, rows=FULL)
    lines = capsys.readouterr().out.splitlines()

    assert code == 0
    assert lines[0].split() == ["ID", "WHAT", "TESTS", "FIRST", "TEST"]
    assert lines[1].split() == ["A1.1", "w" * 47 + "…", "2", "tests/t.py::one"]
    assert lines[2].split() == ["X3a", "call()", "1", "tests/t.py::one"]
    assert lines[3:] == ["", "2 of 2 rows of parts A, B, X and H are shown by 2 tests (3 cases)"]


def test_a_row_without_a_test_is_named_and_fails(capsys: pytest.CaptureFixture[str]) -> None:
    code = conformance.command(as_json=False, rows=WITH_A_HOLE)
    lines = capsys.readouterr().out.splitlines()

    assert code == 1
    assert lines[3].split() == ["X10", "irq", "0", "-"]
    assert lines[-2] == "no test shows X10"
    assert lines[-1].startswith("2 of 3 rows ")


def test_json_has_every_row_with_all_its_text_and_tests(capsys: pytest.CaptureFixture[str]) -> None:
    code = conformance.command(as_json=True, rows=WITH_A_HOLE)
    said: dict[str, Any] = json.loads(capsys.readouterr().out)

    assert code == 1
    assert (said["schema"], said["holes"]) == (1, ["X10"])
    assert said["rows"][0] == {
        "id": "A1.1", "part": "A1 data", "what": LONG,
        "tests": [{"test": "tests/t.py::one", "cases": 2}, {"test": "tests/t.py::two", "cases": 1}],
    }  # fmt: skip
    assert said["totals"] == {"rows": 3, "shown": 2, "tests": 2, "cases": 3}


def test_the_verb_reports_what_is_packaged(capsys: pytest.CaptureFixture[str]) -> None:
    code = cli.run(cli.parser().parse_args(["conformance", "--json"]))
    said: dict[str, Any] = json.loads(capsys.readouterr().out)

    assert said == {"schema": 1, **conformance.as_dict(conformance.load())}
    assert code == (1 if said["holes"] else 0)
