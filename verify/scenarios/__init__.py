# SPDX-License-Identifier: Apache-2.0
"""Scenarios for the explorer, one file each: pages, contexts, and what must hold. Room logic and the
explored core only.

A module that is put here is found: each class in it that gives itself a `name` is a scenario of that name. Nothing else
lists them.
"""

from __future__ import annotations

import importlib
import inspect
import pkgutil
from collections.abc import Iterable, Mapping
from types import ModuleType
from typing import Any, Final

from pvbus.verify.explorer.scenario import Claim, Scenario

SETTABLE: Final = (bool, int, tuple, str)  # kinds of parameters that a command line can give
NUMBER_MAX: Final = 1024  # of anything: more events than that are no search that ends
MODELS_OF_A_DEFAULT = ("sc", "tso")


class UnknownScenarioError(ValueError):
    """There is no scenario of this name; the text names those that there are."""


class BrokenScenarioError(ValueError):
    """The file of a scenario is no Python, or raises something; the text names it."""


class ParameterError(ValueError):
    """A scenario has no such parameter, or not with this value; the text names it."""


def scenarios() -> dict[str, type[Scenario]]:
    """Give every scenario by name, in the order of their names."""
    found: dict[str, type[Scenario]] = {}
    for module in pkgutil.iter_modules(__path__):
        for kind in vars(_loaded(module.name)).values():
            if not (inspect.isclass(kind) and issubclass(kind, Scenario) and kind.__module__.endswith("." + module.name)):
                continue
            if isinstance(vars(kind).get("name"), str) and not inspect.isabstract(kind):
                if kind.name in found:
                    raise RuntimeError(f"two scenarios are called {kind.name!r}: {found[kind.name]} and {kind}")
                found[kind.name] = kind
    return dict(sorted(found.items()))


def _loaded(name: str) -> ModuleType:
    try:
        return importlib.import_module(f"{__name__}.{name}")
    except Exception as error:
        raise BrokenScenarioError(f"verify/scenarios/{name}.py cannot be loaded: {type(error).__name__}: {error}") from error


def find(name: str) -> type[Scenario]:
    """Give the scenario of this name; `_` may stand for `-`."""
    found = {kind.replace("_", "-"): scenario for kind, scenario in scenarios().items()}
    try:
        return found[name.replace("_", "-")]
    except KeyError:
        raise UnknownScenarioError(f"no scenario {name!r}: {', '.join(found)}") from None


def sentence(thing: object) -> str:
    """Give the first sentence of what a class, or else its module, says of itself."""
    module = inspect.getmodule(thing)
    text = inspect.getdoc(thing) if module is None or inspect.getdoc(module) is None else inspect.getdoc(module)
    first = " ".join((text or "").partition("\n\n")[0].split())
    return first.rstrip(":")


def defaults(scenario: type[Scenario]) -> dict[str, Any]:
    """Give the parameters of a scenario, by name, with their defaults."""
    signature = inspect.signature(scenario)
    return {
        name: parameter.default
        for name, parameter in signature.parameters.items()
        if parameter.kind in (parameter.KEYWORD_ONLY, parameter.POSITIONAL_OR_KEYWORD)
    }


def claims(scenario: type[Scenario]) -> tuple[Claim, ...]:
    """Give what is claimed of a scenario: searched to its end, nothing fails."""
    return scenario.claims or tuple(Claim(model) for model in MODELS_OF_A_DEFAULT)


def read_parameters(scenario: type[Scenario], texts: Mapping[str, str]) -> dict[str, Any]:
    """Read parameters as a command line gives them, by the type of their defaults. ParameterError."""
    known = defaults(scenario)
    values: dict[str, Any] = {}
    for name, text in texts.items():
        if name not in known:
            raise ParameterError(f"{scenario.name} has no parameter {name!r}: {', '.join(known) or 'it has none'}")
        try:
            values[name] = _read(text, known[name])
        except ValueError:
            kind = type(known[name]).__name__
            raise ParameterError(f"{name}={text}: {scenario.name} wants {_KINDS.get(kind, kind)} there") from None
    return values


_KINDS = {"int": "a number", "bool": "yes or no", "tuple": "a list like 1,2", "str": "a word"}
_TRUTHS = {"yes": True, "true": True, "1": True, "no": False, "false": False, "0": False}


def _read(text: str, like: Any) -> Any:
    if isinstance(like, bool):
        if text.lower() not in _TRUTHS:
            raise ValueError(text)
        return _TRUTHS[text.lower()]
    if isinstance(like, int):
        return int(text)
    if isinstance(like, tuple):
        items = [item for item in text.split(",") if item]
        read = tuple(_read_item(item) for item in items)
        if like and {type(item) for item in read} - {type(item) for item in like}:
            raise ValueError(text)
        return read
    if isinstance(like, str):
        return text
    raise ValueError(text)


def _read_item(text: str) -> Any:
    """An entry of a list: a number, or several things as in `raise:1`."""
    if ":" in text:
        return tuple(_read_item(part) for part in text.split(":"))
    return int(text) if text.lstrip("-").isdecimal() else text


def made(scenario: type[Scenario], parameters: Mapping[str, Any]) -> Scenario:
    """Make a scenario; what its constructor refuses is a ParameterError."""
    for name, value in parameters.items():
        if isinstance(value, int) and not 0 <= value <= NUMBER_MAX:
            raise ParameterError(f"{name}={value}: {scenario.name} wants a number from 0 to {NUMBER_MAX} there")
    try:
        return scenario(**parameters)
    except (TypeError, ValueError) as error:
        raise ParameterError(f"{scenario.name}: {error}") from None


def script_of(script: Iterable[tuple[str, int]], *known: str) -> tuple[tuple[str, int], ...]:
    """Check a script, which may come from a command line. ValueError: a word that nobody knows would be passed over."""
    steps = tuple((what, int(of)) for what, of in script)
    for what, of in steps:
        if what not in known or of < 1:
            raise ValueError(f"script: {what}:{of} is none of {', '.join(f'{word}:N' for word in known)}")
    return steps
