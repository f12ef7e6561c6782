# SPDX-License-Identifier: Apache-2.0
"""The FUSE file: where it differs from the driver, what it does with segments, stopped files and its own death."""

from __future__ import annotations

import errno
import json
import os
import select
import signal
import subprocess
import sys

import pytest

from pvbus.actors.client import attach
from pvbus.tests.contract.support import wait_until
from pvbus.tests.frontend.support import driver, not_shown, run, server_of, started
from pvbus.view.fuse.caller import READ, WRITE, Callers
from pvbus.view.fuse.follow import Follower, our_processor
from pvbus.view.pytest_plugin import BootedMachine
from pvbus.view.run.fitting import new_inbox, serve_session

INSIDE = """\
import os, sys, json, struct, errno
from pvbus.tests.frontend.deviations import *
DeviceFile.driver = Driver(sys.argv[1])
"""


def inside(machine: BootedMachine, code: str) -> str:
    """Run Python code in the namespaces; give what it prints."""
    done = run(sys.executable, "-c", INSIDE + code, str(driver()), name=machine.name)
    assert done.returncode == 0, done.stderr
    return done.stdout


@pytest.mark.checklist("A12.3")
def test_readv_is_a_read_a_segment_up_to_the_first_short_one(pvbus_shared_machine: BootedMachine) -> None:
    code = """
answers = []
for first, second, events in [(8, 8, 4), (8, 8, 3), (6, 6, 4), (4, 4, 1), (0, 8, 2), (3, 8, 2), (4096, 8, 3), (2, 2, 2),
                              (2, 2, 1), (1, 3, 1), (3, 4, 0)]:
    a, b = opened(os.O_RDWR | os.O_NONBLOCK), opened()
    for _ in range(events):
        port = a.bind_unbound_port(0)
        b.notify(b.bind_interdomain(0, port))
    machine.settle()
    at = ctypes.create_string_buffer(16384)
    answers.append(DeviceFile.driver.call("readv", a.fd, at, ctypes.c_ulong(first), ctypes.c_ulong(second)))
print(json.dumps(answers))
"""
    answers = json.loads(inside(pvbus_shared_machine, "from pvbus.actors.client import attach\nmachine = attach()\n" + code))

    assert answers == [16, 12, 4, 4, 8, 0, 12, 0, 0, 0, 0]


@pytest.mark.checklist("A12.3")
def test_writev_is_a_write_a_segment_up_to_the_first_short_one(pvbus_shared_machine: BootedMachine) -> None:
    code = """
a = opened()
at = ctypes.create_string_buffer(16384)
sizes = [(4, 4), (6, 4), (0, 8), (3, 4), (4096, 4), (4100, 4)]
print(json.dumps([DeviceFile.driver.call("writev", a.fd, at, *map(ctypes.c_ulong, pair)) for pair in sizes]))
"""
    assert json.loads(inside(pvbus_shared_machine, code)) == [8, 4, 8, 0, 4100, 4096]


PAGES = """
library = ctypes.CDLL(None, use_errno=True)
library.mmap.restype = ctypes.c_void_p
pages = library.mmap(None, ctypes.c_size_t(3 * 4096), 3, 0x22, -1, ctypes.c_long(0))
edge = pages + 4096                                     # between two pages

def protect(at, rights):
    assert library.mprotect(ctypes.c_void_p(at), ctypes.c_size_t(4096), rights) == 0
"""


