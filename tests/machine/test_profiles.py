# SPDX-License-Identifier: Apache-2.0
"""Profiles on a running machine: what each answers, and that a defect stays where it belongs."""

from __future__ import annotations

import errno
import json
import select
import subprocess
import sys
from typing import TYPE_CHECKING, Any

import pytest

from pvbus.tests.machine.test_kills import kill_and_wait_for_heir
from pvbus.tests.view.support import until
from pvbus.view.explain import explain

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path

DOMAINS = "[[domain]]\nid = 0\n[[domain]]\nid = 1\n"
NO_RECORD = "[inject]\nrecord_allocation_failures = 1\n"
SEED = 'profile = "seed"\n'
PVBUS = [sys.executable, "-m", "pvbus.supervisor"]
WAIT_MS = 10_000


def errno_of(call: Callable[..., Any], *arguments: Any, **named: Any) -> str:
    with pytest.raises(OSError) as caught:
        call(*arguments, **named)
    return errno.errorcode[caught.value.errno or 0]


def row(machine: Any, port: int) -> dict[str, Any] | None:
    return next((one for one in machine.ports(0) if one["port"] == port), None)


def all_up(machine: Any) -> bool:
    """Whether every process is up; the pool of spare ones may be filling itself."""
    return all(one["state"] == "up" or one["name"].startswith("file/spare.") for one in machine.status()["processes"])


def works(machine: Any) -> bool:
    """Whether a pair of other files gets its events, and every process of the machine is up."""
    with machine.open_evtchn(domain=1, nonblock=True) as near, machine.open_evtchn(domain=0, nonblock=True) as far:
        peer = far.bind_interdomain(1, near.bind_unbound_port(remote_domain=0))
        assert far.poll(select.POLLIN, WAIT_MS) & select.POLLIN       # born pending
        assert far.read_ports(8) == [peer]
        far.notify(peer)
        assert near.poll(select.POLLIN, WAIT_MS) & select.POLLIN
    machine.settle()
    return all_up(machine)


def duplicate(machine: Any) -> tuple[Any, int]:
    """Let a file with a VIRQ run into EEXIST: it holds a number as static when Xen hands it out."""
    file = machine.open_evtchn(domain=0, nonblock=True)
    port = file.bind_virq(3)
    file.bind_static(port + 1)
    assert errno_of(file.bind_unbound_port, 1) == "EEXIST"
    return file, port


# ---- what is shown


@pytest.mark.checklist("H1", "H2", "H3", "H4")
@pytest.mark.parametrize(("text", "profile", "variants"), [
    ("", "linux-6.12", []),
    ('profile = "strict"\n', "strict", ["strict-static-restriction"]),
    ('profile = "strict"\nvariants = ["double-close"]\n', "strict", ["double-close", "strict-static-restriction"]),
    (SEED, "seed", [
        "driver-wakeup-order", "duplicate-drops-ports", "leak-on-enomem", "double-close", "one-tasklet-pair", "offers-stall",
        "leaves-dirty", "work-allocation-retries", "wrong-signal-word", "rescind-queue", "work-per-cpu",
    ]),
])
def test_status_names_the_profile_and_what_is_switched_on(
    pvbus_boot: Any, text: str, profile: str, variants: list[str]
) -> None:
    booted = pvbus_boot(text + DOMAINS)
    command = [*PVBUS, "status", "--name", booted.name]

    plain = subprocess.run(command, capture_output=True, timeout=40, text=True, check=True)
    data = json.loads(subprocess.run([*command, "--json"], capture_output=True, timeout=40, check=True).stdout)

    assert (data["profile"], data["variants"]) == (profile, variants)
    assert data["inject"] == {"record_allocation_failures": 0, "ring_growth_failures": 0}
    assert f"profile {profile}; variants: {', '.join(variants) or 'none'}\n" in plain.stdout
    assert works(booted.machine)


@pytest.mark.parametrize(("text", "said"), [
    ('profile = "linux-2.6"\n', "profile: 'linux-2.6' is not one of linux-6.12, seed, strict"),
    ('variants = ["lossy"]\n', "variants: 'lossy' is not one of driver-wakeup-order, "),
    (
        "[[static_evtchn]]\ndomain = 0\nport = 20\nremote_domain = 5\nremote_port = 21\n",
        "static_evtchn[0]: remote_domain: there is no domain 5",
    ),
])
def test_a_configuration_that_makes_no_sense_ends_up_with_exit_code_2(tmp_path: Path, text: str, said: str) -> None:
    path = tmp_path / "machine.toml"
    path.write_text(text)

    up = [*PVBUS, "up", "--config", str(path), "--name", "refused"]
    done = subprocess.run(up, capture_output=True, timeout=40, text=True, check=False)

    assert done.returncode == 2
    assert done.stderr.startswith(f"pvbus up: {said}")
    assert done.stderr.count("\n") == 1


# ---- H1


@pytest.mark.checklist("H1", "A7.3")
def test_by_default_a_duplicate_leaves_what_its_file_has(pvbus_boot: Any) -> None:
    machine = pvbus_boot(DOMAINS).machine
    file, port = duplicate(machine)

    machine.raise_virq(3)

    assert file.poll(select.POLLIN, WAIT_MS) & select.POLLIN
    assert file.read_ports(8) == [port]
    assert file.enable([port]) == 1
    file.unbind(port + 1)
    file.close()
    assert machine.ports() == []


