# SPDX-License-Identifier: Apache-2.0
"""Unmodified programs under `--frontend seccomp`, and what else stands in their way."""

from __future__ import annotations

import contextlib
import mmap
import os
import signal
import struct
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import psutil
import pytest

from pvbus.tests.frontend.support import command, environment, need_namespaces, not_shown, run, started, xenevtchn_client
from pvbus.tests.frontend.test_run import AS_USER, USER, in_private_mounts, users_python, with_packages
from pvbus.tests.view.support import stopped, until
from pvbus.view.fuse.debugger import CAN_MEND
from pvbus.view.pytest_plugin import BootedMachine
from pvbus.view.seccomp import abi, bpf
from pvbus.view.seccomp.ledger import GAP_MAX, unanswered

UNKNOWN = "ENOSYS" if CAN_MEND else "ENOTTY"  # an ioctl of the FUSE file
SECCOMP = ["--frontend", "seccomp"]
ONE_DOMAIN = '[[domain]]\nid = 0\ncpus = 1\nplatforms = ["xen"]\n'
ANY = bpf.ARCHITECTURES["x86_64"]


@pytest.fixture
def machine_name(pvbus_shared_machine: BootedMachine) -> str:
    need_namespaces()
    try:
        abi.probe(bpf.program(bpf.here()))
    except OSError as error:
        not_shown("programs under the seccomp front end", f"the kernel has no user notification: {error.strerror}")
    return pvbus_shared_machine.name


def client(linking: str = "dynamic") -> str:
    return str(xenevtchn_client(linking, "xen_client.c"))


@contextlib.contextmanager
def holding(machine: str) -> Iterator[subprocess.Popen[str]]:
    """Have a client hold a port for the length of a with block."""
    process = started(client(), "hold", name=machine, options=SECCOMP)
    try:
        yield process
    finally:
        process.terminate()
        process.communicate(timeout=20)


def decide(number: int, *arguments: int, audit: int = ANY.audit) -> int:
    """Run the filter on a call, as the kernel's interpreter does; give what it returns."""
    padded = (*arguments, *[0] * (6 - len(arguments)))
    data = struct.pack("=iIQ6Q", number, audit, 0, *padded)
    steps = list(struct.iter_unpack("=HBBI", bpf.program(ANY)))
    at, accumulator = 0, 0
    while True:
        code, then, otherwise, value = steps[at]
        if code == 0x06:
            return int(value)
        if code == 0x20:
            (accumulator,) = struct.unpack_from("=I", data, value)
            at += 1
            continue
        holds = {0x15: accumulator == value, 0x25: accumulator > value, 0x45: bool(accumulator & value)}[code]
        at += 1 + (then if holds else otherwise)


@pytest.mark.parametrize(
    ("call", "handed_over"),
    [
        ((ANY.read, 3, 0, 4), False), ((ANY.read, 3, 0, 4096), False), ((ANY.read, 3, 0, 8192), False),
        ((ANY.read, 3, 0, 5), True), ((ANY.read, 3, 0, 2), True), ((ANY.write, 3, 0, 8), False),
        ((ANY.write, 3, 0, 4096), False), ((ANY.write, 3, 0, 4100), True), ((ANY.write, 3, 0, 3), True),
        ((ANY.ioctl, 3, 0x44504), True), ((ANY.ioctl, 3, 0x5421), False), ((ANY.ioctl, 3, 0x5451), False),
        ((ANY.ioctl, 3, 0x5460), False), ((ANY.ioctl, 3, 0xC0189436), False),
        ((ANY.ioctl, 3, 0x5452), True), ((ANY.ioctl, 3, 0x5401), True), ((ANY.openat, 0), True), ((ANY.open, 0), True),
        ((ANY.openat2, 0), True), ((ANY.creat, 0), True), ((ANY.readv, 0), True), ((ANY.writev, 0), True),
        ((ANY.fcntl, 3, 4, 0x2000), True), ((ANY.fcntl, 3, 4, 0x800), False), ((ANY.fcntl, 3, 3, 0x2000), False),
        ((ANY.epoll_ctl, 3), True), ((7, 3), False), ((3, 3), False),
    ],
)  # fmt: skip
def test_the_filter_hands_over_what_a_socket_would_answer_otherwise(call: tuple[int, ...], handed_over: bool) -> None:
    assert decide(*call) == (bpf.NOTIFY if handed_over else bpf.ALLOW)


