# SPDX-License-Identifier: Apache-2.0
"""A failure as a file: it comes back as it was, and what is no recording is refused by name."""

import dataclasses
import json
from pathlib import Path

import pytest

from pvbus.verify.explorer import ReplayError, explore
from pvbus.verify.explorer.recording import Recording, RecordingError, fingerprint, read
from pvbus.verify.explorer.shrink import shrink
from pvbus.verify.explorer.trace import Row, columns, rows_of
from pvbus.verify.explorer.verdicts import forbidden_by
from pvbus.verify.explorer.walk import Walker, context_of
from pvbus.verify.scenarios.event_ring import EventRing
from pvbus.verify.scenarios.submission_ring import SubmissionRings

DRIVER = "driver-wakeup-order"
REPEATED = 200  # the same choices give the same trace; a campaign of 10,000 takes half a minute


def recording(**changes: object) -> Recording:
    """Return the recording of the lost wake-up without the barrier, or another."""
    made = Recording(
        scenario="event-ring", parameters={"events": 2}, model="tso", choices=("cpu0", "reader~"), shared=(64,),
        kind="lost wake-up", message="text", drop=("evr_wake",), fingerprint=fingerprint(),
    )  # fmt: skip
    return dataclasses.replace(made, **changes)  # type: ignore[arg-type]


def found(model: str, **arguments: object) -> tuple[Walker, Recording]:
    """Return a failure of the event ring, as it was found."""
    failure = explore(EventRing(), model=model, **arguments).failure  # type: ignore[arg-type]
    assert failure is not None
    made = Recording(
        scenario="event-ring", parameters={}, model=model, choices=failure.choices, shared=failure.shared,
        kind=failure.kind, message=failure.message, **arguments,  # type: ignore[arg-type]
    )  # fmt: skip
    return Walker.of(EventRing, made), made


# ---- the file


def test_what_was_written_is_read_back_as_it_was(tmp_path: Path) -> None:
    written = recording(parameters={"script": (("raise", 1),), "batch": 2}, bounds={"deaths": 1})

    written.write(tmp_path / "one.json")

    assert read(tmp_path / "one.json") == written
    assert written.differs() is None


def test_other_code_is_said() -> None:
    assert "recorded with the code 000000000000" in str(recording(fingerprint="0" * 64).differs())


def test_two_failures_have_two_names_and_one_failure_one() -> None:
    assert recording().name() == recording().name() != recording(choices=("cpu0",)).name()


@pytest.mark.parametrize(("change", "sentence"), [
    ({"choices": "cpu0"}, "choices is 'cpu0'"), ({"choices": [1]}, "choices are not all words"),
    ({"shared": ["x"]}, "shared are not all numbers"), ({"schema": 7}, "no recording of schema 1"),
    ({"speed": 3}, "nobody knows speed"), ({"variant": 4}, "variant is 4"),
    ({"shared": [-1]}, "shared are not all numbers"), ({"shared": [1 << 64]}, "shared are not all numbers"),
    ({"bounds": {"deaths": "x"}}, "the bound deaths is 'x'"), ({"bounds": {"speed": 1}}, "nobody knows the bound 'speed'"),
])  # fmt: skip
def test_what_is_no_recording_is_refused_by_what_is_wrong(change: dict[str, object], sentence: str, tmp_path: Path) -> None:
    recording().write(tmp_path / "one.json")
    data = json.loads((tmp_path / "one.json").read_text()) | change
    (tmp_path / "one.json").write_text(json.dumps(data))

    with pytest.raises(RecordingError, match=sentence):
        read(tmp_path / "one.json")


@pytest.mark.parametrize(("text", "sentence"), [
    ("{", "is no JSON"), ("[]", "no recording"), ('{"schema": 1}', "has no 'scenario'"),
])  # fmt: skip
def test_half_a_file_is_refused(text: str, sentence: str, tmp_path: Path) -> None:
    (tmp_path / "one.json").write_text(text)

    with pytest.raises(RecordingError, match=sentence):
        read(tmp_path / "one.json")


# ---- walking


def test_the_same_choices_give_the_same_trace_each_time() -> None:
    walker, failure = found("tso", drop=("evr_wake",))
    first = walker.along(failure.choices)

    assert first.kind == "lost wake-up"
    assert all(walker.along(failure.choices) == first for _ in range(REPEATED))


def test_a_beginning_has_not_failed_and_says_who_can_go_on() -> None:
    walker, failure = found("sc", variant=DRIVER)

    walked = walker.along(failure.choices[:5])

    assert (walked.kind, walked.choices) == (None, failure.choices[:5])
    assert {context_of(choice) for choice in walked.open} == {"cpu0", "reader"}


