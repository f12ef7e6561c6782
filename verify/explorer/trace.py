# SPDX-License-Identifier: Apache-2.0
"""Print a trace with a column a context."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Final, NamedTuple

LINES_MAX: Final = 400  # a livelock has no end


class Row(NamedTuple):
    """One step: who, what, and the stores that lie in store buffers behind it."""

    context: str
    text: str
    pending: str


def columns(trace: Iterable[tuple[str, str]], names: Sequence[str]) -> str:
    """Lay out (context, what it did) as lines, one a step, each in the column of its context."""
    return table([Row(who, text, "") for who, text in trace], names)


def table(rows: Sequence[Row], names: Sequence[str]) -> str:
    """Lay out steps as lines; where stores wait, they stand in a last column."""
    heads = [*names, "waiting in store buffers"] if any(row.pending for row in rows) else [*names]
    cells = [[*(row.text if row.context == name else "" for name in names), row.pending] for row in rows]
    widths = [max(map(len, column)) for column in zip(heads, *(line[: len(heads)] for line in cells), strict=True)]
    lines = ["  # " + "  ".join(head.ljust(width) for head, width in zip(heads, widths, strict=True))]
    for number, line in enumerate(cells, 1):
        lines.append(f"{number:3} " + "  ".join(cell.ljust(width) for cell, width in zip(line, widths, strict=False)))
    if len(lines) > LINES_MAX:
        lines[LINES_MAX:] = [f"… and {len(lines) - LINES_MAX} more"]
    return "\n".join(line.rstrip() for line in lines)
