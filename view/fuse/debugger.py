# SPDX-License-Identifier: Apache-2.0
"""Answer a caller so that its call gives what FUSE has no answer for: as its debugger, on its way out of the kernel.

On x86-64 a thread that comes out of a call goes this way: first a debugger has its look, then a signal is taken from the queue,
and only then it is seen, in the register for the call's value, whether the call is to begin again. So we become the caller's
debugger before we answer, ask it to stop on its way out, mend what the call has given, and let go; all else is the kernel's own
doing. A caller that cannot be traced gets FUSE's own answer: who has another debugger, or is a thread of the kernel's for
io_uring; and so does everybody on a processor that decides before the look (aarch64).

A debugger is a thread. Each caller has one of its own, for a fraction of a millisecond, since what it waits for may take long:
the caller's stop, and PTRACE_SEIZE, which waits while another thread of the caller's process is in exec, which waits for the
caller's end, which waits for our answer. So the loop looks at those that have no answer yet. If a debugger ends, by SIGKILL for
example, the kernel lets go of the caller.
"""

from __future__ import annotations

import contextlib
import ctypes
import os
import platform
import signal
import struct
import threading
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from pvbus.actors.runtime.inbox import Inbox
    from pvbus.view.fuse.request import Request

CAN_MEND = platform.machine() == "x86_64"
"""Whether it can be done on this processor."""
TRACED_MAX = 64  # at once: a thread for each
LOOK_NS = 10_000_000  # PTRACE_SEIZE takes a few microseconds, unless an exec is under way
SEIZE_NS_MAX = 1_000_000_000
_PEEKUSER, _POKEUSER, _DETACH, _SEIZE, _INTERRUPT = 3, 6, 17, 0x4206, 0x4207
_GET_CALL_INFO, _CALL_INFO, _AUDIT_I386 = 0x420E, struct.Struct("=4xI"), 0x40000003  # as far as it tells of every stop
_VALUE_AT, _CALL_AT = 10 * 8, 15 * 8  # rax and orig_rax in struct user
_ARGUMENTS_AT = tuple(at * 8 for at in (14, 13, 12, 7, 9, 8))  # rdi, rsi, rdx, r10, r8, r9
_ARGUMENTS_32_AT = tuple(at * 8 for at in (5, 11, 12, 13, 14, 4))  # rbx, rcx, rdx, rsi, rdi, rbp
_WALL = 0x40000000  # threads, too
_KILL = 1 << (signal.SIGKILL - 1)
_waiting_ptrace = ctypes.CDLL(None).ptrace
_ptrace = ctypes.PyDLL(None, use_errno=True).ptrace  # keeps the interpreter's lock
for _function in (_waiting_ptrace, _ptrace):
    _function.restype = ctypes.c_long
    _function.argtypes = (ctypes.c_long, ctypes.c_long, ctypes.c_void_p, ctypes.c_void_p)


class Leaving:
    """A thread that has made its call and has stopped on its way out."""

    def __init__(self, thread: int) -> None:
        self.thread = thread
        info = ctypes.create_string_buffer(_CALL_INFO.size)
        if _ptrace(_GET_CALL_INFO, thread, _CALL_INFO.size, ctypes.addressof(info)) < 0:
            raise ProcessLookupError(ctypes.get_errno(), f"thread {thread}")
        self.is_32: bool = _CALL_INFO.unpack(info.raw)[0] == _AUDIT_I386
        """Whether its call is one of 32-bit programs; a 64-bit one can make those, too, by `int 0x80`."""
        self.call = self._register(_CALL_AT)
        """The number of the call; which of 64-bit or of 32-bit programs, `is_32` tells. -1 if it is in none."""
        self.value = ctypes.c_int(self._register(_VALUE_AT)).value
        """What the call gives, or an errno below zero."""

    def _register(self, at: int) -> int:
        """Give a register. ProcessLookupError: it has been killed meanwhile."""
        ctypes.set_errno(0)
        value = int(_ptrace(_PEEKUSER, self.thread, at, None))
        if value == -1 and ctypes.get_errno():
            raise ProcessLookupError(ctypes.get_errno(), f"thread {self.thread}")
        return value

    def argument(self, index: int) -> int:
        """Give an argument of the call, the first by 0. ProcessLookupError."""
        if self.is_32:
            return self._register(_ARGUMENTS_32_AT[index]) & 0xFFFFFFFF
        return self._register(_ARGUMENTS_AT[index]) & (1 << 64) - 1

    def give(self, value: int) -> None:
        """Have the call give something else."""
        _ptrace(_POKEUSER, self.thread, _VALUE_AT, value)


