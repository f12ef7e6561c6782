# SPDX-License-Identifier: Apache-2.0
"""A12: signals during blocked calls, and SIGIO."""

import contextlib
import fcntl
import os
import select
import signal
import struct
import threading
from collections.abc import Callable, Iterator
from types import FrameType
from typing import Any

import pytest

from pvbus.tests.contract.support import WAIT_S_MAX, Pair, asleep, connect, connect_many, errno_of, pack

Opened = Callable[..., Any]

F_SETOWN_EX = 15  # linux/fcntl.h; not in Python's fcntl
F_SETSIG = 10
F_OWNER_TID = 0
SI_KERNEL = 0x80
POLL_IN = 1
QUIET_S = 0.05  # how long a signal that must not come is waited for, once the machine is idle


@contextlib.contextmanager
def handled(number: int, *, restart: bool = False) -> Iterator[threading.Event]:
    """Handle a signal with a function that sets the yielded event."""
    ran = threading.Event()

    def handler(_number: int, _frame: FrameType | None) -> None:
        ran.set()

    previous = signal.signal(number, handler)
    signal.siginterrupt(number, not restart)
    try:
        yield ran
    finally:
        signal.signal(number, previous)


@contextlib.contextmanager
def once_asleep(action: Callable[[], object]) -> Iterator[None]:
    """Do something in another thread as soon as this one sleeps in its call."""
    caller, over = threading.get_native_id(), threading.Event()

    def run() -> None:
        if asleep(caller, over.is_set):
            action()

    helper = threading.Thread(target=run, daemon=True)
    helper.start()
    try:
        yield
    finally:
        over.set()
        helper.join(WAIT_S_MAX)


@pytest.mark.checklist("A12.10", "A4.7")
def test_a_signal_ends_a_blocked_read_with_eintr_and_no_event_is_lost(machine: Any, opened: Opened) -> None:
    pair = connect(machine, opened(nonblock=False), opened())
    main = threading.main_thread().ident
    assert main is not None

    with handled(signal.SIGUSR1) as ran:
        with once_asleep(lambda: signal.pthread_kill(main, signal.SIGUSR1)):
            answer = errno_of(pair.rx.read, 4096)

        assert (answer, ran.is_set()) == ("EINTR", True)
    pair.send()
    assert pair.rx.read(4096) == pack(pair.rx_port)


@pytest.mark.checklist("A12.10")
def test_a_signal_ends_a_sleeping_poll_with_eintr(machine: Any, opened: Opened) -> None:
    pair = connect(machine, opened(), opened())
    main = threading.main_thread().ident
    assert main is not None

    with handled(signal.SIGUSR1), once_asleep(lambda: signal.pthread_kill(main, signal.SIGUSR1)):
        answer = errno_of(pair.rx.poll, select.POLLIN, timeout_ms=5000)

    assert answer == "EINTR"


@pytest.mark.checklist("A12.10")
def test_a_read_goes_on_after_a_signal_under_sa_restart(machine: Any, opened: Opened) -> None:
    pair = connect(machine, opened(nonblock=False), opened())
    main = threading.main_thread().ident
    assert main is not None

    with handled(signal.SIGUSR1, restart=True) as ran:

        def interrupt_then_notify() -> None:
            signal.pthread_kill(main, signal.SIGUSR1)
            ran.wait(WAIT_S_MAX)
            pair.tx.notify(pair.tx_port)

        with once_asleep(interrupt_then_notify):
            data = pair.rx.read(4096)

        assert ran.is_set()
    assert data == pack(pair.rx_port)