@pytest.mark.checklist("A9.3")
def test_an_ioctls_structure_is_read_with_the_rights_that_its_page_has_now(pvbus_shared_machine: BootedMachine) -> None:
    code = PAGES + """
a, _, _, _ = pair()
seen = []
for rights in (3, 0, 1, 0, 2, 3):
    protect(edge, 3)
    ctypes.memset(edge, 0, 4)
    protect(edge, rights)
    seen.append(name_of(lambda: DeviceFile.driver.call("ioctl", a.fd, ctypes.c_ulong(0x44502), ctypes.c_void_p(edge)) > 0))
protect(edge, 0)                                        # a structure that reaches into it
seen.append(name_of(lambda: DeviceFile.driver.call("ioctl", a.fd, ctypes.c_ulong(0x44502), ctypes.c_void_p(edge - 2))))
seen.append(name_of(lambda: DeviceFile.driver.call("ioctl", a.fd, ctypes.c_ulong(0x44502), ctypes.c_void_p(2**64 - 4096))))
print(json.dumps(seen))
"""
    seen = json.loads(inside(pvbus_shared_machine, code))

    assert seen == ["True", "EFAULT", "True", "EFAULT", "True", "True", "EFAULT", "EFAULT"]


@pytest.mark.checklist("A4.9")
def test_a_buffer_across_pages_is_one_transfer(pvbus_shared_machine: BootedMachine) -> None:
    code = PAGES + """
from pvbus.actors.client import attach
machine = attach()

def ready(count):
    a, b = opened(os.O_RDWR | os.O_NONBLOCK), opened()
    ports = []
    for _ in range(count):
        ports.append(a.bind_unbound_port(0))
        b.notify(b.bind_interdomain(0, ports[-1]))
    machine.settle()
    return a, ports

def read(a, at, size):
    return name_of(lambda: DeviceFile.driver.call("read", a.fd, ctypes.c_void_p(at), ctypes.c_ulong(size)))

def write(a, at, size):
    return name_of(lambda: DeviceFile.driver.call("write", a.fd, ctypes.c_void_p(at), ctypes.c_ulong(size)))

seen = []
for before, size, events in [(4, 8, 1), (4, 8, 2), (4, 16, 3), (2, 4, 1), (3, 12, 3), (3, 12, 2), (1, 3, 1), (4, 4, 2)]:
    a, ports = ready(events)
    count = read(a, edge - before, size)
    right = ctypes.string_at(edge - before, int(count)) == struct.pack(f"={len(ports)}I", *ports)[: int(count)]
    seen.append([count, right, write(a, edge - before, int(count))])
protect(edge, 0)
a, ports = ready(2)                                     # nothing is taken, and nothing written back
seen.append([read(a, edge - 4, 8), read(a, edge - 4, 4), write(a, edge - 4, 8), read(a, edge - 8, 8), read(a, edge - 4, 4)])
print(json.dumps(seen))
"""
    *within, beyond = json.loads(inside(pvbus_shared_machine, code))

    assert within == [[str(count), True, str(count)] for count in (4, 8, 12, 4, 12, 8, 0, 4)]
    assert beyond == ["EFAULT", "4", "EFAULT", "4", "EAGAIN"]


def test_a_request_of_a_caller_that_cannot_be_looked_at_is_the_end_of_one_segment() -> None:
    callers = Callers()
    with subprocess.Popen(["cat"], stdin=subprocess.PIPE, stdout=subprocess.DEVNULL) as reader:
        wait_until(lambda: callers.segment(reader.pid, READ, 0, 8)[1] > 8, "it reads, and is seen to")
        address, length, _ = callers.segment(reader.pid, READ, 0, 8)
        seen = [callers.segment(reader.pid, kind, offset, 8) for kind in (READ, WRITE) for offset in (4, length)]
    ended = callers.segment(reader.pid, READ, 4, 8)

    assert address
    assert seen == [(address, length, 4), (0, length + 8, length), (0, 12, 4), (0, length + 8, length)]
    assert ended == (0, 12, 4)