Mend = Callable[[Leaving], None]


class Debuggers:
    """Sees callers out, for one loop, that of `inbox`; answers come from any thread, but each once."""

    def __init__(self, inbox: Inbox, traced_max: int = TRACED_MAX) -> None:
        self.inbox = inbox
        self._due: dict[Request, tuple[int, Callable[[], None]]] = {}
        self._looks = False
        self._free = threading.Semaphore(traced_max)

    def see_out(self, request: Request, answer: Callable[[], None], mend: Mend) -> None:
        """Have a request that is kept answered, soon, and what its call gives mended, if that can be done."""
        if not CAN_MEND or not self._free.acquire(blocking=False):
            answer()
            return
        self._due[request] = self.inbox.clock.now_ns() + SEIZE_NS_MAX, answer
        self._look_later()
        try:
            threading.Thread(target=self._trace, args=(request, mend), name="pvbus-debugger", daemon=True).start()
        except RuntimeError:  # there are no more threads to be had
            self._free.release()
            self._answer(request)

    def _answer(self, request: Request) -> None:
        due = self._due.pop(request, None)
        if due is not None:
            due[1]()

    def _trace(self, request: Request, mend: Mend) -> None:
        """Be the debugger of the thread that has asked. (In a thread, whose end is the end of that.)"""
        try:
            seized = _waiting_ptrace(_SEIZE, request.pid, None, None) == 0
            if seized and request not in self._due:  # the loop has not waited for it
                return
            stops = seized and _ptrace(_INTERRUPT, request.pid, None, None) == 0
            self._answer(request)
            if stops:
                stopped(request.pid, mend)
        finally:
            self._free.release()

    def _look_later(self) -> None:
        if not self._looks:
            self._looks = True
            self.inbox.call_at(self.inbox.clock.now_ns() + LOOK_NS, self._look)

    def _look(self) -> None:
        """Answer who has been killed while its debugger was about to become that, and who has waited for too long."""
        now_ns = self.inbox.clock.now_ns()
        for request, (until_ns, _) in self._due.copy().items():
            if now_ns >= until_ns or is_dying(request.pid):
                self._answer(request)
        self._looks = False
        if self._due:
            self._look_later()


def is_dying(thread: int) -> bool:
    """Whether a thread has been killed, or is gone."""
    try:
        text = Path(f"/proc/{thread}/status").read_bytes()
    except OSError:
        return True
    return bool(int(text.partition(b"\nSigPnd:")[2].split(maxsplit=1)[0], 16) & _KILL)


def stopped(thread: int, mend: Mend) -> None:
    """Wait for the stop of a thread whose debugger we are, mend what its call gives, and let it go."""
    try:
        _, status = os.waitpid(thread, _WALL)
    except ChildProcessError:  # its number is that of another thread now, which has called exec
        return
    if not os.WIFSTOPPED(status):  # it has ended; who has forked it hears of that now
        return
    try:
        with contextlib.suppress(OSError):  # it has been killed meanwhile, or another thread has taken the memory away
            mend(Leaving(thread))
    finally:
        _ptrace(_DETACH, thread, None, None if status >> 16 else os.WSTOPSIG(status))  # a stop of ours, or before a signal
