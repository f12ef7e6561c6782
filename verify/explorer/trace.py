# SPDX-License-Identifier: Apache-2.0
"""Print a trace with a column a context."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Final

LINES_MAX: Final = 400  # a livelock has no end


def columns(trace: Iterable[tuple[str, str]], names: Sequence[str]) -> str:
    """Lay out (context, what it did) as lines, one a step, each in the column of its context."""
    steps = list(trace)
    widths = [max([len(name), *(len(text) for who, text in steps if who == name)]) for name in names]
    lines = ["  # " + "  ".join(name.ljust(width) for name, width in zip(names, widths, strict=True))]
    for number, (who, text) in enumerate(steps, 1):
        cells = [(text if who == name else "", width) for name, width in zip(names, widths, strict=True)]
        lines.append(f"{number:3} " + "  ".join(cell.ljust(width) for cell, width in cells))
    if len(lines) > LINES_MAX:
        lines[LINES_MAX:] = [f"… and {len(lines) - LINES_MAX} more"]
    return "\n".join(line.rstrip() for line in lines)
