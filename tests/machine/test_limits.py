# SPDX-License-Identifier: Apache-2.0
"""Many open files, and processes that run out of descriptors: EMFILE at once, nothing leaked, everybody else goes on."""

from __future__ import annotations

import contextlib
import errno
import os
import re
import resource
import select
import shutil
import subprocess
import sys
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest

from pvbus.actors.client import attach
from pvbus.actors.supervisor.pool import SPARES
from pvbus.tests.frontend.support import not_shown
from pvbus.view.pytest_plugin import environment

if TYPE_CHECKING:
    from collections.abc import Callable

BOUND_S = 20.0
AT_ONCE_S = 5.0  # an answer, and no deadline that has passed: the shortest is that of a start, 10 s
FILES = 500
FDS_OF_A_SPARE = 8  # three streams, control, epoll, its waking, and two ends for signals
ROLES = ["supervisor", "forkserver", "hypervisor", "cpu/0.0", "spare"]


def wait_until(what: str, condition: Callable[[], bool]) -> None:
    deadline = time.monotonic() + BOUND_S
    while not condition():
        assert time.monotonic() < deadline, f"not within {BOUND_S} s: {what}"
        select.select([], [], [], 0.002)


def pids_of(machine: Any, role: str) -> list[int]:
    rows = machine.status()["processes"]
    return [one["pid"] for one in rows if role in (one["name"], one["state"])]


def full_pool(machine: Any) -> None:
    wait_until("the pool is full", lambda: len(pids_of(machine, "spare")) == SPARES)
    for pid in pids_of(machine, "spare"):
        wait_until("it waits for its start", lambda: fds_of(pid) == FDS_OF_A_SPARE)  # noqa: B023


def fds_of(pid: int) -> int:
    return len(os.listdir(f"/proc/{pid}/fd"))  # noqa: PTH208


def limit_for(pid: int, room: int) -> int:
    """Return the limit under which a process can have `room` descriptors more: it bounds their numbers, lowest free first."""
    taken = set()
    for name in os.listdir(f"/proc/{pid}/fd"):  # noqa: PTH208
        if pid != os.getpid() or is_open(int(name)):  # our own listing was one of them
            taken.add(int(name))
    return [number for number in range(max(taken) + room + 2) if number not in taken][room]


def is_open(fd: int) -> bool:
    try:
        os.fstat(fd)
    except OSError:
        return False
    return True


def use(machine: Any) -> dict[str, int]:
    """Return how many descriptors each process has, but for those of open files."""
    full_pool(machine)
    rows = machine.status()["processes"]
    return {one["name"]: fds_of(one["pid"]) for one in rows if not one["name"].startswith("file/")}


def wait_until_use_is(machine: Any, before: dict[str, int]) -> None:
    wait_until(f"no descriptor is left over; before {before}", lambda: use(machine) == before)


def open_until_refused(machine: Any, files: list[Any], most: int) -> OSError:
    begin = time.monotonic()
    while True:
        try:
            files.append(machine.open_evtchn(nonblock=True))
        except OSError as error:
            assert time.monotonic() - begin < AT_ONCE_S
            return error
        assert len(files) <= most
        begin = time.monotonic()


def carries_an_event(near: Any, far: Any) -> bool:
    port = near.bind_unbound_port(remote_domain=0)
    peer = far.bind_interdomain(0, port)
    near.notify(port)
    arrived = bool(far.poll(select.POLLIN, 5000)) and far.read_ports(4) == [peer]
    far.unbind(peer)
    near.unbind(port)
    return arrived


