# SPDX-License-Identifier: Apache-2.0
"""A12.7, A12.8: references that threads and forked children make, use and drop at the same time."""

import contextlib
import os
import random
import re
import threading
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, overload

import pytest

from pvbus.tests.contract.support import InThread, bound, connect, errno_of, pack, take, wait_until
from pvbus.tests.contract.test_file_system import in_forked_child
from pvbus.tests.golden.children import Child
from pvbus.tests.golden.session import Answer, Session, Step

Opened = Callable[..., Any]
STEP = Step("contract", 1, "fork", "exact", "call", "", {}, {})


def open_files(machine: Any) -> int:
    return len(machine.status()["files"])


def our_mappings() -> int:
    return len(re.findall("pvbus-", Path("/proc/self/maps").read_text()))


def our_descriptors() -> int:
    return len(list(Path("/proc/self/fd").iterdir()))


@pytest.mark.checklist("A10.3", "A1.1")
def test_a_file_is_named_after_the_thread_that_opened_it(machine: Any, opened: Opened) -> None:
    def named() -> None:
        Path("/proc/thread-self/comm").write_text("a-name-of-twenty-one")
        opened()

    InThread(named).result()

    assert "evtchn:a-name-of-twent" in [file["name"] for file in machine.status()["files"]]


@pytest.mark.checklist("A10.3", "A12.5")
def test_write_notify_and_binds_go_on_while_a_reader_sleeps(machine: Any, opened: Opened) -> None:
    pair = connect(machine, opened(nonblock=False), opened())
    pair.send()
    pair.rx.read(4096)
    reader = InThread(lambda: pair.rx.read(4096))
    assert reader.sleeps()

    assert pair.rx.write(pack(pair.rx_port)) == 4
    pair.rx.notify(pair.rx_port)
    pair.rx.unbind(pair.rx.bind_unbound_port(remote_domain=0))

    assert reader.sleeps()
    pair.send()
    assert reader.result() == pack(pair.rx_port)


@pytest.mark.checklist("A12.8", "A10.4")
def test_a_file_closed_under_two_readers_lives_until_the_second_returns(machine: Any, opened: Opened) -> None:
    pair = connect(machine, opened(nonblock=False), opened())
    readers = [InThread(lambda: pair.rx.read(4096)) for _ in range(2)]
    assert all(reader.sleeps() for reader in readers)
    pair.rx.close()

    pair.send()
    wait_until(lambda: any(reader.done.is_set() for reader in readers), "one returns")
    machine.settle()

    assert pair.rx_port in bound(machine)
    assert sum(reader.sleeps() for reader in readers) == 1
    assert errno_of(pair.rx.write, pack(pair.rx_port)) == "EBADF"
    # Nobody can write the port back any more, so the second reader ends with its file's process.
    process = next(file["process_pid"] for file in machine.status()["files"] if pair.rx_port in ports_of(machine, file))
    os.kill(process, 9)
    for reader in readers:
        reader.result()
    assert sorted(reader.errno for reader in readers) == ["", "EIO"]
    wait_until(lambda: pair.rx_port not in bound(machine), "the port is free")


def ports_of(machine: Any, file: dict[str, Any]) -> set[int]:
    return {port["port"] for port in machine.ports() if port["file"] == f"file/{file['domain']}.{file['slot']}"}


@pytest.mark.checklist("A12.8", "A12.7")
def test_what_was_closed_under_a_reader_is_not_inherited_by_a_fork(machine: Any, opened: Opened) -> None:
    pair = connect(machine, opened(nonblock=False), opened())
    reader = InThread(lambda: pair.rx.read(4096))
    assert reader.sleeps()
    pair.rx.close()

    child = Child(Session(machine, 1), [STEP], lambda _session, _step: Answer())
    try:
        child.make(STEP)
        pair.tx.notify(pair.tx_port)
        assert reader.result() == pack(pair.rx_port)
        wait_until(lambda: pair.rx_port not in bound(machine), "the child does not keep it")
    finally:
        assert child.reap() == 0


@pytest.mark.checklist("A12.7", "A10.4")
def test_a_killed_child_that_held_the_last_reference_releases(machine: Any, opened: Opened) -> None:
    pair = connect(machine, opened(), opened())
    child = Child(Session(machine, 1), [STEP], lambda _session, _step: Answer(ret=pair.rx.bind_unbound_port(0)))
    try:
        theirs = child.make(STEP).ret
        pair.rx.close()
        pair.send()
        assert {theirs, pair.rx_port} <= bound(machine)
        os.kill(child.pid, 9)
    finally:
        assert child.reap() == -9

    wait_until(lambda: not {theirs, pair.rx_port} & bound(machine), "the ports are free")


@pytest.mark.checklist("A12.7", "A1.1")
def test_a_grandchild_uses_a_file_that_its_parent_never_touched(machine: Any, opened: Opened) -> None:
    pair = connect(machine, opened(), opened())

    def in_grandchild(session: Session, step: Step) -> Answer:
        return Answer(ret=pair.rx.bind_unbound_port(remote_domain=0))

    def in_child(session: Session, step: Step) -> Answer:
        return in_forked_child(machine, in_grandchild)[0]

    answer, status = in_forked_child(machine, in_child)

    assert status == 0
    assert errno_of(pair.rx.notify, answer.ret) == ""