@pytest.mark.checklist("H1", "A7.3", "A10.4")
def test_in_the_seed_a_duplicate_loses_every_port_of_its_file_until_the_machine_stops(pvbus_boot: Any) -> None:
    machine = pvbus_boot(SEED + DOMAINS).machine
    file, port = duplicate(machine)

    assert [errno_of(file.unbind, number) for number in (port, port + 1)] == ["ENOTCONN"] * 2
    assert errno_of(file.notify, port) == "ENOTCONN"
    machine.raise_virq(3)
    assert file.poll(select.POLLIN, WAIT_MS) & select.POLLIN
    assert file.read_ports(8) == [port]     # its handler lives
    file.enable([port])                     # skipped: not the file's
    machine.raise_virq(3)
    machine.settle()
    assert file.poll(select.POLLIN, 0) & select.POLLIN == 0
    assert explain(machine, 0, port).state == "lost"
    file.close()

    for _ in range(2):
        assert (row(machine, port) or {})["file"] == "lost"
        assert explain(machine, 0, port).state == "lost"
        with machine.open_evtchn(domain=0, nonblock=True) as other:       # in the slot that the file had
            assert errno_of(other.bind_virq, 3) == "EEXIST"
            machine.raise_virq(3)
            machine.settle()
            assert not other.poll(select.POLLIN, 0) & select.POLLIN
        assert works(machine)
        kill_and_wait_for_heir(machine, "hypervisor")


# ---- H3, A6.3


@pytest.mark.checklist("H3", "A7.1")
def test_by_default_a_port_without_memory_for_its_record_is_closed(pvbus_boot: Any) -> None:
    machine = pvbus_boot(NO_RECORD + DOMAINS).machine
    with machine.open_evtchn(domain=0, nonblock=True) as file:
        assert errno_of(file.bind_virq, 3) == "ENOMEM"
        assert machine.ports() == []
        assert file.bind_virq(3) == 1
        assert machine.status()["inject"]["record_allocation_failures"] == 1


@pytest.mark.checklist("H3", "A7.1")
def test_in_the_seed_a_port_without_memory_for_its_record_leaks(pvbus_boot: Any) -> None:
    machine = pvbus_boot(SEED + NO_RECORD + DOMAINS).machine
    with machine.open_evtchn(domain=0, nonblock=True) as file:
        assert errno_of(file.bind_virq, 3) == "ENOMEM"
        assert errno_of(file.bind_virq, 3) == "EEXIST"      # it is bound, and nobody's
        assert file.bind_unbound_port(1) == 2
    kill_and_wait_for_heir(machine, "hypervisor")

    assert [(one["port"], one["state"], one["file"]) for one in machine.ports(0)] == [(1, "virq", "lost")]
    assert explain(machine, 0, 1).state == "lost"
    machine.raise_virq(3)
    machine.settle()
    assert all_up(machine)


@pytest.mark.checklist("A6.3", "A6.5")
def test_a_ring_without_memory_to_grow_keeps_what_is_in_it(pvbus_boot: Any) -> None:
    machine = pvbus_boot("[inject]\nring_growth_failures = 1\n" + DOMAINS).machine
    with machine.open_evtchn(domain=0, nonblock=True) as file:
        virq = file.bind_virq(3)
        for _ in range(63):
            file.bind_unbound_port(1)
        machine.raise_virq(3)
        machine.settle()

        assert errno_of(file.bind_unbound_port, 1) == "ENOMEM"

        (found,) = machine.status()["files"]
        assert (found["ring_size"], found["ports"]) == (64, 64)
        assert row(machine, 65) is None
        assert file.bind_unbound_port(1) == 65
        assert file.read_ports(8) == [virq]


# ---- H4


@pytest.mark.checklist("H4", "A7.3")
def test_by_default_a_handler_that_is_refused_costs_nobody_anything(pvbus_boot: Any) -> None:
    machine = pvbus_boot(DOMAINS).machine
    with machine.open_evtchn(domain=0, nonblock=True) as owner, machine.open_evtchn(domain=0, nonblock=True) as file:
        owner.bind_static(1)        # free: Xen will hand it out, and it has a handler

        assert errno_of(file.bind_unbound_port, 1) == "EBUSY"

        owner.unbind(1)
        assert file.bind_unbound_port(1) == 1


@pytest.mark.checklist("H4", "A7.3", "X6")
def test_in_the_seed_a_handler_that_is_refused_ends_its_file_and_no_other(pvbus_boot: Any) -> None:
    booted = pvbus_boot(SEED + DOMAINS)
    machine = booted.machine
    owner = machine.open_evtchn(domain=0, nonblock=True)
    file = machine.open_evtchn(domain=0, nonblock=True)
    port = file.bind_unbound_port(1)
    owner.bind_static(port + 1)

    assert errno_of(file.bind_unbound_port, 1) == "EIO"

    assert file.poll(select.POLLIN, WAIT_MS) & select.POLLHUP
    assert errno_of(file.unbind, port) == "EIO"
    until(lambda: row(machine, port) is None, "the dead file is released")
    until(lambda: "InvariantError: port 2 is closed twice" in booted.log, "its process says why")
    owner.unbind(port + 1)
    owner.close()
    file.close()
    assert works(machine)


# ---- H2


@pytest.mark.checklist("H2", "A9.5")
@pytest.mark.parametrize(("profile", "answer"), [("linux-6.12", "0"), ("seed", "0"), ("strict", "EACCES")])
def test_only_a_strict_machine_restricts_static_binds(pvbus_boot: Any, profile: str, answer: str) -> None:
    machine = pvbus_boot(f'profile = "{profile}"\n{DOMAINS}').machine
    with machine.open_evtchn(domain=0, nonblock=True) as file:
        file.restrict_domid(1)
        if answer == "0":
            file.bind_static(77)
            assert errno_of(file.bind_static, 77) == "EISCONN"
        else:
            assert errno_of(file.bind_static, 77) == answer
