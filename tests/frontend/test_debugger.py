# SPDX-License-Identifier: Apache-2.0
"""The look as a debugger: which kind of call it sees, and what becomes of it when its caller is killed under it."""

from __future__ import annotations

import ctypes
import os
import signal
import sys
from pathlib import Path

import pytest

from pvbus.tests.contract.support import wait_until
from pvbus.tests.frontend.support import client_32, not_shown, run
from pvbus.view.fuse.debugger import CAN_MEND, Leaving, stopped
from pvbus.view.pytest_plugin import BootedMachine

PTRACE_SEIZE, PTRACE_INTERRUPT = 0x4206, 0x4207
GATE = """
import ctypes, mmap, os
low = mmap.mmap(-1, 4096, mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS | 0x40, mmap.PROT_READ | mmap.PROT_WRITE | mmap.PROT_EXEC)
at = ctypes.addressof(ctypes.c_char.from_buffer(low))
low[1024:1040] = b"/dev/xen/evtchn\\0"
low[2072:2076] = (0o100644).to_bytes(4, "little")       # the mode, if a struct stat were at 2048
word = lambda value: value.to_bytes(4, "little")
code = b"\\x53\\xb8" + word(5) + b"\\xbb" + word(at + 1024) + b"\\x31\\xc9\\x31\\xd2\\xbe" + word(at + 2048)
low[:64] = (code + b"\\xcd\\x80\\x5b\\xc3").ljust(64, b"\\xcc")     # open by int 0x80: 5 is fstat for 64-bit programs
before = low[2048:4096]
os.close(0)
print(ctypes.CFUNCTYPE(ctypes.c_int)(at)(), low[2048:4096] == before)
"""


def test_a_32_bit_call_of_a_64_bit_program_is_not_taken_for_another_one(pvbus_shared_machine: BootedMachine) -> None:
    if not CAN_MEND:
        not_shown("calls by int 0x80", "this is no x86-64 processor")
    client_32()  # or it says why there are none

    done = run(sys.executable, "-c", GATE, name=pvbus_shared_machine.name)

    assert (done.returncode, done.stdout, done.stderr) == (0, "0 True\n", "")


def test_a_caller_that_is_killed_under_its_debugger_has_no_registers_and_disturbs_nobody() -> None:
    if not CAN_MEND:
        not_shown("a look as a debugger", "this is no x86-64 processor")
    caller = os.fork()
    if not caller:
        signal.pause()
        os._exit(1)
    library = ctypes.CDLL(None, use_errno=True)
    seen: list[str] = []

    def mend(leaving: Leaving) -> None:
        os.kill(caller, signal.SIGKILL)
        status = Path(f"/proc/{caller}/stat")
        wait_until(lambda: status.read_text().rpartition(")")[2].split()[0] == "Z", "it is dead")
        with pytest.raises(ProcessLookupError):
            leaving.argument(0)
        seen.append("no registers")
        leaving.argument(1)

    assert library.ptrace(PTRACE_SEIZE, caller, None, None) == 0
    assert library.ptrace(PTRACE_INTERRUPT, caller, None, None) == 0
    stopped(caller, mend)

    assert seen == ["no registers"]
    assert os.waitstatus_to_exitcode(os.waitpid(caller, 0)[1]) == -signal.SIGKILL