def test_calls_of_another_architecture_are_let_through() -> None:
    assert decide(ANY.openat, audit=0x40000003) == bpf.ALLOW


@pytest.mark.checklist("A9.9", "A12.3", "A12.10", "A12.11")
@pytest.mark.parametrize(
    ("linking", "what"),
    [("dynamic", "tour"), ("dynamic", "signals"), ("dynamic", "ping-pong"), ("dynamic", "readers"), ("static", "tour")],
)
def test_a_client_of_libxenevtchn_finds_the_device(machine_name: str, linking: str, what: str) -> None:
    done = run(client(linking), what, "3000", name=machine_name, options=SECCOMP)

    assert (done.returncode, done.stderr, done.stdout) == (0, "", "")


def test_a_killed_client_is_a_release(pvbus_shared_machine: BootedMachine) -> None:
    machine = pvbus_shared_machine.machine
    with holding(pvbus_shared_machine.name) as held:
        port = int(_line(held))
        assert [one["port"] for one in machine.ports(0) if one["file"] != "kernel"] == [port]
        assert any(file["name"].startswith("evtchn:xen_client") for file in machine.status()["files"])

        _child_of(held, "hold").kill()

        until(lambda: machine.status()["files"] == [], "the file of a killed client is released")
        assert held.wait(10) == 128 + signal.SIGKILL


def test_when_the_front_end_dies_its_clients_get_errors(machine_name: str) -> None:
    with holding(machine_name) as held:
        _line(held)

        _child_of(held, "pvbus: seccomp").kill()

        assert _line(held) == "error!!"


OUTLIVES = """
import errno, fcntl, os, struct, sys, signal
def answer(call, *arguments):
    try:
        return call(*arguments)
    except OSError as error:
        return errno.errorcode[error.errno]
device = "/dev/xen/evtchn"
fd, one = os.open(device, os.O_RDWR), struct.pack("=I", 1)
print(fcntl.ioctl(fd, 0x44502, bytearray(4)), os.getpid(), flush=True)
sys.stdin.readline()
print(answer(fcntl.ioctl, fd, 0x44502, bytearray(4)), flush=True)     # in the middle of which the front end dies
print(answer(fcntl.ioctl, fd, 0x44504, one), answer(os.read, fd, 4), answer(os.read, fd, 3), answer(os.write, fd, one))
for path in ("/etc/passwd", device):
    print(type(answer(os.open, path, os.O_RDWR)).__name__)
other = os.open(device, os.O_RDWR)
print(fcntl.ioctl(other, 0x44502, bytearray(4)) > 0, answer(fcntl.ioctl, other, 0x4599, 0))
print(os.spawnlp(os.P_WAIT, "cat", "cat", "/proc/self/comm"))
"""


def has_taken_up(server: int, owner: int) -> bool:
    """Whether a call under a process's filter is noted in the server's page as under way."""
    for line in Path(f"/proc/{server}/maps").read_text().splitlines():
        place, rights, *_, name = line.split(maxsplit=5)
        begin, end = (int(word, 16) for word in place.split("-"))
        if rights != "rw-s" or not name.startswith("/dev/zero") or end - begin != mmap.PAGESIZE:
            continue
        with Path(f"/proc/{server}/mem").open("rb", buffering=0) as memory:
            memory.seek(begin)
            found = unanswered(memoryview(memory.read(mmap.PAGESIZE)).cast("Q"), owner)
        if found:
            return len(found) > GAP_MAX  # one at least besides those that may come
    return False


