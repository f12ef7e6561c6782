# SPDX-License-Identifier: Apache-2.0
"""The sites that the explorer lists are those of the code, and docs/barriers.md has a row for each."""

import re
from pathlib import Path

import pytest

from pvbus.verify.explorer.sites import ELSEWHERE, LOCKED, ORDERED, SITES, STAYS, check

ROOT = Path(__file__).resolve().parents[2]
LABEL = re.compile(r"\bSYNC\((\w+)\)")
NATIVE = re.compile(r'PV_(?:LOAD|STORE)\w+\([^;]*?PV_(?:ACQUIRE|RELEASE),\s*"([\w.]+)"\)', re.DOTALL)
PYTHON = re.compile(r'\.(?:load|store)\d+_(?:acquire|release)\([^\n]*, "([\w.]+)"\)')
FENCE = re.compile(r'(?:PV_SMP_\w+\(\w+(?:->\w+)?|smp_(?:mb|rmb|wmb)\(), ?"?([\w.]+)"\)|smp_(?:mb|rmb|wmb)\("([\w.]+)"\)')
ROW = re.compile(r"^\| `([\w.]+)` \|", re.MULTILINE)


def sources() -> dict[str, str]:
    """Return the text of the code under test."""
    paths = [*(ROOT / "shm").rglob("*.[ch]"), *(ROOT / "shm").glob("*.py"), *(ROOT / "actors").rglob("*.py")]
    return {str(path.relative_to(ROOT)): path.read_text() for path in paths}


def test_every_label_of_the_code_is_listed_and_no_other() -> None:
    labels = {label for text in sources().values() for label in LABEL.findall(text)} - {"name"}

    assert set(SITES) == labels


def test_every_ordered_access_that_has_a_site_is_listed_and_no_other() -> None:
    found = {site for text in sources().values() for pattern in (NATIVE, PYTHON) for site in pattern.findall(text)}

    assert found - set(SITES) == set(ORDERED)


def test_every_barrier_has_a_label() -> None:
    found = {site for text in sources().values() for pair in FENCE.findall(text) for site in pair if site} - {"site"}

    assert found <= set(SITES)
    assert len(found) > 8


@pytest.mark.parametrize("sites", [SITES, ORDERED])
def test_each_is_explained_in_one_sentence(sites: dict[str, str]) -> None:
    assert [site for site, sentence in sites.items() if not 20 < len(sentence) < 130 or sentence.endswith(".")] == []


def test_a_site_that_is_none_is_refused_by_name() -> None:
    assert check("evr_wake@reader") == "evr_wake@reader"
    with pytest.raises(ValueError, match="no site 'evr_woke@reader'"):
        check("evr_woke@reader")


def test_the_matrix_has_a_row_for_each_site_and_says_why_a_redundant_one_stays() -> None:
    text = (ROOT / "docs" / "barriers.md").read_text()
    table = text.partition("## Labelled barriers")[2]
    redundant = set(re.findall(r"^\| `([\w.]+)` \| everywhere \|(?! .*needed)", table, re.MULTILINE))

    assert ROW.findall(table) == [*SITES, *ORDERED]
    assert redundant <= set(STAYS)


@pytest.mark.parametrize("site", LOCKED)
def test_the_test_that_stands_for_a_label_of_locked_operations_is_there(site: str) -> None:
    path, _, name = LOCKED[site].partition("::")

    assert f"def {name}(" in (ROOT / path).read_text()
    assert site in STAYS


def test_a_label_that_is_left_out_under_other_names_names_ordered_accesses() -> None:
    assert set(ELSEWHERE) | set(LOCKED) <= set(SITES)
    assert {name for names in ELSEWHERE.values() for name in names} <= set(ORDERED)