@pytest.mark.checklist("A12.7")
def test_the_threads_of_a_forked_child_use_its_files_at_once(machine: Any, opened: Opened) -> None:
    files = [opened() for _ in range(3)]

    def in_child(session: Session, step: Step) -> Answer:
        binds = [InThread(lambda file=file: file.bind_unbound_port(0)) for file in files * 4]  # type: ignore[misc]
        more = [InThread(lambda: machine.open_evtchn(domain=0).close()) for _ in range(4)]
        ports = [thread.result() for thread in binds]
        return Answer(data=ports, errno="".join(thread.errno for thread in binds + more if thread.result() is None))

    answer, status = in_forked_child(machine, in_child)

    assert (status, answer.errno) == (0, "")
    assert answer.data is not None
    assert len(set(answer.data)) == 12
    assert set(answer.data) <= bound(machine)


@pytest.mark.checklist("A10.3", "A10.4")
def test_threads_that_open_and_close_at_once_leave_nothing(machine: Any) -> None:
    before, ports_before = open_files(machine), bound(machine)
    failed: list[BaseException] = []

    def some() -> None:
        try:
            for _ in range(6):
                with machine.open_evtchn(domain=0, nonblock=True) as file, file.dup() as other:
                    port = other.bind_unbound_port(remote_domain=0)
                    file.close()
                    other.notify(port)
        except BaseException as problem:
            failed.append(problem)

    for thread in [InThread(some) for _ in range(4)]:
        thread.result()

    assert failed == []
    wait_until(lambda: open_files(machine) == before, "every file is released")
    assert bound(machine) == ports_before


@pytest.mark.checklist("A10.4")
def test_a_closed_file_leaves_neither_mappings_nor_descriptors(machine: Any) -> None:
    machine.open_evtchn(domain=0).close()
    before = our_mappings(), our_descriptors()

    for _ in range(5):
        machine.open_evtchn(domain=0).close()

    assert (our_mappings(), our_descriptors()) == before


@pytest.mark.checklist("A12.7", "A12.8")
def test_dups_that_threads_make_and_drop_count_right(machine: Any, opened: Opened) -> None:
    file = opened()
    port = file.bind_unbound_port(remote_domain=0)
    rng = random.Random(11)
    orders = [[rng.random() < 0.5 for _ in range(150)] for _ in range(4)]
    failed: list[BaseException] = []

    def churn(order: list[bool]) -> None:
        held = [file.dup()]
        try:
            for more in order:
                if more or len(held) == 1:
                    held.append(held[-1].dup())
                else:
                    held.pop(0).close()
                held[-1].notify(port)
        except BaseException as problem:
            failed.append(problem)
        for one in held:
            one.close()

    threads = [InThread(lambda order=order: churn(order)) for order in orders]  # type: ignore[misc]
    file.close()
    for thread in threads:
        thread.result()

    assert failed == [] or all(isinstance(one, OSError) for one in failed)
    assert port not in bound(machine)


@pytest.mark.checklist("A12.7")
def test_of_many_closes_of_one_reference_one_counts(machine: Any, opened: Opened) -> None:
    file = opened()
    port = file.bind_unbound_port(remote_domain=0)
    other = file.dup()

    for thread in [InThread(file.close) for _ in range(8)]:
        thread.result()

    other.notify(port)
    other.close()
    assert port not in bound(machine)


class Closing(Sequence[int]):
    """Ports whose last one closes a file as it is looked at."""

    def __init__(self, file: Any, port: int) -> None:
        self._file, self._port = file, port

    def __len__(self) -> int:
        return 2

    @overload
    def __getitem__(self, index: int) -> int: ...
    @overload
    def __getitem__(self, index: slice) -> Sequence[int]: ...
    def __getitem__(self, index: Any) -> Any:
        if index == 1:
            self._file.close()
        return self._port


@pytest.mark.parametrize("call", ["notify_many", "enable"])
def test_a_file_that_is_closed_while_its_arguments_are_read_answers_ebadf(opened: Opened, call: str) -> None:
    file = opened()
    port = file.bind_unbound_port(remote_domain=0)

    assert errno_of(getattr(file, call), Closing(file, port)) == "EBADF"


def test_what_is_written_into_the_descriptor_goes_nowhere(machine: Any, opened: Opened) -> None:
    pair = connect(machine, opened(), opened())

    assert errno_of(os.write, pair.rx.fileno(), b"x") == "EPIPE"

    pair.send()
    assert take(machine, pair.rx) == [pair.rx_port]


@pytest.mark.checklist("A12.8")
def test_a_close_that_meets_the_return_of_a_read_is_never_forgotten(machine: Any, opened: Opened) -> None:
    tx = opened()
    for _ in range(12):
        with contextlib.closing(machine.open_evtchn(domain=0)) as rx:
            port = rx.bind_unbound_port(remote_domain=0)
            tx_port = tx.bind_interdomain(0, port)
            reader, go = InThread(lambda rx=rx: rx.read(4096)), threading.Barrier(2)  # type: ignore[misc]
            assert reader.sleeps()
            closer = InThread(lambda rx=rx, go=go: (go.wait(), rx.close()))  # type: ignore[misc]
            go.wait()
            tx.notify(tx_port)
            reader.result()
            closer.result()
            wait_until(lambda port=port: port not in bound(machine), "the port is free")  # type: ignore[misc]
            tx.unbind(tx_port)