def test_when_the_front_end_dies_in_a_call_all_but_its_own_files_goes_on(pvbus_boot: Any, machine_name: str) -> None:
    booted = pvbus_boot(ONE_DOMAIN)
    with started(sys.executable, "-c", OUTLIVES, name=booted.name, options=SECCOMP) as process:
        assert process.stdin is not None
        port, pid = _line(process).split()
        file = next(row["pid"] for row in booted.machine.status()["processes"] if row["name"].startswith("file/0."))
        with stopped(file):
            process.stdin.write("go\n")
            process.stdin.flush()
            call = f"{bpf.here().ioctl} "
            until(lambda: Path(f"/proc/{pid}/syscall").read_text().startswith(call), "it asks for a port")
            server = _child_of(process, "pvbus: seccomp")
            until(lambda: has_taken_up(server.pid, int(pid)), "the server has taken that up")
            server.kill()
            ended = _line(process)
        assert process.stdout is not None
        assert process.stderr is not None
        said, errors = process.stdout.read(), process.stderr.read()

    assert (port, ended) == ("1", "ENOTTY")
    assert said.split("\n")[:-1] == ["ENOTTY b'' b'' EPIPE", "int", "int", f"True {UNKNOWN}", "cat", "0"]
    assert errors == "pvbus run: the server of seccomp has died; its files answer with errors\n"


def test_when_nobody_is_left_that_answers_every_call_is_refused(machine_name: str) -> None:
    with holding(machine_name) as held:
        _line(held)

        stand_in = _child_of(held, "pvbus: stand-in")
        stand_in.kill()
        assert held.stderr is not None
        assert held.stderr.readline().startswith("pvbus run: the stand-in of seccomp has died; ")
        _child_of(held, "pvbus: seccomp").kill()

        assert _line(held) == "error!!"


WITHOUT_STAND_IN = """
import os, signal, socket
from pvbus.view.run.room import Room
from pvbus.view.run.filter import Listeners
from pvbus.view.run.seccomp import fittings
room, made = Room("none", 0), fittings()
for fitting in made:
    fitting.prepare(room)
server, stand_in = [fitting.fds[0] for fitting in made]     # where listeners come to
os.close(stand_in)
if os.fork() == 0:
    signal.alarm(10)                                        # nobody answers its calls
    for hook in room.in_child:
        hook()
    os._exit(0)
print(os.wait()[1], Listeners.receive(socket.socket(fileno=server)) is not None)
"""


def test_a_child_starts_without_a_stand_in_as_long_as_there_is_a_server(machine_name: str) -> None:
    done = subprocess.run(
        [sys.executable, "-c", WITHOUT_STAND_IN], capture_output=True, text=True, check=False, timeout=20, env=environment()
    )

    assert done.stdout == "0 True\n", done.stderr


def test_when_the_file_s_process_dies_its_user_reads_the_end(pvbus_boot: Any) -> None:
    booted = pvbus_boot(ONE_DOMAIN)
    with holding(booted.name) as held:
        _line(held)
        pid = next(row["pid"] for row in booted.machine.status()["processes"] if row["name"].startswith("file/0."))

        os.kill(pid, signal.SIGKILL)

        assert _line(held) == "error!!"


def test_programs_that_never_heard_of_it_go_on_as_ever(machine_name: str, tmp_path: Path) -> None:
    script = (
        "import os, sys, threading\n"
        "for n in (1, 3, 5, 4099):\n"
        "    assert os.write(2, b'x' * n) == n\n"
        "assert os.readv(os.open('/etc/passwd', os.O_RDONLY), [bytearray(3), bytearray(5)]) == 8\n"
        "assert not os.isatty(0)\n"
        "threads = [threading.Thread(target=lambda: open('/etc/passwd').read(7)) for _ in range(8)]\n"
        "[thread.start() for thread in threads]; [thread.join() for thread in threads]\n"
        "try: open('/nowhere/evtchn')\n"
        "except FileNotFoundError: print('fine')\n"
        f"open({str(tmp_path / 'evtchn')!r}, 'w').write('mine')\n"
    )

    done = run(sys.executable, "-c", script, name=machine_name, options=SECCOMP)

    assert (done.returncode, done.stdout) == (0, "fine\n")
    assert len(done.stderr) == 1 + 3 + 5 + 4099
    assert (tmp_path / "evtchn").read_text() == "mine"