@pytest.mark.checklist("A12.4")
def test_select_and_epoll_see_an_event_and_an_edge_is_seen_once(pvbus_shared_machine: BootedMachine) -> None:
    code = """
a, at_a, b, at_b = pair()
level, edge = select.epoll(), select.epoll()
level.register(a.fd, select.EPOLLIN)
edge.register(a.fd, select.EPOLLIN | select.EPOLLET)
seen = [level.poll(0), edge.poll(0), select.select([a.fd], [], [], 0)[0]]
ringer = threading.Thread(target=lambda: wait_until_blocked(threading.main_thread().native_id, lambda: False) and b.notify(at_b))
ringer.start()
seen.append(len(edge.poll(10)))                         # blocked until the event comes
ringer.join()
seen += [len(edge.poll(0)), len(level.poll(0)), len(level.poll(0)), len(select.select([a.fd], [], [], 0)[0])]
a.write(a.read(4))
seen += [len(edge.poll(0)), len(level.poll(0))]
b.notify(at_b)
seen += [len(edge.poll(10)), len(edge.poll(0)), len(level.poll(10))]
print(json.dumps(seen))
"""
    assert json.loads(inside(pvbus_shared_machine, code)) == [[], [], [], 1, 0, 1, 1, 1, 0, 0, 1, 0, 1]


def test_the_directory_of_the_device_is_as_it_is_whoever_asks(pvbus_shared_machine: BootedMachine) -> None:
    code = """
os.chdir("/dev/xen")
print(*map(name_of, (
    lambda: os.mkdir("new"), lambda: os.mkfifo("new"), lambda: os.symlink("evtchn", "new"), lambda: os.link("evtchn", "new"),
    lambda: os.unlink("evtchn"), lambda: os.rename("evtchn", "new"), lambda: os.open("new", os.O_CREAT | os.O_RDWR),
)))
"""
    assert inside(pvbus_shared_machine, code).split() == [*["EPERM"] * 6, "EACCES"]


def file_process(machine: BootedMachine, opener: int) -> int:
    """Give the process of the file that a process has opened."""
    status = machine.machine.status()
    (file,) = [entry for entry in status["files"] if entry["opener_pid"] == opener]
    (process,) = [entry for entry in status["processes"] if entry["name"] == file["file"]]
    return int(process["pid"])


def test_two_clients_on_two_files_do_not_wait_for_each_other(pvbus_shared_machine: BootedMachine) -> None:
    code = INSIDE + """
a, _, b, at_b = pair()
print(os.getpid(), flush=True)
child = os.fork()
if child == 0:
    c = opened()
    print(os.getpid(), flush=True)
    os.read(0, 3)
    threading.Thread(target=lambda: print("bound", c.bind_unbound_port(0) > 0, flush=True)).start()
    sys.exit()
os.read(0, 3)
for _ in range(100):
    b.notify(at_b)
    a.write(a.read(4))
print("went on", flush=True)
os.waitpid(child, 0)
"""
    with started(sys.executable, "-c", code, str(driver()), name=pvbus_shared_machine.name) as process:
        assert process.stdout is not None
        assert process.stdin is not None
        process.stdout.readline()
        stopped = file_process(pvbus_shared_machine, int(process.stdout.readline()))
        os.kill(stopped, signal.SIGSTOP)
        try:
            process.stdin.write("go\ngo\n")
            process.stdin.flush()
            assert process.stdout.readline() == "went on\n"
        finally:
            os.kill(stopped, signal.SIGCONT)
        assert process.stdout.readline() == "bound True\n"
        process.communicate(timeout=20)

    assert process.returncode == 0


def test_a_client_that_asks_without_a_pause_holds_up_no_other(pvbus_shared_machine: BootedMachine) -> None:
    code = """
a, _, b, at_b = pair()
asking = []
for _ in range(2):
    child = os.fork()
    if child == 0:
        c = opened()
        while True:
            c.poll(1, 0)
            c.write(bytes(4))
    asking.append(child)
for _ in range(100):
    b.notify(at_b)
    a.write(a.read(4))                                  # blocks, and is woken while the others ask
for child in asking:
    os.kill(child, signal.SIGKILL)
    os.waitpid(child, 0)
print("went on")
"""
    assert inside(pvbus_shared_machine, "import signal\n" + code) == "went on\n"


