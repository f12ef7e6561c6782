# SPDX-License-Identifier: Apache-2.0
"""Real processes follow a trace of the explorer: the driver's order loses the wake-up there, too, and ours does not."""

import select
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

from pvbus.shm.memory import GATE
from pvbus.tests.view.support import RUN_S_MAX
from pvbus.verify.bridge import BridgeError, Gate, steps_of
from pvbus.verify.explorer import explore
from pvbus.verify.explorer.shrink import shrink
from pvbus.verify.explorer.walk import Walked, Walker
from pvbus.verify.scenarios.event_ring import EventRing
from pvbus.view.explain import explain
from pvbus.view.pytest_plugin import environment

DRIVER = "driver-wakeup-order"
CONFIG = """\
{variants}
[[domain]]
id = 0
cpus = 1
platforms = ["xen"]
abi = "2-level"
"""
PROCESSES = {"cpu0": "cpu/0.0", "reader": "reader"}
EVENTS = 2
END_S_MAX = 10.0
HUNG_S = 0.3  # a reader that is told reads within a millisecond


def lost_wake_up() -> tuple[Walked, tuple[int, ...]]:
    """Give the trace of zoo 1, and the locations that it needs: no hint but the variant."""
    failure = explore(EventRing(events=EVENTS), variant=DRIVER).failure
    assert failure is not None
    walker = Walker(lambda: EventRing(events=EVENTS), model="sc", variant=DRIVER, shared=failure.shared)
    return shrink(walker, failure.choices, failure.kind), failure.shared


def ours(choices: tuple[str, ...], shared: tuple[int, ...]) -> Walked:
    """Give the same schedule over our own order: as far as it fits, then to the end."""
    walker = Walker(lambda: EventRing(events=EVENTS), model="sc", shared=shared)
    return walker.along(walker.fitted(choices), then="first")


@contextmanager
def reader(machine: str) -> Iterator[subprocess.Popen[bytes]]:
    """Start the reader's process; it has bound its ports."""
    process = subprocess.Popen(
        [sys.executable, "-m", "pvbus.verify.bridge", str(EVENTS)], env=environment() | {"PVBUS_MACHINE": machine},
        stdin=subprocess.PIPE, stdout=subprocess.PIPE, bufsize=0,
    )  # fmt: skip
    try:
        yield process
    finally:
        process.kill()
        process.wait(RUN_S_MAX)
        for stream in (process.stdin, process.stdout):
            assert stream is not None
            stream.close()


def said(process: subprocess.Popen[bytes], seconds: float) -> list[str]:
    """Return the words of the next line, or none when there is none in time."""
    assert process.stdout is not None
    return process.stdout.readline().decode().split() if select.select([process.stdout], [], [], seconds)[0] else []


def followed(machine: Any, gate: Gate, trace: Walked, process: subprocess.Popen[bytes]) -> list[int]:
    """Raise both events behind the gate, and let everybody follow the trace to its end. Return the ports."""
    ports = [int(port) for port in said(process, RUN_S_MAX)[1:]]
    steps = steps_of(trace)
    gate.write(steps, PROCESSES)
    gate.hold()
    for number in range(EVENTS):
        machine.raise_virq(3 + number)
    assert process.stdin is not None
    process.stdin.write(b"go\n")
    gate.play()
    assert gate.await_end(END_S_MAX), f"stands at step {gate.turn} of {gate.steps}: {steps[gate.turn]}"
    return ports


@pytest.fixture
def gate(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Gate:
    """Return a gate that the machines and readers of this test follow."""
    monkeypatch.setenv(GATE, str(tmp_path / "gate"))
    return Gate.make(tmp_path / "gate")


def test_in_the_driver_s_order_the_reader_of_a_real_machine_sleeps_for_ever(gate: Gate, pvbus_boot: Any) -> None:
    trace, _ = lost_wake_up()
    booted = pvbus_boot(CONFIG.format(variants=f'variants = ["{DRIVER}"]'))

    with reader(booted.name) as process:
        ports = followed(booted.machine, gate, trace, process)
        first, silence = said(process, END_S_MAX), said(process, HUNG_S)
        found = explain(booted.machine, 0, ports[1])

    assert first == ["read", str(ports[0])]
    assert silence == []
    assert found.state == "not-woken"
    assert "lost wake-up" in found.text


def test_on_the_same_schedule_our_reader_gets_both_events(gate: Gate, pvbus_boot: Any) -> None:
    trace, shared = lost_wake_up()
    schedule = ours(trace.choices, shared)
    assert (schedule.kind, schedule.open) == (None, ())
    booted = pvbus_boot(CONFIG.format(variants=""))

    with reader(booted.name) as process:
        ports = followed(booted.machine, gate, schedule, process)
        read = said(process, END_S_MAX)[1:] + said(process, END_S_MAX)[1:]

    assert [int(port) for port in read] == ports


def test_a_step_of_a_context_that_no_process_stands_for_is_refused(tmp_path: Path) -> None:
    trace, _ = lost_wake_up()

    with pytest.raises(BridgeError, match="one of reader, which no process"):
        Gate.make(tmp_path / "gate").write(steps_of(trace), {"cpu0": "cpu/0.0"})
