# SPDX-License-Identifier: Apache-2.0
"""SIGIO of the device's file: the kernel's own, sent for a doorbell that no program knows of."""

from __future__ import annotations

import json
import os
import sys
from pathlib import Path
from typing import Any

import pytest

from pvbus.tests.frontend.support import driver, not_shown, run
from pvbus.view.pytest_plugin import BootedMachine

INSIDE = """\
import fcntl, json, os, select, signal, struct, sys, threading
from pvbus.tests.frontend.deviations import DeviceFile, Driver, name_of, pair
DeviceFile.driver = Driver(sys.argv[1])
SETSIG, SETOWN_EX = 10, 15
signal.pthread_sigmask(signal.SIG_BLOCK, [signal.SIGIO, signal.SIGUSR1])
def told(timeout_s=5.0):
    found = signal.sigtimedwait([signal.SIGIO, signal.SIGUSR1], timeout_s)
    return None if found is None else [found.si_signo, found.si_code, found.si_band]
def event():
    b.notify(at_b)
    assert a.poll(1, 5000)
def taken():
    a.write(a.read(4096))
    a.poll(0, 0)
def asked(fd, flag=os.O_ASYNC):
    flags = fcntl.fcntl(fd, fcntl.F_GETFL)
    fcntl.fcntl(fd, fcntl.F_SETFL, flags | flag)
a, at_a, b, at_b = pair()
seen = []
"""
IO = [29, 0x80, 0]  # SIGIO, SI_KERNEL
USR1 = [10, 1, 0x41]  # SIGUSR1, POLL_IN, POLLIN | POLLRDNORM


def inside(machine: BootedMachine, code: str) -> Any:
    done = run(sys.executable, "-c", INSIDE + code + "print(json.dumps(seen))", str(driver()), name=machine.name)
    assert (done.returncode, done.stderr) == (0, "")
    return json.loads(done.stdout)


@pytest.mark.checklist("A12.11")
def test_it_comes_once_when_an_empty_ring_gets_entries_until_it_is_switched_off(pvbus_shared_machine: BootedMachine) -> None:
    code = """
from pvbus.actors.client import attach
machine = attach()
at_d = b.bind_interdomain(0, a.bind_unbound_port(0))
fcntl.fcntl(a.fd, fcntl.F_SETOWN, os.getpid())
asked(a.fd)
for _ in range(3):
    event(); seen.append(told())
    b.notify(at_d); machine.settle()                    # the ring is not empty
    seen.append(told(0)); taken()
asked(a.fd, os.O_NONBLOCK)                              # what else is set leaves it as it is
event(); seen.append(told()); taken()
fcntl.fcntl(a.fd, fcntl.F_SETFL, os.O_NONBLOCK)
event(); seen.append(told(0.02)); taken()
DeviceFile.driver.call("ioctl", a.fd, 0x5452, b"\\1\\0\\0\\0")
seen.append(bool(fcntl.fcntl(a.fd, fcntl.F_GETFL) & os.O_ASYNC))
event(); seen.append(told())
"""
    assert inside(pvbus_shared_machine, code) == [*[IO, None] * 3, IO, None, True, IO]


@pytest.mark.checklist("A12.11")
def test_a_signal_of_ones_own_choice_says_what_happened_and_to_which_descriptor(pvbus_shared_machine: BootedMachine) -> None:
    code = """
import ctypes
class Info(ctypes.Structure):
    _fields_ = [("number", ctypes.c_int), ("error", ctypes.c_int), ("code", ctypes.c_int), ("pad", ctypes.c_int),
                ("band", ctypes.c_long), ("fd", ctypes.c_int), ("rest", ctypes.c_int * 25)]
library, wanted = ctypes.CDLL(None, use_errno=True), ctypes.create_string_buffer(128)
def of_which(fds):
    library.sigemptyset(wanted); library.sigaddset(wanted, signal.SIGUSR1)
    info, time = Info(), struct.pack("=qq", 5, 0)
    assert library.sigtimedwait(wanted, ctypes.byref(info), time) == signal.SIGUSR1
    return [info.number, info.code, info.band, fds.index(info.fd)]
other = os.dup2(a.fd, 500)
fcntl.fcntl(other, SETSIG, signal.SIGUSR1)
fcntl.fcntl(a.fd, fcntl.F_SETOWN, os.getpid())
asked(other)
event(); seen.append(of_which([a.fd, other])); taken()
os.close(other)                                         # the open file is the same
event(); seen.append(of_which([a.fd, other])); taken()
fcntl.fcntl(a.fd, SETSIG, 0)
event(); seen.append(told()); taken()
fcntl.fcntl(a.fd, SETSIG, signal.SIGUSR1)               # while it is on
event(); seen.append(told()); taken()
a.close()
"""
    assert inside(pvbus_shared_machine, code) == [[*USR1, 1], [*USR1, 1], IO, USR1]


