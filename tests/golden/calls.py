# SPDX-License-Identifier: Apache-2.0
"""How each recorded call is made through the client.

Composite calls and steps that stand for something the recording does not show are in hidden.py.
"""

from __future__ import annotations

import fcntl
import mmap
import os
import re
import signal
import struct
import termios
from collections.abc import Callable
from typing import Any

from pvbus.tests.golden.session import (
    POLL_ALL,
    POLL_BITS,
    PORT_BYTES,
    Answer,
    Session,
    Step,
    attempt,
    pack,
    read_answer,
)

# size << 16 | 'E' << 8 | number
REQUESTS = {
    "BIND_VIRQ": 0x00044500,
    "BIND_INTERDOMAIN": 0x00084501,
    "BIND_UNBOUND_PORT": 0x00044502,
    "UNBIND": 0x00044503,
    "NOTIFY": 0x00044504,
    "RESET": 0x00004505,
    "RESTRICT_DOMID": 0x00024506,
    "BIND_STATIC": 0x00044507,
}
PORT_GIVING = {"BIND_VIRQ", "BIND_INTERDOMAIN", "BIND_UNBOUND_PORT"}
SI_KERNEL = 0x80


def call_open(session: Session, step: Step) -> Answer:
    """Open a file under the step's symbol."""
    words = step.args["flags"].split("|")
    mode = next(word for word in words if word != "O_NONBLOCK")
    flags = int(mode) if mode.isdigit() else getattr(os, mode)
    nonblock = "O_NONBLOCK" in words
    session.files[step.file] = session.machine.open_evtchn(domain=0, nonblock=nonblock, flags=flags)
    return Answer(ret="fd")


def call_close(session: Session, step: Step) -> Answer:
    """Close the file."""
    session.files.pop(step.file).close()
    return Answer()


def call_dup(session: Session, step: Step) -> Answer:
    """Make a second reference; the symbol of the new one is the recorded answer."""
    name = step.line["ret"]
    session.files[name] = session.file(step).dup()
    return Answer(ret=name)


def call_read(session: Session, step: Step) -> Answer:
    """Read, and keep what came for a later look at the buffer; into one that cannot be written for a bad pointer."""
    count = step.args["count"]
    if step.cmp == "efault":
        return Answer(ret=session.file(step).readinto(bytes(count)))
    answer = read_answer(session.file(step).read(count))
    session.last_read[step.file] = answer.data or []
    return answer


def call_buffer(session: Session, step: Step) -> Answer:
    """Look at the buffer of the last read."""
    return Answer(ret=None, data=session.last_read[step.file])


def call_write(session: Session, step: Step) -> Answer:
    """Write ports; "l" in the recording is the port last read from this file."""
    count = step.args["count"]
    if "ports" in step.args:
        data = pack(session.symbols.numbers(step.args["ports"]))
    elif count < PORT_BYTES:
        data = bytes(count)
    else:
        data = pack(session.last_read[step.file][-1:]) + bytes(count - PORT_BYTES)
    assert len(data) == count
    return Answer(ret=session.file(step).write(data))


def poll_mask(names: str) -> int:
    """Return the bits of "IN|OUT", of "ALL" and of ""."""
    if names == "ALL":
        return POLL_ALL
    return sum(POLL_BITS[name] for name in names.split("|") if name)


def call_poll(session: Session, step: Step) -> Answer:
    """Poll with the recorded time-out, which is a part of the answer, or with what stands for all of it."""
    events = poll_mask(step.args["events"])
    mask = session.file(step).poll(events, timeout_ms=session.timeout_ms(step))
    return Answer(ret=1 if mask else 0, poll=mask)


def call_ioctl(session: Session, step: Step) -> Answer:
    """Make one of the driver's eight ioctls, by its method, or by its number where the argument is NULL."""
    file, args, number = session.file(step), step.args, session.symbols.number
    if args.get("arg") == "NULL":
        return Answer(ret=file.ioctl(REQUESTS[step.call], None))
    methods: dict[str, Callable[[], int | None]] = {
        "BIND_VIRQ": lambda: file.bind_virq(args["virq"]),
        "BIND_INTERDOMAIN": lambda: file.bind_interdomain(args["remote_domain"], number(args["remote_port"])),
        "BIND_UNBOUND_PORT": lambda: file.bind_unbound_port(args["remote_domain"]),
        "UNBIND": lambda: file.unbind(number(args["port"])),
        "NOTIFY": lambda: file.notify(number(args["port"])),
        "RESET": lambda: file.reset(),  # noqa: PLW0108 (only for the request that is made)
        "RESTRICT_DOMID": lambda: file.restrict_domid(args["domid"]),
        "BIND_STATIC": lambda: file.bind_static(number(args["port"])),
    }
    value = methods[step.call]()
    # A method whose ioctl answers 0 may give None.
    return Answer(ret=value or 0, port=step.call in PORT_GIVING)


