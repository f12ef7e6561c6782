# SPDX-License-Identifier: Apache-2.0
"""Forked processes that make some steps of a scenario and report the answers over a pipe.

The recording shows the steps of all processes in one sequence; the plans say which of them a child made.
"""

from __future__ import annotations

import json
import os
import select
import time
import traceback
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from typing import NoReturn

from pvbus.tests.golden.session import Answer, Session, Step

CHILD_TIMEOUT_S = 10.0
LINE_BYTES_MAX = 65536


@dataclass(frozen=True)
class ChildPlan:
    """A child lives from before one step to before another, and makes some of the steps between."""

    fork_before: int
    steps: frozenset[int]
    reap_before: int


# fork, first child: uses the inherited files, opens one of its own (c), binds on both, exits (step 14).
# fork, second child: holds file a while the parent closes it (step 21), notifies from it, exits before
# step 29, in which the ports of a are free.
CHILD_PLANS: dict[str, list[ChildPlan]] = {
    "fork": [
        ChildPlan(fork_before=6, steps=frozenset(range(6, 14)), reap_before=14),
        ChildPlan(fork_before=21, steps=frozenset({25}), reap_before=29),
    ],
}


class Child:
    """A forked copy of this process that makes steps on demand."""

    def __init__(self, session: Session, steps: list[Step], make: Callable[[Session, Step], Answer]) -> None:
        order_read, order_write = os.pipe()
        answer_read, answer_write = os.pipe()
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", DeprecationWarning)  # Python 3.12 on: this process has threads
            self.pid = os.fork()
        if self.pid == 0:
            os.close(order_write)
            os.close(answer_read)
            _serve(session, steps, make, order_read, answer_write)
        os.close(order_read)
        os.close(answer_write)
        self._orders = order_write
        self._answers = answer_read

    def make(self, step: Step) -> Answer:
        """Let the child make a step; raise if it dies or does not answer."""
        os.write(self._orders, b"%d\n" % step.number)
        text = b""
        deadline = time.monotonic() + CHILD_TIMEOUT_S
        while not text.endswith(b"\n"):
            ready, _, _ = select.select([self._answers], [], [], max(0.0, deadline - time.monotonic()))
            data = os.read(self._answers, LINE_BYTES_MAX) if ready else b""
            assert data, f"the child gave no answer at {step.key}"
            text += data
        return Answer(**json.loads(text))

    def reap(self) -> int:
        """Let the child exit and give its status. What only it held open is released with that."""
        os.close(self._orders)
        os.close(self._answers)
        pidfd = os.pidfd_open(self.pid)
        try:
            if not select.select([pidfd], [], [], CHILD_TIMEOUT_S)[0]:
                os.kill(self.pid, 9)
        finally:
            os.close(pidfd)
        return os.waitstatus_to_exitcode(os.waitpid(self.pid, 0)[1])


def _serve(
    session: Session,
    steps: list[Step],
    make: Callable[[Session, Step], Answer],
    orders: int,
    answers: int,
) -> NoReturn:
    status = 1
    try:
        with os.fdopen(orders) as lines:
            for line in lines:
                answer = make(session, steps[int(line) - 1])
                os.write(answers, answer.to_json().encode() + b"\n")
        status = 0
    except BaseException:
        traceback.print_exc()
    finally:
        os._exit(status)
