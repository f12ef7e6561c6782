# SPDX-License-Identifier: Apache-2.0
"""The matrix of barriers: how it judges, and that what docs/barriers.md says of a site still happens."""

import re
from pathlib import Path

import pytest

from pvbus.verify.barriers import (
    NEEDED,
    OPEN,
    REDUNDANT,
    UNSEEN,
    Configuration,
    Finding,
    configurations,
    document,
    examined,
    passed,
)  # fmt: skip
from pvbus.verify.explorer import explore
from pvbus.verify.explorer.sites import ORDERED, SITES
from pvbus.verify.scenarios.event_ring import EventRing

TEXT = (Path(__file__).resolve().parents[2] / "docs" / "barriers.md").read_text()
ONE, TWO = (Configuration(EventRing, (("events", events),)) for events in (1, 2))
HELD_AGAIN_EXECUTIONS_MAX = 100  # rows that fail sooner are searched again here
ROW = re.compile(r"^\| (?:`([\w.]+)`)? *\| (\S+) \| (.*) \| (.*) \|$", re.MULTILINE)
FAILS = re.compile(r"needed: (.+), [\w -]+ \(([\d,]+), (\w+)\)")


def rows() -> list[tuple[str, str, str, int, str]]:
    """Return what the document calls needed: site, model, configuration, executions, search."""
    found: list[tuple[str, str, str, int, str]] = []
    site = ""
    for named, place, *cells in ROW.findall(TEXT):
        site = named or site
        for model, cell in zip(("tso", "arm"), cells, strict=True):
            if (fails := FAILS.match(cell)) is not None:
                where = site if place == "everywhere" else f"{site}@{place}"
                found.append((where, model, fails[1], int(fails[2].replace(",", "")), fails[3]))
    return found


@pytest.mark.parametrize(("site", "model", "where", "verdict"), [
    ("evr_wake", "tso", (ONE, TWO), NEEDED), ("evr_publish", "tso", (ONE,), REDUNDANT), ("evr_publish", "arm", (ONE,), NEEDED),
    ("evr_wake@reader", "tso", (), UNSEEN),
])  # fmt: skip
def test_a_site_is_needed_where_a_scenario_fails_without_it(
    site: str, model: str, where: tuple[Configuration, ...], verdict: str
) -> None:
    assert examined(site, model, where).verdict == verdict


def test_a_search_that_did_not_end_proves_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("pvbus.verify.barriers.EXECUTIONS_MAX", 3)
    monkeypatch.setattr("pvbus.verify.barriers.HUNT_EXECUTIONS_MAX", 3)
    monkeypatch.setattr("pvbus.verify.barriers.LAST_EXECUTIONS_MAX", 4)

    found = examined("evr_publish", "tso", [TWO])

    assert (found.verdict, found.evidence) == (OPEN, ["no end in event-ring events=2"])

    monkeypatch.setattr("pvbus.verify.barriers.LAST_EXECUTIONS_MAX", 100_000)  # it is given more, and ends
    assert str(examined("evr_publish", "tso", [TWO])) == "redundant: complete in event-ring events=2"


def test_it_knows_which_context_comes_by_which_site() -> None:
    found = passed(ONE, ["evr_wake", "vmr_signal"])

    assert {"evr_wake", "evr_wake@cpu0", "evr_wake@reader"} <= found
    assert not any(place.startswith("vmr_signal") for place in found)


def test_the_document_has_a_row_for_every_site_and_says_what_was_not_reached() -> None:
    text = document({"evr_wake": {"": {"tso": Finding(NEEDED, ["here"])}, "reader": {"tso": Finding(NEEDED, ["there"])}}})

    assert "| `evr_wake` | everywhere | needed: here | not reached |" in text
    assert "|  | reader | needed: there |  |" in text
    assert all(f"| `{site}` | everywhere | " in text for site in [*SITES, *ORDERED])


def test_what_the_document_calls_needed_still_fails_there() -> None:
    known = {one.label: one for one in configurations()}
    again = [row for row in rows() if row[3] <= HELD_AGAIN_EXECUTIONS_MAX]
    held = []
    for site, model, label, _, search in again:
        bounds = dict(known[label].bounds)
        result = explore(
            known[label].make(), model=model, drop=[site], search=search, executions=10 * HELD_AGAIN_EXECUTIONS_MAX, **bounds
        )
        if result.failure is None:
            held.append((site, model, label))

    assert len(again) > 20
    assert held == []