def test_a_timer_is_due_however_much_is_asked() -> None:
    class Asked:
        """A session whose callers never pause."""

        fd, kept, closed, served = os.eventfd(1), 0, False, 0

        def serve_on(self) -> None:
            self.served += 1

        def slept(self) -> None:
            pass

        def close(self) -> None:
            self.closed = True

    inbox, session = new_inbox("test"), Asked()
    inbox.call_at(inbox.clock.now_ns() + 20_000_000, session.close)

    serve_session(inbox, session)  # type: ignore[arg-type]

    inbox.abandon()
    os.close(session.fd)
    assert session.served > 1


def test_a_server_goes_to_the_processor_of_who_asks_and_stays_free() -> None:
    ours = os.sched_getaffinity(0)
    if len(ours) < 2:
        not_shown("a server that follows its caller", "there is one processor only")
    follower = Follower()
    for processor in sorted(ours)[:2]:
        with subprocess.Popen(["taskset", "-c", str(processor), "cat"], stdin=subprocess.PIPE) as caller:

            def is_there(pid: int = caller.pid, processor: int = processor) -> bool:
                follower.look(pid)
                return our_processor() == processor and os.sched_getaffinity(caller.pid) == {processor}

            wait_until(is_there, "the server is where its caller is")
    follower.look(caller.pid)  # which has ended

    assert os.sched_getaffinity(0) == ours


def test_the_death_of_the_server_is_an_error_to_its_clients(pvbus_shared_machine: BootedMachine) -> None:
    code = INSIDE + """
a, _, _, _ = pair()
print("reads", flush=True)
print(name_of(lambda: a.read(4)), name_of(lambda: a.notify(1)), name_of(lambda: a.poll(1, 0)), name_of(opened))
"""
    with started(sys.executable, "-c", code, str(driver()), name=pvbus_shared_machine.name) as process:
        assert process.stdout is not None
        assert process.stdout.readline() == "reads\n"
        os.kill(server_of(process.pid, pvbus_shared_machine.name), signal.SIGKILL)
        answers, errors = process.communicate(timeout=20)

    read, notify, poll, opened = answers.split()
    assert {read, notify, opened} <= {"ECONNABORTED", "ENOTCONN"}
    assert int(poll) & select.POLLERR
    assert "the server of evtchn has died" in errors
    wait_until(lambda: pvbus_shared_machine.machine.status()["files"] == [], "the files are released")


def test_the_death_of_a_files_process_is_an_error_to_its_clients_only(pvbus_shared_machine: BootedMachine) -> None:
    code = INSIDE + """
a, _, b, at_b = pair()
print(os.getpid(), flush=True)
child = os.fork()
if child == 0:
    c = opened()
    print(os.getpid(), flush=True)
    print(name_of(lambda: c.read(4)), name_of(lambda: c.bind_unbound_port(0)), c.poll(0xffff) & 8, flush=True)
    os._exit(0)
os.waitpid(child, 0)
b.notify(at_b)
print(len(a.read(4)), flush=True)
"""
    with started(sys.executable, "-c", code, str(driver()), name=pvbus_shared_machine.name) as process:
        assert process.stdout is not None
        process.stdout.readline()
        os.kill(file_process(pvbus_shared_machine, int(process.stdout.readline())), signal.SIGKILL)
        answers, _ = process.communicate(timeout=20)

    assert answers.split() == [errno.errorcode[errno.EIO]] * 2 + [str(select.POLLERR), "4"]


def test_when_the_whole_machine_dies_every_call_says_so_at_once() -> None:
    name = f"dies-{os.getpid()}"
    code = INSIDE + """
a, at_a, _, _ = pair()
print("reads", flush=True)
print(name_of(lambda: a.read(4)), name_of(lambda: a.write(bytes(4))), name_of(lambda: a.notify(at_a)), name_of(opened))
"""
    with started(sys.executable, "-c", code, str(driver()), name=name) as process:
        assert process.stdout is not None
        assert process.stdout.readline() == "reads\n"
        with attach(name) as machine:
            supervisor = next(row["pid"] for row in machine.status()["processes"] if row["name"] == "supervisor")
        os.kill(supervisor, signal.SIGKILL)
        answers, _ = process.communicate(timeout=20)

    assert answers.split() == ["EIO"] * 4
