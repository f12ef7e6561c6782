# SPDX-License-Identifier: Apache-2.0
"""`explain`, on a machine that is put into each of the states that it tells apart."""

import contextlib
import os
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator
from typing import Any

import pytest

from pvbus.shm import channel
from pvbus.shm.layout import FilePage, Machine, Submission
from pvbus.tests.view.conftest import CONFIG
from pvbus.tests.view.support import pid_of, stopped, until
from pvbus.view.explain import Explanation, explain
from pvbus.view.pytest_plugin import environment

READ_MAX = 4096
RING_SIZE_FIRST = 64
USER = """
import sys
from pvbus.actors.client import attach
with attach(sys.argv[1]) as machine:
    file = machine.open_evtchn(domain=0, nonblock=True)
    print(file.bind_unbound_port(remote_domain=0), flush=True)
    sys.stdin.read()
"""


@pytest.fixture(scope="module", params=["fifo", "2-level"])
def pvbus_config(request: Any) -> str:
    """Return the machine of the view tests, on each ABI."""
    return CONFIG.replace('platforms = ["xen"]', f'platforms = ["xen"]\nabi = "{request.param}"')


class Pair:
    """Two connected ports of domain 0, in two files: `near` hears what `far` notifies."""

    def __init__(self, machine: Any, opened: Callable[..., Any]) -> None:
        self.machine, self.near, self.far = machine, opened(), opened()
        self.port = self.near.bind_unbound_port(remote_domain=0)
        self.far_port = self.far.bind_interdomain(0, self.port)
        machine.settle()

    @property
    def slot(self) -> int:
        """The slot of the near file."""
        return (int(self.machine.inspector().irq_word(0, self.port)) & 0xFFF) - 1

    def raise_it(self) -> None:
        """Notify the near port, and wait until that is where it can go."""
        self.far.notify(self.far_port)
        self.machine.settle()

    def explain(self) -> Explanation:
        """Explain the near port, and check what holds for every explanation."""
        found = explain(self.machine, 0, self.port)
        check_form(found)
        return found


def check_form(found: Explanation) -> None:
    """Check that an explanation is a sentence about its port, with hops and what moves it on."""
    assert f"{found.domain}:{found.port}" in found.text
    assert found.text.endswith(".")
    assert found.next
    assert not found.next.endswith(".")
    assert found.steps[0]["where"] == "binding"
    assert all(set(step) == {"where", "holds", "detail"} for step in found.steps)


def holding(found: Explanation) -> list[str]:
    """Return the hops at which an event is."""
    return [step["where"] for step in found.steps if step["holds"]]


@pytest.fixture
def pair(machine: Any, opened: Callable[..., Any]) -> Pair:
    """Return two connected ports."""
    return Pair(machine, opened)


# ---- nothing to deliver to


def test_a_domain_that_is_none_is_named_with_those_that_are(machine: Any) -> None:
    found = explain(machine, 7, 1)

    assert (found.state, found.found) == ("no-domain", False)
    assert "no domain 7" in found.text
    assert "0, 1" in found.text


def test_a_port_beyond_the_abi_is_out_of_range(machine: Any) -> None:
    ports_max = 131072 if channel.is_fifo(machine.inspector().domain_pages[0]) else 4096
    for port in (ports_max, -1, 2**32):
        found = explain(machine, 0, port)

        assert (found.state, found.found) == ("out-of-range", False)
        assert str(port) in found.text
        assert f"1 to {ports_max - 1}" in found.text


def test_a_port_that_nobody_has_bound_is_free(machine: Any) -> None:
    found = explain(machine, 0, 4000)

    check_form(found)
    assert (found.state, found.found) == ("free", True)


def test_port_0_is_reserved(machine: Any) -> None:
    assert explain(machine, 0, 0).state == "reserved"


def test_a_port_of_the_kernel_says_so_and_names_its_virq(machine: Any) -> None:
    found = explain(machine, 0, 1)

    check_form(found)
    assert found.state == "kernel"
    assert "VIRQ 0" in found.text
    assert explain(machine, 0, 2).state == "kernel"


def test_a_static_handler_without_a_channel_is_told_from_a_free_port(machine: Any, opened: Any) -> None:
    file = opened()
    file.bind_static(4001)

    found = explain(machine, 0, 4001)

    check_form(found)
    assert found.state == "no-channel"
    file.unbind(4001)


# ---- nothing on its way


