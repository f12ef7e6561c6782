# SPDX-License-Identifier: Apache-2.0
"""Frames: what two processes say to each other on a Unix SEQPACKET socket.

A frame is one msgpack array `[version, kind, request, reply, {fields}]`; its kind names a subclass of
`Message`. Every process of the machine and every client writes and reads them. Foreign bytes enter here and
nowhere else: msgpack parses them under length limits, msgspec converts them to the one type that the kind
names (never to a union of all), and whatever is wrong with them becomes a `WireError`. Nothing that blocks or
knows of actors may be added here.
"""

from __future__ import annotations

import array
import contextlib
import errno
import os
import socket
import sys
from typing import TYPE_CHECKING, Any, ClassVar, NamedTuple

import msgpack  # type: ignore[import-untyped]
import msgspec

if TYPE_CHECKING:
    from collections.abc import Iterable, Sequence

PROTOCOL_VERSION = 1

FRAME_BYTES_MAX = 65536
"""A frame is control, never data: the longest (a chunk of a port list) stays far below; three fit a default
socket buffer.
"""

FDS_MAX = 64
"""Descriptors with one frame: a process gets its segments, doorbells and rings in one; the kernel's own limit
is 253.
"""

ITEMS_MAX = 4096
"""Elements of one array or map: every port of a 2-level domain. msgpack allocates what a header claims, so a
nest of lying headers costs at most 500 levels of 32 KiB, for a moment.
"""

REQUEST_MAX = 2**63 - 1
"""Request ids count up from 1 and are never used twice on a connection."""

_MESSAGES: dict[str, type[Message]] = {}

_NATIVE = (bytes,)
"""What msgpack gives as itself. Without this msgspec would take text for base64 where a field wants bytes."""

_encode_body = msgspec.msgpack.Encoder().encode


class WireError(ValueError):
    """Say what is wrong with a frame; `request` and `reply` tell which call it belonged to, if that could be
    read. `number` is the errno that its sender is told.
    """

    number = errno.EBADMSG

    def __init__(self, text: str, request: int = 0, *, reply: bool = False) -> None:
        super().__init__(text)
        self.request = request
        self.reply = reply


class DescriptorsLostError(WireError):
    """Say that the descriptors of a good frame found no room here: this process has none left, and the kernel
    has closed them. Not its sender's fault.
    """

    number = errno.EMFILE


