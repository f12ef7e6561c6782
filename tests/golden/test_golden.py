# SPDX-License-Identifier: Apache-2.0
"""The machine answers what the real driver on a real hypervisor answered, step by step."""

from __future__ import annotations

from collections import Counter

import pytest

from pvbus.tests.contract.support import wait_until
from pvbus.tests.golden.calls import CALLS
from pvbus.tests.golden.children import CHILD_PLANS
from pvbus.tests.golden.hidden import BEFORE, HIDDEN_CALLS
from pvbus.tests.golden.replayer import NOT_COMPARED, NOT_EXPRESSIBLE, SUBSTITUTED, replay, scenarios
from pvbus.view.pytest_plugin import BootedMachine

SCENARIOS = scenarios()

# The recording kernel: it held four VIRQs and its first ports, and there was no domain 1.
CONFIG = """\
[[domain]]
id = 0
cpus = {cpus}
platforms = ["xen"]
abi = "{abi}"
kernel_virqs = [0, 2, 9, 16]
kernel_ports = 13
affinity = "{affinity}"
"""
SHAPES = {
    f"{abi}-{name}": (cpus, affinity, abi)
    for abi in ("fifo", "2-level")
    for name, cpus, affinity in (("one-cpu", 1, "vcpu0"), ("two-cpus", 2, "vcpu0"), ("two-cpus-spread", 2, "spread"))
}


@pytest.fixture(scope="module", params=SHAPES)
def shape(request: pytest.FixtureRequest) -> tuple[int, str, str]:
    return SHAPES[request.param]


@pytest.fixture(scope="module")
def pvbus_config(shape: tuple[int, str, str]) -> str:
    cpus, affinity, abi = shape
    return CONFIG.format(cpus=cpus, affinity=affinity, abi=abi)


@pytest.mark.checklist("A1.1", "A4.1", "A5.1", "A6.1", "A9.1", "A10.1", "A11.1", "A12.1")
@pytest.mark.parametrize("scenario", SCENARIOS)
def test_the_machine_gives_the_recorded_answers(
    pvbus_shared_machine: BootedMachine, shape: tuple[int, str, str], scenario: str
) -> None:
    machine = pvbus_shared_machine.machine
    steps = SCENARIOS[scenario]

    result = replay(steps, machine, cpus=shape[0], abi=shape[2])

    assert not result.differences, "\n".join(result.differences)
    assert result.compared + result.made_only + result.not_expressible == len(steps)
    assert result.not_expressible == sum(name == scenario for name, _ in NOT_EXPRESSIBLE)
    wait_until(lambda: machine.status()["files"] == [], "every file is closed")


@pytest.mark.checklist("A9.1", "A9.2", "A9.3", "A9.4", "A9.5", "A9.6", "A9.7", "A9.8")
@pytest.mark.parametrize(
    "scenario", ["open_two", "loopback_same_fd", "restrict", "stale_entry", "port_reuse", "static_restricted"]
)
def test_ioctls_by_number_and_structure_give_the_recorded_answers(
    pvbus_shared_machine: BootedMachine, shape: tuple[int, str, str], scenario: str
) -> None:
    result = replay(SCENARIOS[scenario], pvbus_shared_machine.machine, cpus=shape[0], raw=True)

    assert not result.differences, "\n".join(result.differences)


def test_the_recording_is_complete() -> None:
    assert len(SCENARIOS) == 29
    assert sum(len(steps) for steps in SCENARIOS.values()) == 701


def test_every_recorded_call_is_known_to_the_replayer() -> None:
    recorded = {
        step.call for steps in SCENARIOS.values() for step in steps if step.key not in NOT_EXPRESSIBLE
    }

    assert recorded <= set(CALLS | HIDDEN_CALLS)


def test_every_table_of_exceptions_names_steps_that_exist() -> None:
    recorded = {step.key for steps in SCENARIOS.values() for step in steps}
    planned = {(name, plan.fork_before) for name, plans in CHILD_PLANS.items() for plan in plans}

    assert set(NOT_EXPRESSIBLE) | set(SUBSTITUTED) | set(BEFORE) | planned <= recorded
    assert not set(NOT_EXPRESSIBLE) & set(SUBSTITUTED)


def test_only_steps_about_bad_pointers_and_device_nodes_are_not_expressible() -> None:
    steps = {step.key: step for steps in SCENARIOS.values() for step in steps}

    left_out = Counter(steps[key].call for key in NOT_EXPRESSIBLE)

    assert left_out == {"write": 3, "read": 1, "partial_copy_happened": 1, "S_ISCHR": 1, "rdev": 1}


def test_steps_that_are_made_but_not_compared_are_those_that_the_recorder_marked() -> None:
    marked = Counter(step.cmp for steps in SCENARIOS.values() for step in steps if step.cmp in NOT_COMPARED)

    assert marked == {"info": 26}


def test_a_wrong_answer_is_seen() -> None:
    """The replayer catches a planted bug: a device that never has an event."""

    class SilentFile:
        def poll(self, events: int, timeout_ms: int) -> int:
            return 0

        def bind_unbound_port(self, remote_domain: int) -> int:
            return 14

        def close(self) -> None:
            pass

    class SilentMachine:
        def open_evtchn(self, domain: int, nonblock: bool, flags: int) -> SilentFile:
            return SilentFile()

    result = replay(SCENARIOS["bind_unbound_domids"], SilentMachine(), cpus=1)

    assert any("step 3:" in text and "golden 'p1'" in text for text in result.differences)
    assert any("step 16:" in text and "'OUT', 'WRNORM'" in text for text in result.differences)
