# SPDX-License-Identifier: Apache-2.0
"""Print a trace with a column a context, and read one that was printed."""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence
from typing import Final, NamedTuple

LINES_MAX: Final = 400  # a livelock has no end
_HEAD: Final = "  # "


class Row(NamedTuple):
    """One step: who, and what."""

    context: str
    text: str


def columns(trace: Iterable[tuple[str, str]], names: Sequence[str]) -> str:
    """Lay out (context, what it did) as lines, one a step, each in the column of its context."""
    return table([Row(who, text) for who, text in trace], names)


def table(rows: Sequence[Row], names: Sequence[str], beside: Sequence[str] = (), title: str = "") -> str:
    """Lay out steps as lines; `beside` them, under a title, stands what else is to be said of each."""
    heads = [*names, title] if any(beside) else [*names]
    cells = [[row.text if row.context == name else "" for name in names] for row in rows]
    if any(beside):
        cells = [[*line, more] for line, more in zip(cells, beside, strict=True)]
    widths = [max(map(len, column)) for column in zip(heads, *cells, strict=True)]
    lines = [_HEAD + "  ".join(head.ljust(width) for head, width in zip(heads, widths, strict=True))]
    for number, line in enumerate(cells, 1):
        lines.append(f"{number:3} " + "  ".join(cell.ljust(width) for cell, width in zip(line, widths, strict=True)))
    if len(lines) > LINES_MAX:
        lines[LINES_MAX:] = [f"… and {len(lines) - LINES_MAX} more"]
    return "\n".join(line.rstrip() for line in lines)


def rows_of(text: str) -> tuple[list[Row], list[str]]:
    """Read what `columns` wrote: the steps, and the names of the contexts."""
    lines = text.splitlines()
    if not lines:
        return [], []
    heads = list(re.finditer(r"\S+", lines[0][len(_HEAD) :]))
    starts = [len(_HEAD) + head.start() for head in heads]
    names = [head[0] for head in heads]
    rows = []
    for line in lines[1:]:
        if line.startswith("…"):
            break
        indent = len(re.match(r" *\d+ ", line)[0]) - len(_HEAD) if re.match(r" *\d+ ", line) else 0  # type: ignore[index]
        for name, start, end in zip(names, starts, [*starts[1:], None], strict=True):
            cell = line[start + indent : None if end is None else end + indent].strip()
            if cell:
                rows.append(Row(name, cell))
    return rows, names
