# SPDX-License-Identifier: Apache-2.0
"""Frames: what is well-formed comes through, and whatever is not is a WireError and nothing else."""

from __future__ import annotations

import array
import contextlib
import errno
import os
import socket
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any, ClassVar

import msgpack  # type: ignore[import-untyped]
import msgspec
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from pvbus.actors.runtime import wire
from pvbus.actors.runtime.wire import Done, Failure, Message, WireError, decode, encode

sys.path.insert(0, str(Path(__file__).parent))
from rig import descriptors_left  # type: ignore[import-not-found]

Pair = tuple[socket.socket, socket.socket]


class WireInner(msgspec.Struct, frozen=True):
    port: int


class WireSample(Message, frozen=True, kw_only=True):
    fds_max: ClassVar[int | None] = 1
    number: int
    data: bytes = b""
    inner: list[WireInner] = msgspec.field(default_factory=list)


@pytest.fixture
def pair() -> Iterator[Pair]:
    ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    yield ours, theirs
    ours.close()
    theirs.close()


def open_fds() -> int:
    return len(list(Path("/proc/self/fd").iterdir()))


def frame(
    fields: Any, *, version: Any = 1, kind: Any = "WireSample", request: Any = 3, reply: Any = False
) -> bytes:
    packed: bytes = msgpack.packb([version, kind, request, reply, fields])
    return packed


def test_a_message_comes_back_as_it_went() -> None:
    message = WireSample(number=2**64 - 1, data=b"\x00\xff", inner=[WireInner(port=4)])
    got = decode(encode(message, 7, reply=True))
    assert got == wire.Frame(wire.PROTOCOL_VERSION, "WireSample", 7, True, message)


def test_the_bytes_are_plain_msgpack_whichever_library_writes_them() -> None:
    message = WireSample(number=1, data=b"x", inner=[WireInner(port=2)])
    fields = {"number": 1, "data": b"x", "inner": [{"port": 2}]}
    assert encode(message, 3) == frame(fields)
    assert msgpack.unpackb(encode(message, 3)) == [1, "WireSample", 3, False, fields]


def test_a_second_message_of_one_name_is_refused() -> None:
    with pytest.raises(TypeError, match="WireSample is defined in"):
        type("WireSample", (Message,), {}, frozen=True, kw_only=True)


@pytest.mark.parametrize(
    ("fields", "path"),
    [
        ({"number": "1"}, r"Expected `int`, got `str` - at `\$.number`"),
        ({"number": True}, r"\$.number"),
        ({"number": 1.0}, r"\$.number"),
        ({"number": None}, r"\$.number"),
        ({"number": 1, "data": "dGV4dA=="}, r"Expected `bytes`, got `str` - at `\$.data`"),
        ({"number": 1, "inner": [{"port": 1}, {"port": "2"}]}, r"\$.inner\[1\].port"),
        ({}, "missing required field `number`"),
        ({"number": 1, "surplus": 2}, "unknown field `surplus`"),
    ],
)
def test_a_wrongly_typed_field_is_named_by_its_path(fields: dict[str, Any], path: str) -> None:
    with pytest.raises(WireError, match=path) as caught:
        decode(frame(fields))
    assert caught.value.request == 3


@pytest.mark.parametrize(
    "data",
    [
        b"",
        b"\xc1",
        b"\x95",
        b"\x01",
        b"\x95\x01",
        b"\xdd\xff\xff\xff\xff",
        b"\xdf\xff\xff\xff\xff",
        b"\xdb\xff\xff\xff\xff",
        b"\xc6\xff\xff\xff\xff",
        b"\xd7\xff" + b"\xff" * 8,
        b"\xd9\x02\xff\xff",
        b"\x91" * 60_000,
        b"\x91" * 400 + b"\x01",
        b"\xdc\x10\x00" * 500,
        b"\x81\x91\x01\x02",
        b"x" * (wire.FRAME_BYTES_MAX + 1),
        encode(WireSample(number=1))[:-1],
        encode(WireSample(number=1)) + b"\x00",
        frame({"number": 1}, version=2),
        frame({"number": 1}, version=True),
        frame({"number": 1}, version="1"),
        frame({"number": 1}, kind="Nobody"),
        frame({"number": 1}, kind=b"WireSample"),
        frame({"number": 1}, kind=["WireSample"]),
        frame({"number": 1}, kind="Message"),
        frame({"number": 1}, request=-1),
        frame({"number": 1}, request=2**63),
        frame({"number": 1}, request=True),
        frame({"number": 1}, reply=1),
        frame([1]),
        frame({b"number": 1}),
        frame({1: 1}),
        frame({"number": msgpack.ExtType(4, b"abc")}),
    ],
)
def test_a_foreign_frame_is_a_wire_error(data: bytes) -> None:
    with pytest.raises(WireError) as caught:
        decode(data)
    assert str(caught.value)


