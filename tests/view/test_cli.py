# SPDX-License-Identifier: Apache-2.0
"""The command line, run as a user does: output for people and machines, exit codes, mistakes on purpose."""

import errno
import json
import os
import re
import subprocess
from pathlib import Path
from typing import Any

import pytest

from pvbus.actors.runtime import rundir
from pvbus.tests.view.support import PVBUS, RUN_S_MAX, WAIT_S_MAX, pid_of, pvbus, stopped
from pvbus.view import cli
from pvbus.view.pytest_plugin import BootedMachine, environment
from pvbus.view.tables import table

VERBS = [
    "up", "down", "status", "ports", "virq", "affinity", "soft-reset", "offer", "rescind", "devices", "channels", "explain",
    "stress", "explore", "zoo", "replay", "demo", "doctor", "conformance",
]  # fmt: skip
FOREIGN = frozenset(path.name for path in rundir.SHM_DIRECTORY.glob("pvbus-*"))  # what others left, or hold
WITHOUT_NAME = {"explore", "zoo", "replay", "demo", "conformance"}  # a machine of its own, and none at all
NEEDS_MACHINE = [
    ["down"], ["status"], ["ports"], ["virq", "3"], ["affinity", "0:1", "0"], ["soft-reset", "0"], ["explain", "port", "0:1"],
    ["offer", "echo"], ["rescind", "1"], ["devices"], ["channels"],
]  # fmt: skip


@pytest.fixture
def name(pvbus_shared_machine: BootedMachine) -> str:
    """Return the name of the machine that the tests of this module share."""
    return pvbus_shared_machine.name


# ---- output


def test_help_fits_a_screen_and_names_every_verb() -> None:
    done = pvbus("--help")

    assert done.returncode == 0
    assert len(done.stdout.splitlines()) <= 28
    assert all(re.search(rf"^ +{verb} ", done.stdout, re.MULTILINE) for verb in VERBS)
    assert max(map(len, done.stdout.splitlines())) <= 100


def test_every_verb_takes_json_and_a_name() -> None:
    for verb in VERBS:
        said = pvbus(verb, "--help").stdout

        assert "--json" in said
        assert ("--name" in said) == (verb not in WITHOUT_NAME)


def test_status_shows_processes_cpus_and_open_files_in_plain_text(name: str, opened: Any) -> None:
    opened()

    done = pvbus("status", "--name", name)

    assert (done.returncode, done.stderr) == (0, "")
    assert "\x1b" not in done.stdout
    assert done.stdout.startswith(f"{name} is ready")
    assert "hypervisor" in done.stdout
    assert "evtchn:" in done.stdout
    assert re.search(r"^NAME +PID +RESTARTS", done.stdout, re.MULTILINE)


def test_status_as_json_is_one_object_with_a_schema(name: str) -> None:
    data = json.loads(pvbus("status", "--json", machine=name).stdout)

    assert (data["schema"], data["name"], data["state"]) == (1, name, "ready")
    assert {"name", "pid", "restarts"} <= set(data["processes"][0])


def test_ports_as_json_carries_the_promised_keys(name: str, opened: Any) -> None:
    near, far = opened(), opened(domain=1)
    port = near.bind_unbound_port(remote_domain=1)
    far_port = far.bind_interdomain(0, port)

    data = json.loads(pvbus("ports", "--json", machine=name).stdout)

    assert data["schema"] == 1
    (row,) = (row for row in data["ports"] if (row["domain"], row["port"]) == (0, port))
    assert (row["state"], row["remote_domain"], row["remote_port"]) == ("interdomain", 1, far_port)
    assert {"file", "pending", "masked"} <= set(row)
    only = json.loads(pvbus("ports", "--domain", "1", "--json", machine=name).stdout)
    assert {row["domain"] for row in only["ports"]} == {1}


def test_ports_for_people_is_a_table(name: str) -> None:
    lines = pvbus("ports", machine=name).stdout.splitlines()

    assert lines[0].split()[:3] == ["DOMAIN", "PORT", "STATE"]
    assert len(lines) == 1 + 3  # what the kernel holds


def test_virq_raises_it(name: str, opened: Any) -> None:
    file = opened()
    port = file.bind_virq(4)

    done = pvbus("virq", "4", "--json", machine=name)

    assert done.returncode == 0
    assert json.loads(done.stdout) == {"schema": 1, "virq": 4, "domain": 0, "vcpu": 0, "port": port}
    assert pvbus("virq", "4", machine=name).stdout == f"VIRQ 4 is raised on port {port}\n"


def test_a_global_virq_is_raised_in_the_domain_that_handles_it(name: str, machine: Any, opened: Any) -> None:
    machine.set_virq_handler(3, 1)
    file = opened(1)
    port = file.bind_virq(3)

    done = pvbus("virq", "3", "--json", machine=name)

    assert json.loads(done.stdout)["port"] == port
    machine.settle()
    assert file.read_ports(8) == [port]
    machine.set_virq_handler(3, 0)