class Message(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """Be the base of everything that travels; a subclass is known on the wire by its class name.

    A subclass may set `fds_max`, the descriptors that may come with it: more is a foreign frame, refused and
    closed before an actor sees it. None means up to `FDS_MAX`, and the receiver must close what it does not
    want.
    """

    fds_max: ClassVar[int | None] = None
    moot_when_stopped: ClassVar[bool] = False
    """An actor that has stopped has done what this asks for: nothing is undelivered."""

    def __init_subclass__(cls, **options: Any) -> None:
        super().__init_subclass__(**options)
        known = _MESSAGES.setdefault(cls.__name__, cls)
        if known is not cls:
            text = f"message {cls.__name__} is defined in {known.__module__} and again in {cls.__module__}"
            raise TypeError(text)


class Failure(Message, frozen=True, kw_only=True):
    """Answer a call that failed: the errno of the driver, and a sentence where the errno alone says too
    little.
    """

    fds_max: ClassVar[int | None] = 0
    errno: int
    text: str = ""

    def as_oserror(self) -> OSError:
        """Return the exception that a caller outside of an actor raises for it."""
        return OSError(self.errno, self.text or os.strerror(self.errno))


class Done(Message, frozen=True, kw_only=True):
    """Answer a call that succeeded and has nothing, or one number, to say."""

    fds_max: ClassVar[int | None] = 0
    value: int = 0


class Frame(NamedTuple):
    """Hold one decoded frame; `request` 0 is a tell, `reply` tells an answer from a call of that number."""

    version: int
    kind: str
    request: int
    reply: bool
    message: Message


def encode(message: Message, request: int = 0, reply: bool = False) -> bytes:
    """Return the bytes of one frame; WireError if it is longer than a frame may be."""
    data = _encode_body((PROTOCOL_VERSION, type(message).__name__, request, reply, message))
    if len(data) > FRAME_BYTES_MAX:
        text = f"{type(message).__name__} takes {len(data)} bytes, a frame has at most {FRAME_BYTES_MAX}"
        raise WireError(text, request, reply=reply)
    return data


def decode(data: bytes) -> Frame:
    """Return the frame in foreign bytes; WireError says what is wrong with them, and never anything else is
    raised.
    """
    kind, request, reply, body = _header(_unpack(data))
    message_type = _MESSAGES.get(kind)
    if message_type is None:
        raise WireError(f"unknown kind {kind[:64]!r}", request, reply=reply)
    try:
        message = msgspec.convert(body, message_type, strict=True, builtin_types=_NATIVE)
    except (msgspec.MsgspecError, RecursionError, ValueError, TypeError) as error:
        raise WireError(f"{kind}: {error}", request, reply=reply) from error
    return Frame(PROTOCOL_VERSION, kind, request, reply, message)


def _unpack(data: bytes) -> Any:
    if len(data) > FRAME_BYTES_MAX:
        raise WireError(f"frame of {len(data)} bytes, at most {FRAME_BYTES_MAX}")
    try:
        return msgpack.unpackb(
            data, raw=False, strict_map_key=True, max_str_len=FRAME_BYTES_MAX, max_bin_len=FRAME_BYTES_MAX,
            max_array_len=ITEMS_MAX, max_map_len=ITEMS_MAX, max_ext_len=0,
        )  # fmt: skip
    except msgpack.exceptions.ExtraData as error:
        raise WireError("bytes after the frame's end") from error
    except msgpack.exceptions.StackError as error:
        raise WireError("frame nested too deeply") from error
    except (
        ValueError,
        TypeError,
        OverflowError,
        RecursionError,
        msgpack.exceptions.UnpackException,
    ) as error:
        raise WireError(f"not msgpack: {error or type(error).__name__}") from error


def _header(parts: Any) -> tuple[str, int, bool, dict[str, Any]]:
    if not isinstance(parts, list) or len(parts) != 5:
        raise WireError("a frame is an array of 5: version, kind, request, reply, fields")
    version, kind, request, reply, body = parts
    # `type() is` and not isinstance: True is no number here.
    good_request = request if type(request) is int and 0 <= request <= REQUEST_MAX else 0
    good_reply = reply is True
    if type(version) is not int or version != PROTOCOL_VERSION:
        text = f"protocol version {str(version)[:32]}, this is {PROTOCOL_VERSION} - at `version`"
        raise WireError(text, good_request, reply=good_reply)
    for wrong, text in (
        (type(kind) is not str, "Expected `str` - at `kind`"),
        (good_request != request or type(request) is not int, "Expected `int` >= 0 - at `request`"),
        (type(reply) is not bool, "Expected `bool` - at `reply`"),
        (type(body) is not dict, "Expected a map - at `fields`"),
    ):
        if wrong:
            raise WireError(text, good_request, reply=good_reply)
    return kind, request, reply, body


def check_fds(message: Message, count: int, request: int = 0, *, reply: bool = False) -> None:
    """Raise WireError if more descriptors come with this message than its class allows."""
    allowed = FDS_MAX if message.fds_max is None else message.fds_max
    if count > allowed:
        text = f"{type(message).__name__} comes with {count} descriptors, may have {allowed}"
        raise WireError(text, request, reply=reply)


def send_frame(sock: socket.socket, data: bytes, fds: Sequence[int] = (), flags: int = 0) -> None:
    """Send one frame with its descriptors; what the socket raises (BlockingIOError, BrokenPipeError) comes
    through.
    """
    if len(fds) > FDS_MAX:
        raise WireError(f"{len(fds)} descriptors with one frame, at most {FDS_MAX}")
    if fds:
        ancillary = [(socket.SOL_SOCKET, socket.SCM_RIGHTS, array.array("i", fds))]
        try:
            sock.sendmsg((data,), ancillary, flags | socket.MSG_NOSIGNAL)
        except OSError as error:
            if error.errno != errno.ETOOMANYREFS:  # what is under way in sockets counts against the same limit
                raise
            raise OSError(errno.EMFILE, "too many descriptors are under way in sockets") from None
    else:
        sock.send(data, flags | socket.MSG_NOSIGNAL)


_SO_COOKIE = 57  # linux/socket.h; not in Python's socket

_ANCILLARY_BYTES = socket.CMSG_SPACE(FDS_MAX * 4)


def recv_frame(sock: socket.socket, flags: int = 0) -> tuple[bytes, list[int]]:
    """Return one frame's bytes and the descriptors that came with it; empty bytes are the other side's
    hang-up.

    WireError for a frame that was cut (too long, or with too many descriptors), DescriptorsLostError if there
    was no room for its descriptors; what came of them is closed.
    """
    try:
        return recv_frame_once(sock, flags)
    except ConnectionResetError:
        return recv_frame_once(sock, flags)


def recv_frame_once(sock: socket.socket, flags: int = 0) -> tuple[bytes, list[int]]:
    """Do as `recv_frame`, but let ConnectionResetError through.

    The kernel raises it once, before what the other side still sent, when that side closed with frames of
    ours unread.
    """
    data, ancillary, answer, _ = sock.recvmsg(
        FRAME_BYTES_MAX, _ANCILLARY_BYTES, flags | socket.MSG_CMSG_CLOEXEC
    )
    fds: list[int] = []
    for level, kind, value in ancillary:
        if level == socket.SOL_SOCKET and kind == socket.SCM_RIGHTS:
            received = array.array("i")
            received.frombytes(value[: len(value) - len(value) % received.itemsize])
            fds.extend(received)
    if answer & (socket.MSG_TRUNC | socket.MSG_CTRUNC):
        close_fds(fds)
        if answer & socket.MSG_TRUNC:
            raise WireError(f"frame with longer than {FRAME_BYTES_MAX} bytes")
        if len(fds) >= FDS_MAX:  # our buffer is full; with less in it the kernel found no free descriptor
            raise WireError(f"frame with more than {FDS_MAX} descriptors")
        raise _lost(data)
    if not data:
        close_fds(fds)
        fds = []
    return data, fds


def _lost(data: bytes) -> WireError:
    """Name the call whose descriptors were lost, so that it alone fails."""
    try:
        kind, request, reply, _ = _header(_unpack(data))
    except WireError as error:
        return error
    text = f"{kind}: no descriptor is left in the process that it went to (ulimit -n)"
    return DescriptorsLostError(text, request, reply=reply)


def socket_cookie(fd: int) -> int:
    """Return the number that the kernel gives a socket once and never again, the same for every copy of the descriptor.

    OSError: EBADF, or EINVAL for what is no socket.
    """
    if fd < 0:
        raise OSError(errno.EBADF, os.strerror(errno.EBADF))
    try:
        sock = socket.socket(fileno=fd)
    except OSError as error:
        if error.errno == errno.ENOTSOCK:
            raise OSError(errno.EINVAL, f"descriptor {fd} is no open event-channel file") from None
        raise
    try:
        return int.from_bytes(sock.getsockopt(socket.SOL_SOCKET, _SO_COOKIE, 8), sys.byteorder)
    finally:
        sock.detach()


def close_fds(fds: Iterable[int]) -> None:
    """Close descriptors that nobody took."""
    for fd in fds:
        with contextlib.suppress(OSError):
            os.close(fd)
