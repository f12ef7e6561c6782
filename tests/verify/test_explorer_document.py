# SPDX-License-Identifier: Apache-2.0
"""docs/explorer.md tells the truth: its scenario is one file that is found and does what it says, its commands exist."""

import re
import sys
from pathlib import Path

import pytest

from pvbus.verify import exploring, scenarios
from pvbus.verify.explorer import Scenario, explore
from pvbus.view import cli

TEXT = (Path(__file__).resolve().parents[2] / "docs" / "explorer.md").read_text()
PROGRAM = re.findall(r"^```python\n(.*?)^```$", TEXT, re.MULTILINE | re.DOTALL)[0]
COMMANDS = re.findall(r"^pvbus (explore [^#\n]*)", TEXT, re.MULTILINE) + re.findall(
    r"`pvbus (explore (?:\./)?counting[^`]*)`", TEXT
)


@pytest.fixture
def counting(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> type[Scenario]:
    """Put the scenario of the document where scenarios lie, and find it."""
    (tmp_path / "counting.py").write_text('"""Two processes count in one word: is a count ever lost?"""\n\n' + PROGRAM)
    monkeypatch.setattr(scenarios, "__path__", [*scenarios.__path__, str(tmp_path)])
    monkeypatch.setitem(sys.modules, f"{scenarios.__name__}.counting", None)
    monkeypatch.delitem(sys.modules, f"{scenarios.__name__}.counting")
    return scenarios.find("counting")


def test_a_scenario_is_one_file_that_nothing_else_lists(counting: type[Scenario]) -> None:
    assert "counting" in scenarios.scenarios()
    assert scenarios.sentence(counting) == "Two processes count in one word: is a count ever lost?"
    assert scenarios.defaults(counting) == {"processes": 2, "locked": True}


def test_the_scenario_of_the_document_does_what_the_document_says(counting: type[Scenario]) -> None:
    failure = explore(counting(**scenarios.read_parameters(counting, {"locked": "no"}))).failure

    assert [explore(counting(), model=model).verdict for model in ("sc", "tso")] == ["complete", "complete"]
    assert failure is not None
    assert failure.message == "2 have counted, and the word says 1"
    assert len(failure.choices) == 4


def test_the_commands_of_the_document_make_sense(
    counting: type[Scenario], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)    # where the file lies
    assert len(COMMANDS) == 6
    for command in COMMANDS:
        assert list(exploring.jobs(cli.parser().parse_args(command.split())))
