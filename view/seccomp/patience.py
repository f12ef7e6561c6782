# SPDX-License-Identifier: Apache-2.0
"""Asking another server, which may have been stopped, without waiting for it for ever.

What asks is a thread. While one that was given up has not come back, nobody else is sent: a server that does not answer costs
those who wait for us the patience of one.
"""

from __future__ import annotations

import errno
import threading
from collections.abc import Callable
from typing import TypeVar

PATIENCE_S = 2.0  # an answer takes some 50 µs; on a host with much else to do, ten milliseconds
T = TypeVar("T")


class Patience:
    """Has one thing at a time done."""

    def __init__(self) -> None:
        self._given_up: threading.Thread | None = None

    def ask(self, question: Callable[[], T]) -> T:
        """Give what `question` gives. TimeoutError: it takes too long, or another one still does. OSError: its own."""
        if self._given_up is not None and self._given_up.is_alive():
            raise TimeoutError(errno.ETIMEDOUT, "a question before this one has no answer yet")
        answers: list[T] = []
        failures: list[OSError] = []

        def run() -> None:
            try:
                answers.append(question())
            except OSError as failed:
                failures.append(failed)

        thread = threading.Thread(target=run, daemon=True)
        thread.start()
        thread.join(PATIENCE_S)
        if thread.is_alive():
            self._given_up = thread
            raise TimeoutError(errno.ETIMEDOUT, f"no answer within {PATIENCE_S} s")
        if failures:
            raise failures[0]
        return answers[0]
