# SPDX-License-Identifier: Apache-2.0
"""The run directory: names, modes, who lives, and what the dead leave."""

from __future__ import annotations

import os
import socket
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from pvbus.actors.runtime import rundir


@pytest.fixture(autouse=True)
def root(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    deep = tmp_path / ("d" * 100)
    deep.mkdir(mode=0o700)
    monkeypatch.setenv("XDG_RUNTIME_DIR", str(deep))
    yield deep / "pvbus"
    for name in [path.name for path in list(rundir._held)]:
        rundir.remove(name)


@pytest.mark.parametrize("name", ["", "A", "-a", "a_b", "a" * 33, "../x", "a/b", "a\n"])
def test_a_bad_machine_name_is_a_value_error_that_names_it(name: str) -> None:
    with pytest.raises(ValueError, match="is no machine name") as caught:
        rundir.run_directory(name)
    assert repr(name) in str(caught.value)


def test_without_a_runtime_directory_it_lies_in_tmp_under_the_uid(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("XDG_RUNTIME_DIR")
    assert rundir.run_root() == Path(f"/tmp/pvbus-{os.geteuid()}")


def test_a_machine_is_alive_while_its_socket_takes_connections(root: Path) -> None:
    path = rundir.create("ci", "abcd1234")
    assert path == root / "ci"
    assert path.stat().st_mode & 0o777 == 0o700
    assert [(m.name, m.alive, m.held, m.run_id) for m in rundir.list_machines()] == [
        ("ci", False, True, "abcd1234")
    ]
    listener = rundir.bind_machine(path)
    assert rundir.list_machines()[0].alive
    connection = rundir.connect_machine(path)
    rundir.check_peer_uid(connection)
    connection.close()
    with pytest.raises(FileExistsError, match="ci is running"):
        rundir.create("ci")
    with pytest.raises(BlockingIOError, match="ci is running"):
        rundir.clean("ci")
    listener.close()
    rundir.remove("ci")
    assert rundir.list_machines() == []


def test_two_starts_at_once_do_not_clean_each_other(monkeypatch: pytest.MonkeyPatch) -> None:
    rundir.create("ci")
    monkeypatch.setattr(rundir, "LOCK_PAUSE_S", 0.0)
    with pytest.raises(FileExistsError, match="starting or stopping"):
        rundir.create("ci")


def test_what_a_dead_machine_left_is_cleaned_by_doctor_and_by_the_next_start(root: Path) -> None:
    script = (
        "import os; from pvbus.actors.runtime import rundir; "
        "rundir.bind_machine(rundir.create('dead', 'feed0001')); os._exit(9)"
    )
    segment = Path("/dev/shm/pvbus-feed0001-info")
    for how in ("clean", "create"):
        environment = {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)}
        assert subprocess.run([sys.executable, "-c", script], env=environment, check=False).returncode == 9
        segment.write_bytes(b"x")
        dead = rundir.list_machines()[0]
        assert (dead.name, dead.alive, dead.held) == ("dead", False, False)
        if how == "clean":
            removed = rundir.clean("dead")
            assert str(segment) in removed
            assert not (root / "dead").exists()
        else:
            rundir.create("dead")
            assert not (root / "dead" / "machine.sock").exists()
        assert not segment.exists()


def test_a_directory_open_to_others_or_a_link_is_refused(root: Path, tmp_path: Path) -> None:
    root.mkdir(mode=0o755)
    root.chmod(0o755)
    with pytest.raises(PermissionError, match="0755"):
        rundir.create("ci")
    root.chmod(0o700)
    (root / "ci").symlink_to(tmp_path)
    with pytest.raises(PermissionError, match="not a directory"):
        rundir.create("ci")


def test_a_peer_of_another_uid_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    rundir.check_peer_uid(ours)
    monkeypatch.setattr(os, "geteuid", lambda: 4711)
    with pytest.raises(PermissionError, match="not 4711"):
        rundir.check_peer_uid(ours)
    ours.close()
    theirs.close()


def test_cleaning_a_machine_that_never_was_does_nothing() -> None:
    assert rundir.clean("nobody") == []
    assert rundir.list_machines() == []
