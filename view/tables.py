# SPDX-License-Identifier: Apache-2.0
"""How the command line speaks: one object for machines, aligned tables for people, plain when piped.

Formats what it is given; knows nothing of the machine.
"""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, TextIO

SCHEMA = 1
_BOLD, _PLAIN = "\x1b[1m", "\x1b[0m"


def bold(text: str, stream: TextIO | None = None) -> str:
    """Make text bold on a terminal that wants it."""
    out = stream or sys.stdout
    return f"{_BOLD}{text}{_PLAIN}" if out.isatty() and "NO_COLOR" not in os.environ else text


def cell(value: object) -> str:
    """Say one value: yes or no, a dash for nothing."""
    if value is None or value == "":
        return "-"
    if isinstance(value, bool):
        return "yes" if value else "no"
    if isinstance(value, list | tuple):
        return ",".join(cell(item) for item in value)
    return str(value)


def table(rows: Iterable[Mapping[str, Any]], columns: Sequence[str]) -> str:
    """Align rows under a heading. A column is the key of a row; its heading, the same in words."""
    cells = [[cell(row.get(column)) for column in columns] for row in rows]
    heads = [column.replace("_", " ").upper() for column in columns]
    widths = [max(map(len, column)) for column in zip(heads, *cells, strict=True)]

    def line(values: Sequence[str]) -> str:
        return "  ".join(value.ljust(width) for value, width in zip(values, widths, strict=True)).rstrip()

    return "\n".join([bold(line(heads)), *map(line, cells)])


def print_json(data: Mapping[str, Any]) -> None:
    """Print one object, its schema number first."""
    print(json.dumps({"schema": SCHEMA, **data}))
