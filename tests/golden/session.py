# SPDX-License-Identifier: Apache-2.0
"""What a golden scenario is made of while it runs: steps, answers, port symbols, open files.

The replayer writes a session and its calls read it; nothing here knows a particular call or compares.
"""

from __future__ import annotations

import contextlib
import json
import re
import select
import signal
import socket
import struct
import threading
import time
from collections.abc import Callable, Iterable, Iterator
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

PORT_BYTES = 4
PORTS_A_CALL_MAX = 1024  # one page
ARRIVAL_TIMEOUT_S = 2.0  # the recorder's own limit for what must arrive
BLOCKED_TIMEOUT_S = 5.0  # for a thread to come to rest in a call, on a busy machine
BLOCKED_SAMPLES = 3  # that many looks in a row see a thread asleep that has not run in between
RAN_OUT_SHARE = 10  # of a recorded time-out, see Session.timeout_ms
SAMPLE_GAP_S = 0.01  # twice the interval in which a thread that waits for the interpreter lock stirs

POLL_BITS = {
    "IN": select.POLLIN,
    "PRI": select.POLLPRI,
    "OUT": select.POLLOUT,
    "ERR": select.POLLERR,
    "HUP": select.POLLHUP,
    "RDNORM": select.POLLRDNORM,
    "RDBAND": select.POLLRDBAND,
    "WRNORM": select.POLLWRNORM,
    "WRBAND": select.POLLWRBAND,
}
POLL_ALL = sum(bit for name, bit in POLL_BITS.items() if name not in {"ERR", "HUP"})


@dataclass(frozen=True)
class Step:
    """One line of the recording."""

    scenario: str
    number: int
    group: str
    cmp: str
    call: str
    file: str
    args: dict[str, Any]
    line: dict[str, Any]

    @property
    def key(self) -> tuple[str, int]:
        """Return what tables of steps are keyed by."""
        return self.scenario, self.number


@dataclass
class Answer:
    """What a call gave. Ports are real numbers here; `port` says that `ret` is one that was handed out."""

    ret: int | str | None = 0
    errno: str | None = None
    data: list[int] | None = None
    poll: int = 0
    info: Any = None
    port: bool = False
    rx_ports: list[int] = field(default_factory=list)
    tx_ports: list[int] = field(default_factory=list)

    def handed_out(self) -> list[int]:
        """Return the port numbers that this answer hands out, in the order of their symbols."""
        ports = [self.ret] if self.port and isinstance(self.ret, int) else []
        return [*ports, *self.rx_ports, *self.tx_ports]

    def to_json(self) -> str:
        """Write the answer as one line."""
        return json.dumps(asdict(self))


def load(path: Path) -> dict[str, list[Step]]:
    """Read a recording: the steps of each scenario, in order."""
    scenarios: dict[str, list[Step]] = {}
    for text in path.read_text().splitlines():
        line = json.loads(text)
        step = Step(
            scenario=line["scenario"],
            number=line["step"],
            group=line["group"],
            cmp=line["cmp"],
            call=line["call"],
            file=line.get("fd", ""),
            args=line.get("args", {}),
            line=line,
        )
        steps = scenarios.setdefault(step.scenario, [])
        assert step.number == len(steps) + 1, f"steps out of order at {step.key}"
        steps.append(step)
    return scenarios


def expand(symbols: Iterable[str | int]) -> list[str | int]:
    """Write runs out in full: "p0..p2" becomes p0, p1, p2."""
    expanded: list[str | int] = []
    for symbol in symbols:
        run = re.fullmatch(r"p(\d+)\.\.p(\d+)", symbol) if isinstance(symbol, str) else None
        if run:
            expanded.extend(f"p{number}" for number in range(int(run[1]), int(run[2]) + 1))
        else:
            expanded.append(symbol)
    return expanded


def pack(ports: Iterable[int]) -> bytes:
    """Return ports as the bytes of a read or write."""
    numbers = list(ports)
    return struct.pack(f"={len(numbers)}I", *numbers)


def unpack(data: bytes) -> list[int]:
    """Return the ports in the bytes of a read."""
    return list(struct.unpack(f"={len(data) // PORT_BYTES}I", data))


class Symbols:
    """Names p0, p1, … for port numbers, in the order in which they were first handed out."""

    def __init__(self) -> None:
        self._number: dict[str, int] = {}
        self._name: dict[int, str] = {}

    def hand_out(self, port: int) -> str:
        """Name a port that was handed out; a number handed out again keeps its name."""
        if port not in self._name:
            name = f"p{len(self._name)}"
            self._name[port] = name
            self._number[name] = port
        return self._name[port]

    def name(self, port: int) -> str:
        """Return the name of a port that came out of a read."""
        return self._name.get(port, f"port {port}, never handed out")

    def number(self, symbol: str | int) -> int:
        """Return the number that an argument means: a symbol, "#n" for n itself, or a number."""
        if isinstance(symbol, int):
            return symbol
        if symbol.startswith("#"):
            return int(symbol[1:])
        return self._number[symbol]

    def numbers(self, symbols: Iterable[str | int]) -> list[int]:
        """Return the numbers of a list of arguments, runs included."""
        return [self.number(symbol) for symbol in expand(symbols)]


