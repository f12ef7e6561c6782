# SPDX-License-Identifier: Apache-2.0
"""The FUSE file and callers whose calls look otherwise: 32-bit programs, io_uring and aio, O_APPEND, readahead."""

from __future__ import annotations

import json
import sys

import pytest

from pvbus.tests.frontend.support import HERE, client_32, compiled, driver, not_shown, run
from pvbus.view.fuse.debugger import CAN_MEND
from pvbus.view.pytest_plugin import BootedMachine

NO_IO_URING = 77


@pytest.mark.checklist("A4.9", "A9.3")
@pytest.mark.parametrize(
    ("options", "defines"), [([], ["-DFILTERED"]), (["--no-filter"], []), (["--frontend", "seccomp"], [])], ids=" ".join
)
def test_a_32_bit_program_finds_the_device(
    pvbus_shared_machine: BootedMachine, options: list[str], defines: list[str]
) -> None:
    done = run(str(client_32(*defines)), name=pvbus_shared_machine.name, options=options)

    assert (done.returncode, done.stdout, done.stderr) == (0, "ok\n", "")


@pytest.mark.parametrize(
    ("options", "defines"), [([], ["-DFILTERED"]), (["--no-filter"], []), (["--frontend", "seccomp"], [])], ids=" ".join
)
def test_through_io_uring_the_device_is_read_written_to_and_polled(
    pvbus_shared_machine: BootedMachine, options: list[str], defines: list[str]
) -> None:
    if not CAN_MEND:
        not_shown("io_uring on the device file", "it is an empty file for it on this processor")
    client = str(compiled(HERE / "uring_client.c", *defines))

    done = run(client, name=pvbus_shared_machine.name, options=options)

    if done.returncode == NO_IO_URING:
        not_shown("io_uring on the device file", done.stdout.strip())
    assert (done.returncode, done.stdout, done.stderr) == (0, "ok\n", "")


APPENDS = """
import ctypes, json, os, sys
from pvbus.tests.frontend.deviations import DeviceFile, Driver, opened
DeviceFile.driver = Driver(sys.argv[1])
library = ctypes.CDLL(None)
library.mmap.restype = ctypes.c_void_p
edge = library.mmap(None, ctypes.c_size_t(3 * 4096), 3, 0x22, -1, ctypes.c_long(0)) + 4096
a, b = opened(os.O_RDWR | os.O_APPEND), opened()
theirs = [b.bind_interdomain(0, a.bind_unbound_port(0)) for _ in range(2)]
for port in theirs:
    b.write(b.read(4))
seen = []
for _ in range(3):                                      # each round needs what the one before has written back
    for port in theirs:
        b.notify(port)
    ports = b""
    while len(ports) < 8 and a.poll(1, 5000):
        ports += a.read(8)
    ctypes.memmove(edge - 4, ports, len(ports))
    seen.append([len(ports), a.write_at(ctypes.c_void_p(edge - 4), 8)])
seen.append([a.write_at(ctypes.c_void_p(edge), size) for size in (3, 4, 4100, 8)])
seen.append([DeviceFile.driver.call("writev", a.fd, ctypes.c_void_p(edge - 4), *map(ctypes.c_ulong, pair))
             for pair in [(8, 4), (6, 4), (4100, 4)]])
print(json.dumps(seen))
"""


@pytest.mark.checklist("A5.2")
def test_what_is_appended_is_written_as_what_is_not(pvbus_shared_machine: BootedMachine) -> None:
    done = run(sys.executable, "-c", APPENDS, str(driver()), name=pvbus_shared_machine.name)

    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout) == [[8, 8], [8, 8], [8, 8], [0, 4, 4096, 8], [12, 4, 4096]]


READS_AHEAD = """
import ctypes, os, signal
readahead = ctypes.CDLL(None).readahead
readahead.argtypes = ctypes.c_int, ctypes.c_long, ctypes.c_size_t
children = []
for _ in range(3):
    children.append(os.fork())
    if children[-1] == 0:
        fd = os.open("/dev/xen/evtchn", os.O_RDWR)
        while True:                                     # the kernel keeps the first page locked until it has its answer
            readahead(fd, 0, 4096)
for _ in range(30):
    os.close(os.open("/dev/xen/evtchn", os.O_RDWR))
for child in children:
    os.kill(child, signal.SIGKILL)
    os.waitpid(child, 0)
print("alive")
"""


@pytest.mark.parametrize("options", [[], ["--no-filter"]], ids=" ".join)
def test_who_reads_ahead_while_others_open_the_device_holds_up_nobody(
    pvbus_shared_machine: BootedMachine, options: list[str]
) -> None:
    done = run(sys.executable, "-c", READS_AHEAD, name=pvbus_shared_machine.name, options=options)

    assert (done.returncode, done.stdout, done.stderr) == (0, "alive\n", "")