def test_however_the_path_is_put_it_leads_to_the_device(machine_name: str) -> None:
    script = (
        "import os, stat\n"
        "os.chdir('/dev')\n"
        "directory = os.open('/dev/xen', os.O_RDONLY | os.O_DIRECTORY)\n"
        "files = [os.open('/dev/xen/evtchn', os.O_RDWR), os.open('xen/../xen/evtchn', os.O_RDWR)]\n"
        "files.append(os.open('evtchn', os.O_RDWR, dir_fd=directory))\n"
        "print([stat.S_ISSOCK(os.fstat(fd).st_mode) for fd in files], [os.get_inheritable(fd) for fd in files])\n"
    )

    done = run(sys.executable, "-c", script, name=machine_name, options=SECCOMP)

    assert done.stdout == "[True, True, True] [False, False, False]\n", done.stderr


def test_who_has_no_descriptor_left_hears_emfile_and_the_file_is_released(
    pvbus_shared_machine: BootedMachine, machine_name: str
) -> None:
    script = (
        "import os, resource\n"
        "resource.setrlimit(resource.RLIMIT_NOFILE, (3, 3))\n"
        "try: os.open('/dev/xen/evtchn', os.O_RDWR)\n"
        "except OSError as error: print(error.errno)\n"
    )

    done = run(sys.executable, "-c", script, name=machine_name, options=SECCOMP)

    assert done.stdout == "24\n", done.stderr
    assert pvbus_shared_machine.machine.status()["files"] == []


def test_an_access_control_list_is_the_kernel_s_to_look_at(machine_name: str) -> None:
    if os.geteuid() != 0 or Path("/proc/self/uid_map").read_text().split()[2] == "1":
        not_shown("access control lists under the seccomp front end", "it takes root to become another user")
    script = (
        "import os\n"
        "from pvbus.tests.frontend.xattrs import ANYBODY, access_list\n"
        "mine = (2, 6, 1234), (4, 0, ANYBODY), (16, 6, ANYBODY), (32, 0, ANYBODY)\n"
        "os.setxattr('/dev/xen/evtchn', 'system.posix_acl_access', access_list((1, 6, ANYBODY), *mine))\n"
        "for user, group in (1234, 1234), (1235, 0):\n"
        "    if os.fork() == 0:\n"
        "        os.setgroups([]); os.setgid(group); os.setuid(user)\n"
        "        try: os.open('/dev/xen/evtchn', os.O_RDWR); print('opened', flush=True)\n"
        "        except PermissionError: print('refused', flush=True)\n"
        "        os._exit(0)\n"
        "    os.wait()\n"
    )

    done = run(sys.executable, "-c", script, name=machine_name, options=SECCOMP)

    assert (done.stdout, done.stderr) == ("opened\nrefused\n", "")


def test_when_the_machine_stops_its_device_answers_eio_and_all_else_goes_on(pvbus_boot: Any) -> None:
    booted = pvbus_boot(ONE_DOMAIN)
    script = (
        "import fcntl, os, struct, sys\n"
        "def errno_of(call, *arguments):\n"
        "    try: return call(*arguments)\n"
        "    except OSError as error: return error.errno\n"
        "fd, one = os.open('/dev/xen/evtchn', os.O_RDWR), struct.pack('=I', 1)\n"
        "print(fcntl.ioctl(fd, 0x44502, bytearray(4)), flush=True)\n"
        "sys.stdin.readline()\n"
        "print(*[errno_of(fcntl.ioctl, fd, request, one) for request in (0x44504, 0x44502)], errno_of(os.read, fd, 4),\n"
        "      errno_of(os.open, '/dev/xen/evtchn', os.O_RDWR), open('/proc/self/comm').read().strip())\n"
    )
    with started(sys.executable, "-c", script, name=booted.name, options=SECCOMP) as process:
        assert _line(process) == "1"
        booted.machine.shutdown()
        until(lambda: booted.process.poll() is not None, "the machine has stopped")

        said, _ = process.communicate("go\n", timeout=20)

    assert said == f"5 5 b'' 5 {Path(sys.executable).name[:15]}\n"


