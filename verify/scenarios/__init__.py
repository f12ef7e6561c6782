# SPDX-License-Identifier: Apache-2.0
"""Scenarios for the explorer, one file each: pages, contexts, and what must hold. Room logic and the
explored core only.

A module that is put here is found: each class in it that gives itself a `name` is a scenario of that name. Nothing else
lists them. One that lies elsewhere is named by its file, `counting.py`, or `counting.py:counting` where it has several.
"""

from __future__ import annotations

import importlib
import importlib.util
import inspect
import pkgutil
import re
import sys
import traceback
from collections.abc import Iterable, Mapping
from pathlib import Path
from types import ModuleType
from typing import Any, Final

from pvbus.verify.explorer.scenario import Claim, Scenario

SETTABLE: Final = (bool, int, tuple, str)  # kinds of parameters that a command line can give
STEP_OF_MAX: Final = 63  # the ports of a word
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
        for name, kind in _in(_loaded(module.name)).items():
            if name in found:
                raise BrokenScenarioError(f"two scenarios are called {name!r}: {found[name]} and {kind}")
            found[name] = kind
    return dict(sorted(found.items()))


def _in(module: ModuleType) -> dict[str, type[Scenario]]:
    kinds = [kind for kind in vars(module).values() if inspect.isclass(kind) and issubclass(kind, Scenario)]
    return {
        kind.name: kind for kind in kinds
        if kind.__module__ == module.__name__ and isinstance(vars(kind).get("name"), str) and not inspect.isabstract(kind)
    }


def _loaded(name: str) -> ModuleType:
    try:
        return importlib.import_module(f"{__name__}.{name}")
    except Exception as error:
        raise BrokenScenarioError(_broken(Path(f"verify/scenarios/{name}.py"), error)) from error


def _broken(path: Path, error: Exception) -> str:
    lines = [frame.lineno for frame in traceback.extract_tb(error.__traceback__) if Path(frame.filename).name == path.name]
    where = f" (line {lines[-1]})" if lines else ""
    return f"{path} cannot be loaded: {type(error).__name__}: {error}{where}"


# ---- those that lie elsewhere


def file_of(name: str) -> tuple[Path, str] | None:
    """Tell a file, and which scenario of it, from the name of one that is here."""
    path, _, which = name.rpartition(":") if re.search(r"\.py:[^/]*$", name) else (name, "", "")
    return (Path(path), which) if path.endswith(".py") else None


def names_of(text: str) -> list[str]:
    """Give the names that a command line's word stands for: a file has as many as scenarios."""
    if (file := file_of(text)) is None:
        return [find(text).name]
    return [text] if file[1] else [f"{text}:{name}" for name in _of_file(file[0])]


def _of_file(path: Path) -> dict[str, type[Scenario]]:
    spec = importlib.util.spec_from_file_location(f"{__name__}.at.{path.resolve()}", path)
    assert spec is not None
    assert spec.loader is not None
    if (module := sys.modules.get(spec.name)) is None or not path.is_file():
        module = sys.modules[spec.name] = importlib.util.module_from_spec(spec)
        try:
            spec.loader.exec_module(module)
        except OSError as error:
            del sys.modules[spec.name]
            raise UnknownScenarioError(f"{path}: {error.strerror or error}") from None
        except Exception as error:
            del sys.modules[spec.name]
            raise BrokenScenarioError(_broken(path, error)) from error
    if not (found := _in(module)):
        raise BrokenScenarioError(f"{path} has no scenario: {_what_is_missing(module)}")
    return found


def _what_is_missing(module: ModuleType) -> str:
    for kind in vars(module).values():
        if inspect.isclass(kind) and issubclass(kind, Scenario) and kind.__module__ == module.__name__:
            if missing := sorted(getattr(kind, "__abstractmethods__", ())):
                return f"{kind.__name__} does not have {', '.join(missing)}"
            return f"{kind.__name__} does not say what its `name` is"
    return "no class in it is a pvbus.verify.explorer.scenario.Scenario"


def find(name: str) -> type[Scenario]:
    """Give the scenario of this name; `_` may stand for `-`."""
    if (file := file_of(name)) is not None:
        there = _of_file(file[0])
        if (which := file[1] or next(iter(there))) not in there:
            raise UnknownScenarioError(f"no scenario {which!r} in {file[0]}: {', '.join(there)}")
        return there[which]
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
        if re.fullmatch(r"-?[0-9]{1,9}", text) is None:
            raise ValueError(text)
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
    return int(text) if re.fullmatch(r"-?[0-9]{1,18}", text) else text


def made(scenario: type[Scenario], parameters: Mapping[str, Any]) -> Scenario:
    """Make a scenario; what its constructor refuses is a ParameterError."""
    for name, value in parameters.items():
        _check_range(scenario, name, value)
    try:
        return scenario(**parameters)
    except (TypeError, ValueError) as error:
        raise ParameterError(f"{scenario.name}: {error}") from None


def _check_range(scenario: type[Scenario], name: str, value: Any) -> None:
    ranges = getattr(scenario, "ranges", {})
    low, high = ranges.get(name, (0, NUMBER_MAX))
    listed = isinstance(value, tuple) and name in ranges
    for number in value if listed else [value]:
        if not low <= number <= high if isinstance(number, int) else listed:
            raise ParameterError(f"{name}={number}: {scenario.name} wants a number from {low} to {high} there")


def power_of_two(name: str, number: int) -> None:
    """Refuse a size that no ring has."""
    if number & (number - 1):
        raise ValueError(f"{name}={number}: a ring's size is a power of two")


def script_of(script: Iterable[tuple[str, int]], *known: str) -> tuple[tuple[str, int], ...]:
    """Check a script, which may come from a command line. ValueError: a word that nobody knows would be passed over."""
    steps = tuple((what, int(of)) for what, of in script)
    for what, of in steps:
        if what not in known or not 1 <= of <= STEP_OF_MAX:
            raise ValueError(f"script: {what}:{of} is none of {', '.join(f'{word}:N' for word in known)}")
    return steps
