# SPDX-License-Identifier: Apache-2.0
"""The bridge from the explorer to a real machine: its processes follow a trace, access by access.

A machine that runs with PVBUS_GATE=FILE has the baton gate in its core (shm/native/gate.h). Here the file is written: which
process makes which access of the trace, in one order. While the gate is held, everybody who comes to a step of the trace
waits there; once it plays, each step is made when it is its turn, and behind the last one all are free again. What is no
step of the trace (a location that only one process touches) is not held up at any time.

Only a trace under `sc` can be followed: real processes cannot be told what their store buffers do.

    gate = Gate.make(path)
    gate.write(steps_of(walked), {"cpu0": "cpu/0.0"})
    gate.hold()     # raise what the scenario has pending at the start
    gate.play()
    gate.await_end(seconds)

`python -m pvbus.verify.bridge` is the reader of such a machine: a user process, see `reader`.
"""

from __future__ import annotations

import os
import re
import sys
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final, NamedTuple

from pvbus.shm.layout import Domain, FilePage, Machine, PublicPage, SubmissionRing
from pvbus.shm.memory import Memory, enter_gate

if TYPE_CHECKING:
    from pvbus.verify.explorer.walk import Walked

STEPS_MAX: Final = 1_000
CONTEXTS_MAX: Final = 8
NAME_BYTES: Final = 32
SITE_BYTES: Final = 40
_STATE, _TURN, _STEPS, _SCHEDULE, _CHANGED, _CONTEXTS, _NAMES = 0, 4, 8, 12, 16, 20, 64
_STEP_BYTES: Final = 24 + SITE_BYTES
_STEP_FIRST: Final = _NAMES + CONTEXTS_MAX * NAME_BYTES
BYTES: Final = _STEP_FIRST + STEPS_MAX * _STEP_BYTES
OFF, HELD, PLAYING, OVER = range(4)
LOOK_S: Final = 0.002
VIRQ_FIRST: Final = 3  # global ones that no kernel holds here


# How the scenarios of an open file call what a process knows by its size, and the doorbells by what is done to them.
_SIZES: Final = {
    "machine": Machine.BYTES, "domain": Domain.BYTES, "page": FilePage.BYTES, "public": PublicPage.BYTES,
    "ring0": SubmissionRing.BYTES,
}  # fmt: skip
_BELLS: Final = {"ring door": "door.send", "take door": "door.take", "woken by door": "door.wait", "ring kick": "kick"}
_ACCESS: Final = re.compile(r"(\S+) (\w+)\+(0x[0-9a-f]+) ")
_BELL: Final = re.compile(r"\* (\w+(?: by)? \w+)")
_NO_STEP: Final = ("--", "[")


class Step(NamedTuple):
    """An access, or something done to a doorbell, as a real process makes it: the memory by its size, 0 for a doorbell."""

    context: str
    site: str
    size: int
    offset: int


class BridgeError(ValueError):
    """A trace that real processes cannot follow; the text says why."""


def steps_of(walked: Walked) -> list[Step]:
    """Give the steps of a trace under `sc`. BridgeError for one that no process can follow."""
    found = []
    for row in walked.rows:
        if row.text.startswith(_NO_STEP):
            continue
        if (bell := _BELL.match(row.text)) is not None and bell[1] in _BELLS:
            found.append(Step(row.context, _BELLS[bell[1]], 0, 0))
        elif (access := _ACCESS.match(row.text)) is not None and access[2] in _SIZES and " <- " not in row.text:
            found.append(Step(row.context, access[1], _SIZES[access[2]], int(access[3], 16)))
        else:
            raise BridgeError(f"{row.context}: {row.text!r} is nothing that a process of a machine can be held up at")
    return found


class Gate:
    """The file that the processes of one machine follow."""

    def __init__(self, memory: Memory) -> None:
        self._memory = memory
        self.steps = 0

    @classmethod
    def make(cls, path: Path) -> Gate:
        """Make the file, with a gate that is open."""
        fd = os.open(path, os.O_RDWR | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o600)
        try:
            os.ftruncate(fd, BYTES)
            return cls(Memory(fd, BYTES))
        finally:
            os.close(fd)

    def write(self, steps: Sequence[Step], names: Mapping[str, str]) -> None:
        """Write a trace; `names` says which process is which context. BridgeError."""
        if len(steps) > STEPS_MAX or len(names) > CONTEXTS_MAX:
            raise BridgeError(f"a trace of {len(steps)} steps and {len(names)} processes: at most {STEPS_MAX} and {CONTEXTS_MAX}")
        numbers = {context: number for number, context in enumerate(names)}
        self._set(_STATE, OFF)
        for context, name in names.items():
            self._text(_NAMES + numbers[context] * NAME_BYTES, name, NAME_BYTES)
        for number, step in enumerate(steps):
            if step.context not in numbers:
                raise BridgeError(f"step {number} is one of {step.context}, which no process of the machine stands for")
            at = _STEP_FIRST + number * _STEP_BYTES
            self._set(at, numbers[step.context])
            self._memory.store64(at + 8, step.size)
            self._memory.store64(at + 16, step.offset)
            self._text(at + 24, step.site, SITE_BYTES)
        self.steps = len(steps)
        self._set(_TURN, 0)
        self._set(_STEPS, len(steps))
        self._set(_CONTEXTS, len(names))
        self._set(_SCHEDULE, self._memory.load32(_SCHEDULE) + 1)

    def hold(self) -> None:
        """Let nobody make a step of the trace."""
        self._change(HELD)

    def play(self) -> None:
        """Let each step be made when it is its turn."""
        self._change(PLAYING)

    def open(self) -> None:
        """Let everybody go."""
        self._change(OVER)

    @property
    def turn(self) -> int:
        """How many steps have been made."""
        return self._memory.load32_acquire(_TURN)

    def await_end(self, seconds: float) -> bool:
        """Wait until every step has been made; False when that takes too long."""
        deadline_s = time.monotonic() + seconds
        while self.turn < self.steps and time.monotonic() < deadline_s:
            time.sleep(LOOK_S)
        return self.turn >= self.steps

    def _change(self, state: int) -> None:
        self._set(_STATE, state)
        self._set(_CHANGED, self._memory.load32(_CHANGED) + 1)  # whoever waits looks again within 50 ms

    def _set(self, offset: int, value: int) -> None:
        self._memory.store32_release(offset, value)

    def _text(self, offset: int, text: str, size: int) -> None:
        raw = text.encode()
        if len(raw) >= size:
            raise BridgeError(f"{text!r} is longer than {size - 1} letters")
        padded = raw.ljust(size, b"\0")
        for at in range(0, size, 8):
            self._memory.store64(offset + at, int.from_bytes(padded[at : at + 8], "little"))


def reader(machine: Any, events: int, say: Any, go: Any) -> None:
    """Be the reader of the scenario event-ring: bind a VIRQ for each event, and say `bound`; when `go` has a line, read, and
    say each port as it comes.
    """
    with machine.open_evtchn(domain=0) as file:
        ports = [file.bind_virq(VIRQ_FIRST + number) for number in range(events)]
        print("bound", *ports, file=say, flush=True)
        go.readline()
        read = 0
        while read < events:
            found = file.read_ports(16)
            read += len(found)
            print("read", *found, file=say, flush=True)
        go.readline()


def main() -> None:
    """Run the reader: the number of events is the argument, the machine is $PVBUS_MACHINE."""
    from pvbus.actors.client import attach

    enter_gate("reader")
    with attach() as machine:
        reader(machine, int(sys.argv[1]), sys.stdout, sys.stdin)


if __name__ == "__main__":
    main()