def test_a_port_without_a_peer_says_who_may_bind_it(machine: Any, opened: Any) -> None:
    port = opened().bind_unbound_port(remote_domain=1)

    found = explain(machine, 0, port)

    check_form(found)
    assert found.state == "unbound"
    assert f"bind_interdomain(0, {port})" in found.next
    assert "domain 1" in found.text


def test_a_port_that_is_connected_and_was_not_notified_was_never_raised(pair: Pair) -> None:
    found = pair.explain()

    assert found.state == "never-raised"
    assert f"notify({pair.far_port})" in found.next
    assert holding(found) == []


def test_a_virq_that_was_not_raised_says_how_to_raise_it(machine: Any, opened: Any) -> None:
    port = opened().bind_virq(3)

    found = explain(machine, 0, port)

    check_form(found)
    assert found.state == "virq-not-raised"
    assert "pvbus virq 3" in found.next


def test_a_peer_that_closed_its_end_is_told_from_one_that_never_came(pair: Pair) -> None:
    pair.raise_it()
    assert pair.near.read_ports(4) == [pair.port]
    pair.near.enable([pair.port])
    pair.far.close()
    pair.machine.settle()

    found = pair.explain()

    assert found.state == "peer-closed"
    assert "has closed its end" in found.text


def test_a_port_whose_events_are_all_done_is_idle(pair: Pair) -> None:
    pair.raise_it()
    pair.near.read(READ_MAX)
    pair.near.enable([pair.port])
    pair.machine.settle()

    found = pair.explain()

    assert found.state == "idle"
    assert holding(found) == []


# ---- delivered, and not taken


def test_an_unread_event_says_where_in_the_ring_it_lies(pair: Pair) -> None:
    first = pair.near.bind_interdomain(0, pair.far.bind_unbound_port(remote_domain=0))
    pair.machine.settle()
    pair.raise_it()

    found = pair.explain()

    assert found.state == "unread"
    assert "position 2 of 2" in found.text
    assert "doorbell is raised" in found.text
    assert str(os.getpid()) in found.text
    assert holding(found) == ["event ring"]
    assert explain(pair.machine, 0, first).state == "unread"


def test_an_event_behind_an_unread_one_is_mentioned(pair: Pair) -> None:
    pair.raise_it()
    pair.raise_it()

    found = pair.explain()

    assert found.state == "unread"
    assert "Another event is pending behind it" in found.text
    assert holding(found) == ["pending bit", "event ring"]


def test_an_unread_event_whose_doorbell_is_down_wakes_nobody(pair: Pair) -> None:
    pair.raise_it()
    pair.near._shared.page.store32(FilePage.DOOR, 0)

    found = pair.explain()

    assert found.state == "not-woken"
    assert "a reader that sleeps is not woken" in found.text


def test_with_the_order_of_the_driver_a_lost_wake_up_is_called_one(pvbus_boot: Any) -> None:
    machine = pvbus_boot(f'variants = ["driver-wakeup-order"]\n{CONFIG}').machine
    pair = Pair(machine, lambda: machine.open_evtchn(domain=0, nonblock=True))
    pair.raise_it()
    pair.near._shared.page.store32(FilePage.DOOR, 0)

    found = pair.explain()

    assert found.state == "not-woken"
    assert "lost wake-up" in found.text


def test_a_reader_that_is_stopped_is_named(machine: Any, opened: Any) -> None:
    with user_process(machine) as (user, port):
        far = opened()
        far_port = far.bind_interdomain(0, port)
        far.notify(far_port)
        machine.settle()
        with stopped(user.pid):
            found = explain(machine, 0, port)

    check_form(found)
    assert found.state == "reader-stopped"
    assert f"kill -CONT {user.pid}" in found.next


def test_an_event_that_was_read_waits_for_its_write_back(pair: Pair) -> None:
    pair.raise_it()
    pair.near.read(READ_MAX)

    found = pair.explain()

    assert found.state == "not-written-back"
    assert "no other event is pending" in found.text
    assert holding(found) == [f"user of file/0.{pair.slot}"]


def test_a_pending_masked_event_says_who_has_not_written_back(pair: Pair) -> None:
    pair.raise_it()
    pair.near.read(READ_MAX)
    pair.raise_it()

    found = pair.explain()

    assert found.state == "pending-masked"
    assert f"pid {os.getpid()}" in found.text
    assert "not written the port back" in found.text
    assert "pending bit" in holding(found)


