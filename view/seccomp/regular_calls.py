# SPDX-License-Identifier: Apache-2.0
"""The filter over the FUSE file: which calls are handed over because the kernel answers them by itself for a regular file.

Such a call never becomes a request of FUSE, or not one with all that is needed to answer it. All of them are rare: the calls on
the path of an event (read, write, poll, the device's own ioctls) are let through, and so is what every program does when it
starts. Mappings with MAP_DENYWRITE, which means nothing but is how the dynamic loader maps libraries, are among those. Pure:
bytes out, nothing is installed here.
"""

from __future__ import annotations

import platform
from dataclasses import dataclass

from pvbus.view.seccomp.bpf import (
    ALLOW,
    AT_ARCHITECTURE,
    AT_ARGUMENTS,
    AT_NUMBER,
    F_SETFL,
    FIOASYNC,
    JUMP_AT_LEAST,
    JUMP_BITS,
    JUMP_EQUAL,
    LOAD,
    NOTIFY,
    RETURN,
    for_call,
    instruction,
)

O_DIRECT = {"x86_64": 0x4000, "aarch64": 0x10000}.get(platform.machine(), 0)
F_GETFL, F_SETOWN, F_SETSIG, F_SETOWN_EX, F_SETLEASE = 3, 8, 10, 15, 1024
FIBMAP, FIONREAD, FIOQSIZE = 1, 0x541B, 0x5460
FICLONE, FICLONERANGE, FIDEDUPERANGE = 0x40049409, 0x4020940D, 0xC0189436
HAS_A_STRUCTURE = 0xC0000000
"""Bits of an ioctl's number that say so: FUSE fetches it before it asks."""
NOT_MAPPED_PRIVATELY = 0x1 | 0x20 | 0x800  # MAP_SHARED and MAP_SHARED_VALIDATE; MAP_ANONYMOUS; MAP_DENYWRITE
LOW = 0x10000  # nothing is mapped below, on any machine as it is set up
STANDARD_FDS = 3
SHORT = 4  # bytes of a port
_ALLOW, _NOTIFY = instruction(RETURN, ALLOW), instruction(RETURN, NOTIFY)


@dataclass(frozen=True)
class Abi:
    """A way in which programs of this machine make system calls: its audit number, and the numbers of those that matter.

    `halves` is true where an offset or a length takes two arguments, the low half first.
    """

    audit: int
    read: int
    write: int
    mmap: int
    ioctl: int
    fcntl: tuple[int, ...]
    fallocate: int
    readahead: int
    sync_file_range: int
    copy_file_range: int
    io_submit: int
    halves: bool = False


X86_64 = Abi(0xC000003E, 0, 1, 9, 16, (72,), 285, 187, 277, 326, 209)
I386 = Abi(0x40000003, 3, 4, 192, 54, (55, 221), 324, 225, 314, 377, 248, halves=True)
AARCH64 = Abi(0xC00000B7, 63, 64, 222, 29, (25,), 47, 213, 84, 285, 2)
ABIS = {"x86_64": (X86_64, I386), "aarch64": (AARCH64,)}


def here() -> tuple[Abi, ...]:
    """Give this machine's; none where they are not known."""
    return ABIS.get(platform.machine(), ())


def program(abis: tuple[Abi, ...]) -> bytes:
    """Assemble the filter. What is made in another way than these is let through."""
    steps = [instruction(LOAD, AT_ARCHITECTURE)]
    for abi in abis:
        body = [instruction(LOAD, AT_NUMBER), *_body(abi), _ALLOW]
        steps += [instruction(JUMP_EQUAL, abi.audit, 0, len(body)), *body]
    return b"".join([*steps, _ALLOW])


def _low(index: int) -> bytes:
    return instruction(LOAD, AT_ARGUMENTS + 8 * index)


def _high(index: int) -> bytes:
    return instruction(LOAD, AT_ARGUMENTS + 8 * index + 4)


def _one_of(words: tuple[int, ...]) -> list[bytes]:
    """Skip one instruction more, behind these, if the word that is loaded is one of them."""
    return [instruction(JUMP_EQUAL, word, len(words) - at, 0) for at, word in enumerate(words)]


def _body(abi: Abi) -> list[bytes]:
    """Decide about the call whose number is loaded; what falls through is let through."""
    transfer = [  # to or from an address where nothing is; of less than a port, where nothing usual does such a thing
        _high(1), instruction(JUMP_EQUAL, 0, 0, 3), _low(1), instruction(JUMP_AT_LEAST, LOW, 1, 0), _NOTIFY,
        _low(2), instruction(JUMP_AT_LEAST, SHORT, 4, 0), instruction(JUMP_EQUAL, 0, 3, 0),
        _low(0), instruction(JUMP_AT_LEAST, STANDARD_FDS, 0, 1), _NOTIFY, _ALLOW,
    ]  # fmt: skip
    mapping = [_low(3), instruction(JUMP_BITS, NOT_MAPPED_PRIVATELY, 1, 0), _NOTIFY, _ALLOW]
    single = (FIBMAP, FIONREAD, FIOQSIZE, FIOASYNC)
    request = [_low(1), instruction(JUMP_BITS, HAS_A_STRUCTURE, len(single) + 1, 0)]
    request += [*_one_of(single), _ALLOW, _NOTIFY]
    control = [_low(1), *_one_of((F_GETFL, F_SETFL, F_SETOWN, F_SETSIG, F_SETOWN_EX, F_SETLEASE)), _ALLOW, _NOTIFY]
    steps: list[bytes] = []
    for numbers, decision in (
        ((abi.read, abi.write), transfer), ((abi.mmap,), mapping), ((abi.ioctl,), request), (abi.fcntl, control),
        ((abi.fallocate, abi.readahead, abi.sync_file_range, abi.copy_file_range, abi.io_submit), [_NOTIFY]),
    ):  # fmt: skip
        for number in numbers:
            steps += for_call(number, decision)
    return steps
