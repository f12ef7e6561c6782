# SPDX-License-Identifier: Apache-2.0
"""What `explain` says of states that a machine passes in microseconds: judged from evidence made by hand."""

from dataclasses import replace
from typing import Any

import pytest

from pvbus.shm.layout import Irq, Port
from pvbus.view.evidence import Evidence, OpenFile, Ring
from pvbus.view.explain import judge
from pvbus.view.processes import Process, User, condition_of, user_of
from pvbus.view.route import duration, hops

HYPERVISOR = Process("hypervisor", 2, 0, "running")
CPU = Process("cpu/0.0", 3, 0, "running")
DEAD_CPU = Process("cpu/0.0", 0, 2, "dead")
FILE = OpenFile(
    slot=0,
    name="file/0.0",
    label="evtchn:cat",
    is_open=True,
    overflowed=False,
    poisoned=False,
    dropped=0,
    opened_ns=10,
    process=Process("file/0.0", 4, 0, "running"),
    users=(User(5, "cat", "running"),),
    ring=Ring(0, 64, (), door=False),
    waiting=None,
)
BOUND = 1 | Irq.ENABLED
PUT_OFF = Irq.ACTIVE | Irq.EOI_PENDING | Irq.DELAYED
IDLE = Evidence(
    domain=0,
    port=6,
    state=Port.INTERDOMAIN,
    peer_closed=False,
    static=False,
    raw=False,
    remote_domain=1,
    remote_port=7,
    irq=BOUND,
    pending=False,
    masked=False,
    pending_since_ns=1_000,
    served_at_ns=2_000,
    now_ns=5_000_002_000,
    file=FILE,
    hypervisor=HYPERVISOR,
    cpus=(CPU,),
    cpu_asleep=False,
    upcall_pending=False,
    server=None,
    sender=None,
    sender_name="",
    driver_order=False,
    fifo=True,
    linked=False,
    queue=(0, 7),
    put_off_ns=0,
)


@pytest.mark.parametrize(
    ("changes", "state", "said"),
    [
        ({}, "idle", "5.0 s ago"),
        ({"pending": True}, "on-its-way", "in no queue"),
        ({"pending": True, "fifo": False}, "on-its-way", "cpu/0.0 has been told"),
        ({"pending": True, "linked": True}, "on-its-way", "linked in the queue of priority 7 of cpu/0.0: cpu/0.0 has been told"),
        ({"pending": True, "linked": True, "cpu_asleep": True}, "on-its-way", "about to be told"),
        ({"pending": True, "linked": True, "cpus": (DEAD_CPU,)}, "cpu-not-running", "queue of priority 7 of cpu/0.0"),
        ({"irq": BOUND | PUT_OFF, "put_off_ns": 9_000_000}, "eoi-put-off", "put off until 9 ms from now"),
        ({"irq": BOUND | PUT_OFF, "put_off_ns": 9_000_000}, "eoi-put-off", "no other event is pending"),
        ({"irq": BOUND | PUT_OFF, "put_off_ns": 1, "pending": True, "masked": True}, "eoi-put-off", "it is pending for 5.0 s"),
        (
            {"irq": BOUND | PUT_OFF, "put_off_ns": 1, "hypervisor": HYPERVISOR._replace(condition="stopped")},
            "hypervisor-not-running", "put off until",
        ),
        ({"pending": True, "cpus": (DEAD_CPU,)}, "cpu-not-running", "is dead (restarted 2 times so far)"),
        ({"pending": True, "cpus": ()}, "no-cpu", "no CPU serves it"),
        ({"irq": BOUND | Irq.IN_SERVICE | Irq.ACTIVE, "server": CPU}, "in-service", "into the event ring"),
        ({"irq": BOUND | Irq.IN_SERVICE | Irq.ACTIVE, "server": DEAD_CPU}, "cpu-not-running", "in service"),
        ({"pending": True, "masked": True, "irq": BOUND | Irq.EXPLICIT}, "disabled", "unbound"),
        ({"pending": True, "masked": True, "irq": BOUND | Irq.TEMPORARY}, "masked", "for a moment"),
        ({"pending": True, "masked": True}, "masked", "being bound"),
        ({"irq": 0, "file": None}, "no-handler", "no handler"),
        ({"irq": 0, "file": None, "pending": True}, "no-handler", "An event is pending"),
        ({"file": replace(FILE, is_open=False)}, "file-gone", "being closed"),
        ({"irq": 1 | Irq.ACTIVE, "file": replace(FILE, ring=None)}, "not-written-back", "is not known"),
        ({"irq": 0, "file": None, "raw": True}, "no-handler", "by a hypercall of its domain's kernel"),
        ({"irq": 0, "file": None, "static": True}, "no-handler", "one end of a static channel"),
        ({"irq": BOUND | Irq.LOST}, "lost", "can neither write it back nor unbind it"),
        ({"irq": Irq.KERNEL | Irq.LOST, "file": None}, "lost", "released without a record"),
        ({"irq": Irq.LOST, "file": None}, "lost", "has leaked"),
        ({"state": Port.IPI, "pending_since_ns": 0}, "never-raised", "has not been raised"),
    ],
)
def test_a_state_of_a_moment_has_its_sentence(changes: dict[str, Any], state: str, said: str) -> None:
    evidence = replace(IDLE, **changes)

    answer = judge(evidence)

    assert answer.state == state
    assert said in answer.text
    assert "0:6" in answer.text
    assert answer.next
    assert hops(evidence)


@pytest.mark.parametrize(
    ("span_ns", "said"),
    [
        (-5, "0 µs"),
        (12_345, "12 µs"),
        (12_345_678, "12 ms"),
        (3_210_000_000, "3.2 s"),
        (600 * 10**9, "10 min"),
        (9_000 * 10**9, "2 h"),
    ],
)
def test_a_span_of_time_is_said_in_two_or_three_figures(span_ns: int, said: str) -> None:
    assert duration(span_ns) == said


def test_a_process_that_is_gone_is_dead_and_has_no_name() -> None:
    assert condition_of(0) == "dead"
    assert condition_of(2**22 + 1) == "dead"
    assert str(user_of(2**22 + 1)) == f"pid {2**22 + 1} (gone)"