class Session:
    """A scenario in progress: its machine, its open files, and what later steps ask about earlier ones."""

    def __init__(self, machine: Any, cpus: int) -> None:
        self.machine = machine
        self.cpus = cpus
        self.symbols = Symbols()
        self.files: dict[str, Any] = {}
        self.last_read: dict[str, list[int]] = {}
        self.pairs: list[tuple[int, int]] = []
        self.readers: list[Reader] = []
        self.elapsed_s = 0.0
        self.facts: dict[str, Any] = {}
        self.after_step = contextlib.ExitStack()
        self.after_scenario = contextlib.ExitStack()

    def file(self, step: Step) -> Any:
        """Return the open file that a step is about."""
        return self.files[step.file]

    def timeout_ms(self, step: Step) -> int:
        """Return how long a call waits. Where the recorder's ran out, wait until the machine is idle, and then a part of the
        time: nothing is under way any more that all of it would show.
        """
        recorded: int = step.args["timeout_ms"]
        if recorded == 0 or not (step.line.get("ret") == 0 or step.line.get("errno") == "EAGAIN"):
            return recorded
        self.machine.settle()
        return recorded // RAN_OUT_SHARE

    def close_leftovers(self) -> list[str]:
        """Close what the scenario left open, and say what that was."""
        names = sorted(self.files)
        for name in names:
            with contextlib.suppress(OSError):
                self.files.pop(name).close()
        return names

    def drain(self, file: Any, expect: int) -> list[int]:
        """Read until `expect` ports came or two seconds passed, then what comes until the machine is idle."""
        ports: list[int] = []
        deadline = time.monotonic() + ARRIVAL_TIMEOUT_S
        while len(ports) < expect and (left := deadline - time.monotonic()) > 0:
            if file.poll(select.POLLIN, timeout_ms=int(left * 1000) + 1):
                ports += self._read_some(file)
        self.machine.settle()
        while file.poll(select.POLLIN, timeout_ms=0):
            ports += self._read_some(file)
        return ports

    @staticmethod
    def _read_some(file: Any) -> list[int]:
        try:
            return unpack(file.read(PORTS_A_CALL_MAX * PORT_BYTES))
        except BlockingIOError:
            return []

    def fill(self, file: Any, rx_port: int, tx_file: Any, tx_port: int, entries: int) -> int:
        """Fill a ring with entries of one port: notify, wait for it, write it back unread, over and over."""
        for _ in range(entries):
            tx_file.notify(tx_port)
            self.machine.settle()
            file.write(pack([rx_port]))
        self.machine.settle()
        return entries


class Reader(threading.Thread):
    """A thread that is in one blocking read of a file."""

    def __init__(self, file: Any, name: str) -> None:
        super().__init__(name=name, daemon=True)
        self._file = file
        self.answer: Answer | None = None

    def run(self) -> None:
        """Read once."""
        self.answer = attempt(lambda: read_answer(self._file.read(PORTS_A_CALL_MAX * PORT_BYTES)))


def read_answer(data: bytes) -> Answer:
    """Return the answer of a read that gave these bytes."""
    return Answer(ret=len(data), data=unpack(data))


def attempt(call: Callable[[], Answer]) -> Answer:
    """Run a call; an OSError is an answer."""
    import errno

    try:
        return call()
    except OSError as problem:
        name = errno.errorcode.get(problem.errno or 0, repr(problem))
        return Answer(ret=-1, errno=name)


def wait_until_blocked(native_id: int | None, finished: Callable[[], bool]) -> bool:
    """Wait until a thread of this process sleeps in a call. False: it finished, or does not come to rest."""
    deadline = time.monotonic() + BLOCKED_TIMEOUT_S
    pace = threading.Event()
    seen = ""
    asleep = 0
    while time.monotonic() < deadline and not finished():
        state = _thread_state(native_id)
        asleep = asleep + 1 if state == seen and state.startswith("S") else 0
        if asleep >= BLOCKED_SAMPLES:
            return not finished()
        seen = state
        pace.wait(SAMPLE_GAP_S)
    return False


@contextlib.contextmanager
def signals_seen() -> Iterator[Callable[[float], bool]]:
    """Yield a call that waits until a signal was handled in C. Python's own handler runs when the call that was hit ends,
    which under SA_RESTART it does not.
    """
    seen, wakeup = socket.socketpair()
    with seen, wakeup:
        wakeup.setblocking(False)
        previous = signal.set_wakeup_fd(wakeup.fileno())
        try:
            yield lambda timeout_s: bool(select.select([seen], [], [], timeout_s)[0])
        finally:
            signal.set_wakeup_fd(previous)


def _thread_state(native_id: int | None) -> str:
    try:
        status = Path(f"/proc/self/task/{native_id}/status").read_text()
    except (FileNotFoundError, ProcessLookupError):
        return ""
    found = re.search(r"^State:\s+(\w).*^voluntary_ctxt_switches:\s+(\d+)", status, re.DOTALL | re.MULTILINE)
    return f"{found[1]}{found[2]}" if found else ""
