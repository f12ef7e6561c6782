# SPDX-License-Identifier: Apache-2.0
"""Answer a read that a signal has interrupted so that the kernel goes on with it where it would with a driver's.

A driver says that its read may be begun again, and the kernel decides: it does so after a handler with SA_RESTART and where no
handler has run (SIGSTOP and SIGCONT), and gives EINTR after any other handler. FUSE takes no such answer, only EINTR. But on
x86-64 the kernel comes to decide in one go, on the reader's way out of its call: first a debugger has its look, then a signal is
taken from the queue, and only then does it see, in the register for the call's value, whether the call is to begin again. So we
become the reader's debugger before we answer, ask it to stop on its way out, put that value there in the place of EINTR, and let
go. All else is the kernel's own doing; begun again, the read is a new READ. A processor that decides before the look (aarch64)
leaves EINTR, and so does a reader that cannot be traced: who has another debugger, a kernel's thread for io_uring.

A debugger is a thread. Each reader has one of its own, for a few dozen microseconds, since both that it waits for may take
long: the reader's stop, and PTRACE_SEIZE itself, which waits while another thread of the reader's process is in exec, which waits
for the reader's end, which waits for our answer. So an answer is due after a while all the same. Requests are answered by the
loop alone. If a debugger ends, the kernel lets go of the reader for it.
"""

from __future__ import annotations

import ctypes
import errno
import functools
import os
import platform
import signal
import threading
from pathlib import Path
from typing import TYPE_CHECKING

from pvbus.view.fuse.caller import READ_CALLS

if TYPE_CHECKING:
    from pvbus.actors.runtime.clock import Timer
    from pvbus.actors.runtime.inbox import Inbox
    from pvbus.view.fuse.request import Request

RESTARTS = platform.machine() == "x86_64"
"""Whether it can be done on this processor."""
TRACED_MAX = 64  # at once: a thread for each
SEIZE_NS_MAX = 100_000_000  # it takes a few microseconds, unless an exec is under way
_ERESTARTSYS = 512  # the kernel's own word for it; no program ever sees it
_PEEKUSER, _POKEUSER, _DETACH, _SEIZE, _INTERRUPT = 3, 6, 17, 0x4206, 0x4207
_CALL_AT, _VALUE_AT = 15 * 8, 10 * 8  # orig_rax and rax in struct user
_WALL = 0x40000000
_KILL = 1 << (signal.SIGKILL - 1)
_ptrace = ctypes.CDLL(None, use_errno=True).ptrace
_ptrace.restype = ctypes.c_long
_ptrace.argtypes = (ctypes.c_long, ctypes.c_long, ctypes.c_void_p, ctypes.c_void_p)


class Restarts:
    """Answers the interrupted reads of one loop, that of `inbox`."""

    def __init__(self, inbox: Inbox) -> None:
        self.inbox = inbox
        self._due: dict[Request, Timer] = {}
        self._free = threading.Semaphore(TRACED_MAX)

    def interrupted(self, request: Request) -> None:
        """Answer a READ that waited and has been taken out of its queue: it ends, or begins again, as its signal wants it."""
        if not RESTARTS or is_dying(request.pid) or not self._free.acquire(blocking=False):
            request.fail(errno.EINTR)
            return
        answer = functools.partial(self._answer, request)
        self._due[request] = self.inbox.call_at(self.inbox.clock.now_ns() + SEIZE_NS_MAX, answer)
        threading.Thread(target=self._trace, args=(request, answer), name="pvbus-restart", daemon=True).start()

    def _answer(self, request: Request) -> None:
        timer = self._due.pop(request, None)
        if timer is not None:
            timer.cancel()
            request.fail(errno.EINTR)

    def _trace(self, request: Request, answer: functools.partial[None]) -> None:
        """Be the debugger of the thread that reads. (In a thread, whose end is the end of that.)"""
        try:
            seized = _ptrace(_SEIZE, request.pid, None, None) == 0 and request in self._due
            stops = seized and _ptrace(_INTERRUPT, request.pid, None, None) == 0
            self.inbox.call_soon(answer)
            if stops:
                mend(request.pid)
        finally:
            self._free.release()


def is_dying(thread: int) -> bool:
    """Whether a thread has been killed, or is gone: it has no use for an answer of ours but its end."""
    try:
        text = Path(f"/proc/{thread}/status").read_bytes()
    except OSError:
        return True
    return bool(int(text.partition(b"\nSigPnd:")[2].split(maxsplit=1)[0], 16) & _KILL)


def mend(thread: int) -> None:
    """Wait until a thread stops that is ours, have it begin its read again if that has ended with EINTR, and let it go."""
    try:
        _, status = os.waitpid(thread, _WALL)
    except ChildProcessError:  # another thread of its process has become its leader, in exec
        return
    if not os.WIFSTOPPED(status):  # it has ended; who has forked it hears of that now
        return
    value = ctypes.c_int(_ptrace(_PEEKUSER, thread, _VALUE_AT, None)).value  # of a 32-bit program, too
    if value == -errno.EINTR and _ptrace(_PEEKUSER, thread, _CALL_AT, None) in READ_CALLS:
        _ptrace(_POKEUSER, thread, _VALUE_AT, -_ERESTARTSYS)
    _ptrace(_DETACH, thread, None, None if status >> 16 else os.WSTOPSIG(status))  # a stop of ours, or before a signal
