# SPDX-License-Identifier: Apache-2.0
"""Answer a read that a signal has interrupted so that the kernel goes on with it where it would with a driver's.

A driver says that its read may be begun again, and the kernel decides: it does so after a handler with SA_RESTART and where no
handler has run (SIGSTOP and SIGCONT), and gives EINTR after any other handler. FUSE takes no such answer, only EINTR. But on
x86-64 the kernel decides in one go, on the reader's way out of its call: first a debugger has its look, then a signal is taken
from the queue, and only then it sees, in the register for the call's value, whether the call may begin again. So we become the
reader's debugger before we answer, ask it to stop on its way out, put that value there in the place of EINTR, and let go. All
else is the kernel's own doing; begun again, the read is a new READ. A processor that decides before the look (aarch64) leaves
EINTR, and so does a reader that cannot be traced: who has another debugger, a thread of the kernel's for io_uring.

A debugger is a thread. Each reader has one of its own, for a fraction of a millisecond, since what it waits for may take long:
the reader's stop, and PTRACE_SEIZE, which waits while another thread of the reader's process is in exec, which waits for the
reader's end, which waits for our answer. So the loop looks at those that have no answer yet. If a debugger ends, by SIGKILL for
example, the kernel lets go of the reader.
"""

from __future__ import annotations

import ctypes
import errno
import os
import platform
import signal
import threading
from pathlib import Path
from typing import TYPE_CHECKING

from pvbus.view.fuse.caller import READ_CALLS

if TYPE_CHECKING:
    from pvbus.actors.runtime.inbox import Inbox
    from pvbus.view.fuse.request import Request

RESTARTS = platform.machine() == "x86_64"
"""Whether it can be done on this processor."""
TRACED_MAX = 64  # at once: a thread for each
LOOK_NS = 10_000_000  # PTRACE_SEIZE takes a few microseconds, unless an exec is under way
SEIZE_NS_MAX = 1_000_000_000
_ERESTARTSYS = 512  # the kernel's own; no program ever sees it
_PEEKUSER, _POKEUSER, _DETACH, _SEIZE, _INTERRUPT = 3, 6, 17, 0x4206, 0x4207
_CALL_AT, _VALUE_AT = 15 * 8, 10 * 8  # orig_rax and rax in struct user
_WALL = 0x40000000  # threads, too
_KILL = 1 << (signal.SIGKILL - 1)
_waiting_ptrace, _ptrace = ctypes.CDLL(None).ptrace, ctypes.PyDLL(None).ptrace  # the second one keeps the interpreter's lock
for _function in (_waiting_ptrace, _ptrace):
    _function.restype = ctypes.c_long
    _function.argtypes = (ctypes.c_long, ctypes.c_long, ctypes.c_void_p, ctypes.c_void_p)


class Restarts:
    """Answers the interrupted reads of one loop, that of `inbox`; from any thread, but each once."""

    def __init__(self, inbox: Inbox, traced_max: int = TRACED_MAX) -> None:
        self.inbox = inbox
        self._due: dict[Request, int] = {}
        self._looks = False
        self._free = threading.Semaphore(traced_max)

    def interrupted(self, request: Request) -> None:
        """Answer a READ that waited and has been taken out of its queue: it ends, or begins again, as its signal wants it."""
        if not RESTARTS or not self._free.acquire(blocking=False):
            request.fail(errno.EINTR)
            return
        self._due[request] = self.inbox.clock.now_ns() + SEIZE_NS_MAX
        self._look_later()
        try:
            threading.Thread(target=self._trace, args=(request,), name="pvbus-restart", daemon=True).start()
        except RuntimeError:  # there are no more threads to be had
            self._free.release()
            self._answer(request)

    def _answer(self, request: Request) -> None:
        if self._due.pop(request, None) is not None:
            request.fail(errno.EINTR)

    def _trace(self, request: Request) -> None:
        """Be the debugger of the thread that reads. (In a thread, whose end is the end of that.)"""
        try:
            seized = _waiting_ptrace(_SEIZE, request.pid, None, None) == 0
            if seized and request not in self._due:  # the loop has not waited for it
                return
            stops = seized and _ptrace(_INTERRUPT, request.pid, None, None) == 0
            self._answer(request)
            if stops:
                mend(request.pid)
        finally:
            self._free.release()

    def _look_later(self) -> None:
        if not self._looks:
            self._looks = True
            self.inbox.call_at(self.inbox.clock.now_ns() + LOOK_NS, self._look)

    def _look(self) -> None:
        """Answer who has been killed while its debugger was about to become that, and who has waited for too long."""
        now_ns = self.inbox.clock.now_ns()
        for request, until_ns in self._due.copy().items():
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


def mend(thread: int) -> None:
    """Wait for the stop of a thread whose debugger we are, have it begin a read again that has given EINTR, and let it go."""
    try:
        _, status = os.waitpid(thread, _WALL)
    except ChildProcessError:  # its number is that of another thread now, which has called exec
        return
    if not os.WIFSTOPPED(status):  # it has ended; who has forked it hears of that now
        return
    value = ctypes.c_int(_ptrace(_PEEKUSER, thread, _VALUE_AT, None)).value  # of a 32-bit program, too
    if value == -errno.EINTR and _ptrace(_PEEKUSER, thread, _CALL_AT, None) in READ_CALLS:
        _ptrace(_POKEUSER, thread, _VALUE_AT, -_ERESTARTSYS)
    _ptrace(_DETACH, thread, None, None if status >> 16 else os.WSTOPSIG(status))  # a stop of ours, or before a signal
