# SPDX-License-Identifier: Apache-2.0
"""Every bug of the zoo is caught by the models that can show it, and by those only; a bounded look at our own code is clean.

That the production code passes each scenario exhaustively is what `pvbus explore --all` shows.
"""

import pytest

from pvbus.verify import zoo
from pvbus.verify.explorer import MODELS, explore

BUGS = {bug.name: bug for bug in zoo.bugs()}
PRODUCTION_EXECUTIONS = 150


def verdict_of(bug: zoo.Bug, model: str) -> str:
    result = explore(bug.broken(), model=model, executions=zoo.EXECUTIONS_MAX, **bug.arguments())
    return zoo.CAUGHT if result.failure is not None else zoo.CLEAN


@pytest.mark.parametrize("name", BUGS)
def test_a_bug_is_seen_by_the_models_that_can_show_it(name: str) -> None:
    bug = BUGS[name]

    assert {model: verdict_of(bug, model) for model in bug.expected} == bug.expected


@pytest.mark.parametrize("name", BUGS)
def test_the_production_code_shows_nothing_in_the_same_scenario(name: str) -> None:
    bug = BUGS[name]
    for model in bug.expected:
        result = explore(bug.production(), model=model, executions=PRODUCTION_EXECUTIONS, **bug.search)

        assert result.failure is None, f"{model}: {result.failure}"


def test_a_bug_names_models_that_there_are() -> None:
    assert {model for bug in BUGS.values() for model in bug.expected} == set(MODELS)


def test_every_bug_has_a_name_of_its_own_and_tells_its_story() -> None:
    bugs = zoo.bugs()

    assert len({bug.name for bug in bugs}) == len(bugs)
    for bug in bugs:
        assert bug.sentence
        assert len(bug.story) > len(bug.sentence)
        assert bug.citation
        assert zoo.CAUGHT in bug.expected.values(), f"{bug.name} is caught by no model"
        assert sum((bug.variant is not None, bool(bug.drop), bug.handler is not None)) == 1, bug.name


def test_every_row_of_the_catalogue_is_here_or_said_not_to_be() -> None:
    rows = set(range(1, 47))

    assert rows - {bug.number for bug in zoo.bugs()} == zoo.NOT_HERE.keys()


def test_a_bug_is_found_by_name_and_by_number() -> None:
    assert zoo.find("lost-wakeup") is zoo.find("1")
    with pytest.raises(KeyError, match="lost-wakeup"):
        zoo.find("no-such-bug")
