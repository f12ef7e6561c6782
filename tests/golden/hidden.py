# SPDX-License-Identifier: Apache-2.0
"""What the recording does not spell out: composite calls, threads, signals, and sums of loops.

`BEFORE` holds what must be under way when a step is made (a thread that will wake it, a signal that will
interrupt it); `HIDDEN_CALLS` what stands behind a line that only sums something up.
"""

from __future__ import annotations

import contextlib
import fcntl
import os
import signal
import struct
import threading
import time
from collections.abc import Callable
from types import FrameType
from typing import Any

from pvbus.tests.golden.calls import Call
from pvbus.tests.golden.session import (
    ARRIVAL_TIMEOUT_S,
    PORTS_A_CALL_MAX,
    Answer,
    Reader,
    Session,
    Step,
    pack,
    signals_seen,
    wait_until_blocked,
)

RING_SIZE_FIRST = 64
FILL_OF_NEVER_SHRINKS = 100
REBIND_CYCLES = 64
INTERRUPT_AFTER_S = 0.1  # by then the main thread is in its call; an interval timer, as recorded
WATCHDOG_S = 5.0  # what a signal failed to interrupt is woken by an event, and its answer is wrong
F_SETOWN_EX = 15  # linux/fcntl.h; not in Python's fcntl
F_OWNER_TID = 0


# Composite calls ----------------------------------------------------------------------------------


def call_pairs(session: Session, step: Step) -> Answer:
    """Bind n ports of the file, each interdomain from the one in args.tx; drain that one's first events."""
    rx, tx, n = session.file(step), session.files[step.args["tx"]], step.args["n"]
    rx_ports = [rx.bind_unbound_port(remote_domain=0) for _ in range(n)]
    tx_ports = [tx.bind_interdomain(0, port) for port in rx_ports]
    first = session.drain(tx, n)
    assert sorted(first) == sorted(tx_ports), f"PAIRS: first events of {tx_ports} were {first}"
    session.pairs += zip(rx_ports, tx_ports, strict=True)
    answer = Answer(ret=len(session.pairs), rx_ports=rx_ports, tx_ports=tx_ports)
    if step.scenario == "ring_growth":
        for _, port in session.pairs:
            tx.notify(port)
        session.machine.settle()
    return answer


def call_advance(session: Session, step: Step) -> Answer:
    """Send events through the ring one by one: notify, wait for it, read 4 bytes, write it back."""
    rx_port, tx_port = session.pairs[0]
    rx, tx = session.file(step), session.files[step.args["tx"]]
    for _ in range(step.args["k"]):
        tx.notify(tx_port)
        session.machine.settle()
        data = rx.read(4)
        assert data == pack([rx_port])
        rx.write(data)
    return Answer()


def write_back_growth(session: Session, step: Step) -> None:
    """In ring_growth, write everything back that a drain has read."""
    ports = session.last_read[step.file]
    for start in range(0, len(ports), PORTS_A_CALL_MAX):
        session.file(step).write(pack(ports[start : start + PORTS_A_CALL_MAX]))


def call_fill_ring(session: Session, step: Step) -> Answer:
    """Fill the ring of file a to its last slot with entries of the first pair."""
    rx_port, tx_port = session.pairs[0]
    if step.scenario == "sigio_overflow":
        ask_for_sigio(session)
    filled = session.fill(session.files["a"], rx_port, session.files["b"], tx_port, RING_SIZE_FIRST)
    return Answer(ret=None, info=filled)


def call_fill_100(session: Session, step: Step) -> Answer:
    """Unbind all ports but one, then queue more entries than the first ring size holds."""
    for rx_port, _ in session.pairs[1:]:
        session.files["a"].unbind(rx_port)
    rx_port, tx_port = session.pairs[0]
    a, b = session.files["a"], session.files["b"]
    return Answer(ret=None, info=session.fill(a, rx_port, b, tx_port, FILL_OF_NEVER_SHRINKS))


def call_entries_read(session: Session, step: Step) -> Answer:
    """Count what lies in the ring."""
    return Answer(ret=None, info=len(session.drain(session.files["a"], FILL_OF_NEVER_SHRINKS)))


