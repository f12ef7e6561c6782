# SPDX-License-Identifier: Apache-2.0
"""A failure as a file: everything that is needed to run it again, and what it was run with.

One JSON object. The choices mean nothing without the scenario, its parameters, the model, the switches, and the locations
that were scheduling points; and they are promised to fit only for the code that they were recorded with, which the
fingerprint names.
"""

from __future__ import annotations

import functools
import hashlib
import json
import os
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, Final

SCHEMA: Final = 1
PACKAGE: Final = Path(__file__).resolve().parents[2]
ROOMS: Final = ("shm", "actors", "verify/explorer", "verify/scenarios", "verify/zoo")  # what decides how a trace goes on
FILE_BYTES_MAX: Final = 16 << 20  # a trace has hundreds of choices


class RecordingError(ValueError):
    """A file is no recording of a failure; the text names the file and what is wrong with it."""


@dataclass(frozen=True)
class Recording:
    """One failing execution. `choices` and `shared` as in the Failure; `kind` and `message` are what it showed then."""

    scenario: str
    parameters: Mapping[str, Any]
    model: str
    choices: tuple[str, ...]
    shared: tuple[int, ...]
    kind: str
    message: str
    variant: str | None = None
    drop: tuple[str, ...] = ()
    bug: str | None = None  # of the zoo: its handler runs instead of the scenario's
    bounds: Mapping[str, Any] = field(default_factory=dict)
    fingerprint: str = ""

    def write(self, path: Path) -> None:
        """Write the file, whole or not at all: two searches may find the same failure at once."""
        beside = path.with_name(f".{path.name}.{os.getpid()}")
        try:
            beside.write_text(json.dumps({"schema": SCHEMA, **asdict(self)}, indent=1) + "\n", encoding="utf-8")
            beside.replace(path)
        finally:
            beside.unlink(missing_ok=True)

    def name(self) -> str:
        """Give a file name that tells failures apart, and is the same for the same failure."""
        digest = hashlib.sha256(json.dumps(asdict(self)).encode()).hexdigest()
        called = self.bug or self.scenario.rpartition(":")[2].rpartition("/")[2].removesuffix(".py")
        return f"{called}-{self.model}-{digest[:8]}.json"

    def differs(self) -> str | None:
        """Say it when the code is not that of the recording."""
        here = fingerprint(self.scenario)
        if self.fingerprint == here:
            return None
        return f"recorded with the code {self.fingerprint[:12]}, this is {here[:12]}: its choices may mean something else here"


def read(path: Path) -> Recording:
    """Read a recording; RecordingError, or OSError as open() raises it."""
    with path.open("rb") as file:
        raw = file.read(FILE_BYTES_MAX + 1)
    if len(raw) > FILE_BYTES_MAX:
        raise RecordingError(f"{path} is longer than any recording: {FILE_BYTES_MAX} bytes")
    try:
        data = json.loads(raw)
    except ValueError as error:
        raise RecordingError(f"{path} is no JSON: {error}") from None
    except RecursionError:
        raise RecordingError(f"{path} is no recording: what it holds lies too deep") from None
    if not isinstance(data, dict) or data.pop("schema", None) != SCHEMA:
        raise RecordingError(f"{path} is no recording of schema {SCHEMA}")
    for name, kind in _KINDS.items():
        if name not in data:
            raise RecordingError(f"{path} has no {name!r}")
        if not isinstance(data[name], kind):
            raise RecordingError(f"{path}: {name} is {data[name]!r}")
    if strange := set(data) - set(_KINDS):
        raise RecordingError(f"{path}: nobody knows {', '.join(sorted(strange))}")
    for name in ("choices", "drop"):
        if not all(isinstance(item, str) for item in data[name]):
            raise RecordingError(f"{path}: {name} are not all words")
    if not all(type(item) is int and 0 <= item < 1 << 64 for item in data["shared"]):
        raise RecordingError(f"{path}: shared are not all numbers of locations")
    for name, bound in data["bounds"].items():
        if name not in _BOUNDS:
            raise RecordingError(f"{path}: nobody knows the bound {name!r}: {', '.join(_BOUNDS)}")
        if name != "search" and not (type(bound) is int and 0 <= bound <= BOUND_MAX):
            raise RecordingError(f"{path}: the bound {name} is {bound!r}, no number from 0 to {BOUND_MAX}")
    sequences = {name: tuple(data[name]) for name in ("choices", "drop", "shared")}
    return Recording(**{**data, **sequences, "parameters": _frozen(data["parameters"]), "bounds": _frozen(data["bounds"])})


_KINDS: Final[dict[str, Any]] = {
    "scenario": str, "parameters": dict, "model": str, "choices": list, "shared": list, "kind": str, "message": str,
    "variant": str | None, "drop": list, "bug": str | None, "bounds": dict, "fingerprint": str,
}  # fmt: skip


_BOUNDS: Final = ("deaths", "preemptions", "flush_delay", "search")
BOUND_MAX: Final = 1 << 20  # an execution has a thousand steps


def _frozen(value: Any) -> Any:
    """JSON has no tuples, parameters have nothing else."""
    if isinstance(value, list):
        return tuple(_frozen(item) for item in value)
    if isinstance(value, dict):
        return {name: _frozen(item) for name, item in value.items()}
    return value


def fingerprint(scenario: str = "") -> str:
    """Give the digest of the code under test and of the explorer, and of the scenario's file if it lies elsewhere."""
    path = Path(scenario.rpartition(":")[0] or scenario)
    if path.suffix != ".py" or not path.is_file():
        return _of_the_package()
    return hashlib.sha256(_of_the_package().encode() + path.read_bytes()).hexdigest()


@functools.cache
def _of_the_package() -> str:
    """Give the digest of our own; of the compiled core where its source is not installed."""
    digest = hashlib.sha256()
    native = sorted((PACKAGE / "shm/native").glob("*.[ch]")) or sorted((PACKAGE / "shm").glob("_core_explored*.so"))
    python = sorted(path for room in ROOMS for path in (PACKAGE / room).rglob("*.py"))
    for path in [*python, *native]:
        digest.update(f"{path.relative_to(PACKAGE)}\0".encode() + path.read_bytes() + b"\0")
    return digest.hexdigest()
