# SPDX-License-Identifier: Apache-2.0
"""The filter: which system calls of a program are handed to the front end, as a classic BPF program.

A filter sees numbers, neither paths nor what a descriptor is. So it lets through whatever the injected socket answers as the
device would (reads and writes of whole ports, poll, dup), and hands over the rest: opens, ioctls, transfers whose length the
device would round down, and what asks for edges: O_ASYNC and epoll_ctl. Pure: bytes out, nothing is installed here.
"""

from __future__ import annotations

import errno
import platform
import struct
from collections.abc import Iterable
from dataclasses import dataclass

ALLOW, NOTIFY = 0x7FFF0000, 0x7FC00000
LOAD, JUMP_EQUAL, JUMP_ABOVE, JUMP_AT_LEAST, JUMP_BITS, RETURN = 0x20, 0x15, 0x25, 0x35, 0x45, 0x06
AT_NUMBER, AT_ARCHITECTURE, AT_ARGUMENTS = 0, 4, 16
_ANSWERED_BY_THE_VFS = (  # no driver ever sees them
    0x5421, 0x5450, 0x5451, 0x5460,  # FIONBIO, FIONCLEX, FIOCLEX, FIOQSIZE
    0x2, 0xC020660B, 0x40049409, 0x4020940D, 0xC0189436,  # FIGETBSZ, FS_IOC_FIEMAP, FICLONE, FICLONERANGE, FIDEDUPERANGE
)  # fmt: skip
FIOASYNC, F_SETFL, O_ASYNC = 0x5452, 4, 0x2000
PORT_BYTES = 4
TRANSFER_BYTES_MAX = 4096  # a page: what a longer write is cut to (A5.2)


@dataclass(frozen=True)
class Architecture:
    """The audit number of a machine, and the numbers of the system calls that matter; None for one that it has not."""

    audit: int
    read: int
    write: int
    ioctl: int
    readv: int
    writev: int
    openat: int
    openat2: int
    open: int | None = None
    creat: int | None = None
    seccomp: int = 0
    fcntl: int = 0
    epoll_ctl: int = 0
    pidfd_getfd: int = 438
    pidfd_open: int = 434


ARCHITECTURES = {
    "x86_64": Architecture(0xC000003E, 0, 1, 16, 19, 20, 257, 437, 2, 85, seccomp=317, fcntl=72, epoll_ctl=233),
    "aarch64": Architecture(0xC00000B7, 63, 64, 29, 65, 66, 56, 437, seccomp=277, fcntl=25, epoll_ctl=21),
}


def here() -> Architecture:
    """Give this machine's numbers. OSError ENOSYS where the front end has none."""
    found = ARCHITECTURES.get(platform.machine())
    if found is None:
        raise OSError(errno.ENOSYS, f"the seccomp front end knows x86_64 and aarch64, not {platform.machine()}")
    return found


def instruction(code: int, value: int, then: int = 0, otherwise: int = 0) -> bytes:
    """Assemble one; a jump skips as many as `then` or `otherwise` says."""
    return struct.pack("=HBBI", code, then, otherwise, value)


def for_call(number: int, body: Iterable[bytes]) -> list[bytes]:
    """If the call's number (in the accumulator) is this one, `body` decides; it must return in every case."""
    steps = list(body)
    return [instruction(JUMP_EQUAL, number, 0, len(steps)), *steps]


def program(machine: Architecture) -> bytes:
    """Assemble the filter. Calls of another architecture (32-bit programs) are let through."""
    notify, allow = instruction(RETURN, NOTIFY), instruction(RETURN, ALLOW)
    length = instruction(LOAD, AT_ARGUMENTS + 2 * 8)
    broken = PORT_BYTES - 1  # the bits of a length that is no whole number of ports
    # A longer read than a page is whole as well: no more than a page lies in the socket.
    read = [length, instruction(JUMP_BITS, broken, 0, 1), notify, allow]
    write = [length, instruction(JUMP_BITS, broken, 1, 0), instruction(JUMP_ABOVE, TRANSFER_BYTES_MAX, 0, 1), notify, allow]
    request = [instruction(LOAD, AT_ARGUMENTS + 8)]
    for index, known in enumerate(_ANSWERED_BY_THE_VFS):
        request.append(instruction(JUMP_EQUAL, known, len(_ANSWERED_BY_THE_VFS) - index))
    ioctl = [*request, notify, allow]
    fcntl = [
        instruction(LOAD, AT_ARGUMENTS + 8), instruction(JUMP_EQUAL, F_SETFL, 0, 3),
        length, instruction(JUMP_BITS, O_ASYNC, 0, 1), notify, allow,
    ]  # fmt: skip
    steps = [
        instruction(LOAD, AT_ARCHITECTURE),
        instruction(JUMP_EQUAL, machine.audit, 1, 0),
        allow,
        instruction(LOAD, AT_NUMBER),
        *for_call(machine.read, read),  # the commonest first
        *for_call(machine.write, write),
        *for_call(machine.ioctl, ioctl),
        *for_call(machine.fcntl, fcntl),
    ]
    always = machine.openat, machine.open, machine.openat2, machine.creat, machine.readv, machine.writev, machine.epoll_ctl
    for number in always:
        if number is not None:
            steps += for_call(number, [notify])
    return b"".join([*steps, allow])
