# SPDX-License-Identifier: Apache-2.0
"""The kernel's side of xenbus: many users on one connection, a ring of two kilobytes, hypercalls of tools."""

from __future__ import annotations

import ctypes
import errno
import os
import struct
from collections.abc import Iterator

import pytest

from pvbus.shm.memory import Memory
from pvbus.view.xen import privcmd, ring, xenbus
from pvbus.view.xen.ring import REQ_CONS, REQ_PROD, REQUESTS, RESPONSES, RING_BYTES, RSP_CONS, RSP_PROD, Ring, RingBroken
from pvbus.view.xen.xenbus import HEADER, User, Xenbus

READ, WATCH, UNWATCH, START, END, EVENT, ERROR = 2, 4, 5, 6, 7, 15, 16


def message(kind: int, request: int, transaction: int, payload: bytes) -> bytes:
    return HEADER.pack(kind, request, transaction, len(payload)) + payload


def sent(bus: Xenbus) -> list[tuple[int, int, int, bytes]]:
    """Take what goes to xenstored, message by message."""
    found = []
    while bus.outgoing:
        kind, request, transaction, size = HEADER.unpack_from(bus.outgoing)
        found.append((kind, request, transaction, bytes(bus.outgoing[HEADER.size : HEADER.size + size])))
        del bus.outgoing[: HEADER.size + size]
    return found


def start_transaction(bus: Xenbus, user: User, number: int) -> None:
    bus.write(user, message(START, 9, 0, b"\0"))
    ((_, request, _, _),) = sent(bus)
    bus.receive(message(START, request, 0, b"%d\0" % number))
    user.replies.clear()


def test_answers_find_the_user_who_asked_under_the_number_that_it_gave() -> None:
    bus = Xenbus()
    one, other = bus.open(), bus.open()
    bus.write(one, message(READ, 7, 0, b"/a\0"))
    bus.write(other, message(READ, 7, 0, b"/b\0"))
    (_, first, _, _), (_, second, _, _) = sent(bus)

    assert first != second
    assert bus.receive(message(READ, second, 0, b"B") + message(ERROR, first, 0, b"ENOENT\0")) == {one.number, other.number}
    assert one.replies == message(ERROR, 7, 0, b"ENOENT\0")
    assert other.replies == message(READ, 7, 0, b"B")


def test_a_message_may_come_and_go_in_any_pieces() -> None:
    bus = Xenbus()
    user = bus.open()
    for byte in message(READ, 1, 0, b"/a\0"):
        assert not bus.outgoing
        bus.write(user, bytes([byte]))
    ((_, request, _, payload),) = sent(bus)
    assert payload == b"/a\0"

    ready = [bus.receive(bytes([byte])) for byte in message(READ, request, 0, b"value")]
    assert ready[-1] == {user.number}
    assert not any(ready[:-1])


def test_watches_of_the_same_path_and_token_are_each_user_s_own() -> None:
    bus = Xenbus()
    one, other = bus.open(), bus.open()
    for user in (one, other):
        bus.write(user, message(WATCH, 1, 0, b"/a\0token\0"))
    tokens = [payload.split(b"\0")[1] for *_, payload in sent(bus)]
    assert len(set(tokens)) == 2

    bus.receive(message(EVENT, 0, 0, b"/a/x\0" + tokens[1] + b"\0"))

    assert not one.replies
    assert other.replies == message(EVENT, 0, 0, b"/a/x\0token\0")


def test_what_a_user_leaves_behind_is_ended_when_it_closes() -> None:
    bus = Xenbus()
    user = bus.open()
    start_transaction(bus, user, 44)
    bus.write(user, message(WATCH, 2, 0, b"/a\0token\0"))
    ((_, request, _, watched),) = sent(bus)
    bus.receive(message(WATCH, request, 0, b"OK\0"))

    bus.close(user)

    ended = sent(bus)
    assert [(kind, transaction, payload) for kind, _, transaction, payload in ended] == [(END, 44, b"F\0"), (UNWATCH, 0, watched)]
    for kind, request, transaction, _ in ended:
        assert bus.receive(message(kind, request, transaction, b"OK\0")) == set()


def test_a_transaction_that_begins_after_the_close_is_ended_too() -> None:
    bus = Xenbus()
    user = bus.open()
    bus.write(user, message(START, 1, 0, b"\0"))
    ((_, request, _, _),) = sent(bus)
    bus.close(user)

    bus.receive(message(START, request, 0, b"5\0"))

    assert [(kind, transaction) for kind, _, transaction, _ in sent(bus)] == [(END, 5)]


def test_a_transaction_of_another_user_is_none() -> None:
    bus = Xenbus()
    one, other = bus.open(), bus.open()
    start_transaction(bus, one, 3)

    bus.write(other, message(READ, 1, 3, b"/a\0"))

    assert not bus.outgoing
    assert other.replies == message(ERROR, 1, 3, b"ENOENT\0")


