# SPDX-License-Identifier: Apache-2.0
"""A scenario that lies in a file of its user, and more mistakes of a command line: each is one sentence."""

import json
import subprocess
from pathlib import Path

import pytest

from pvbus.tests.verify.test_explorer_document import PROGRAM
from pvbus.tests.view.support import PVBUS, RUN_S_MAX
from pvbus.tests.view.test_cli_explorer import carried_out
from pvbus.view.pytest_plugin import environment


@pytest.fixture
def counting(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Return the scenario of the document as a file that nobody knows, in the directory where we are."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "counting.py").write_text(PROGRAM)
    return tmp_path / "counting.py"


def test_a_file_is_a_scenario_wherever_it_lies(counting: Path, capsys: pytest.CaptureFixture[str]) -> None:
    code, out, err = carried_out(capsys, "explore", str(counting), "--model", "all")

    assert (code, err) == (0, "")
    assert f"{counting}:counting under sc: complete" in out
    assert carried_out(capsys, "explore", f"{counting}:counting", "--all")[0] == 0


@pytest.mark.usefixtures("counting")
def test_its_failure_replays_and_the_file_is_part_of_the_code(capsys: pytest.CaptureFixture[str]) -> None:
    code, out, _ = carried_out(capsys, "explore", "counting.py", "--set", "locked=no", "--json")
    replay = json.loads(out)["replay"]
    again = carried_out(capsys, "replay", replay)
    Path("counting.py").write_text(PROGRAM + "\n# another one\n")
    changed = carried_out(capsys, "replay", replay)
    Path("counting.py").unlink()
    gone = carried_out(capsys, "replay", replay)

    assert code == 1
    assert replay.startswith("counting-sc-")
    assert (again[0], again[2]) == (1, "")
    assert "recorded with the code" in changed[2]
    assert (gone[0], gone[2]) == (2, "pvbus replay: counting.py: No such file or directory\n")


@pytest.mark.parametrize(("text", "sentence"), [
    ("class A(: pass", "mine.py cannot be loaded: SyntaxError: invalid syntax (mine.py, line 1)"),
    ("x = 1\nx / 0", "mine.py cannot be loaded: ZeroDivisionError: division by zero (line 2)"),
    ("x = 1", "mine.py has no scenario: no class in it is a pvbus.verify.explorer.scenario.Scenario"),
    ("from pvbus.verify.explorer import Scenario\nclass A(Scenario):\n  name = 'a'", "A does not have broken, prepare, start"),
    (PROGRAM.replace("name =", "title ="), "Counting does not say what its `name` is"),
])  # fmt: skip
def test_a_file_that_holds_no_scenario_is_told_what_it_lacks(
    text: str, sentence: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "mine.py").write_text(text)

    code, _, err = carried_out(capsys, "explore", str(tmp_path / "mine.py"))

    assert code == 2
    assert sentence in err
    assert len(err.splitlines()) == 1


@pytest.mark.parametrize(("arguments", "sentence"), [
    (["nowhere.py"], "nowhere.py: No such file or directory"), (["counting.py:adding"], "no scenario 'adding' in counting.py"),
    (["event-ring", "--set", "events=2", "--set", "events=3"], "--set events=3: events is 2 already"),
    (["event-ring", "--drop", "evr_wake@nobody"], "--drop evr_wake@nobody: no context 'nobody': cpu0, reader, hypervisor"),
    (["event-ring", "--drop", "evr_wake@"], "--drop evr_wake@: no context ''"), (["--variant", ""], "no variant ''"),
    (["counting.py", "--variant", "two-rescinds"], "is one of the scenario offers, not of counting"),
])  # fmt: skip
@pytest.mark.usefixtures("counting")
def test_a_mistake_is_named(arguments: list[str], sentence: str, capsys: pytest.CaptureFixture[str]) -> None:
    code, out, err = carried_out(capsys, "explore", *arguments)

    assert (code, out) == (2, "")
    assert sentence in err


def test_what_is_asked_for_twice_is_searched_once(capsys: pytest.CaptureFixture[str]) -> None:
    code, out, _ = carried_out(capsys, "explore", "event-ring", "event_ring", "--model", "sc,sc", "--executions", "2", "--json")

    assert (code, len(json.loads(out)["runs"])) == (0, 1)


def test_a_barrier_that_nobody_came_by_is_not_among_those_that_were_dropped(capsys: pytest.CaptureFixture[str]) -> None:
    _, out, _ = carried_out(
        capsys, "explore", "event-ring", "--executions", "9", "--drop", "evr_wake", "--drop", "vmr_room", "--json"
    )

    run = json.loads(out)["runs"][0]
    assert (run["drop"], run["dropped"]) == (["evr_wake", "vmr_room"], ["evr_wake"])


def test_a_failure_is_one_although_nobody_reads_to_its_end(tmp_path: Path) -> None:
    done = subprocess.run(
        ["/bin/sh", "-c", '("$@"; echo $? >code) | true', "sh", *PVBUS, "explore", "--variant", "lost-wakeup"],
        env=environment(), cwd=tmp_path, capture_output=True, timeout=RUN_S_MAX, check=False,
    )  # fmt: skip

    assert (done.stderr, (tmp_path / "code").read_text()) == (b"", "1\n")


# ---- recordings


@pytest.mark.parametrize(("text", "sentence"), [
    ("[" * 100_000, "no recording: what it holds lies too deep"), ('{"schema": 1, "choices": ' + "[" * 100_000, "too deep"),
])  # fmt: skip
def test_a_recording_that_lies_too_deep_is_refused(
    text: str, sentence: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "deep.json").write_text(text)

    code, _, err = carried_out(capsys, "replay", str(tmp_path / "deep.json"))

    assert code == 2
    assert sentence in err


def test_a_recording_that_never_ends_is_refused(capsys: pytest.CaptureFixture[str]) -> None:
    code, _, err = carried_out(capsys, "replay", "/dev/zero")

    assert code == 2
    assert "/dev/zero is longer than any recording" in err


@pytest.mark.usefixtures("counting")
def test_a_replay_says_what_fails_now_and_not_what_failed_then(capsys: pytest.CaptureFixture[str]) -> None:
    _, out, _ = carried_out(capsys, "explore", "counting.py", "--set", "locked=no", "--json")
    replay = Path(json.loads(out)["replay"])
    replay.write_text(replay.read_text().replace('"kind": "property"', '"kind": "livelock"'))

    _, out, _ = carried_out(capsys, "replay", str(replay))

    assert out.startswith("property: 2 have counted, and the word says 1")
    assert "another failure than the one that was recorded, which was livelock" in out


@pytest.mark.usefixtures("counting")
def test_a_bug_of_another_scenario_is_refused(capsys: pytest.CaptureFixture[str]) -> None:
    _, out, _ = carried_out(capsys, "explore", "--variant", "lost-wakeup", "--json")
    replay = Path(json.loads(out)["replay"])
    replay.write_text(replay.read_text().replace('"bug": "lost-wakeup"', '"bug": "two-rescinds"'))

    code, _, err = carried_out(capsys, "replay", str(replay))

    assert code == 2
    assert "the bug two-rescinds is none of the scenario event-ring" in err


# ---- where nothing more can be written


@pytest.mark.parametrize("more", [[], ["--json"]])
def test_a_full_device_is_one_sentence(more: list[str], tmp_path: Path) -> None:
    with Path("/dev/full").open("wb") as full:
        done = subprocess.run(
            [*PVBUS, "explore", "--list", *more], env=environment(), cwd=tmp_path, stdout=full, stderr=subprocess.PIPE, text=True,
            timeout=RUN_S_MAX, check=False,
        )  # fmt: skip

    assert (done.returncode, done.stderr) == (3, "pvbus explore: No space left on device\n")