def test_an_overflowed_ring_says_what_ends_it(pair: Pair) -> None:
    for _ in range(RING_SIZE_FIRST + 1):  # written back without being read: it comes again and again
        pair.raise_it()
        pair.near.enable([pair.port])
    pair.machine.settle()

    found = pair.explain()

    assert found.state == "overflowed"
    assert "EFBIG" in found.text
    assert "of 64 entries" in found.text
    assert "RESET" in found.next
    pair.near.reset()
    pair.near.enable([pair.port])
    pair.machine.settle()
    assert pair.explain().state == "idle"


def test_a_poisoned_file_says_that_it_must_be_opened_again(pair: Pair) -> None:
    pair.near._shared.page.store64(FilePage.CONS, 12345)
    pair.raise_it()

    found = pair.explain()

    assert found.state == "poisoned"
    assert "EIO" in found.text


# ---- somebody does not run


def test_a_cpu_that_is_stopped_holds_the_pending_event(pair: Pair) -> None:
    cpu = pid_of(pair.machine, "cpu/0.0")
    with stopped(cpu):
        pair.far.notify(pair.far_port)
        until(lambda: pair.machine.inspector().is_pending(0, pair.port), "the port is pending")

        found = pair.explain()

    assert found.state == "cpu-not-running"
    assert "cpu/0.0" in found.text
    assert "pending for" in found.text
    queue = "queue of priority 7 of cpu/0.0"
    fifo = channel.is_fifo(pair.machine.inspector().domain_pages[0])
    assert (queue in holding(found)) == (f"linked in the {queue}" in found.text) == fifo
    assert f"kill -CONT {cpu}" in found.next
    until(lambda: pair.explain().state == "unread", "the CPU that goes on delivers")


def test_a_hypervisor_that_is_stopped_leaves_notifies_in_the_submission_ring(pair: Pair) -> None:
    hypervisor = pid_of(pair.machine, "hypervisor")
    with stopped(hypervisor):
        before = pair.explain()
        pair.far.notify(pair.far_port)

        found = pair.explain()

    assert before.state == found.state == "hypervisor-not-running"
    assert "Nothing is on its way" in before.text
    assert "1 notify waits in the submission ring" in found.text
    assert f"kill -CONT {hypervisor}" in found.next
    assert any("submission ring" in hop for hop in holding(found))
    until(lambda: pair.explain().state == "unread", "the hypervisor that goes on takes it")


def test_a_write_back_that_the_hypervisor_has_not_taken_is_seen(pair: Pair) -> None:
    pair.raise_it()
    pair.near.read(READ_MAX)
    with stopped(pid_of(pair.machine, "hypervisor")):
        pair.near.enable([pair.port])

        found = pair.explain()

    assert found.state == "hypervisor-not-running"
    assert "has been written back" in found.text
    until(lambda: pair.explain().state == "idle", "the write-back is taken")


def test_a_file_whose_process_died_is_gone(pair: Pair) -> None:
    file_process = pid_of(pair.machine, f"file/0.{pair.slot}")
    with stopped(pid_of(pair.machine, "hypervisor")):  # which would have released it at once
        os.kill(file_process, signal.SIGKILL)
        until(lambda: pair.explain().state == "file-gone", "the death is seen")
    until(lambda: pair.explain().state == "free", "the release")


def test_an_explanation_is_plain_data(pair: Pair) -> None:
    data = pair.explain().as_dict()

    assert {"domain", "port", "state", "text", "next", "steps", "found"} == set(data)


def test_looking_changes_nothing(pair: Pair) -> None:
    pair.raise_it()
    look = pair.machine.inspector()

    def words() -> tuple[int, ...]:
        taken = Machine.submission(0, Submission.TAKEN)
        return look.irq_word(0, pair.port), look.port_word(0, pair.port), look.machine.load64(taken)

    before = words()
    for _ in range(3):
        pair.explain()

    assert words() == before
    assert pair.near.read_ports(4) == [pair.port]


@contextlib.contextmanager
def user_process(machine: Any) -> Iterator[tuple[subprocess.Popen[str], int]]:
    """Run a user that has a port for domain 0 and does not read."""
    user = subprocess.Popen(
        [sys.executable, "-c", USER, machine.name],
        env=environment(),
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
    )
    assert user.stdin is not None
    assert user.stdout is not None
    try:
        yield user, int(user.stdout.readline())
    finally:
        user.stdin.close()
        user.wait(timeout=10)
        user.stdout.close()