def test_a_message_too_long_and_one_too_many_are_refused() -> None:
    bus = Xenbus()
    user = bus.open()
    with pytest.raises(OSError, match="4097") as failed:
        bus.write(user, HEADER.pack(READ, 1, 0, 4097))
    assert failed.value.errno == errno.EINVAL
    for _ in range(xenbus.REQUESTS_MAX):
        bus.write(user, message(READ, 1, 0, b"/\0"))
    with pytest.raises(BlockingIOError):
        bus.write(user, message(READ, 1, 0, b"/\0"))


def test_a_watch_that_is_too_long_with_our_number_is_refused_before_xenstored_hangs_up() -> None:
    bus = Xenbus()
    user = bus.open()

    bus.write(user, message(WATCH, 7, 0, b"x" * 4096))

    assert user.replies == message(ERROR, 7, 0, b"EINVAL\0")
    assert sent(bus) == []
    bus.write(user, message(WATCH, 8, 0, b"/\0" + b"t" * 4080 + b"\0"))
    ((_, _, _, payload),) = sent(bus)
    assert len(payload) <= 4096


def test_an_answer_that_nobody_asked_for_is_the_end_of_the_connection() -> None:
    with pytest.raises(xenbus.ProtocolError, match="request 77"):
        Xenbus().receive(message(READ, 77, 0, b""))


@pytest.fixture
def page() -> Iterator[Memory]:
    fd = os.memfd_create("xsd")
    os.ftruncate(fd, ring.PAGE_BYTES)
    memory = Memory(fd, ring.PAGE_BYTES)
    os.close(fd)
    yield memory
    memory.close()


@pytest.mark.parametrize("at", [0, 1000, 2**32 - 10])
def test_both_rings_carry_bytes_round_their_ends(page: Memory, at: int) -> None:
    for index in (REQ_CONS, REQ_PROD, RSP_CONS, RSP_PROD):
        page.store32(index, at)
    side, data = Ring(page), bytes(range(100)) * 12

    assert side.put(data) == RING_BYTES
    assert side.put(b"more") == 0
    assert bytes(page.load8(REQUESTS + (at + n) % RING_BYTES) for n in range(RING_BYTES)) == data[:RING_BYTES]
    for n in range(600):
        page.store8(RESPONSES + (at + n) % RING_BYTES, data[n])
    page.store32_release(RSP_PROD, at + 600 & 0xFFFFFFFF)
    assert side.take() == data[:600]
    assert side.take() == b""
    assert page.load32(RSP_CONS) == at + 600 & 0xFFFFFFFF


@pytest.mark.parametrize(("index", "call"), [(REQ_CONS, lambda side: side.put(b"x")), (RSP_PROD, lambda side: side.take())])
def test_an_impossible_index_of_the_other_side_breaks_the_ring(page: Memory, index: int, call: object) -> None:
    page.store32(index, 5000)
    with pytest.raises(RingBroken):
        call(Ring(page))  # type: ignore[operator]


def _hypercall(number: int, operation: int, structure: ctypes.Array[ctypes.c_char] | None) -> ctypes.Array[ctypes.c_char]:
    address = ctypes.addressof(structure) if structure is not None else 8
    return ctypes.create_string_buffer(privcmd.HYPERCALL.pack(number, operation, address, 0, 0, 0))


def test_a_hypercall_is_carried_out_on_the_caller_s_structure() -> None:
    seen: list[tuple[int, bytes | None]] = []

    def operation(number: int, argument: bytes | None, then: privcmd.Then) -> None:
        seen.append((number, argument))
        then(0, struct.pack("=H2xIIIII", 0x7FF0, 5, 4, 1, 3, 0))

    answers: list[int] = []
    structure = ctypes.create_string_buffer(struct.pack("=H2xIIIII", 0x7FF0, 5, 0, 0, 0, 0))
    call = _hypercall(32, 5, structure)

    privcmd.Privcmd(operation).hypercall(os.getpid(), ctypes.addressof(call), answers.append)

    assert answers == [0]
    assert seen == [(5, struct.pack("=H2xIIIII", 0x7FF0, 5, 0, 0, 0, 0))]
    assert structure.raw[:24] == struct.pack("=H2xIIIII", 0x7FF0, 5, 4, 1, 3, 0)


@pytest.mark.parametrize(
    ("number", "operation", "error"), [(17, 0, errno.ENOSYS), (32, 99, errno.ENOSYS), (32, 5, errno.EFAULT)]
)
def test_other_hypercalls_and_bad_pointers_are_refused(number: int, operation: int, error: int) -> None:
    def fault(_number: int, argument: bytes | None, then: privcmd.Then) -> None:
        then(errno.EFAULT if argument is None else 0, b"")

    answers: list[int] = []
    call = _hypercall(number, operation, None)
    try:
        privcmd.Privcmd(fault).hypercall(os.getpid(), ctypes.addressof(call), answers.append)
    except OSError as failed:
        answers.append(failed.errno or 0)

    assert answers == [error]
    with pytest.raises(OSError, match="Bad address"):
        privcmd.Privcmd(fault).hypercall(os.getpid(), 8, answers.append)
