# SPDX-License-Identifier: Apache-2.0
"""Replay the recorded scenarios on /dev/xen/evtchn, in a process of `pvbus run`, by a small C driver.

    python -m pvbus.tests.golden.through_file DRIVER.so CPUS ABI SCENARIO…

prints a JSON object: for each scenario what was compared and how it differed. The machine,
$PVBUS_MACHINE, is only asked to settle.
What a front end may answer otherwise stands in DEVIATIONS, and is counted.
"""

from __future__ import annotations

import contextlib
import ctypes
import json
import os
import select
import stat
import struct
import sys
from typing import Any, Self

from pvbus.actors.client import Machine, attach
from pvbus.tests.golden import replayer
from pvbus.tests.golden.calls import CALLS, REQUESTS, Call
from pvbus.tests.golden.session import Answer, Session, Step, pack, unpack
from pvbus.view.fuse.debugger import CAN_MEND

DEVICE = "/dev/xen/evtchn"
BAD_ADDRESS = 2**64 - 4096


class Driver:
    """The C driver: a call gives its value, or raises the OSError of its errno."""

    def __init__(self, path: str) -> None:
        self._library = ctypes.CDLL(path)
        self._library.driver_edge.restype = ctypes.c_void_p

    def call(self, name: str, *arguments: Any) -> int:
        """Make a call. Integers that are pointers must be ctypes'."""
        function = getattr(self._library, f"driver_{name}")
        function.restype = ctypes.c_long
        value = int(function(*arguments))
        if value < 0:
            raise OSError(-value, os.strerror(-value))
        return value

    def edge(self, mapped: int) -> int:
        """Give an address that is mapped for so many bytes."""
        return int(self._library.driver_edge(ctypes.c_ulong(mapped)))


class DeviceFile:
    """An open /dev/xen/evtchn with the methods that the replayer uses."""

    driver: Driver
    never_compared = 0
    """What poll shows besides: docs/divergences.md."""

    def __init__(self, fd: int) -> None:
        self.fd = fd

    def fileno(self) -> int:
        """Give the descriptor."""
        return self.fd

    def close(self) -> None:
        """Close it."""
        self.driver.call("close", self.fd)

    def dup(self) -> Self:
        """Make a second reference."""
        return type(self)(self.driver.call("dup", self.fd))

    def read(self, count: int) -> bytes:
        """Read into a buffer of that size."""
        buffer = ctypes.create_string_buffer(max(count, 1))
        taken = self.read_at(buffer, count)
        return buffer.raw[:taken]

    def read_at(self, address: Any, count: int) -> int:
        """Read to an address."""
        return self.driver.call("read", self.fd, address, ctypes.c_ulong(count))

    def write(self, data: bytes) -> int:
        """Write bytes."""
        return self.write_at(ctypes.create_string_buffer(data, max(len(data), 1)), len(data))

    def write_at(self, address: Any, count: int) -> int:
        """Write from an address."""
        return self.driver.call("write", self.fd, address, ctypes.c_ulong(count))

    def poll(self, events: int, timeout_ms: int = 0) -> int:
        """Poll, give the mask."""
        return self.driver.call("poll", self.fd, ctypes.c_uint(events), timeout_ms) & ~self.never_compared

    def ioctl(self, request: int, argument: bytearray | None) -> int:
        """Make an ioctl; None is the null pointer."""
        at = None if argument is None else ctypes.create_string_buffer(bytes(argument), max(len(argument), 1))
        return self.driver.call("ioctl", self.fd, ctypes.c_ulong(request), at)

    def _numbers(self, name: str, *numbers: int) -> int:
        return self.ioctl(REQUESTS[name], bytearray(struct.pack(f"={len(numbers)}I", *numbers)))

    def bind_virq(self, virq: int) -> int:
        """Make the ioctl."""
        return self._numbers("BIND_VIRQ", virq)

    def bind_interdomain(self, remote_domain: int, remote_port: int) -> int:
        """Make the ioctl."""
        return self._numbers("BIND_INTERDOMAIN", remote_domain, remote_port)

    def bind_unbound_port(self, remote_domain: int) -> int:
        """Make the ioctl."""
        return self._numbers("BIND_UNBOUND_PORT", remote_domain)

    def bind_static(self, port: int) -> int:
        """Make the ioctl."""
        return self._numbers("BIND_STATIC", port)

    def unbind(self, port: int) -> int:
        """Make the ioctl."""
        return self._numbers("UNBIND", port)

    def notify(self, port: int) -> int:
        """Make the ioctl."""
        return self._numbers("NOTIFY", port)

    def reset(self) -> int:
        """Make the ioctl."""
        return self.ioctl(REQUESTS["RESET"], None)

    def restrict_domid(self, domid: int) -> int:
        """Make the ioctl."""
        return self.ioctl(REQUESTS["RESTRICT_DOMID"], bytearray(struct.pack("=H", domid & 0xFFFF)))


