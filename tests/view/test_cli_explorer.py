# SPDX-License-Identifier: Apache-2.0
"""The verbs explore, zoo and replay, as a user runs them: formats, exit codes, mistakes on purpose."""

import argparse
import dataclasses
import io
import json
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from pvbus import supervisor
from pvbus.tests.view.support import PVBUS, RUN_S_MAX
from pvbus.verify import exploring, replaying, scenarios, zooing
from pvbus.verify.explorer.progress import Progress
from pvbus.verify.scenarios.event_ring import EventRing
from pvbus.verify.searching import search
from pvbus.verify.zoo import bugs, find
from pvbus.view import cli
from pvbus.view.pytest_plugin import environment


class MortalRing(EventRing):
    """An event ring whose hypervisor may die: nobody asks it for anything."""

    mortal = ("hypervisor",)


LOST = ["explore", "--variant", "driver-wakeup-order"]


def ran(*arguments: str, cwd: Path, answers: str = "") -> subprocess.CompletedProcess[str]:
    """Run a command in a directory."""
    return subprocess.run(
        [*PVBUS, *arguments], env=environment(), cwd=cwd, input=answers, capture_output=True, text=True,
        timeout=RUN_S_MAX, check=False,
    )  # fmt: skip


def parsed(*arguments: str) -> argparse.Namespace:
    """Return a command line as its verb sees it."""
    return cli.parser().parse_args(arguments)


def carried_out(capsys: pytest.CaptureFixture[str], *arguments: str) -> tuple[int, str, str]:
    """Carry a verb out here: what costs a process nothing new."""
    verbs: dict[str, Any] = {"explore": exploring.command, "zoo": zooing.command, "replay": replaying.command}
    code = cli.run(parsed(*arguments), verbs)
    said = capsys.readouterr()
    return code, said.out, said.err


