# SPDX-License-Identifier: Apache-2.0
"""What every test runs under: its own run root, known checklist ids, and nothing left behind.

The run root ($XDG_RUNTIME_DIR) is a directory of this test session, so tests never meet a machine of the
user. Every process that a test starts, however indirectly, inherits $PVBUS_TEST_RUN, by which the check after
each test finds it in /proc. A machine that a fixture of wider scope keeps running is announced in
`pytest_plugin.ALIVE_RUN_IDS`; what carries another run id, or none, must be gone. Nothing else belongs in
here: fixtures of one room lie with its tests.
"""

import contextlib
import importlib.metadata
import os
import re
import secrets
import shutil
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
SHM = Path("/dev/shm")
# Of someone else's machine: segments (those there before us, and what turned out to be so), processes by pid and start time.
foreign_segments = {entry.name for entry in SHM.glob("pvbus-*")}
foreign_processes: set[tuple[str, str]] = set()
ANCESTORS_MAX = 16      # test, supervisor, fork server, child: four
EXIT_S_MAX = 2.0        # a process that was told to end, or is being reaped, may need this long
CHECKLIST_ID = re.compile(r"[ABXH]\d+(\.\d+)?[a-z]?|E\d+")

# The plugin comes by its entry point where pvbus is installed, from the tree where only .dev is on the path.
INSTALLED = bool(importlib.metadata.entry_points(group="pytest11", name="pvbus"))
if not INSTALLED and (ROOT / "view" / "pytest_plugin.py").exists():
    pytest_plugins = ["pvbus.view.pytest_plugin"]


def pytest_configure(config: pytest.Config) -> None:
    """Give the session a mark that its processes inherit, and a run root of its own."""
    os.environ["PVBUS_TEST_RUN"] = secrets.token_hex(8)
    # Short and under /tmp: the path of a Unix socket has at most 107 bytes.
    root = tempfile.mkdtemp(prefix="pvt-", dir="/tmp")
    config.add_cleanup(lambda: shutil.rmtree(root, ignore_errors=True))
    os.environ["XDG_RUNTIME_DIR"] = root
    os.environ["SPT_NOENV"] = "1"       # setproctitle: leave /proc/*/environ readable
    os.environ.pop("PVBUS_MACHINE", None)
    paths = [str(ROOT / ".dev"), *filter(None, os.environ.get("PYTHONPATH", "").split(os.pathsep))]
    os.environ["PYTHONPATH"] = os.pathsep.join(dict.fromkeys(paths))
    # Every machine is two interpreters. Who wants no bytecode in the tree gets none there; without any, the compiler would be
    # half of what a machine takes to start.
    if os.environ.pop("PYTHONDONTWRITEBYTECODE", ""):
        os.environ["PYTHONPYCACHEPREFIX"] = f"{root}/bytecode"


# -------------------------------------------------------------------------------------------- checklist ids


def checklist_ids() -> frozenset[str]:
    """Return the ids that stand at the head of a row of docs/checklist.md."""
    text = (ROOT / "docs" / "checklist.md").read_text()
    rows = re.finditer(rf"^\| ({CHECKLIST_ID.pattern}) \|", text, re.MULTILINE)
    return frozenset(row[1] for row in rows)