def test_affinity_says_who_serves_the_port_now(name: str, opened: Any) -> None:
    port = opened().bind_unbound_port(remote_domain=1)

    data = json.loads(pvbus("affinity", f"0:{port}", "0", "--json", machine=name).stdout)

    assert data == {"schema": 1, "domain": 0, "port": port, "vcpu": 0}
    assert pvbus("affinity", f"0:{port}", "0", machine=name).stdout == f"port 0:{port} is served by cpu/0.0\n"


def test_a_soft_reset_frees_every_port_of_the_domain(name: str, machine: Any, opened: Any) -> None:
    file = opened(1)
    file.bind_unbound_port(remote_domain=0)

    done = pvbus("soft-reset", "1", "--json", machine=name)

    assert json.loads(done.stdout) == {"schema": 1, "domain": 1, "state": "reset"}
    assert machine.ports(1) == []
    assert pvbus("soft-reset", "1", machine=name).stdout == "domain 1 has booted another kernel\n"
    with pytest.raises(OSError) as dead:
        file.bind_unbound_port(remote_domain=0)
    assert dead.value.errno == errno.EIO


def test_explain_gives_a_sentence_and_what_comes_next(name: str, opened: Any) -> None:
    port = opened().bind_unbound_port(remote_domain=1)

    plain = pvbus("explain", "port", f"0:{port}", machine=name)
    data = json.loads(pvbus("explain", "port", f"0:{port}", "--json", machine=name).stdout)

    assert plain.returncode == 0
    assert plain.stdout.count("\n") == 1
    assert plain.stdout.startswith(f"Port 0:{port} is unbound")
    assert " Next: domain 1 binds it" in plain.stdout
    assert (data["schema"], data["state"]) == (1, "unbound")
    assert {"where", "holds", "detail"} == set(data["steps"][0])


def test_explain_and_status_answer_while_the_hypervisor_is_stopped(machine: Any, name: str) -> None:
    with stopped(pid_of(machine, "hypervisor")):
        status = pvbus("status", machine=name)
        explained = pvbus("explain", "port", "0:1", machine=name)

    assert (status.returncode, explained.returncode) == (0, 0)


def test_a_reader_that_has_seen_enough_is_no_error(name: str) -> None:
    read_end, write_end = os.pipe()
    os.close(read_end)
    with os.fdopen(write_end, "wb") as pipe:
        done = subprocess.run(
            [*PVBUS, "ports", "--name", name],
            env=environment(),
            stdout=pipe,
            stderr=subprocess.PIPE,
            timeout=RUN_S_MAX,
            check=False,
        )

    assert (done.returncode, done.stderr) == (0, b"")


def test_a_table_aligns_columns_and_says_nothing_with_a_dash() -> None:
    text = table([{"a": 1, "long_name": None}, {"a": 222, "long_name": True}], ("a", "long_name"))

    assert text.splitlines() == ["A    LONG NAME", "1    -", "222  yes"]


# ---- mistakes


@pytest.mark.parametrize("arguments", NEEDS_MACHINE, ids=lambda arguments: str(arguments[0]))
def test_without_a_machine_a_verb_says_how_to_start_one(arguments: list[str], tmp_path: Path) -> None:
    done = pvbus(*arguments, "--json", XDG_RUNTIME_DIR=str(tmp_path))

    assert done.returncode == 3
    assert "pvbus up" in done.stderr
    assert done.stderr.count("\n") == 1
    assert json.loads(done.stdout)["schema"] == 1
    assert "pvbus up" in json.loads(done.stdout)["error"]


def test_a_machine_of_another_name_is_not_there(name: str) -> None:
    done = pvbus("status", "--name", "nobody")

    assert done.returncode == 3
    assert "nobody" in done.stderr
    assert "pvbus up --name nobody" in done.stderr


@pytest.mark.parametrize(
    ("arguments", "named"),
    [
        (["status", "--name", "No/Name"], "No/Name"),
        (["doctor", "--name", "No/Name"], "No/Name"),
        (["explain", "port", "5"], "'5'"),
        (["explain", "port", "0:-5"], "'0:-5'"),
        (["explain", "port", "0:131072"], "131072"),
        (["explain", "port", "9:1"], "domain 9"),
        (["explain", "queue", "0:1"], "queue"),
        (["ports", "--domain", "9"], "--domain 9"),
        (["ports", "--domain", "zero"], "zero"),
        (["virq", "24"], "24"),
        (["virq", "-1"], "-1"),
        (["virq", "3", "--vcpu", "7"], "--vcpu 7"),
        (["virq", "3", "--domain", "9"], "--domain 9"),
        (["affinity", "0:4", "1"], "vCPU 1"),
        (["affinity", "9:4", "0"], "--domain 9"),
        (["affinity", "0:4000", "0"], "0:4000"),
        (["affinity", "five", "0"], "five"),
        (["soft-reset", "9"], "--domain 9"),
        (["demo", "--seconds", "0"], "0"),
        (["nonsense"], "nonsense"),
        ([], "VERB"),
    ],
)
def test_a_bad_argument_is_named(name: str, arguments: list[str], named: str) -> None:
    done = pvbus(*arguments, machine=name)

    assert done.returncode == 2
    assert named in done.stderr
    assert "Traceback" not in done.stderr