@settings(max_examples=300, deadline=None)
@given(st.binary(max_size=200))
def test_no_bytes_raise_anything_but_a_wire_error(data: bytes) -> None:
    with contextlib.suppress(WireError):
        decode(data)


@settings(max_examples=300, deadline=None)
@given(st.integers(0, 40), st.integers(0, 255))
def test_no_flipped_byte_raises_anything_but_a_wire_error(place: int, value: int) -> None:
    data = bytearray(encode(WireSample(number=70_000, data=b"abc", inner=[WireInner(port=300)]), 9))
    data[place % len(data)] = value
    with contextlib.suppress(WireError):
        decode(bytes(data))


def test_a_message_too_long_is_refused_at_its_sender() -> None:
    with pytest.raises(WireError, match="at most 65536"):
        encode(WireSample(number=1, data=bytes(wire.FRAME_BYTES_MAX)))


def test_descriptors_travel_and_are_closed_on_exec(pair: Pair) -> None:
    reading, writing = os.pipe()
    wire.send_frame(pair[0], encode(WireSample(number=1)), [writing])
    os.close(writing)
    data, fds = wire.recv_frame(pair[1])
    assert decode(data).message == WireSample(number=1)
    assert not os.get_inheritable(fds[0])
    os.write(fds[0], b"through")
    assert os.read(reading, 10) == b"through"
    wire.close_fds([*fds, reading])


def test_a_frame_with_too_many_descriptors_leaves_none_behind(pair: Pair) -> None:
    before = open_fds()
    many = array.array("i", [pair[0].fileno()] * (wire.FDS_MAX + 5))
    pair[0].sendmsg([b"x"], [(socket.SOL_SOCKET, socket.SCM_RIGHTS, many)])
    with pytest.raises(WireError, match="descriptors"):
        wire.recv_frame(pair[1])
    assert open_fds() == before
    with pytest.raises(WireError, match=f"at most {wire.FDS_MAX}"):
        wire.send_frame(pair[0], b"x", [0] * (wire.FDS_MAX + 1))


@pytest.mark.parametrize("room", [0, 1])
def test_a_frame_whose_descriptors_find_no_room_names_the_call_that_lost_them(pair: Pair, room: int) -> None:
    before = open_fds()
    wire.send_frame(pair[0], encode(WireSample(number=1), 7), [0, 1, 2])
    wire.send_frame(pair[0], encode(WireSample(number=2), 8, reply=True), [0, 1, 2])
    wire.send_frame(pair[0], encode(WireSample(number=3), 9))
    with descriptors_left(room):
        with pytest.raises(wire.DescriptorsLostError, match="WireSample: no descriptor") as call:
            wire.recv_frame(pair[1])
        with pytest.raises(wire.DescriptorsLostError) as answer:
            wire.recv_frame(pair[1])
        data, _ = wire.recv_frame(pair[1])

    assert (call.value.request, call.value.reply, call.value.number) == (7, False, errno.EMFILE)
    assert (answer.value.request, answer.value.reply) == (8, True)
    assert decode(data).request == 9
    assert open_fds() == before


def test_a_foreign_frame_is_foreign_even_where_its_descriptors_find_no_room(pair: Pair) -> None:
    wire.send_frame(pair[0], b"\xc1", [0, 1])
    with descriptors_left(0), pytest.raises(WireError, match="not msgpack") as foreign:
        wire.recv_frame(pair[1])
    assert foreign.value.number == errno.EBADMSG


def test_an_oversized_frame_is_cut_and_refused(pair: Pair) -> None:
    pair[0].send(bytes(wire.FRAME_BYTES_MAX + 1))
    with pytest.raises(WireError, match="longer than"):
        wire.recv_frame(pair[1])


def test_a_hang_up_is_empty_bytes_after_what_was_sent_before(pair: Pair) -> None:
    pair[1].send(b"never read")
    wire.send_frame(pair[0], encode(Done(value=5)))
    pair[0].close()
    assert decode(wire.recv_frame(pair[1])[0]).message == Done(value=5)
    assert wire.recv_frame(pair[1]) == (b"", [])


def test_a_message_says_how_many_descriptors_it_may_have() -> None:
    wire.check_fds(WireSample(number=1), 1)
    with pytest.raises(WireError, match="comes with 2 descriptors, may have 1"):
        wire.check_fds(WireSample(number=1), 2)
    with pytest.raises(WireError):
        wire.check_fds(Failure(errno=1), 1)