@contextlib.contextmanager
def sigio(file: Any, number: int = signal.SIGIO, *, set_signal: bool = False) -> Iterator[None]:
    """Ask for SIGIO, or another signal, on a file: blocked, and directed to this thread."""
    previous = signal.signal(number, lambda _number, _frame: None)
    mask = signal.pthread_sigmask(signal.SIG_BLOCK, [number])
    fd = file.fileno()
    try:
        fcntl.fcntl(fd, F_SETOWN_EX, struct.pack("=ii", F_OWNER_TID, threading.get_native_id()))
        if set_signal:
            fcntl.fcntl(fd, F_SETSIG, number)
        fcntl.fcntl(fd, fcntl.F_SETFL, fcntl.fcntl(fd, fcntl.F_GETFL) | os.O_ASYNC)
        yield
        fcntl.fcntl(fd, fcntl.F_SETFL, fcntl.fcntl(fd, fcntl.F_GETFL) & ~os.O_ASYNC)
    finally:
        while signal.sigtimedwait([number], 0) is not None:
            pass
        signal.pthread_sigmask(signal.SIG_SETMASK, mask)
        signal.signal(number, previous)


def code_of(number: int, timeout_s: float = WAIT_S_MAX) -> int | None:
    """Wait for a signal and give its si_code; None if it does not come."""
    info = signal.sigtimedwait([number], timeout_s)
    return info.si_code if info is not None else None


@pytest.mark.checklist("A12.11", "A10.2", "A3.5", "X10c")
def test_sigio_comes_once_when_an_empty_ring_gets_entries(machine: Any, opened: Opened) -> None:
    rx, tx = opened(), opened()
    first, second = connect_many(machine, rx, tx, 2)
    with sigio(rx):
        first.send()
        codes = [code_of(signal.SIGIO), code_of(signal.SIGIO, QUIET_S)]
        second.send()
        codes.append(code_of(signal.SIGIO, QUIET_S))
        rx.read(4096)
        machine.settle()
        codes.append(code_of(signal.SIGIO, QUIET_S))
        first.enable()
        first.send()
        codes.append(code_of(signal.SIGIO))

    assert codes == [SI_KERNEL, None, None, None, SI_KERNEL]


@pytest.mark.checklist("A12.11", "A12.6")
def test_an_overflow_sends_no_sigio_and_a_reset_arms_it_again(machine: Any, opened: Opened) -> None:
    pair = connect(machine, opened(), opened())
    with sigio(pair.rx):
        pair.queue(64)
        codes = [code_of(signal.SIGIO), code_of(signal.SIGIO, QUIET_S)]
        pair.send()
        codes.append(code_of(signal.SIGIO, QUIET_S))
        pair.rx.reset()
        pair.enable()
        codes.append(code_of(signal.SIGIO, QUIET_S))
        pair.send()
        codes.append(code_of(signal.SIGIO))

    assert codes == [SI_KERNEL, None, None, None, SI_KERNEL]


@pytest.mark.checklist("A12.11", "X10c")
def test_a_signal_of_ones_own_choice_says_what_happened(machine: Any, opened: Opened) -> None:
    pair = connect(machine, opened(), opened())
    number = signal.SIGRTMIN + 3
    with sigio(pair.rx, number, set_signal=True):
        pair.send()
        info = signal.sigtimedwait([number], WAIT_S_MAX)

    assert info is not None
    assert info.si_code == POLL_IN
    assert info.si_band == select.POLLIN | select.POLLRDNORM


@pytest.mark.checklist("A10.2", "A12.11", "X10c")
def test_no_sigio_comes_once_it_is_switched_off(machine: Any, opened: Opened) -> None:
    pair: Pair = connect(machine, opened(), opened())
    with sigio(pair.rx):
        pair.send()
        assert code_of(signal.SIGIO) == SI_KERNEL
        pair.rx.read(4096)
        pair.rx.write(pack(pair.rx_port))
        fd = pair.rx.fileno()
        fcntl.fcntl(fd, fcntl.F_SETFL, fcntl.fcntl(fd, fcntl.F_GETFL) & ~os.O_ASYNC)

        pair.send()

        assert code_of(signal.SIGIO, QUIET_S) is None