@pytest.fixture
def recorded(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Path:
    """Return the file of a lost wake-up."""
    monkeypatch.chdir(tmp_path)
    code, out, _ = carried_out(capsys, *LOST, "--json")
    assert code == 1
    return tmp_path / str(json.loads(out)["replay"])


# ---- explore


def test_the_default_command_finds_the_lost_wake_up_and_prints_what_replays_it(tmp_path: Path) -> None:
    done = ran(*LOST, cwd=tmp_path)

    assert (done.returncode, done.stderr) == (1, "")
    assert "lost wake-up: the reader sleeps" in done.stdout
    assert re.search(r"failed, ([0-9,]+) executions", done.stdout)
    again = re.search(r"^replay: pvbus (replay \S+\.json)$", done.stdout, re.MULTILINE)
    assert again is not None
    assert ran(*again[1].split(), cwd=tmp_path).returncode == 1


def test_the_json_of_a_failure_has_its_numbers_and_its_file(recorded: Path, capsys: pytest.CaptureFixture[str]) -> None:
    code, out, _ = carried_out(capsys, *LOST, "--json")
    data = json.loads(out)

    assert (code, data["schema"], data["verdict"]) == (1, 1, "failed")
    assert 0 < data["executions"] <= 1000
    assert data["steps"] > data["executions"]
    assert data["seconds"] >= 0
    assert Path(data["replay"]).is_file()
    assert data["replay"] == recorded.name  # the same search, the same failure, the same file
    assert data["runs"][0]["scenario"] == "event-ring"


def test_what_holds_is_complete_and_exits_with_0(capsys: pytest.CaptureFixture[str]) -> None:
    code, out, err = carried_out(capsys, "explore", "submission-ring", "--set", "notifies=2", "--model", "sc,tso", "--json")
    data = json.loads(out)

    assert (code, data["verdict"], err) == (0, "complete", "")
    assert [run["model"] for run in data["runs"]] == ["sc", "tso"]
    assert data["executions"] == sum(run["executions"] for run in data["runs"])
    assert "replay" not in data


def test_a_bound_is_never_called_complete(capsys: pytest.CaptureFixture[str]) -> None:
    code, out, _ = carried_out(capsys, "explore", "event-ring", "--executions", "5", "--json")

    assert (code, json.loads(out)["verdict"]) == (0, "bounded")


def test_without_a_name_every_scenario_gets_a_look_that_ends() -> None:
    jobs = list(exploring.jobs(parsed("explore")))

    assert [job.scenario for job in jobs] == list(scenarios.scenarios())
    assert {job.arguments["seconds"] for job in jobs} == {exploring.LOOK_SECONDS}
    assert {job.model for job in jobs} == {"sc"}


def test_everything_is_listed_with_a_name_and_a_sentence(capsys: pytest.CaptureFixture[str]) -> None:
    code, out, _ = carried_out(capsys, "explore", "--list", "--json")
    data = json.loads(out)

    assert code == 0
    assert {"scenarios", "variants", "models", "sites"} <= set(data)
    for kind in ("scenarios", "variants", "models", "sites"):
        assert all(item["name"] and len(item["sentence"]) > 10 for item in data[kind])
    names = {item["name"] for item in data["scenarios"]}
    assert {item["scenario"] for item in data["variants"]} <= names
    assert "driver-wakeup-order" in {item["name"] for item in data["variants"]}


def test_all_is_every_claim_of_every_scenario() -> None:
    jobs = list(exploring.jobs(parsed("explore", "--all")))

    assert {job.scenario for job in jobs} == set(scenarios.scenarios())
    assert {(job.model, dict(job.parameters)["events"]) for job in jobs if set(job.parameters) == {"events"}} >= {
        ("sc", 2), ("sc", 3), ("sc", 4), ("tso", 2), ("tso", 3), ("tso", 4),
    }  # fmt: skip
    assert all(job.claimed for job in jobs)


def test_what_is_claimed_to_be_complete_and_is_not_is_no_success() -> None:
    job = next(exploring.jobs(parsed("explore", "event-ring", "--all")))
    bounded = search(dataclasses.replace(job, arguments={"executions": 3}), show=False)

    assert bounded.result.verdict.startswith("bounded")
    assert not bounded.held


def test_a_claim_with_deaths_is_held_when_its_deaths_were_all_that_bounded_it() -> None:
    job = next(exploring.jobs(parsed("explore", "event-ring", "--all")))
    dying = dataclasses.replace(job, bounds={"deaths": 1}, make=lambda: MortalRing(events=1))

    assert search(dying, show=False).held
    assert not search(dataclasses.replace(dying, arguments={"executions": 3}), show=False).held


@pytest.mark.parametrize(("arguments", "verdict"), [
    (["cpu-death"], "bounded (1 death)"),  # who asks for a death's scenario wants to see one
    (["cpu-death", "--deaths", "0"], "complete"),
    (["event-ring", "--preemptions", "1"], "bounded (1 preemption)"),
    (["event-ring", "--model", "tso", "--flush-delay", "2"], "bounded (2 steps of flush delay)"),
])  # fmt: skip
def test_bounds_on_an_execution_are_said_in_the_verdict(
    arguments: list[str], verdict: str, capsys: pytest.CaptureFixture[str]
) -> None:
    code, out, _ = carried_out(capsys, "explore", *arguments)

    assert code == 0
    assert f": {verdict}, " in out


@pytest.mark.parametrize(("arguments", "sentence"), [
    (["explore", "event-rung"], "no scenario 'event-rung'"),
    (["explore", "--model", "pso"], "no memory model 'pso': sc, tso"),
    (["explore", "--variant", "lost-sleep"], "no variant 'lost-sleep'"),
    (["explore", "--drop", "evr_woke"], "no site 'evr_woke'"),
    (["explore", "event-ring", "--set", "events"], "--set 'events': write NAME=VALUE"),
    (["explore", "event-ring", "--set", "evants=2"], "event-ring has no parameter 'evants'"),
    (["explore", "event-ring", "--set", "events=two"], "events=two: event-ring wants a number there"),
    (["explore", "event-ring", "--set", "sender=perhaps"], "sender=perhaps: event-ring wants yes or no there"),
    (["explore", "--set", "events=2"], "--set is for one scenario"),
    (["explore", "event-ring", "--executions", "0"], "--executions 0: it must be more than 0"),
    (["explore", "event-ring", "--deaths", "-1"], "--deaths -1: it must be from 0 to"),
    (["explore", "--all", "--drop", "evr_wake"], "--all searches what is claimed"),
    (["explore", "--all", "--preemptions", "1"], "--all searches what is claimed"),
    (["explore", "event-ring", "--search", "luck"], "'luck'"),
    (["replay", "nothing.json"], "nothing.json: No such file"),
])  # fmt: skip
def test_a_mistake_is_one_sentence_that_names_the_value(
    arguments: list[str], sentence: str, capsys: pytest.CaptureFixture[str]
) -> None:
    code, out, err = carried_out(capsys, *arguments)

    assert (code, out) == (2, "")
    assert sentence in err
    assert len(err.splitlines()) == 1


# ---- replay


def test_a_replay_draws_the_trace_and_says_what_forbids_it(recorded: Path, capsys: pytest.CaptureFixture[str]) -> None:
    code, out, err = carried_out(capsys, "replay", str(recorded))

    assert (code, err) == (1, "")
    assert re.search(r"^ +# cpu0 +reader +hypervisor", out, re.MULTILINE)
    assert "this trace is forbidden by\n  the order of our own code" in out


def test_a_replay_stops_where_it_is_told_and_goes_on_by_chance(recorded: Path, capsys: pytest.CaptureFixture[str]) -> None:
    stopped = carried_out(capsys, "replay", str(recorded), "--until", "5")
    chances = [carried_out(capsys, "replay", str(recorded), "--until", "5", "--then", "random", "--seed", "1") for _ in range(2)]

    assert stopped[0] == 0
    assert "after 5 of" in stopped[1]
    assert chances[0] == chances[1]


def test_a_replay_asks_who_goes_on_until_the_answers_end(recorded: Path) -> None:
    done = ran("replay", recorded.name, "--until", "2", "--then", "step", "--json", cwd=recorded.parent, answers="1\n9\n\nq\n")
    data = json.loads(done.stdout)

    assert (done.returncode, data["verdict"]) == (0, "held")
    assert len(data["choices"]) == 4
    assert done.stderr.count("who goes on?") == 4
    assert "'9' is none of 1 to" in done.stderr


def test_a_recording_of_other_code_is_said_and_one_that_does_not_fit_refused(
    recorded: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    data = json.loads(recorded.read_text())
    recorded.write_text(json.dumps(data | {"fingerprint": "0" * 64}))
    said = carried_out(capsys, "replay", str(recorded))
    recorded.write_text(json.dumps(data | {"choices": ["gpu7"]}))
    refused = carried_out(capsys, "replay", str(recorded))

    assert said[0] == 1
    assert "recorded with the code 000000000000" in said[2]
    assert refused[0] == 2
    assert "does not fit here: no context 'gpu7'" in refused[2]


def test_more_choices_than_there_are_cannot_be_asked_for(recorded: Path, capsys: pytest.CaptureFixture[str]) -> None:
    code, _, err = carried_out(capsys, "replay", str(recorded), "--until", "9999")

    assert code == 2
    assert "--until 9999: the recording has" in err


# ---- zoo


def test_a_bug_of_the_zoo_is_shown_with_its_verdict_in_each_model() -> None:
    one = zooing.shown(find("lost-wakeup"), production_executions_max=50)

    assert one["bug"] == "lost-wakeup"
    assert {(model["model"], model["verdict"], model["expected"]) for model in one["models"]} >= {
        ("sc", "caught", "caught"), ("tso", "caught", "caught"),
    }  # fmt: skip
    assert all(0 < model["executions"] <= 1000 for model in one["models"])
    assert one["production"].startswith("bounded")
    assert zooing.as_expected(one)


def test_a_verdict_that_nobody_expected_is_no_success() -> None:
    one = zooing.shown(find("lost-wakeup"), production_executions_max=50)

    assert not zooing.as_expected({**one, "models": [{**one["models"][0], "verdict": "clean"}]})
    assert not zooing.as_expected({**one, "production": "failed under sc"})


def test_every_bug_has_a_scenario_that_can_be_named() -> None:
    assert {exploring._scenario_of(bug) for bug in bugs()} <= set(scenarios.scenarios())


# ---- progress


class Terminal(io.StringIO):
    """A stream that says that it is a terminal."""

    def isatty(self) -> bool:
        return True


def test_progress_says_rate_and_what_is_left() -> None:
    progress = Progress("event-ring", executions_max=1000, seconds=30, stream=io.StringIO())

    line = progress.line(250, 5000, 12, 2.0)

    assert line == (
        "event-ring: 250 executions, 125/s, 2,500 steps/s; 12 choices to try on the path, at most 750 executions to go, 28 s left"
    )


@pytest.mark.parametrize(("width", "line"), [
    (80, "event-ring events=4: 250 executions, 125/s; 12 choices to try on the path"),
    (65, "event-ring…: 250 executions, 125/s; 12 choices to try on the path"), (20, "…: 250 executions, 1"), (1, "…"),
])  # fmt: skip
def test_on_a_narrow_terminal_what_is_left_is_said_before_what_is_searched(width: int, line: str) -> None:
    said = Progress("event-ring events=4", stream=io.StringIO()).line(250, 5000, 12, 2.0, width)

    assert said == line
    assert len(said) <= width


@pytest.mark.parametrize(("stream", "lines"), [(io.StringIO(), "\n"), (Terminal(), "\r")])
def test_progress_is_a_line_that_changes_on_a_terminal_and_plain_lines_elsewhere(stream: io.StringIO, lines: str) -> None:
    progress = Progress("event-ring", stream=stream)
    progress.said_s -= 60

    progress(1, 2, 3)
    progress.close()

    assert lines in stream.getvalue()
    assert ("\r" in stream.getvalue()) == stream.isatty()


# ---- without greenlet


def test_without_greenlet_each_verb_says_so_in_one_sentence(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setitem(sys.modules, "greenlet", None)

    codes = [supervisor.main(arguments) for arguments in (["zoo"], ["explore"], ["replay", "some.json"])]

    assert codes == [3, 3, 3]
    said = capsys.readouterr().err.splitlines()
    assert len(said) == 3
    assert all("needs greenlet, which is not installed here: pip install" in line for line in said)


# ---- what is around it


def test_a_directory_that_cannot_be_written_costs_the_file_and_not_the_failure(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    gone = tmp_path / "gone"
    gone.mkdir()
    monkeypatch.chdir(gone)
    gone.rmdir()

    code, out, err = carried_out(capsys, *LOST, "--json")

    assert (code, json.loads(out)["verdict"]) == (1, "failed")
    assert "replay" not in json.loads(out)
    assert "cannot be written to this directory" in err


def test_a_variant_is_searched_under_the_simplest_model_that_can_show_it() -> None:
    models = {bug.name: next(exploring.jobs(parsed("explore", "--variant", bug.name))).model for bug in bugs()}

    assert models["lost-wakeup"] == "sc"
    assert all(find(name).expected[model] == "caught" for name, model in models.items())


@pytest.mark.parametrize(("change", "sentence"), [
    ({"drop": ["nowhere"]}, "no site 'nowhere'"), ({"parameters": {"events": "x"}}, "events='x'"),
    ({"parameters": {"events": 10**9}}, "events=1000000000"), ({"choices": ["cpu0=99999999999"]}, "is no choice"),
])  # fmt: skip
def test_a_recording_that_asks_for_nonsense_is_refused(
    change: dict[str, Any], sentence: str, recorded: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    recorded.write_text(json.dumps({**json.loads(recorded.read_text()), **change}))

    code, _, err = carried_out(capsys, "replay", str(recorded))

    assert code == 2
    assert sentence in err


@pytest.mark.parametrize(("scenario", "setting", "sentence"), [
    ("fifo-queue", "script=rise:1", "rise:1 is none of raise:N, eoi:N"), ("port-life", "script=raise:0", "raise:0 is none of"),
    ("offers", "script=offer", "'offer' is none of again, offer X"), ("teardown", "ends=somehow", "ends a channel by 'somehow'"),
    ("synic-slot", "types=1,x", "types=1,x"), ("event-ring", "events=-1", "events=-1"), ("event-ring", "readers=99", "1 to 6"),
])  # fmt: skip
def test_a_parameter_that_makes_no_sense_is_no_complete_search(
    scenario: str, setting: str, sentence: str, capsys: pytest.CaptureFixture[str]
) -> None:
    code, out, err = carried_out(capsys, "explore", scenario, "--set", setting, "--executions", "20")

    assert (code, out) == (2, "")
    assert sentence in err


def test_the_file_of_a_scenario_that_is_no_python_is_named(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    (tmp_path / "unfinished.py").write_text("class Half(:\n")
    monkeypatch.setattr(scenarios, "__path__", [*scenarios.__path__, str(tmp_path)])

    with pytest.raises(scenarios.BrokenScenarioError, match=r"unfinished.py cannot be loaded: SyntaxError"):
        scenarios.scenarios()