def test_a_virq_that_nobody_has_bound_cannot_be_heard(name: str) -> None:
    done = pvbus("virq", "5", machine=name)

    assert done.returncode == 3
    assert "VIRQ 5" in done.stderr
    assert "bind" in done.stderr


def test_an_interrupted_command_says_130(monkeypatch: pytest.MonkeyPatch) -> None:
    def interrupted(_name: str | None) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(cli, "attach", interrupted)

    assert cli.run(cli.parser().parse_args(["status"])) == 130


def test_a_machine_that_does_not_answer_is_a_time_out(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def silent(_name: str | None) -> None:
        raise TimeoutError(110, "no answer to Hello")

    monkeypatch.setattr(cli, "attach", silent)

    assert cli.run(cli.parser().parse_args(["status"])) == 4
    assert "no answer to Hello" in capsys.readouterr().err


def test_a_verb_of_the_supervisor_is_handed_in() -> None:
    arguments = cli.parser().parse_args(["stress", "--seconds", "2", "--seed", "7"])

    assert cli.run(arguments, {"stress": lambda given: int(given.seconds) + int(given.seed)}) == 9


# ---- the end of a machine, and what dead ones leave


def test_down_returns_when_the_machine_is_gone(pvbus_machine: BootedMachine) -> None:
    directory = rundir.run_directory(pvbus_machine.name)

    done = pvbus("down", "--name", pvbus_machine.name, "--json")

    assert json.loads(done.stdout) == {
        "schema": 1, "name": pvbus_machine.name, "run_id": pvbus_machine.run_id, "state": "stopped",
    }  # fmt: skip
    assert done.returncode == 0
    assert not directory.exists()
    assert pvbus_machine.process.wait(timeout=WAIT_S_MAX) == 0


def test_doctor_checks_the_host_and_finds_nothing_of_ours_left() -> None:
    done = pvbus("doctor", "--json")
    data = json.loads(done.stdout)
    ours = [left for left in data["leftovers"] if Path(left["path"]).name not in FOREIGN]

    assert ours == []
    assert [check for check in data["checks"] if check["level"] == "lacking"] == []
    assert (done.returncode, data["schema"]) == (0 if data["ok"] else 1, 1)
    assert data["ok"] == (not data["leftovers"])
    assert {"descriptors", "shared memory", "native core", "run directory"} <= {
        check["name"] for check in data["checks"]
    }


def test_doctor_does_not_touch_a_machine_that_runs(machine: Any, name: str) -> None:
    done = pvbus("doctor", "--clean")

    assert done.returncode == 0, done.stdout
    assert pvbus("status", machine=name).returncode == 0
    assert machine.status()["state"] == "ready"


def test_doctor_finds_and_takes_away_what_a_dead_machine_left(tmp_path: Path) -> None:
    directory = tmp_path / "pvbus" / "dead"
    directory.mkdir(parents=True, mode=0o700)
    (tmp_path / "pvbus").chmod(0o700)
    run_id = f"dead{os.getpid():x}"
    (directory / "run_id").write_text(run_id + "\n")
    segment = Path("/dev/shm") / f"pvbus-{run_id}-m"
    segment.write_bytes(b"")
    try:
        found = pvbus("doctor", XDG_RUNTIME_DIR=str(tmp_path))
        cleaned = pvbus("doctor", "--clean", "--json", XDG_RUNTIME_DIR=str(tmp_path))

        assert found.returncode == 1
        assert str(directory) in found.stdout
        assert str(segment) in found.stdout
        assert "pvbus doctor --clean" in found.stdout
        assert cleaned.returncode == 0
        assert {str(directory), str(segment)} <= set(json.loads(cleaned.stdout)["removed"])
        assert not directory.exists()
        assert not segment.exists()
    finally:
        segment.unlink(missing_ok=True)


def test_doctor_leaves_a_segment_that_somebody_holds() -> None:
    segment = Path("/dev/shm") / f"pvbus-held{os.getpid():x}-m"
    try:
        with segment.open("wb"):
            held = pvbus("doctor", "--clean", "--json")
            assert segment.exists()
        left = pvbus("doctor", "--clean", "--json")

        assert json.loads(held.stdout)["leftovers"] == []
        assert str(segment) in json.loads(left.stdout)["removed"]
        assert not segment.exists()
    finally:
        segment.unlink(missing_ok=True)


def test_doctor_says_what_a_host_lacks(tmp_path: Path) -> None:
    done = pvbus("doctor", "--json", XDG_RUNTIME_DIR=str(tmp_path / "missing"))

    assert done.returncode == 3
    (check,) = (check for check in json.loads(done.stdout)["checks"] if check["level"] == "lacking")
    assert check["name"] == "run directory"
    assert "XDG_RUNTIME_DIR" in check["advice"]
