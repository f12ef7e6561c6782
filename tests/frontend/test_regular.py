# SPDX-License-Identifier: Apache-2.0
"""The filter over the FUSE file: what it hands over, who answers, and what becomes of programs when that one dies."""

from __future__ import annotations

import os
import signal
import struct
import subprocess
import sys
from pathlib import Path

import psutil
import pytest

from pvbus.tests.contract.support import wait_until
from pvbus.tests.frontend.support import command, environment, not_shown, run, started
from pvbus.view.pytest_plugin import BootedMachine
from pvbus.view.seccomp import regular_calls
from pvbus.view.seccomp.bpf import ALLOW, NOTIFY
from pvbus.view.seccomp.regular_calls import AARCH64, I386, X86_64, Abi

BIG = 1 << 32
NOTIFY_PORT = 0x44504
AT = 0x7F0000001000


def decided(code: bytes, audit: int, number: int, arguments: list[int]) -> int:
    """Run a classic BPF program, as far as the filters use that, over a call."""
    data = struct.pack("=iIQ6Q", number, audit, 0, *arguments, *[0] * (6 - len(arguments)))
    steps = list(struct.iter_unpack("=HBBI", code))
    at = word = 0
    while True:
        operation, then, otherwise, value = steps[at]
        at += 1
        if operation == 0x20:
            (word,) = struct.unpack_from("=I", data, value)
        elif operation == 0x06:
            return int(value)
        else:
            holds = {0x15: word == value, 0x25: word > value, 0x35: word >= value, 0x45: bool(word & value)}[operation]
            at += then if holds else otherwise


@pytest.mark.parametrize(("abis", "abi"), [((X86_64, I386), X86_64), ((X86_64, I386), I386), ((AARCH64,), AARCH64)])
def test_what_programs_do_all_day_is_let_through_and_what_the_kernel_answers_by_itself_is_not(
    abis: tuple[Abi, ...], abi: Abi
) -> None:
    code = regular_calls.program(abis)
    fcntl = abi.fcntl[-1]
    let_through = [
        (abi.read, [3, AT, 4]), (abi.read, [3, AT, 4096]), (abi.read, [0, AT, 1]), (abi.write, [2, AT, 3]),
        (abi.write, [3, AT, 0]), (abi.write, [3, AT, 4]), (abi.read, [3, BIG, 4]),
        (abi.ioctl, [3, NOTIFY_PORT, AT]), (abi.ioctl, [0, 0x5401, AT]),
        (abi.mmap, [0, 4096, 1, 0x1, 3, 0]), (abi.mmap, [0, 4096, 1, 0x3, 3, 0]), (abi.mmap, [0, 4096, 1, 0x22, -1 % 2**64, 0]),
        (abi.mmap, [0, 4096, 5, 0x802, 3, 0]), (fcntl, [3, 1, 1]), (fcntl, [3, 9, 0]), (9999, [3, AT, 3]),
    ]  # fmt: skip
    handed_over = [
        (abi.read, [3, AT, 1]), (abi.write, [3, AT, 3]), (abi.read, [0, 0, 4]), (abi.write, [3, 0xFFFF, 4096]),
        (abi.ioctl, [3, 0x40044599, 0]), (abi.ioctl, [3, 0x80086601, AT]), (abi.ioctl, [3, 1, AT]), (abi.ioctl, [3, 0x541B, AT]),
        (abi.ioctl, [3, 0x5460, AT]), (abi.ioctl, [3, 0x5452, AT]), (abi.mmap, [0, 4096, 1, 0x2, 3, 0]),
        *((fcntl, [3, command, 0]) for command in (3, 4, 8, 10, 15, 1024)),
        *((number, [3, 0, 0, 0]) for number in (abi.fallocate, abi.readahead, abi.copy_file_range, abi.io_submit)),
    ]  # fmt: skip

    for number, arguments in let_through:
        assert decided(code, abi.audit, number, arguments) == ALLOW, (number, arguments)
    for number, arguments in handed_over:
        assert decided(code, abi.audit, number, arguments) == NOTIFY, (number, arguments)
        assert decided(code, 0x1234, number, arguments) == ALLOW


LOOKS = """
import ctypes, errno, os, sys
library = ctypes.CDLL(None, use_errno=True)
library.mmap.restype = ctypes.c_void_p
def mapped(fd):
    at = library.mmap(None, ctypes.c_size_t(4096), 1, 2, fd, ctypes.c_long(0))     # PROT_READ, MAP_PRIVATE
    if at == 2**64 - 1:
        return errno.errorcode[ctypes.get_errno()]
    library.munmap(ctypes.c_void_p(at), ctypes.c_size_t(4096))
    return "mapped"
def private(path="/dev/xen/evtchn"):
    fd = os.open(path, os.O_RDONLY)
    try:
        return mapped(fd)
    finally:
        os.close(fd)
"""


ASKS = """
import fcntl
try:
    fcntl.ioctl(os.open("/dev/xen/evtchn", os.O_RDONLY), 0x5452, b"\\1\\0\\0\\0")       # FIOASYNC
except OSError as error:
    print(private(), private(sys.executable), errno.errorcode[error.errno])
"""