def call_cycles(session: Session, step: Step) -> Answer:
    """Bind, raise and unbind a port again and again without reading: each round leaves a stale entry."""
    a, b = session.files["a"], session.files["b"]
    numbers = set()
    for _ in range(REBIND_CYCLES):
        rx_port = a.bind_unbound_port(remote_domain=0)
        tx_port = b.bind_interdomain(0, rx_port)
        session.symbols.hand_out(rx_port)
        session.symbols.hand_out(tx_port)
        session.drain(b, 1)
        b.notify(tx_port)
        session.machine.settle()
        a.unbind(rx_port)
        b.unbind(tx_port)
        numbers.add(rx_port)
    session.facts["same_port"] = len(numbers) == 1
    return Answer(ret=None, info=REBIND_CYCLES)


# Threads ------------------------------------------------------------------------------------------


def notify_when_blocked(session: Session, file: Any, port: int) -> None:
    """Notify from another thread as soon as this one sleeps in its next call."""
    caller = threading.get_native_id()
    over = threading.Event()

    def run() -> None:
        if wait_until_blocked(caller, over.is_set):
            file.notify(port)

    helper = threading.Thread(target=run, daemon=True)
    session.after_step.callback(helper.join, ARRIVAL_TIMEOUT_S)
    session.after_step.callback(over.set)
    helper.start()


def start_reader(session: Session, name: str) -> Reader:
    """Start a thread that reads from file a, and wait until it sleeps."""
    reader = Reader(session.files["a"], name)
    reader.start()
    session.readers.append(reader)
    session.facts[f"{name} blocked"] = blocked(reader)
    return reader


def blocked(reader: Reader) -> bool:
    """Wait until the thread sleeps in its read; False if the read has returned."""
    return wait_until_blocked(reader.native_id, lambda: reader.answer is not None)


def call_both_blocked(session: Session, step: Step) -> Answer:
    """Start two readers of one file."""
    readers = [start_reader(session, name) for name in ("t1", "t2")]
    session.machine.settle()
    return Answer(ret=None, info=all(blocked(reader) for reader in readers))


def call_readers_returned(session: Session, step: Step) -> Answer:
    """Wait until a further reader has returned, make sure that the others sleep on, and count."""
    expected = session.facts["returned"] = session.facts.get("returned", 0) + 1
    deadline = time.monotonic() + ARRIVAL_TIMEOUT_S
    pace = threading.Event()
    while time.monotonic() < deadline and returned(session) < expected:
        pace.wait(0.001)
    session.machine.settle()
    asleep = sum(blocked(reader) for reader in session.readers)
    assert asleep + returned(session) == len(session.readers), "a reader neither sleeps nor has returned"
    return Answer(ret=None, info=returned(session))


def returned(session: Session) -> int:
    """Count the readers that are done."""
    return sum(reader.answer is not None for reader in session.readers)


def reader_answer(reader: Reader) -> Answer:
    """Wait for a reader's end and give what it got."""
    reader.join(ARRIVAL_TIMEOUT_S)
    assert reader.answer is not None, f"reader {reader.name} did not return"
    return reader.answer


def call_bytes(session: Session, step: Step) -> Answer:
    """Give the return value of each reader."""
    return Answer(ret=None, info=[reader_answer(reader).ret for reader in session.readers])


def call_data_of_both(session: Session, step: Step) -> Answer:
    """Give everything the readers got."""
    return Answer(data=[port for reader in session.readers for port in reader_answer(reader).data or []])


def call_still_blocked(session: Session, step: Step) -> Answer:
    """Look whether the reader sleeps on after the close."""
    session.machine.settle()
    return Answer(ret=None, info=session.facts["t1 blocked"] and blocked(session.readers[0]))


def call_reader_done(session: Session, step: Step) -> Answer:
    """Wait for the reader."""
    reader_answer(session.readers[0])
    session.readers[0].join(ARRIVAL_TIMEOUT_S)
    return Answer(ret=None, info=not session.readers[0].is_alive())


def call_thread_read(session: Session, step: Step) -> Answer:
    """Give what the reader got."""
    return reader_answer(session.readers[0])


# Signals ------------------------------------------------------------------------------------------


def interrupt(session: Session, *, restart: bool) -> None:
    """Let a timer's signal hit the next call."""
    session.facts["handler_runs"] = 0

    def handler(_number: int, _frame: FrameType | None) -> None:
        session.facts["handler_runs"] += 1

    previous = signal.signal(signal.SIGALRM, handler)
    signal.siginterrupt(signal.SIGALRM, not restart)
    session.after_step.callback(signal.signal, signal.SIGALRM, previous)
    session.after_step.callback(signal.setitimer, signal.ITIMER_REAL, 0)
    signal.setitimer(signal.ITIMER_REAL, INTERRUPT_AFTER_S)


