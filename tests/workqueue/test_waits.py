# SPDX-License-Identifier: Apache-2.0
"""Waiting for an answer: what a completion does, and what comes before the wait, behind it, or never."""

import pytest

from pvbus.actors.runtime import vmbus_wire as wire
from pvbus.actors.workqueue.waits import Reply, Request, Steps
from pvbus.tests.workqueue.rig import Guest

OFFERED = wire.AllOffersDelivered()


def waits(request: Request, deadline_s: float = 5.0) -> Steps[object]:
    return (yield Reply(request, deadline_s))


@pytest.mark.checklist("X18")
def test_an_answer_wakes_one_waiter_and_the_next_answer_the_next() -> None:
    guest = Guest()
    requests = [guest.requests.enter(lambda _: True) for _ in range(2)]
    outcomes = [guest.start(waits(request)) for request in requests]

    seen = []
    for _ in range(3):
        found = guest.requests.deliver(OFFERED)
        guest.tasks.pump()
        seen.append((found, [list(outcome) for outcome in outcomes]))

    assert seen == [(True, [[OFFERED], []]), (True, [[OFFERED], [OFFERED]]), (False, [[OFFERED], [OFFERED]])]


@pytest.mark.checklist("X18", "X13")
def test_an_answer_to_everybody_wakes_everybody() -> None:
    guest = Guest()
    outcomes = [guest.start(waits(guest.requests.enter(lambda _: True))) for _ in range(3)]

    assert guest.requests.deliver(OFFERED, every=True)
    guest.tasks.pump()

    assert outcomes == [[OFFERED]] * 3


@pytest.mark.checklist("X18", "B9.4")
def test_an_answer_that_comes_before_the_wait_is_remembered() -> None:
    guest = Guest()
    request = guest.requests.enter(lambda _: True)
    guest.requests.deliver(OFFERED)

    assert guest.run(waits(request)) == OFFERED
    assert guest.clock.now_ns() == 0


@pytest.mark.checklist("X18")
@pytest.mark.parametrize("seconds", [0, 0.25, 5])
def test_without_an_answer_the_wait_ends_with_nothing_when_its_time_is_up_and_no_later(seconds: float) -> None:
    guest = Guest()
    request = guest.requests.enter(lambda _: True)

    assert guest.run(waits(request, seconds)) is None

    assert guest.clock.now_ns() == round(seconds * 1e9)
    guest.requests.unlink(request)
    assert not guest.requests.deliver(OFFERED)      # too late: nobody's