def servers(run_pid: int, title: str) -> list[psutil.Process]:
    return [child for child in psutil.Process(run_pid).children() if child.cmdline()[:1] and child.cmdline()[0].startswith(title)]


def test_when_the_server_dies_the_device_s_file_is_a_regular_one_and_all_else_goes_on(
    pvbus_shared_machine: BootedMachine
) -> None:
    code = LOOKS + """
while sys.stdin.readline():
    print(private(), private(sys.executable), flush=True)
"""
    with started(sys.executable, "-c", code, name=pvbus_shared_machine.name) as process:
        assert process.stdin is not None
        assert process.stdout is not None
        assert process.stderr is not None

        def look() -> str:
            print(file=process.stdin, flush=True)
            assert process.stdout is not None
            return process.stdout.readline()

        assert look() == "ENODEV mapped\n"
        (server,) = servers(process.pid, "pvbus: regular")
        server.kill()
        assert "the server of regular has died" in process.stderr.readline()
        assert look() == "mapped mapped\n"
        (stand_in,) = servers(process.pid, "pvbus: stand-in")
        stand_in.kill()
        assert "the stand-in of regular has died; when that server dies as well, its programs" in process.stderr.readline()
        assert look() == "ENOSYS ENOSYS\n"
        assert process.communicate("", timeout=20) == ("", "")


def test_a_run_within_a_run_has_its_devices_known_by_the_outer_one(pvbus_shared_machine: BootedMachine) -> None:
    within = command(sys.executable, "-c", LOOKS + ASKS, name=pvbus_shared_machine.name)

    done = run(*within, name=pvbus_shared_machine.name)

    assert (done.returncode, done.stdout, done.stderr) == (0, "ENODEV mapped ENOTTY\n", "")


CROWD = """
import fcntl, os, struct, threading
fd = os.open("/dev/xen/evtchn", os.O_RDWR)
port = fcntl.ioctl(fd, 0x44502, bytearray(4))                                          # BIND_UNBOUND_PORT
def notify():
    for _ in range(200):
        fcntl.ioctl(fd, 0x44504, struct.pack("=I", port))                              # its server asks the kernel by an ioctl
def flags():
    for _ in range(200):
        assert fcntl.fcntl(fd, fcntl.F_GETFL) & os.O_ACCMODE == os.O_RDWR
threads = [threading.Thread(target=work, daemon=True) for work in (notify, flags) * 2]
for thread in threads:
    thread.start()
for thread in threads:
    thread.join(20)
print([thread.is_alive() for thread in threads], flush=True)
"""


@pytest.mark.parametrize("outer", ["fuse", "seccomp"])
def test_the_servers_of_a_run_within_a_run_and_of_the_outer_one_never_wait_for_each_other(
    pvbus_shared_machine: BootedMachine, outer: str
) -> None:
    within = command(sys.executable, "-c", CROWD, name=pvbus_shared_machine.name)

    done = run(*within, name=pvbus_shared_machine.name, options=["--frontend", outer])

    assert (done.returncode, done.stdout, done.stderr) == (0, f"{[False] * 4}\n", "")


def test_where_a_listener_is_in_place_already_the_run_says_what_that_costs(pvbus_shared_machine: BootedMachine) -> None:
    words = command(sys.executable, "-c", LOOKS + "print(private())", name=pvbus_shared_machine.name)
    code = f"""
import os
from pvbus.view.seccomp import abi
from pvbus.view.seccomp.bpf import ALLOW, RETURN, instruction
os.set_inheritable(abi.install(instruction(RETURN, ALLOW)), True)
os.execv({words[0]!r}, {words!r})
"""
    can = run("true", name=pvbus_shared_machine.name)
    assert (can.returncode, can.stderr) == (0, "")

    words = [sys.executable, "-c", code]
    done = subprocess.run(words, capture_output=True, text=True, check=False, timeout=60, env=environment())

    assert (done.returncode, done.stdout) == (0, "mapped\n")
    assert done.stderr.startswith("pvbus run: no filter over the device's file: ")


def test_whoever_calls_and_from_whichever_thread_is_answered(pvbus_shared_machine: BootedMachine) -> None:
    if os.geteuid() != 0 or Path("/proc/self/uid_map").read_text().split()[2] == "1":
        not_shown("users of a run", "it takes root to become another user")
    code = LOOKS + """
import threading
fd = os.open("/dev/xen/evtchn", os.O_RDONLY)
os.dup2(fd, 700)
def ask():
    for _ in range(50):
        assert (mapped(700), private("/etc/passwd")) == ("ENODEV", "mapped")
threads = [threading.Thread(target=ask) for _ in range(4)]
[thread.start() for thread in threads], [thread.join() for thread in threads]
os.chmod("/dev/xen/evtchn", 0o666)
os.setgid(1234), os.setuid(1234)
ask()
print(private())
"""
    done = run(sys.executable, "-c", code, name=pvbus_shared_machine.name)

    assert (done.returncode, done.stdout, done.stderr) == (0, "ENODEV\n", "")


