# SPDX-License-Identifier: Apache-2.0
"""That the check after each test sees what is left behind: each kind is planted, seen, and taken away."""

import os
import secrets
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

TITLED = "import sys; print('up', flush=True); sys.stdin.read()"


@pytest.fixture
def checks(request: pytest.FixtureRequest) -> object:
    """Return the conftest module itself, which --import-mode=importlib lets nobody import by name."""
    path = str(Path(__file__).with_name("conftest.py"))
    return next(
        plugin for plugin in request.config.pluginmanager.get_plugins()
        if getattr(plugin, "__file__", None) == path
    )


@pytest.fixture
def titled_process() -> Iterator[subprocess.Popen[str]]:
    """Start a process whose command line begins like one of ours, until its input ends."""
    with subprocess.Popen(
        ["pvbus: cpu/9.9", "-c", TITLED], executable=sys.executable, text=True,
        stdin=subprocess.PIPE, stdout=subprocess.PIPE,
    ) as process:
        assert process.stdout is not None
        assert process.stdout.readline() == "up\n"
        yield process


def call(checks: object, name: str, *arguments: object) -> list[object]:
    found = getattr(checks, name)(*arguments)
    assert isinstance(found, list)
    return found


def test_a_process_that_stays_is_seen(checks: object, titled_process: subprocess.Popen[str]) -> None:
    seen = call(checks, "left_processes", set())

    assert seen == [f"process {titled_process.pid} (pvbus: cpu/9.9 -c {TITLED})"]


def test_a_process_of_an_announced_machine_is_not_held_against_a_test(checks: object) -> None:
    run_id = secrets.token_hex(4)
    with subprocess.Popen(
        ["pvbus: cpu/9.9", "-c", TITLED], executable=sys.executable, text=True,
        stdin=subprocess.PIPE, stdout=subprocess.PIPE, env=os.environ | {"PVBUS_RUN_ID": run_id},
    ) as process:
        assert process.stdout is not None
        assert process.stdout.readline() == "up\n"
        assert call(checks, "left_processes", {run_id}) == []
        assert len(call(checks, "left_processes", {"another"})) == 1


def test_a_segment_that_stays_is_seen_unless_its_machine_is_announced(checks: object) -> None:
    run_id = secrets.token_hex(4)
    segment = Path("/dev/shm", f"pvbus-{run_id}-ports")
    segment.touch()
    try:
        assert call(checks, "left_segments", set()) == [f"segment {segment.name}"]
        assert call(checks, "left_segments", {run_id}) == []
    finally:
        segment.unlink()


def test_a_run_directory_that_stays_is_seen(checks: object) -> None:
    before = len(call(checks, "left_directories", set()))
    root = Path(os.environ["XDG_RUNTIME_DIR"], "pvbus")
    root.mkdir(mode=0o700, exist_ok=True)
    directory = root / "planted"
    directory.mkdir()
    try:
        assert len(call(checks, "left_directories", set())) == before + 1
    finally:
        directory.rmdir()


def test_an_interpreter_that_a_test_starts_keeps_its_bytecode_and_not_in_a_tree_that_wants_none() -> None:
    said = subprocess.run(
        [sys.executable, "-c", "import sys; print(sys.dont_write_bytecode, sys.pycache_prefix)"],
        check=True, capture_output=True, text=True,
    ).stdout.split()

    place = f"{os.environ['XDG_RUNTIME_DIR']}/bytecode" if sys.dont_write_bytecode else str(sys.pycache_prefix)
    assert said == ["False", place]


def test_a_segment_of_someone_elses_machine_is_looked_at_once_and_not_held_against_a_test(checks: object) -> None:
    segment = Path("/dev/shm", f"pvbus-{secrets.token_hex(4)}-ports")
    segment.touch()
    stranger = "import sys; file = open(sys.argv[1]); print('up', flush=True); sys.stdin.read()"
    # Its environment has no mark, and the shell above it has ended: nothing leads to this session.
    shell = 'exec 3<&0; env -u PVBUS_TEST_RUN setsid "$@" <&3 &'
    command = ["sh", "-c", shell, "sh", sys.executable, "-c", stranger, str(segment)]
    try:
        with subprocess.Popen(command, text=True, stdin=subprocess.PIPE, stdout=subprocess.PIPE) as process:
            assert process.stdout is not None
            assert process.stdout.readline() == "up\n"
            process.wait(10)
            assert call(checks, "left_segments", set()) == []
            assert segment.name in checks.foreign_segments      # type: ignore[attr-defined]
    finally:
        segment.unlink()


def test_a_checklist_id_that_no_row_has_is_refused(checks: object) -> None:
    known = frozenset({"A4.1", "X3a", "E13"})
    ids = ("A4.1", "X3a", "E13", "A4.99", "a4.1", 4)
    assert call(checks, "wrong_checklist_ids", ids, known) == ["A4.99", "a4.1", 4]