def test_chance_is_a_matter_of_its_seed() -> None:
    walker, failure = found("sc", variant=DRIVER)
    runs = [walker.along(failure.choices[:5], then="random", seed=seed).choices for seed in (1, 2, 1)]

    assert runs[0] == runs[2] != runs[1]


def test_choices_that_do_not_fit_are_left_out_or_refused() -> None:
    walker, failure = found("sc", variant=DRIVER)
    choices = ("gpu7", *failure.choices[:3], "cpu0~", *failure.choices[3:5])

    assert walker.fitted(choices) == failure.choices[:5]
    with pytest.raises(ReplayError, match="gpu7"):
        walker.along(choices)


def test_the_stores_that_wait_are_shown_until_they_are_flushed() -> None:
    walker, failure = found("tso", drop=("evr_wake",))
    walked = walker.along(failure.choices)

    waiting = [[store.site for store in pending.get("cpu0", [])] for pending in walked.pending()]
    stored = next(number for number, row in enumerate(walked.rows) if row.text.startswith("evr.entry"))
    flushed = next(number for number, row in enumerate(walked.rows) if row.text.startswith("~ evr.entry"))
    assert "evr.entry" in waiting[stored]
    assert waiting[flushed].count("evr.entry") == waiting[flushed - 1].count("evr.entry") - 1


def test_a_printed_trace_is_read_back() -> None:
    rows = [Row("cpu0", "evr.door page+0xc0 = 0x0"), Row("reader", "* take door = 1"), Row("cpu0", "-- mb evr_wake")]

    assert rows_of(columns(rows, ["cpu0", "reader", "hypervisor"])) == (rows, ["cpu0", "reader", "hypervisor"])


# ---- shortening, explaining


@pytest.mark.parametrize(("model", "arguments"), [("sc", {"variant": DRIVER}), ("tso", {"drop": ("evr_wake",)})])
def test_a_shorter_failure_is_of_the_same_kind_and_no_longer(model: str, arguments: dict[str, object]) -> None:
    walker, failure = found(model, **arguments)
    long = walker.along(failure.choices)

    short = shrink(walker, failure.choices, failure.kind)

    assert short.kind == "lost wake-up"
    assert short.cost <= long.cost
    assert short.cost[0] <= 4  # producer, reader, producer, and the last flush of each


def test_what_is_needless_goes() -> None:
    walker, failure = found("sc", variant=DRIVER)
    wandering = next(
        walked for seed in range(2000)
        if (walked := walker.along((), then="random", seed=seed)).kind == failure.kind and walked.cost[0] > 8
    )

    assert shrink(walker, wandering.choices, failure.kind).cost[0] <= 3


def test_the_barrier_that_was_left_out_is_named_and_where_one_would_help() -> None:
    _, failure = found("tso", drop=("evr_wake@reader",))

    sentences = forbidden_by(EventRing, failure)

    assert "SYNC(evr_wake), which was left out of reader: with it this trace is impossible" in sentences
    assert "a full barrier in reader between the store evr.door.lower and the load evr.state.prod" in sentences


def test_a_barrier_that_does_not_matter_is_not_named() -> None:
    _, failure = found("tso", drop=("evr_wake@reader", "sub_kick"))

    assert not any("sub_kick" in sentence for sentence in forbidden_by(EventRing, failure))


def test_stores_that_reach_memory_in_their_order_need_no_store_barrier() -> None:
    failure = explore(SubmissionRings(), model="tso", drop=["sub_kick"]).failure
    assert failure is not None
    lost = recording(scenario="submission-ring", choices=failure.choices, shared=failure.shared, model="tso", drop=("sub_kick",))

    sentences = forbidden_by(SubmissionRings, lost)

    assert "SYNC(sub_kick), which was left out: with it this trace is impossible" in sentences
    assert not any("store barrier" in sentence for sentence in sentences)


def test_where_the_order_of_the_code_is_wrong_no_barrier_is_blamed() -> None:
    _, failure = found("sc", variant=DRIVER)

    assert forbidden_by(EventRing, failure) == [
        f"the order of our own code: without the variant {DRIVER} this trace is impossible",
        "no barrier: each step is in program order, what has to change is the order in the code",
    ]


@pytest.mark.parametrize(("site", "sentence"), [
    ("evr_publish@cpu0", "a store barrier in cpu0 between evr.entry and evr.publish"),
    ("evr_publish@reader", "a load barrier in reader in front of evr.take.entry, which reads what is no longer there"),
])  # fmt: skip
def test_on_arm_stores_that_pass_each_other_and_loads_that_come_too_early_are_named(site: str, sentence: str) -> None:
    _, failure = found("arm", drop=(site,))

    assert sentence in forbidden_by(EventRing, failure)