def test_threads_of_a_program_call_at_the_same_time(machine_name: str) -> None:
    script = (
        "import fcntl, os, struct, threading\n"
        "fds = [os.open('/dev/xen/evtchn', os.O_RDWR) for _ in range(4)]\n"
        "ports = [[] for _ in fds]\n"
        "def work(at):\n"
        "    for _ in range(20):\n"
        "        port = fcntl.ioctl(fds[at], 0x44502, bytearray(4))\n"
        "        assert fcntl.ioctl(fds[at], 0x44504, bytearray(struct.pack('=I', port))) == 0\n"
        "        ports[at].append(port)\n"
        "threads = [threading.Thread(target=work, args=(at,)) for at in range(4)]\n"
        "[thread.start() for thread in threads]; [thread.join() for thread in threads]\n"
        "print(sorted(sum(ports, [])) == list(range(1, 81)))\n"
    )

    done = run(sys.executable, "-c", script, name=machine_name, options=SECCOMP)

    assert done.stdout == "True\n", done.stderr


@pytest.mark.parametrize(("frontend", "interrupted"), [("seccomp", True), ("fuse", False)])
def test_a_signal_before_a_call_is_taken_up_ends_it_and_nothing_is_done(
    machine_name: str, frontend: str, interrupted: bool
) -> None:
    script = (
        "import fcntl, os, signal, time\n"
        "from pvbus.actors.client import attach\n"
        "fd, bound, interrupted, end_s = os.open('/dev/xen/evtchn', os.O_RDWR), 0, False, time.monotonic() + 20\n"
        "signal.signal(signal.SIGALRM, lambda *_: None)\n"
        "signal.setitimer(signal.ITIMER_REAL, 0.0003, 0.0003)\n"
        f"while (not interrupted and time.monotonic() < end_s) if {interrupted} else bound < 500:\n"
        "    try:\n"
        "        bound += fcntl.ioctl(fd, 0x44502, bytearray(4)) > 0\n"
        "    except InterruptedError:\n"
        "        interrupted = True\n"
        "signal.setitimer(signal.ITIMER_REAL, 0)\n"
        "with attach() as machine:\n"
        "    print(interrupted, bound == len(machine.ports(0)))\n"
    )

    done = run(sys.executable, "-c", script, name=machine_name, options=["--frontend", frontend])

    assert (done.stdout, done.stderr) == (f"{interrupted} True\n", "")


def test_an_ordinary_user_runs_so_in_a_user_namespace() -> None:
    python = users_python()
    script = f"""
        mount -t tmpfs none /mnt && mknod -m 666 /mnt/fuse c 10 229 && mount --bind /mnt/fuse /dev/fuse
        export HOME=/mnt/home XDG_RUNTIME_DIR=/mnt/run; mkdir -m 700 /mnt/home /mnt/run; chown {USER} /mnt/home /mnt/run
        cp {client()} /mnt/client; exec "$@"
    """
    words = [python, "-P", "-m", "pvbus.supervisor", "run", *SECCOMP, "--", "/mnt/client"]

    for what in ("tour", "signals"):
        done = in_private_mounts(script, *AS_USER, *words, what, environ=with_packages())

        assert (done.returncode, done.stderr) == (0, "")


def test_a_run_within_such_a_run_says_what_stands_against_it(machine_name: str) -> None:
    done = run(*command("true", name=machine_name, options=SECCOMP), name=machine_name, options=SECCOMP)

    assert (done.returncode, done.stderr) == (3, "pvbus run: no seccomp user notification: Device or resource busy\n")


def _line(run: subprocess.Popen[str]) -> str:
    assert run.stdout is not None
    return run.stdout.readline().strip()


def _child_of(run: subprocess.Popen[str], title: str) -> psutil.Process:
    return next(child for child in psutil.Process(run.pid).children() if title in " ".join(child.cmdline()))
