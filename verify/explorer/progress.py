# SPDX-License-Identifier: Apache-2.0
"""Say how a long search gets on: on a terminal one line that changes, otherwise a plain line now and then.

Goes to standard error, so that what is piped on stays what was asked for.
"""

from __future__ import annotations

import shutil
import sys
import time
from typing import Final, TextIO

TERMINAL_S: Final = 0.2  # between two changes of the line
PLAIN_S: Final = 10.0  # between two lines of a log


class Progress:
    """One search as it runs. `executions_max` and `seconds` are its bounds, as far as it has them."""

    def __init__(
        self, label: str, *, executions_max: int | None = None, seconds: float | None = None, stream: TextIO | None = None,
    ) -> None:  # fmt: skip
        self.label = label
        self.executions_max = executions_max
        self.seconds = seconds
        self.stream = sys.stderr if stream is None else stream
        self.terminal = self.stream.isatty()
        self.began_s = self.said_s = time.monotonic()
        self.width = 0

    def __call__(self, executions: int, steps: int, waiting: int) -> None:
        """Hear of the search: executions and steps so far, and choices on its path that have not been tried yet."""
        now_s = time.monotonic()
        if now_s - self.said_s < (TERMINAL_S if self.terminal else PLAIN_S):
            return
        self.said_s = now_s
        width = shutil.get_terminal_size().columns - 1 if self.terminal else None  # a line that wraps cannot be written over
        self._say(self.line(executions, steps, waiting, max(now_s - self.began_s, 1e-9), width))

    def line(self, executions: int, steps: int, waiting: int, elapsed_s: float, width: int | None = None) -> str:
        """Make the line. Where it has to fit into a width, the rate of steps goes first, and then the label's end."""
        rates = [f"{executions:,} executions, {executions / elapsed_s:,.0f}/s", f"{steps / elapsed_s:,.0f} steps/s"]
        left = [f"{waiting:,} choices to try on the path"] if waiting else []
        if self.executions_max is not None:
            left.append(f"at most {max(self.executions_max - executions, 0):,} executions to go")
        if self.seconds is not None:
            left.append(f"{max(self.seconds - elapsed_s, 0):.0f} s left")
        more = "; " + ", ".join(left) if left else ""
        line = f"{self.label}: {', '.join(rates)}{more}"
        if width is None or len(line) <= width:
            return line
        rest = f": {rates[0]}{more}"
        if len(self.label) + len(rest) <= width:
            return self.label + rest
        return (self.label[: max(width - len(rest) - 1, 0)] + "…" + rest)[: max(width, 1)]

    def close(self) -> None:
        """Leave the terminal clean."""
        if self.width:
            self.stream.write("\r" + " " * self.width + "\r")
            self.stream.flush()
            self.width = 0

    def _say(self, line: str) -> None:
        if self.terminal:
            self.stream.write("\r" + line.ljust(self.width))
            self.width = len(line)
        else:
            self.stream.write(line + "\n")
        self.stream.flush()
