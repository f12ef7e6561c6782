# SPDX-License-Identifier: Apache-2.0
"""A12: what the file system and the kernel around the driver answer: references, readers, select, epoll."""

import asyncio
import contextlib
import fcntl
import mmap
import os
import select
from collections.abc import Callable
from typing import Any

import pytest

from pvbus.tests.contract.support import (
    WAIT_S_MAX,
    InThread,
    bound,
    connect,
    connect_many,
    errno_of,
    pack,
    take,
    wait_until,
)
from pvbus.tests.golden.children import Child
from pvbus.tests.golden.session import Answer, Session, Step, unpack

Opened = Callable[..., Any]


@pytest.mark.checklist("A12.1", "A10.3", "X10c")
@pytest.mark.parametrize(
    ("call", "answer"),
    [
        (lambda fd: os.lseek(fd, 0, os.SEEK_CUR), "ESPIPE"),
        (lambda fd: os.pread(fd, 4, 0), "ESPIPE"),
        (lambda fd: os.pwrite(fd, bytes(4), 0), "ESPIPE"),
        (lambda fd: mmap.mmap(fd, mmap.PAGESIZE, prot=mmap.PROT_READ), "ENODEV"),
        (lambda fd: os.ftruncate(fd, 0), "EINVAL"),
        (os.fsync, "EINVAL"),
    ],
    ids=["lseek", "pread", "pwrite", "mmap", "ftruncate", "fsync"],
)
def test_the_descriptor_is_a_stream(opened: Opened, call: Callable[[int], Any], answer: str) -> None:
    assert errno_of(call, opened().fileno()) == answer


@pytest.mark.checklist("A12.1", "A4.6")
def test_o_nonblock_can_be_set_and_cleared_on_the_descriptor(machine: Any, opened: Opened) -> None:
    pair = connect(machine, opened(nonblock=False), opened())
    flags = fcntl.fcntl(pair.rx.fileno(), fcntl.F_GETFL)
    assert not flags & os.O_NONBLOCK

    fcntl.fcntl(pair.rx.fileno(), fcntl.F_SETFL, flags | os.O_NONBLOCK)
    assert errno_of(pair.rx.read, 4096) == "EAGAIN"
    fcntl.fcntl(pair.rx.fileno(), fcntl.F_SETFL, flags)

    reader = InThread(lambda: pair.rx.read(4096))
    assert reader.sleeps()
    pair.send()
    assert reader.result() == pack(pair.rx_port)


# References ------------------------------------------------------------------------------------------


@pytest.mark.checklist("A12.7", "A1.1")
def test_a_dup_shares_ports_and_ring(machine: Any, opened: Opened) -> None:
    pair = connect(machine, opened(), opened())
    with contextlib.closing(pair.rx.dup()) as other:
        port = other.bind_unbound_port(remote_domain=0)
        pair.send()

        assert unpack(other.read(4096)) == [pair.rx_port]
        assert errno_of(pair.rx.read, 4096) == "EAGAIN"
        assert other.write(pack(pair.rx_port)) == 4
        pair.send()
        assert take(machine, pair.rx) == [pair.rx_port]
        assert errno_of(pair.rx.unbind, port) == ""


@pytest.mark.checklist("A12.7", "A10.4")
def test_the_last_reference_releases(machine: Any, opened: Opened) -> None:
    pair = connect(machine, opened(), opened())
    other = pair.rx.dup()

    pair.rx.close()
    pair.send()
    assert take(machine, other) == [pair.rx_port]
    other.close()

    assert opened().bind_unbound_port(remote_domain=0) == pair.rx_port