@pytest.mark.checklist("A12.11")
def test_the_owner_can_be_a_thread_or_another_process_also_later(pvbus_shared_machine: BootedMachine) -> None:
    code = """
asked(a.fd)
event(); seen.append(told(0.02)); taken()               # it has no owner
says, say = os.pipe()
child = os.fork()
if child == 0:
    seen = told(20)
    os.write(say, json.dumps(seen).encode())
    os._exit(0)
fcntl.fcntl(a.fd, fcntl.F_SETOWN, child)
event(); seen.append(json.loads(os.read(says, 100))); seen.append(told(0.02)); taken()
os.waitpid(child, 0)
def thread():
    fcntl.fcntl(a.fd, SETOWN_EX, struct.pack("=ii", 0, threading.get_native_id()))
    event(); seen.append(told()); taken()
    seen.append(list(struct.unpack("=ii", fcntl.fcntl(a.fd, 16, bytes(8))))[1] == threading.get_native_id())
one = threading.Thread(target=thread); one.start(); one.join()
os.setpgrp()                                            # of its own: nobody else is to hear of it
fcntl.fcntl(a.fd, fcntl.F_SETOWN, -os.getpgrp())
event(); seen.append(told())
seen.append(name_of(lambda: fcntl.fcntl(a.fd, SETOWN_EX, struct.pack("=ii", 9, 1))))
"""
    assert inside(pvbus_shared_machine, code) == [None, IO, None, IO, True, IO, "EINVAL"]


def test_who_may_not_signal_another_cannot_have_that_done_for_him(pvbus_shared_machine: BootedMachine) -> None:
    if os.geteuid() != 0 or Path("/proc/self/uid_map").read_text().split()[2] == "1":
        not_shown("SIGIO of another user", "it takes root to become another user")
    code = """
says, say = os.pipe()
go, goes = os.pipe()
child = os.fork()
if child == 0:
    os.setgid(1234); os.setuid(1234)
    for owner in os.getppid(), os.getpid():
        fcntl.fcntl(a.fd, fcntl.F_SETOWN, owner)
        asked(a.fd)
        os.write(say, b"."); os.read(go, 1)
    os.write(say, json.dumps(told()).encode())
    os._exit(0)
for _ in range(2):
    os.read(says, 1); event(); seen.append(told(0.02)); taken(); os.write(goes, b".")
seen.append(json.loads(os.read(says, 100)))
"""
    assert inside(pvbus_shared_machine, code) == [None, None, IO]


def test_a_number_of_another_pid_namespace_makes_nobody_else_the_owner(pvbus_shared_machine: BootedMachine) -> None:
    code = """
import ctypes, subprocess
stranger = subprocess.Popen(["cat"], stdin=subprocess.PIPE, preexec_fn=lambda: signal.pthread_sigmask(signal.SIG_SETMASK, []))
library = ctypes.CDLL(None, use_errno=True)
if library.unshare(0x20000000):                         # CLONE_NEWPID: for children
    raise OSError(ctypes.get_errno(), "unshare")
child = os.fork()
if not child:
    try:
        fcntl.fcntl(a.fd, fcntl.F_SETOWN, os.getpid())
        asked(a.fd)                                     # the owner's number is known in both namespaces here
        event(); mine = told(); taken()
        for number in (stranger.pid, os.getpid()):      # and here it would be taken for one of the outer namespace
            try:
                fcntl.fcntl(a.fd, fcntl.F_SETOWN, number)
            except ProcessLookupError:
                pass
            event(); taken()
        os._exit(42 if mine else 1)
    finally:
        os._exit(2)
seen.append(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]))
stranger.stdin.close()
seen.append(stranger.wait())
"""
    assert inside(pvbus_shared_machine, code) == [42, 0]