def interrupt_call(session: Session) -> None:
    """Interrupt the next call, which must answer EINTR; an event ends it if it does not."""
    b, port = session.files["b"], session.symbols.number("p1")
    watchdog = threading.Timer(WATCHDOG_S, lambda: b.notify(port))
    session.after_step.callback(watchdog.join)
    session.after_step.callback(watchdog.cancel)
    watchdog.start()
    interrupt(session, restart=False)


def interrupt_and_restart(session: Session) -> None:
    """Interrupt the next call under SA_RESTART; once it sleeps again, an event ends it."""
    b, port = session.files["b"], session.symbols.number("p1")
    caller, over = threading.get_native_id(), threading.Event()
    seen = session.after_step.enter_context(signals_seen())

    def run() -> None:
        if seen(ARRIVAL_TIMEOUT_S):
            wait_until_blocked(caller, over.is_set)
        b.notify(port)

    helper = threading.Thread(target=run, daemon=True)
    session.after_step.callback(helper.join, WATCHDOG_S)
    session.after_step.callback(over.set)
    interrupt(session, restart=True)
    helper.start()


def ask_for_sigio(session: Session) -> None:
    """Ask for SIGIO on file a, directed to this thread: a test process has others, which do not block it."""
    fd = session.files["a"].fileno()
    previous = signal.signal(signal.SIGIO, lambda _number, _frame: None)
    session.after_scenario.callback(signal.signal, signal.SIGIO, previous)
    mask = signal.pthread_sigmask(signal.SIG_BLOCK, [signal.SIGIO])
    session.after_scenario.callback(signal.pthread_sigmask, signal.SIG_SETMASK, mask)
    session.after_scenario.callback(discard_sigio)
    fcntl.fcntl(fd, F_SETOWN_EX, struct.pack("=ii", F_OWNER_TID, threading.get_native_id()))
    fcntl.fcntl(fd, fcntl.F_SETFL, fcntl.fcntl(fd, fcntl.F_GETFL) | os.O_ASYNC)


def discard_sigio() -> None:
    """Take a SIGIO that is still pending."""
    with contextlib.suppress(InterruptedError):
        signal.sigtimedwait([signal.SIGIO], 0)


# Tables -------------------------------------------------------------------------------------------


def fact(name: str) -> Call:
    """Return a call that gives what an earlier step has noted."""
    return lambda session, step: Answer(ret=None, info=session.facts.get(name))


def call_woken_by_notify(session: Session, step: Step) -> Answer:
    """Say whether the poll before this step ended before its time-out."""
    return Answer(ret=None, info=session.elapsed_s < ARRIVAL_TIMEOUT_S * 0.9)


def call_saw_error_at(session: Session, step: Step) -> Answer:
    """Say whether the poll before this step ended with its time-out of 1500 ms or earlier."""
    return Answer(ret=None, info="timeout" if session.elapsed_s > 1.5 * 0.95 else "event")


HIDDEN_CALLS: dict[str, Call] = {
    "PAIRS": call_pairs,
    "ADVANCE": call_advance,
    "fill_ring": call_fill_ring,
    "fill_100": call_fill_100,
    "entries_read": call_entries_read,
    "cycles": call_cycles,
    "same_port_number_each_cycle": fact("same_port"),
    "handler_runs": fact("handler_runs"),
    "child_status": fact("child_status"),
    "woken_by_notify": call_woken_by_notify,
    "poll_for_error_only_saw_it_at": call_saw_error_at,
    "both_blocked": call_both_blocked,
    "readers_returned": call_readers_returned,
    "bytes": call_bytes,
    "data_of_both": call_data_of_both,
    "still_blocked_after_close": call_still_blocked,
    "reader_done": call_reader_done,
    "thread_read": call_thread_read,
}

BEFORE: dict[tuple[str, int], Callable[[Session], object]] = {
    ("blocking_poll", 4): lambda s: notify_when_blocked(s, s.files["b"], s.pairs[0][1]),
    ("blocking_poll", 9): lambda s: notify_when_blocked(s, s.files["b"], s.pairs[0][1]),
    ("close_while_blocked", 7): lambda s: start_reader(s, "t1"),
    ("eintr", 6): interrupt_call,
    ("eintr", 11): interrupt_call,
    ("eintr", 13): interrupt_and_restart,
}