def wrong_checklist_ids(ids: tuple[object, ...], known: frozenset[str]) -> list[object]:
    """Return those of `ids` that no row of the checklist has."""
    return [
        name for name in ids
        if not (isinstance(name, str) and CHECKLIST_ID.fullmatch(name) and name in known)
    ]


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Refuse a test that claims to show a row that does not exist."""
    known = checklist_ids()
    for item in items:
        for mark in item.iter_markers("checklist"):
            wrong = wrong_checklist_ids(mark.args, known)
            if wrong or not mark.args:
                raise pytest.UsageError(f"{item.nodeid}: not in docs/checklist.md: {wrong or 'no id given'}")


# ------------------------------------------------------------------------------------ nothing is left behind


def alive_run_ids() -> set[str]:
    """Return the run ids of machines that a fixture of wider scope holds on purpose."""
    plugin = sys.modules.get("pvbus.view.pytest_plugin")
    return set(plugin.ALIVE_RUN_IDS) if plugin is not None else set()


def _read(pid: str, name: str) -> bytes:
    """Read a file of a process in /proc; empty if the process is gone. No Path: this runs for every process after each test."""
    try:
        with os.fdopen(os.open(f"/proc/{pid}/{name}", os.O_RDONLY), "rb", buffering=0) as file:
            return file.read()
    except OSError:
        return b""


def _pids() -> list[str]:
    return [name for name in os.listdir("/proc") if name.isdigit()]     # noqa: PTH208 (no Path, either)


def _state_parent_and_start(pid: str) -> tuple[str, str, str]:
    """Return the state letter, the parent and the start time of a process; ("X", "0", "") if it is gone."""
    fields = _read(pid, "stat").rpartition(b")")[2].split()
    return (fields[0].decode(), fields[1].decode(), fields[19].decode()) if len(fields) > 19 else ("X", "0", "")


def holds_segment(pid: str, prefix: str) -> bool:
    """Whether a process has a segment mapped or open whose name begins with `prefix`."""
    path = f"{SHM}/{prefix}"
    if path.encode() in _read(pid, "maps"):
        return True
    with contextlib.suppress(OSError):
        return any(str(link.readlink()).startswith(path) for link in Path("/proc", pid, "fd").iterdir())
    return False


def _and_ancestors(pid: str) -> Iterator[str]:
    """Yield a process and those above it, nearest first."""
    for _ in range(ANCESTORS_MAX):
        if pid in {"0", "1"}:
            return
        yield pid
        pid = _state_parent_and_start(pid)[1]


def _has_variable(pid: str, name: str, value: str) -> bool:
    return f"{name}={value}".encode() in _read(pid, "environ").split(b"\0")


def of_this_session(pid: str) -> bool:
    """Whether a process inherited the mark of this session, or was forked by it."""
    mark = os.environ["PVBUS_TEST_RUN"]
    return _has_variable(pid, "PVBUS_TEST_RUN", mark) or str(os.getpid()) in _and_ancestors(pid)


def belongs_to(pid: str, run_ids: set[str]) -> bool:
    """Whether a process, or one above it, is part of one of the machines with these run ids."""
    return any(
        _has_variable(above, "PVBUS_RUN_ID", run_id) or holds_segment(above, f"pvbus-{run_id}-")
        for above in _and_ancestors(pid) if above != str(os.getpid())
        for run_id in run_ids
    )


def left_processes(alive: set[str]) -> list[str]:
    """Return a line for each process of this session titled "pvbus:" that belongs to no announced machine."""
    left = []
    for pid in _pids():
        command = _read(pid, "cmdline")
        if not command.startswith(b"pvbus:"):
            continue
        state, _, start = _state_parent_and_start(pid)
        if state in "XZ" or (pid, start) in foreign_processes:     # a zombie has ended
            continue
        if not of_this_session(pid):
            foreign_processes.add((pid, start))
        elif not belongs_to(pid, alive):
            title = command.replace(b"\0", b" ").decode(errors="replace").strip()
            left.append(f"process {pid} ({title})")
    return left


def left_segments(alive: set[str]) -> list[str]:
    """Return the segments that belong to no announced machine and to no machine outside of this session."""
    left = []
    for name in sorted(entry.name for entry in SHM.glob("pvbus-*")):
        announced = any(name.startswith(f"pvbus-{run_id}-") for run_id in alive)
        if announced or name in foreign_segments:
            continue
        if any(holds_segment(pid, name) and not of_this_session(pid) for pid in _pids()):
            foreign_segments.add(name)
        else:
            left.append(f"segment {name}")
    return left


def left_directories(alive: set[str]) -> list[str]:
    """Return what lies under the run root, unless as many machines are announced as there are directories."""
    root = Path(os.environ["XDG_RUNTIME_DIR"], "pvbus")
    entries = sorted(root.iterdir()) if root.is_dir() else []
    return [f"run directory {entry.name}" for entry in entries] if len(entries) > len(alive) else []


def left_behind() -> list[str]:
    """Return what should have been taken away, one line each; give what is just ending its time."""
    deadline = time.monotonic() + EXIT_S_MAX
    while True:
        alive = alive_run_ids()
        left = left_processes(alive) + left_segments(alive) + left_directories(alive)
        if not left or time.monotonic() >= deadline:
            return left
        time.sleep(0.01)        # processes that are not our children, and files: nothing to wait on


@pytest.fixture(autouse=True, scope="session")
def nothing_left_behind_at_the_end() -> Iterator[None]:
    """Fail the session if a fixture of wider scope kept its machine."""
    yield
    assert not alive_run_ids()
    left = left_behind()
    assert not left, "left behind: " + ", ".join(left)


@pytest.fixture(autouse=True)
def nothing_left_behind() -> Iterator[None]:
    """Fail a test that leaves a process, a segment or a run directory behind."""
    yield
    left = left_behind()
    assert not left, "left behind: " + ", ".join(left)