@pytest.fixture
def plenty() -> Any:
    """Let this process hold the descriptors of many files; the machine raises its own limit."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    wanted = FILES * 5 if hard == resource.RLIM_INFINITY else min(FILES * 5, hard)
    resource.setrlimit(resource.RLIMIT_NOFILE, (max(soft, wanted), hard))
    yield
    resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))


@pytest.mark.checklist("A12.7")
@pytest.mark.usefixtures("plenty")
def test_five_hundred_files_are_open_at_once_and_leave_nothing(pvbus_machine: Any) -> None:
    machine = pvbus_machine.machine
    before = use(machine)

    files = [machine.open_evtchn(nonblock=True) for _ in range(FILES)]

    assert len(machine.status()["files"]) == FILES
    assert carries_an_event(files[0], files[-1])
    assert carries_an_event(files[-1], files[0])
    for file in files:
        file.close()
    assert machine.status()["files"] == []
    assert machine.ports() == []
    wait_until_use_is(machine, before)
    rows = machine.status()["processes"]
    assert [one["name"] for one in rows if one["name"].startswith("file/") and one["state"] != "spare"] == []


@pytest.mark.parametrize("room", [0, 1, 3, 5])
@pytest.mark.parametrize("role", ROLES)
def test_a_process_without_descriptors_refuses_opens_with_emfile_and_nothing_else(
    pvbus_boot: Any, role: str, room: int
) -> None:
    booted = pvbus_boot('[[domain]]\nid = 0\ncpus = 1\nplatforms = ["xen"]\n')
    machine = booted.machine
    pair = [machine.open_evtchn(nonblock=True) for _ in range(2)]
    before = use(machine)
    limited = pids_of(machine, role)
    old = resource.prlimit(limited[0], resource.RLIMIT_NOFILE)
    for pid in limited:
        resource.prlimit(pid, resource.RLIMIT_NOFILE, (limit_for(pid, room), old[1]))
    if role == "forkserver":  # an open with a spare process would not come to it
        pair.extend(machine.open_evtchn(nonblock=True) for _ in range(SPARES))
    files: list[Any] = []

    refused = open_until_refused(machine, files, most=SPARES + 8)

    assert refused.errno == errno.EMFILE
    assert "descriptor" in str(refused), refused
    assert carries_an_event(pair[0], pair[1])
    for pid in limited:
        with contextlib.suppress(ProcessLookupError):  # a spare process that could not start has ended, or is about to
            resource.prlimit(pid, resource.RLIMIT_NOFILE, old)
    fresh = machine.open_evtchn(nonblock=True)
    assert carries_an_event(pair[0], fresh)
    for file in (fresh, *files, *pair[2:]):
        file.close()
    assert len(machine.status()["files"]) == 2
    wait_until_use_is(machine, before)
    for file in pair:
        file.close()


@pytest.mark.parametrize("limit", [96, 128])
def test_a_machine_under_a_low_limit_opens_as_many_files_as_it_can(limit: int) -> None:
    name = f"low-{os.getpid()}"
    command = [sys.executable, "-m", "pvbus.supervisor", "up", "--name", name]
    process = subprocess.Popen(
        command, stdout=subprocess.PIPE, stderr=subprocess.PIPE,
        preexec_fn=lambda: resource.setrlimit(resource.RLIMIT_NOFILE, (limit, limit)),  # noqa: PLW1509
    )  # fmt: skip
    assert process.stdout is not None
    assert process.stderr is not None
    try:
        assert process.stdout.readline() == b"ready\n"
        with attach(name) as machine:
            files: list[Any] = []
            for _ in range(3):
                refused = open_until_refused(machine, files, most=limit)
                assert refused.errno == errno.EMFILE
                assert len(files) >= 4
                assert carries_an_event(files[0], files[-1])
                files.pop().close()  # and at once there is room again
                files.append(machine.open_evtchn(nonblock=True))
                with attach(name) as other:  # a full machine can still be asked
                    assert len(other.status()["files"]) == len(files)
                files.pop(0).close()
                files.pop(0).close()
        process.terminate()
        assert process.wait(BOUND_S) == 0
    finally:
        process.kill()
        process.wait()
        process.stdout.close()
        process.stderr.close()


@pytest.mark.parametrize("room", range(6))
def test_a_user_without_descriptors_gets_emfile_and_leaks_nothing(pvbus_machine: Any, room: int) -> None:
    machine = pvbus_machine.machine
    before = use(machine)
    ours = fds_of(os.getpid())
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (limit_for(os.getpid(), room), hard))
    file = None
    refused: int | None = 0
    try:
        file = machine.open_evtchn(nonblock=True)
    except OSError as error:
        refused = error.errno
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))

    assert refused == (0 if room >= 4 else errno.EMFILE)
    if file is not None:
        file.close()
    assert fds_of(os.getpid()) == ours
    wait_until("the file is gone", lambda: machine.status()["files"] == [])
    wait_until_use_is(machine, before)
    with machine.open_evtchn(nonblock=True) as near, machine.open_evtchn(nonblock=True) as far:
        assert carries_an_event(near, far)


def test_a_supervisor_without_descriptors_tells_who_attaches(pvbus_boot: Any) -> None:
    booted = pvbus_boot('[[domain]]\nid = 0\nplatforms = ["xen"]\n')
    machine = booted.machine
    full_pool(machine)
    pid = booted.process.pid
    old = resource.prlimit(pid, resource.RLIMIT_NOFILE)
    resource.prlimit(pid, resource.RLIMIT_NOFILE, (limit_for(pid, 2), old[1]))
    begin = time.monotonic()

    with pytest.raises(OSError) as refused:
        attach(booted.name)

    assert refused.value.errno == errno.EMFILE
    assert time.monotonic() - begin < AT_ONCE_S
    assert machine.status()["state"] == "ready"
    resource.prlimit(pid, resource.RLIMIT_NOFILE, old)
    with attach(booted.name) as other:
        assert other.status()["state"] == "ready"


def test_a_forked_user_that_finds_no_room_in_the_file_s_process_gets_emfile(pvbus_machine: Any) -> None:
    file = pvbus_machine.machine.open_evtchn(nonblock=True)
    port = file.bind_unbound_port(remote_domain=0)
    pid = pvbus_machine.machine.status()["files"][0]["process_pid"]
    old = resource.prlimit(pid, resource.RLIMIT_NOFILE)
    results = []
    for limit in (*(limit_for(pid, room) for room in range(3)), old[0]):
        resource.prlimit(pid, resource.RLIMIT_NOFILE, (limit, old[1]))
        child = os.fork()
        if child == 0:
            code = 255
            try:
                file.unbind(port + 1)
            except OSError as error:
                code = error.errno or 254
            finally:
                os._exit(code)
        results.append(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]))

    assert results == [errno.EMFILE, errno.EMFILE, errno.EMFILE, errno.ENOTCONN]
    file.unbind(port)
    file.close()


def test_a_forked_user_that_was_refused_may_try_again(pvbus_machine: Any) -> None:
    file = pvbus_machine.machine.open_evtchn(nonblock=True)
    pid = pvbus_machine.machine.status()["files"][0]["process_pid"]
    old = resource.prlimit(pid, resource.RLIMIT_NOFILE)
    before = fds_of(pid)
    child = os.fork()
    if child == 0:
        code = 255
        try:
            answers = []
            for limit in (*(limit_for(pid, room) for room in range(3)), old[0]):
                resource.prlimit(pid, resource.RLIMIT_NOFILE, (limit, old[1]))
                try:
                    answers.append(file.bind_unbound_port(remote_domain=0))
                except OSError as error:
                    answers.append(error.errno or 0)
            code = 0 if answers == [errno.EMFILE, errno.EMFILE, errno.EMFILE, 1] else 254
        finally:
            os._exit(code)

    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0
    wait_until("the child's connection and ring are gone", lambda: fds_of(pid) == before)
    file.unbind(1)
    file.close()


@pytest.mark.checklist("A12.7")
@pytest.mark.parametrize(("role", "needs"), [("user", 4), ("supervisor", 3), ("its process", 3)])
def test_a_passed_descriptor_without_room_for_more_is_refused_and_stays_its_owners(
    pvbus_boot: Any, role: str, needs: int
) -> None:
    booted = pvbus_boot('[[domain]]\nid = 0\nplatforms = ["xen"]\n')
    machine = booted.machine
    file = machine.open_evtchn(nonblock=True)
    file._shared.cookie = 0  # so that this process does not know it
    fd = os.dup(file.fileno())
    full_pool(machine)
    rows = machine.status()
    pid = {"user": os.getpid(), "supervisor": booted.process.pid, "its process": rows["files"][0]["process_pid"]}[role]
    users = {"user": os.getpid(), "supervisor": booted.process.pid, "file": rows["files"][0]["process_pid"]}
    before = {name: fds_of(one) for name, one in users.items()}
    old = resource.prlimit(pid, resource.RLIMIT_NOFILE)

    for room in range(needs):
        resource.prlimit(pid, resource.RLIMIT_NOFILE, (limit_for(pid, room), old[1]))
        refused: int | None = 0
        try:
            machine.fdopen_evtchn(fd).close()
        except OSError as error:
            refused = error.errno
        finally:
            resource.prlimit(pid, resource.RLIMIT_NOFILE, old)
        assert (refused, is_open(fd)) == (errno.EMFILE, True), room
        wait_until("nothing is left of it", lambda: {name: fds_of(one) for name, one in users.items()} == before)

    resource.prlimit(pid, resource.RLIMIT_NOFILE, (limit_for(pid, needs), old[1]))
    try:
        again = machine.fdopen_evtchn(fd)
    finally:
        resource.prlimit(pid, resource.RLIMIT_NOFILE, old)
    with machine.open_evtchn(nonblock=True) as other:
        assert carries_an_event(again, other)
    again.close()
    file.close()


USERS_CAPABILITIES = "+dac_override,+dac_read_search"  # it reads what root has installed, wherever that lies


def segments_of(user: int) -> list[str]:
    found = []
    for path in Path("/dev/shm").glob("pvbus-*"):
        with contextlib.suppress(FileNotFoundError):  # another machine's
            found += [path.name] * (path.stat().st_uid == user)
    return found


@pytest.mark.parametrize("processes", [2, 6])
def test_a_machine_whose_processes_cannot_be_forked_says_so_and_ends(tmp_path: Path, processes: int) -> None:
    user = 4_000_000 + os.getpid()  # nobody's: the limit counts all that a user has
    if os.geteuid() or shutil.which("setpriv") is None or int(Path("/proc/self/uid_map").read_text().split()[2]) <= user:
        not_shown("a user without a process left", "only root of the whole system can be another one, by setpriv of util-linux")
    os.chown(tmp_path, user, user)
    tmp_path.chmod(0o700)
    as_user = ["setpriv", "--reuid", str(user), "--regid", str(user), "--clear-groups"]
    as_user += [f"--{of}={USERS_CAPABILITIES}" for of in ("bounding-set", "inh-caps", "ambient-caps")]

    done = subprocess.run(
        [*as_user, "prlimit", f"--nproc={processes}", sys.executable, "-m", "pvbus.supervisor", "up"],
        env=environment() | {"PVBUS_RUN_ROOT": str(tmp_path)}, capture_output=True, timeout=60, text=True, check=False,
    )  # fmt: skip

    assert done.returncode == 1, done.stderr
    assert re.search(r"^pvbus: \S+ cannot be forked: Resource temporarily unavailable$", done.stderr, re.MULTILINE), done.stderr
    assert list(tmp_path.iterdir()) == []
    assert segments_of(user) == []