class DeviceMachine:
    """What the replayer takes for a machine: opens the device file."""

    def __init__(self, machine: Machine) -> None:
        self._machine = machine
        self._opened: list[int] = []

    def open_evtchn(self, domain: int, *, nonblock: bool, flags: int) -> DeviceFile:
        """Open the device file."""
        assert domain == 0
        flags |= os.O_NONBLOCK if nonblock else 0
        self._opened.append(DeviceFile.driver.call("open", DEVICE.encode(), flags))
        return DeviceFile(self._opened[-1])

    def settle(self) -> None:
        """Wait until nothing is under way, in the front end neither: an ioctl of a file finds what was before it done."""
        for _ in range(2):  # what was written reaches the machine; what comes of that reaches the file
            self._machine.settle()
            for fd in self._opened:
                with contextlib.suppress(OSError):
                    DeviceFile.driver.call("ioctl", fd, ctypes.c_ulong(0), None)


# ---- bad pointers, which a Python client does not have


def _address(step: Step, last: list[int]) -> tuple[Any, int | None]:
    """Give the address that a step names, and where to find what was put there."""
    text = step.args["buf"]
    if text == "NULL":
        return None, None
    if text == "(void*)-4096":
        return ctypes.c_void_p(BAD_ADDRESS), None
    edge = DeviceFile.driver.edge(4)
    if step.call == "write":
        ctypes.memmove(edge, pack(last[-1:]), 4)
    return ctypes.c_void_p(edge), edge


def read_anywhere(session: Session, step: Step) -> Answer:
    """Read to where the step says."""
    if "buf" not in step.args:
        return CALLS["read"](session, step)
    address, edge = _address(step, [])
    if edge is not None:
        session.facts["edge"] = edge
    taken = session.file(step).read_at(address, step.args["count"])
    session.last_read[step.file] = unpack(ctypes.string_at(edge, taken)) if edge is not None else []
    return Answer(ret=taken)


def write_anywhere(session: Session, step: Step) -> Answer:
    """Write from where the step says."""
    if "buf" not in step.args or step.args["buf"] == "l":
        return CALLS["write"](session, step)
    address, _ = _address(step, session.last_read.get(step.file, []))
    return Answer(ret=session.file(step).write_at(address, step.args["count"]))


def partial_copy(session: Session, step: Step) -> Answer:
    """Say whether the read that faulted has copied what fitted."""
    return Answer(ret=None, info=ctypes.string_at(session.facts["edge"], 4) != bytes(4))


def map_page(session: Session, step: Step) -> Answer:
    """Map a page: Python's own mmap looks at the size first."""
    return Answer(ret=DeviceFile.driver.call("mmap", session.file(step).fileno()))


def what_it_is(session: Session, step: Step) -> Answer:
    """Look at it."""
    session.facts["stat"] = os.fstat(session.file(step).fileno())
    return Answer(ret=0)


def is_character_device(session: Session, _step: Step) -> Answer:
    """Say whether it is that."""
    return Answer(ret=None, info=stat.S_ISCHR(session.facts["stat"].st_mode))


def number_of_device(session: Session, _step: Step) -> Answer:
    """Give its numbers."""
    return Answer(ret=None, info=[os.major(session.facts["stat"].st_rdev), os.minor(session.facts["stat"].st_rdev)])


CALLS_HERE: dict[str, Call] = {
    "read": read_anywhere, "write": write_anywhere, "partial_copy_happened": partial_copy, "mmap(READ)": map_page,
    "fstat": what_it_is, "S_ISCHR": is_character_device, "rdev": number_of_device,
}  # fmt: skip


# ---- what may differ: docs/divergences.md

DEVIATIONS: dict[str, dict[tuple[str, int], str]] = {
    "fuse": {} if CAN_MEND else {
        ("vfs_misc", 16): "the file is S_ISREG",
        ("vfs_misc", 17): "the file is S_ISREG",
        ("vfs_misc", 23): "ENOTTY for an unknown ioctl",
        ("eintr", 13): "EINTR despite SA_RESTART",
        ("eintr", 14): "EINTR despite SA_RESTART",
    },
    "seccomp": {
        ("vfs_misc", 16): "the file is S_ISSOCK",
        ("vfs_misc", 17): "the file is S_ISSOCK",
        **{("read_efault", step): "a read that faults behind its first entries gives those" for step in range(12, 19)},
        **{("overflow_rebind", step): "no overflow is shown" for step in (10, 11)},
        **{("overflow_not_cured_by_growth", step): "no overflow is shown" for step in (10, 12, 13, 16, 17)},
        ("sigio_overflow", 9): "no overflow is shown",
        **{("blocking_poll", step): "no overflow is shown" for step in (9, 10)},
        **{("open_flags", step): "the access mode is not looked at" for step in (9, 11, 16, 17)},
    },
}


def main(library: str, frontend: str, cpus: str, abi: str, *names: str) -> None:
    """Replay and print."""
    DeviceFile.driver = Driver(library)
    DeviceFile.never_compared = select.POLLWRBAND if frontend == "seccomp" else 0
    recorded = replayer.scenarios()
    found = {}
    with attach() as machine:
        for name in names:
            result = replayer.replay(
                recorded[name], DeviceMachine(machine), cpus=int(cpus), abi=abi, calls=CALLS_HERE, left_out=DEVIATIONS[frontend]
            )
            found[name] = {
                "steps": len(recorded[name]), "compared": result.compared, "made_only": result.made_only,
                "left_out": result.not_expressible, "differences": result.differences,
            }  # fmt: skip
    print(json.dumps(found))


if __name__ == "__main__":
    main(*sys.argv[1:])