@pytest.mark.checklist("A12.7", "A1.1")
def test_a_forked_child_uses_the_files_of_its_parent(machine: Any, opened: Opened) -> None:
    pair = connect(machine, opened(), opened())
    pair.send()

    def in_child(session: Session, step: Step) -> Answer:
        ports = unpack(pair.rx.read(4096))
        pair.rx.write(pack(*ports))
        return Answer(ret=pair.rx.bind_unbound_port(remote_domain=0), data=ports)

    answer, status = in_forked_child(machine, in_child)

    assert (answer.data, status) == ([pair.rx_port], 0)
    pair.send()
    assert take(machine, pair.rx) == [pair.rx_port]
    assert errno_of(pair.rx.notify, answer.ret) == ""


@pytest.mark.checklist("A12.7", "A10.4")
def test_what_only_a_child_held_open_is_released_with_it(machine: Any, opened: Opened) -> None:
    def in_child(session: Session, step: Step) -> Answer:
        session.files["mine"] = machine.open_evtchn(domain=0, nonblock=True)
        return Answer(ret=session.files["mine"].bind_unbound_port(remote_domain=0))

    answer, status = in_forked_child(machine, in_child)

    assert status == 0
    wait_until(lambda: answer.ret not in bound(machine), "the child's port is free")
    assert opened().bind_unbound_port(remote_domain=0) == answer.ret


def in_forked_child(machine: Any, call: Callable[[Session, Step], Answer]) -> tuple[Answer, int]:
    """Make one call in a forked child and give its answer and the child's exit status."""
    step = Step("contract", 1, "fork", "exact", "call", "", {}, {})
    child = Child(Session(machine, 1), [step], call)
    try:
        answer = child.make(step)
    finally:
        status = child.reap()
    return answer, status


@pytest.mark.checklist("A12.8")
def test_close_does_not_end_a_blocked_read_and_the_ports_live_until_it_returns(
    machine: Any, opened: Opened
) -> None:
    pair = connect(machine, opened(nonblock=False), opened())
    reader = InThread(lambda: pair.rx.read(4096))
    assert reader.sleeps()

    pair.rx.close()
    machine.settle()

    assert reader.sleeps()
    assert opened().bind_unbound_port(remote_domain=0) != pair.rx_port
    pair.tx.notify(pair.tx_port)
    assert reader.result() == pack(pair.rx_port)
    assert opened().bind_unbound_port(remote_domain=0) == pair.rx_port


# Several readers -------------------------------------------------------------------------------------


@pytest.mark.checklist("A12.9")
def test_one_event_lets_exactly_one_reader_return(machine: Any, opened: Opened) -> None:
    rx, tx = opened(nonblock=False), opened()
    first, second = connect_many(machine, rx, tx, 2)
    readers = [InThread(lambda: rx.read(4096)) for _ in range(2)]
    assert all(reader.sleeps() for reader in readers)

    first.send()
    wait_until(lambda: any(reader.done.is_set() for reader in readers), "a reader returns")

    assert sum(reader.sleeps() for reader in readers) == 1
    second.send()
    got = sorted(unpack(reader.result())[0] for reader in readers)
    assert got == [first.rx_port, second.rx_port]


@pytest.mark.checklist("A12.5", "A9.7", "A9.4")
def test_reset_and_unbind_wake_no_reader_and_wait_for_none(machine: Any, opened: Opened) -> None:
    rx, tx = opened(nonblock=False), opened()
    first, second = connect_many(machine, rx, tx, 2)
    reader = InThread(lambda: rx.read(4096))
    assert reader.sleeps()

    rx.reset()
    rx.unbind(first.rx_port)
    rx.notify(second.rx_port)
    extra = rx.bind_unbound_port(remote_domain=0)
    machine.settle()

    assert extra == first.rx_port
    assert reader.sleeps()
    second.send()
    assert reader.result() == pack(second.rx_port)


