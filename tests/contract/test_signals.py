# SPDX-License-Identifier: Apache-2.0
"""A12: signals during blocked calls, and SIGIO."""

import contextlib
import ctypes
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

from pvbus.tests.contract.support import WAIT_S_MAX, InThread, Pair, asleep, bound, connect, connect_many, errno_of, pack
from pvbus.tests.golden.children import Child
from pvbus.tests.golden.session import Answer, Session, Step, signals_seen

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

    caller, returned, slept_on = threading.get_native_id(), threading.Event(), threading.Event()
    with handled(signal.SIGUSR1, restart=True) as ran, signals_seen() as seen:

        def interrupt_then_notify() -> None:
            signal.pthread_kill(main, signal.SIGUSR1)
            if seen(WAIT_S_MAX) and asleep(caller, returned.is_set):
                slept_on.set()
            pair.tx.notify(pair.tx_port)

        with once_asleep(interrupt_then_notify):
            data = pair.rx.read(4096)
            returned.set()

        assert (ran.is_set(), slept_on.is_set()) == (True, True)
    assert data == pack(pair.rx_port)


@pytest.mark.checklist("A12.3", "A12.10")
def test_a_signal_in_a_later_segment_of_readv_gives_what_came_before(machine: Any, opened: Opened) -> None:
    pair = connect(machine, opened(nonblock=False), opened())
    pair.send()
    main = threading.main_thread().ident
    assert main is not None
    segments = [bytearray(4), bytearray(4)]

    with handled(signal.SIGUSR1) as ran:
        with once_asleep(lambda: signal.pthread_kill(main, signal.SIGUSR1)):
            count = pair.rx.readv(segments)
        with once_asleep(lambda: signal.pthread_kill(main, signal.SIGUSR1)):
            refused = errno_of(pair.rx.readv, segments)

        assert ran.is_set()
    assert (count, refused) == (4, "EINTR")
    assert bytes(segments[0]) == pack(pair.rx_port)


@pytest.mark.checklist("A12.10")
def test_a_handler_that_raises_ends_a_blocked_read_and_no_event_is_lost(machine: Any, opened: Opened) -> None:
    pair = connect(machine, opened(nonblock=False), opened())
    main = threading.main_thread().ident
    assert main is not None

    def handler(_number: int, _frame: FrameType | None) -> None:
        raise InterruptedHereError

    previous = signal.signal(signal.SIGUSR1, handler)
    try:
        with once_asleep(lambda: signal.pthread_kill(main, signal.SIGUSR1)), pytest.raises(InterruptedHereError):
            pair.rx.read(4096)
    finally:
        signal.signal(signal.SIGUSR1, previous)

    pair.send()
    assert pair.rx.read(4096) == pack(pair.rx_port)


class InterruptedHereError(Exception):
    """What a handler of ours raises."""


@pytest.mark.checklist("A12.10", "A12.8")
def test_a_signal_ends_a_read_of_a_file_that_was_closed_meanwhile_and_releases_it(machine: Any, opened: Opened) -> None:
    pair = connect(machine, opened(nonblock=False), opened())
    main = threading.main_thread().ident
    assert main is not None

    def close_then_interrupt() -> None:
        pair.rx.close()
        signal.pthread_kill(main, signal.SIGUSR1)

    with handled(signal.SIGUSR1), once_asleep(close_then_interrupt):
        answer = errno_of(pair.rx.read, 4096)

    assert answer == "EINTR"
    assert pair.rx_port not in bound(machine)


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


@contextlib.contextmanager
def signalfd(number: int) -> Iterator[int]:
    """Give a descriptor that a blocked signal can be read from: unlike Python's sigtimedwait, it tells the descriptor."""
    libc = ctypes.CDLL(None, use_errno=True)
    mask = (ctypes.c_ulong * 16)(1 << (number - 1))
    fd = libc.signalfd(-1, mask, os.O_NONBLOCK | os.O_CLOEXEC)
    assert fd >= 0
    try:
        yield fd
    finally:
        os.close(fd)


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


@pytest.mark.checklist("A12.11")
def test_a_signal_of_ones_own_choice_names_the_descriptor_and_each_has_its_own(machine: Any, opened: Opened) -> None:
    rx, tx = opened(), opened()
    first, second = connect(machine, rx, tx), connect(machine, opened(), tx)
    number = signal.SIGRTMIN + 3
    seen = []
    with sigio(first.rx, number, set_signal=True), sigio(second.rx, number, set_signal=True), signalfd(number) as fd:
        for pair in (second, first):
            pair.send()
            assert select.select([fd], [], [], WAIT_S_MAX)[0]
            info = struct.unpack("=IiiIIiII", os.read(fd, 128)[:32])
            seen.append((info[0], info[2], info[5], info[7]))

    assert seen == [(number, POLL_IN, pair.rx.fileno(), select.POLLIN | select.POLLRDNORM) for pair in (second, first)]


@pytest.mark.checklist("A12.11", "A10.2")
def test_the_owner_can_be_another_thread(machine: Any, opened: Opened) -> None:
    pair = connect(machine, opened(), opened())
    with sigio(pair.rx):
        waiter = InThread(lambda: code_of(signal.SIGIO))  # it inherits the mask
        assert waiter.sleeps()
        fcntl.fcntl(pair.rx.fileno(), F_SETOWN_EX, struct.pack("=ii", F_OWNER_TID, waiter.native_id))
        pair.send()

        assert waiter.result() == SI_KERNEL
        assert code_of(signal.SIGIO, 0) is None


@pytest.mark.checklist("A12.11", "A12.7")
def test_the_owner_can_be_another_process(machine: Any, opened: Opened) -> None:
    pair = connect(machine, opened(), opened())
    step = Step("contract", 1, "fork", "exact", "call", "", {}, {})
    with sigio(pair.rx):
        child = Child(Session(machine, 1), [step], lambda _session, _step: Answer(ret=code_of(signal.SIGIO)))
        try:
            fcntl.fcntl(pair.rx.fileno(), fcntl.F_SETOWN, child.pid)
            pair.send()

            assert child.make(step).ret == SI_KERNEL
            assert code_of(signal.SIGIO, 0) is None
        finally:
            assert child.reap() == 0


@pytest.mark.checklist("A12.11", "A12.7")
def test_o_async_belongs_to_the_open_file_whoever_sets_it(machine: Any, opened: Opened) -> None:
    pair = connect(machine, opened(), opened())
    with contextlib.closing(pair.rx.dup()) as other, sigio(other):
        assert fcntl.fcntl(pair.rx.fileno(), fcntl.F_GETFL) & os.O_ASYNC
        pair.send()
        assert code_of(signal.SIGIO) == SI_KERNEL