def call_raw_ioctl(session: Session, step: Step) -> Answer:
    """Make the same ioctl by its number, with the driver's structure."""
    args, number = step.args, session.symbols.number
    if step.call == "BIND_INTERDOMAIN":
        argument = struct.pack("=II", args["remote_domain"], number(args["remote_port"]))
    elif step.call == "RESTRICT_DOMID":
        argument = struct.pack("=H", args["domid"])
    elif step.call == "RESET":
        argument = b""
    else:
        value = next(args[name] for name in ("virq", "remote_domain", "port") if name in args)
        argument = struct.pack("=I", number(value))
    ret = session.file(step).ioctl(REQUESTS[step.call], bytearray(argument))
    return Answer(ret=ret, port=step.call in PORT_GIVING)


def call_notify_each(session: Session, step: Step) -> Answer:
    """Notify each port; where the recorder left a gap, wait until the event has arrived."""
    file = session.file(step)
    for port in session.symbols.numbers(step.args["ports"]):
        file.notify(port)
        session.machine.settle()
    return Answer()


def call_drain(session: Session, step: Step) -> Answer:
    """Read until the expected ports came, then until the machine is idle."""
    ports = session.drain(session.file(step), step.args["expect"])
    session.last_read[step.file] = ports
    return Answer(ret=len(ports), data=ports)


def call_sleep(session: Session, step: Step) -> Answer:
    """Where the recorder slept until all had arrived, wait until the machine is idle."""
    session.machine.settle()
    return Answer(ret=None)


def call_sigtimedwait(session: Session, step: Step) -> Answer:
    """Wait for SIGIO; EAGAIN at the time-out."""
    info = signal.sigtimedwait([signal.SIGIO], session.timeout_ms(step) / 1000)
    if info is None:
        return Answer(ret=-1, errno="EAGAIN")
    code = "SI_KERNEL" if info.si_code == SI_KERNEL else str(info.si_code)
    return Answer(ret="SIGIO", info={"si_code": code})


def call_isatty(session: Session, step: Step) -> Answer:
    """Ask for terminal attributes, which is how isatty asks."""
    return Answer(ret=session.file(step).ioctl(termios.TCGETS, bytearray(64)))


def _mmap(fd: int) -> int:
    mmap.mmap(fd, mmap.PAGESIZE, mmap.MAP_SHARED, mmap.PROT_READ).close()
    return 0


def _fstat(fd: int) -> int:
    os.fstat(fd)
    return 0


def _fionbio(fd: int, value: int) -> int:
    fcntl.ioctl(fd, termios.FIONBIO, struct.pack("=i", value))
    return 0


# What the kernel around the driver answers: asked of the descriptor itself.
ON_DESCRIPTOR: dict[str, Callable[[int], Any]] = {
    "lseek(0,SEEK_SET)": lambda fd: os.lseek(fd, 0, os.SEEK_SET),
    "lseek(0,SEEK_CUR)": lambda fd: os.lseek(fd, 0, os.SEEK_CUR),
    "lseek(0,SEEK_END)": lambda fd: os.lseek(fd, 0, os.SEEK_END),
    "pread(4,0)": lambda fd: len(os.pread(fd, 4, 0)),
    "pwrite(4,0)": lambda fd: os.pwrite(fd, bytes(4), 0),
    "mmap(READ)": _mmap,
    "ftruncate(0)": lambda fd: os.ftruncate(fd, 0),
    "fsync": os.fsync,
    "fstat": _fstat,
    "fcntl(F_GETFL)&(O_ACCMODE|O_NONBLOCK)": lambda fd: (
        fcntl.fcntl(fd, fcntl.F_GETFL) & (os.O_ACCMODE | os.O_NONBLOCK)
    ),
    "fcntl(F_GETFL)&O_NONBLOCK": lambda fd: fcntl.fcntl(fd, fcntl.F_GETFL) & os.O_NONBLOCK,
    "ioctl(FIONBIO,0)": lambda fd: _fionbio(fd, 0),
    "ioctl(FIONBIO,1)": lambda fd: _fionbio(fd, 1),
}


def call_on_descriptor(session: Session, step: Step) -> Answer:
    """Make a system call on the file's descriptor."""
    return Answer(ret=ON_DESCRIPTOR[step.call](session.file(step).fileno()))


Call = Callable[[Session, Step], Answer]

CALLS: dict[str, Call] = {
    "open": call_open,
    "close": call_close,
    "dup": call_dup,
    "read": call_read,
    "buffer": call_buffer,
    "write": call_write,
    "poll": call_poll,
    "NOTIFY_EACH": call_notify_each,
    "drain": call_drain,
    "sleep": call_sleep,
    "sigtimedwait": call_sigtimedwait,
    "isatty": call_isatty,
    **dict.fromkeys(REQUESTS, call_ioctl),
    **dict.fromkeys(ON_DESCRIPTOR, call_on_descriptor),
}


def execute(session: Session, step: Step, calls: dict[str, Call]) -> Answer:
    """Make the call of a step and give its answer; an OSError is an answer."""
    call = calls.get(step.call)
    if call is None:
        raise LookupError(f"the recording has a call that the replayer does not know: {re.escape(step.call)}")
    return attempt(lambda: call(session, step))
