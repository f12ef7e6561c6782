# SPDX-License-Identifier: Apache-2.0
"""Integration components: the message that heartbeat and shutdown share, and how their versions are negotiated.

    0            8                                                    28
    +------+-----+-----------+------+---------+------+--------+-+-+----+--------
    | pipe | size| frame ver | type | msg ver | size | status |t|f|    | body     t = transaction, f = flags
    +------+-----+-----------+------+---------+------+--------+-+-+----+--------

The host asks with type NEGOTIATE, counts and a list of the versions that it speaks; the guest answers with one of each, or with
counts of 0. Pure, stateless but for `Negotiation`.
"""

from __future__ import annotations

import struct
from typing import NamedTuple

import msgspec

from pvbus.actors.hypervisor.vmbus.endpoint import IN_BAND, Packet

NEGOTIATE, HEARTBEAT, KVP, SHUTDOWN, TIMESYNC, VSS = range(6)
TRANSACTION, REQUEST, RESPONSE = 1, 2, 4
PIPE_DATA = 1

S_OK = 0
E_FAIL = 0x80004005

_PIPE = struct.Struct("<II")
_HEADER = struct.Struct("<HHHHHHIBBH")
_COUNTS = struct.Struct("<HHI")
_VERSION = struct.Struct("<HH")


class IcVersion(NamedTuple):
    """A version of frame or message."""

    major: int
    minor: int


V1_0, V3_0 = IcVersion(1, 0), IcVersion(3, 0)
FRAME_VERSIONS = (V1_0, V3_0)


class IcError(ValueError):
    """Say what is wrong with an integration message."""


class IcMessage(msgspec.Struct, frozen=True, kw_only=True):
    """One message, with its pipe header."""

    type: int
    body: bytes = b""
    frame: IcVersion = V1_0
    version: IcVersion = V1_0
    status: int = S_OK
    transaction: int = 0
    flags: int = TRANSACTION | REQUEST

    def encode(self) -> bytes:
        """Give the payload of a packet."""
        header = _HEADER.pack(
            *self.frame, self.type, *self.version, len(self.body), self.status, self.transaction & 0xFF, self.flags, 0
        )
        return _PIPE.pack(PIPE_DATA, len(header) + len(self.body)) + header + self.body

    def packet(self) -> Packet:
        """Give the packet."""
        return Packet(IN_BAND, self.transaction, self.encode())


def decode(payload: bytes) -> IcMessage:
    """Read a message; the packet may be longer (padding). IcError: too short for what its sizes say."""
    if len(payload) < _PIPE.size + _HEADER.size:
        raise IcError(f"{len(payload)} bytes, the headers have {_PIPE.size + _HEADER.size}")
    _, size = _PIPE.unpack_from(payload)
    frame_major, frame_minor, type_, major, minor, body, status, transaction, flags, _ = _HEADER.unpack_from(payload, _PIPE.size)
    at = _PIPE.size + _HEADER.size
    if size != _HEADER.size + body or len(payload) < at + body:
        raise IcError(f"{len(payload)} bytes; the pipe header says {size}, the message {body}")
    return IcMessage(
        type=type_, body=payload[at : at + body], frame=IcVersion(frame_major, frame_minor), version=IcVersion(major, minor),
        status=status, transaction=transaction, flags=flags,
    )  # fmt: skip


def versions_body(frames: tuple[IcVersion, ...], versions: tuple[IcVersion, ...]) -> bytes:
    """Give the body of a NEGOTIATE: how many, then the frame versions, then those of the message."""
    return _COUNTS.pack(len(frames), len(versions), 0) + b"".join(_VERSION.pack(*v) for v in (*frames, *versions))


def versions_of(body: bytes) -> tuple[tuple[IcVersion, ...], tuple[IcVersion, ...]]:
    """Read the body of a NEGOTIATE. Raises IcError."""
    if len(body) < _COUNTS.size:
        raise IcError(f"a negotiation of {len(body)} bytes")
    frames, versions, _ = _COUNTS.unpack_from(body)
    if len(body) < _COUNTS.size + (frames + versions) * _VERSION.size:
        raise IcError(f"{frames} + {versions} versions in {len(body)} bytes")
    found = tuple(
        IcVersion(*_VERSION.unpack_from(body, _COUNTS.size + i * _VERSION.size)) for i in range(frames + versions)
    )
    return found[:frames], found[frames:]


class Negotiation(msgspec.Struct):
    """Where the talk about versions stands: both versions set = agreed."""

    frame: IcVersion | None = None
    version: IcVersion | None = None
    refused: bool = False

    def ask(self, versions: tuple[IcVersion, ...], transaction: int) -> Packet:
        """Give the host's question."""
        return IcMessage(type=NEGOTIATE, body=versions_body(FRAME_VERSIONS, versions), transaction=transaction).packet()

    def answer(self, message: IcMessage, versions: tuple[IcVersion, ...]) -> bool:
        """Take the guest's answer; whether it agrees. IcError: a choice that was not offered."""
        frames, chosen = versions_of(message.body)
        if not frames or not chosen:
            self.refused = True
            return False
        if frames[0] not in FRAME_VERSIONS or chosen[0] not in versions:
            raise IcError(f"frame {frames[0]}, message {chosen[0]}: not offered")
        self.frame, self.version = frames[0], chosen[0]
        return True

    @property
    def agreed(self) -> tuple[IcVersion, IcVersion] | None:
        """Frame and message version."""
        return (self.frame, self.version) if self.frame is not None and self.version is not None else None