@pytest.mark.checklist("A4.7", "A12.9")
def test_a_reader_whose_entry_a_rival_took_sleeps_on(machine: Any, opened: Opened) -> None:
    pair = connect(machine, opened(nonblock=False), opened())
    readers = [InThread(lambda: pair.rx.read(4)) for _ in range(3)]
    assert all(reader.sleeps() for reader in readers)

    for done in (1, 2, 3):
        pair.send()
        wait_until(lambda done=done: sum(r.done.is_set() for r in readers) == done, "a reader returns")  # type: ignore[misc]
        assert sum(reader.sleeps() for reader in readers) == 3 - done
        pair.enable()


# select, epoll, asyncio ------------------------------------------------------------------------------


@pytest.mark.checklist("A12.4")
def test_select_sees_an_event_until_it_is_read(machine: Any, opened: Opened) -> None:
    pair = connect(machine, opened(), opened())
    seen = [select.select([pair.rx], [], [], 0)[0]]

    pair.send()
    seen += [select.select([pair.rx], [], [], 0)[0] for _ in range(2)]
    pair.rx.read(4096)
    seen.append(select.select([pair.rx], [], [], 0)[0])

    assert seen == [[], [pair.rx], [pair.rx], []]


@pytest.mark.checklist("A12.4")
def test_epoll_by_level_reports_a_file_until_it_is_drained(machine: Any, opened: Opened) -> None:
    rx, tx = opened(), opened()
    pairs = connect_many(machine, rx, tx, 2)
    with select.epoll() as epoll:
        epoll.register(rx, select.EPOLLIN)
        for pair in pairs:
            pair.send()
        seen = [len(epoll.poll(0)), len(epoll.poll(0))]
        rx.read(4)
        seen.append(len(epoll.poll(0)))
        rx.read(4)
        seen.append(len(epoll.poll(0)))

    assert seen == [1, 1, 1, 0]


@pytest.mark.checklist("A12.4", "A3.5")
def test_epoll_by_edge_fires_only_when_an_empty_ring_gets_an_entry(machine: Any, opened: Opened) -> None:
    rx, tx = opened(), opened()
    first, second = connect_many(machine, rx, tx, 2)
    with select.epoll() as epoll:
        epoll.register(rx, select.EPOLLIN | select.EPOLLET)
        epoll.poll(0)
        first.send()
        seen = [len(epoll.poll(WAIT_S_MAX)), len(epoll.poll(0))]
        second.send()
        seen.append(len(epoll.poll(0)))
        rx.read(4)
        machine.settle()
        seen.append(len(epoll.poll(0)))
        first.enable()
        rx.read(4096)
        first.send()
        seen.append(len(epoll.poll(WAIT_S_MAX)))

    assert seen == [1, 0, 0, 0, 1]


@pytest.mark.checklist("A12.4", "A9.7")
def test_epoll_by_edge_fires_again_after_a_reset(machine: Any, opened: Opened) -> None:
    pair = connect(machine, opened(), opened())
    with select.epoll() as epoll:
        epoll.register(pair.rx, select.EPOLLIN | select.EPOLLET)
        pair.send()
        seen = [len(epoll.poll(WAIT_S_MAX))]
        pair.rx.reset()
        pair.enable()
        seen.append(len(epoll.poll(0)))
        pair.send()
        seen.append(len(epoll.poll(WAIT_S_MAX)))

    assert seen == [1, 0, 1]


@pytest.mark.checklist("A12.4")
def test_asyncio_can_wait_for_a_file(machine: Any, opened: Opened) -> None:
    pair = connect(machine, opened(), opened())

    async def rounds(count: int) -> list[int]:
        loop = asyncio.get_running_loop()
        queue: asyncio.Queue[bytes] = asyncio.Queue()
        loop.add_reader(pair.rx, lambda: queue.put_nowait(pair.rx.read(4096)))
        got = []
        for _ in range(count):
            pair.tx.notify(pair.tx_port)
            data = await asyncio.wait_for(queue.get(), WAIT_S_MAX)
            got += unpack(data)
            pair.rx.write(data)
        loop.remove_reader(pair.rx)
        return got

    assert asyncio.run(rounds(20)) == [pair.rx_port] * 20
