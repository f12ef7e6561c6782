# SPDX-License-Identifier: Apache-2.0
"""The parameters of the scenarios: at both ends of their ranges nothing fails, and beyond they are refused."""

from typing import Any

import pytest

from pvbus.verify import scenarios
from pvbus.verify.explorer import Scenario, explore

EXECUTIONS = 3
KINDS = scenarios.scenarios()
ENDS = [
    (kind, name, end) for kind in KINDS.values() for name, ends in kind.ranges.items() for end in ends
    if isinstance(scenarios.defaults(kind).get(name), int)    # of those that it inherits it may not have each
]  # fmt: skip


def ids_of(value: Any) -> str:
    return str(value.name) if isinstance(value, type) and issubclass(value, Scenario) else str(value)


def is_refused(kind: type[Scenario], parameters: dict[str, Any]) -> bool:
    try:
        scenarios.made(kind, parameters)
    except scenarios.ParameterError:
        return True
    return False


@pytest.mark.parametrize(("kind", "name", "end"), ENDS, ids=ids_of)
def test_at_the_end_of_its_range_a_parameter_makes_no_failure(kind: type[Scenario], name: str, end: int) -> None:
    if is_refused(kind, {name: end}):    # with the defaults of the others it does not fit
        return
    scenario = scenarios.made(kind, {name: end})

    result = explore(scenario, executions=EXECUTIONS, deaths=1 if scenario.mortal else 0)

    assert result.failure is None, str(result.failure)


@pytest.mark.parametrize("kind", KINDS.values(), ids=ids_of)
def test_beyond_its_range_a_parameter_is_refused_with_its_value(kind: type[Scenario]) -> None:
    known = scenarios.defaults(kind)
    for name, (low, high) in kind.ranges.items():
        for value in (low - 1, high + 1) if name in known else ():
            given = (value,) if isinstance(known[name], tuple) else value
            with pytest.raises(scenarios.ParameterError, match=f"{name}={value}: {kind.name} wants a number from {low} to"):
                scenarios.made(kind, {name: given})


def test_every_number_has_a_range() -> None:
    for kind in KINDS.values():
        numbers = {name for name, value in scenarios.defaults(kind).items() if type(value) is int}
        assert numbers <= set(kind.ranges), kind.name


@pytest.mark.parametrize(("name", "settings", "sentence"), [
    ("ring-growth", {"entries": 6}, "entries=6: a ring's size is a power of two"),
    ("synic-messages", {"ahead": 5}, "ahead=5: there are 3 messages"),
    ("synic-messages", {"cpus": 8, "posters": 4}, "a domain has 16 message ports"),
    ("submission-ring", {"users": 8, "notifies": 60}, "each has a port of its own"),
    ("fifo-queue", {"waiting": (1,)}, "waiting=1: its user has it"), ("fifo-queue", {"before": ("x",)}, "before=x"),
    ("unbinding", {"ports": (2,)}, "port 1 is none of ports=2"), ("channel-ring", {"filled": (20,)}, "multiples of 8"),
    ("synic-slot", {"types": ()}, "there is no message"), ("event-flags", {"ahead": 9}, "there are 3 signals"),
])  # fmt: skip
def test_parameters_that_do_not_go_together_are_refused(name: str, settings: dict[str, Any], sentence: str) -> None:
    with pytest.raises(scenarios.ParameterError, match=sentence):
        scenarios.made(scenarios.find(name), settings)


@pytest.mark.parametrize("text", ["1_0", " 2", "٣", "+3", "2.0", ""])
def test_a_number_is_written_in_digits(text: str) -> None:
    with pytest.raises(scenarios.ParameterError, match="event-ring wants a number there"):
        scenarios.read_parameters(scenarios.find("event-ring"), {"events": text})