@pytest.mark.parametrize(("restarts", "answer"), [(False, "EINTR"), (True, "mapped")])
def test_a_signal_before_a_call_is_taken_up_ends_it_as_its_handler_wants(
    pvbus_shared_machine: BootedMachine, restarts: bool, answer: str
) -> None:
    code = LOOKS + f"""
import signal
signal.signal(signal.SIGALRM, lambda *_: None)
signal.siginterrupt(signal.SIGALRM, not {restarts})
print(os.getpid(), flush=True)
sys.stdin.readline()
print(private(sys.executable))
"""
    with started(sys.executable, "-c", code, name=pvbus_shared_machine.name) as process:
        assert process.stdout is not None
        assert process.stdin is not None
        client = int(process.stdout.readline())
        (server,) = servers(process.pid, "pvbus: regular")
        server.suspend()
        print(file=process.stdin, flush=True)
        mmap = f"{regular_calls.here()[0].mmap} "
        wait_until(lambda: Path(f"/proc/{client}/syscall").read_text().startswith(mmap), "it waits for the server")
        os.kill(client, signal.SIGALRM)
        wait_until(lambda: not is_pending(client, signal.SIGALRM), "the signal has come")
        server.resume()
        answers, _ = process.communicate(timeout=20)

    assert answers == f"{answer}\n"


def is_pending(pid: int, number: int) -> bool:
    """Whether a signal has not been taken from a process's queues yet; of a process that has ended, none is."""
    try:
        lines = Path(f"/proc/{pid}/status").read_text().splitlines()
    except (FileNotFoundError, ProcessLookupError):
        return False
    return any(int(line.split()[1], 16) >> (number - 1) & 1 for line in lines if line.startswith(("SigPnd:", "ShdPnd:")))


def test_a_server_of_the_device_that_is_stopped_holds_up_nobody_for_long(pvbus_shared_machine: BootedMachine) -> None:
    code = LOOKS + """
import fcntl
fd = os.open("/dev/xen/evtchn", os.O_RDWR)
for _ in range(3):
    print("go", flush=True)
    sys.stdin.readline()
    print([fcntl.fcntl(fd, fcntl.F_GETFL) & os.O_ACCMODE for _ in range(5)], private(sys.executable), flush=True)
"""
    with started(sys.executable, "-c", code, name=pvbus_shared_machine.name) as process:
        assert process.stdin is not None
        assert process.stdout is not None
        for action in (psutil.Process.suspend, psutil.Process.resume, psutil.Process.resume):
            assert process.stdout.readline() == "go\n"
            (server,) = servers(process.pid, "pvbus: evtchn")
            action(server)
            print(file=process.stdin, flush=True)
            assert process.stdout.readline() == "[2, 2, 2, 2, 2] mapped\n"
        process.communicate(timeout=20)


def test_a_killed_caller_leaves_the_server_well(pvbus_shared_machine: BootedMachine) -> None:
    code = LOOKS + """
import signal
for _ in range(20):
    child = os.fork()
    if child == 0:
        print("runs", file=open("/dev/null", "w"), flush=True)
        while True:
            private(sys.executable)
    os.sched_yield()
    os.kill(child, signal.SIGKILL)
    os.waitpid(child, 0)
print(private())
"""
    done = run(sys.executable, "-c", code, name=pvbus_shared_machine.name)

    assert (done.returncode, done.stdout, done.stderr) == (0, "ENODEV\n", "")


def test_when_the_run_is_killed_the_stand_in_is_the_last_to_go_and_goes(pvbus_shared_machine: BootedMachine) -> None:
    code = "import time; print('runs', flush=True); time.sleep(1000)"
    with started(sys.executable, "-c", code, name=pvbus_shared_machine.name) as process:
        assert process.stdout is not None
        assert process.stdout.readline() == "runs\n"
        (stand_in,) = servers(process.pid, "pvbus: stand-in")
        process.kill()
        process.communicate(timeout=20)

    wait_until(lambda: not stand_in.is_running() or stand_in.status() == psutil.STATUS_ZOMBIE, "the stand-in has ended")


def test_a_front_end_that_is_a_filter_cannot_be_had_without_one(pvbus_shared_machine: BootedMachine) -> None:
    done = run("true", name=pvbus_shared_machine.name, options=["--frontend", "seccomp", "--no-filter"])

    assert done.returncode == 2
    assert "--no-filter: there is no --frontend seccomp without a filter" in done.stderr


def test_without_the_filter_nothing_serves_one(pvbus_shared_machine: BootedMachine) -> None:
    code = "import sys; print('runs', flush=True); sys.stdin.readline()"
    with started(sys.executable, "-c", code, name=pvbus_shared_machine.name, options=["--no-filter"]) as process:
        assert process.stdout is not None
        assert process.stdout.readline() == "runs\n"
        wait_until(lambda: servers(process.pid, "pvbus: evtchn") != [], "the device is served")
        assert servers(process.pid, "pvbus: regular") == servers(process.pid, "pvbus: stand-in") == []
        process.communicate("\n", timeout=20)
