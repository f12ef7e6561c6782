# SPDX-License-Identifier: Apache-2.0
"""The channel messages of VMBus, byte for byte: what guest and host post to each other as the payload of message type 1.

The host (hypervisor) and the guest (workqueue) encode and decode with the same structures, for versions 0.13 (the 2012 driver)
and 5.3. `shm/native/vmbus.h` declares them for C, and tests/runtime/vmbus_vectors.json holds bytes of every one; a test
compares the three. Foreign bytes enter by `decode`: what is wrong with them becomes a `WireError` that names the value.
Nothing that knows of states, channels or memory may be added here.

    0        4        8
    +--------+--------+----------------- - -
    | type   | pad    | fields, little-endian, packed
    +--------+--------+----------------- - -
"""

from __future__ import annotations

import struct
import uuid
from typing import ClassVar, Self

import msgspec

from pvbus.actors.runtime.vmbus_facts import (
    HEADER_BYTES,
    KIND_MAX_2012,
    PAYLOAD_BYTES_MAX,
    STATE_OK,
    USER_DATA_BYTES,
    Kind,
    Version,
    WireError,
    has_dedicated_interrupts,
    version_text,
)


class ChannelMessage(msgspec.Struct, frozen=True):
    """Be the base of every message: a kind, and fields that lie one behind the other after the header.

    LAYOUT holds the struct codes of the fields, in the order of the fields. A message with more to it overrides both ways.
    """

    KIND: ClassVar[Kind]
    LAYOUT: ClassVar[str] = "<"

    def encode(self, version: int) -> bytes:
        """Give the payload for a peer of this version."""
        return self._header() + _pack(self.LAYOUT, *msgspec.structs.astuple(self))

    def _header(self) -> bytes:
        return struct.pack("<II", self.KIND, 0)

    @classmethod
    def parse(cls, payload: bytes, version: int) -> Self:
        """Read the fields of a payload whose kind has been looked at; what lies behind them belongs to later versions."""
        return cls(*_unpack(cls.LAYOUT, payload, cls.KIND))


def _pack(layout: str, *values: object) -> bytes:
    try:
        return struct.pack(layout, *values)
    except struct.error as error:
        raise WireError(f"{values} do not fit {layout}: {error}") from None


def _unpack(layout: str, payload: bytes, kind: Kind) -> tuple[int, ...]:
    need = HEADER_BYTES + struct.calcsize(layout)
    if len(payload) < need:
        raise WireError(f"{kind.name} of {len(payload)} bytes, it has {need}")
    return struct.unpack_from(layout, payload, HEADER_BYTES)


def _user_data(data: bytes) -> bytes:
    if len(data) > USER_DATA_BYTES:
        raise WireError(f"user data of {len(data)} bytes, room is for {USER_DATA_BYTES}")
    return data.ljust(USER_DATA_BYTES, b"\0")


class OfferChannel(ChannelMessage, frozen=True, kw_only=True):
    """Host offers a channel: 196 bytes, 190 in 0.13, which ends before the event connection."""

    KIND: ClassVar[Kind] = Kind.OFFERCHANNEL
    LAYOUT: ClassVar[str] = "<16s16sQIIHH120sHHIBB"
    INTERRUPT: ClassVar[str] = "<HI"    # from 1.1

    class_id: uuid.UUID
    instance_id: uuid.UUID
    relid: int
    latency_100ns: int = 0              # in 0.13: 64 bits of latency, revision, context size; later two reserved words
    revision: int = 0
    context_bytes: int = 0
    flags: int = 0
    mmio_mb: int = 0
    user_data: bytes = bytes(USER_DATA_BYTES)
    sub_index: int = 0
    mmio_mb_optional: int = 0
    monitor_id: int = 0
    monitor_allocated: bool = False
    dedicated: bool = False
    connection: int = 0

    def encode(self, version: int) -> bytes:
        """Give the 196 or 190 bytes."""
        fixed = _pack(
            self.LAYOUT, self.class_id.bytes_le, self.instance_id.bytes_le, self.latency_100ns, self.revision,
            self.context_bytes, self.flags, self.mmio_mb, _user_data(self.user_data), self.sub_index,
            self.mmio_mb_optional, self.relid, self.monitor_id, self.monitor_allocated,
        )  # fmt: skip
        if not has_dedicated_interrupts(version):
            return self._header() + fixed
        return self._header() + fixed + _pack(self.INTERRUPT, self.dedicated, self.connection)

    @classmethod
    def parse(cls, payload: bytes, version: int) -> Self:
        """Read the 196 or 190 bytes; of the two flag words only bit 0 means something."""
        layout = cls.LAYOUT + (cls.INTERRUPT[1:] if has_dedicated_interrupts(version) else "")
        fields = _unpack(layout, payload, cls.KIND)
        class_id, instance_id, latency, revision, context, flags, mmio, user = fields[:8]
        sub, optional, relid, monitor, allocated = fields[8:13]
        dedicated, connection = fields[13:] or (0, 0)
        return cls(
            class_id=uuid.UUID(bytes_le=_bytes(class_id)), instance_id=uuid.UUID(bytes_le=_bytes(instance_id)), relid=relid,
            latency_100ns=latency, revision=revision, context_bytes=context, flags=flags, mmio_mb=mmio, user_data=_bytes(user),
            sub_index=sub, mmio_mb_optional=optional, monitor_id=monitor, monitor_allocated=bool(allocated & 1),
            dedicated=bool(dedicated & 1), connection=connection,
        )  # fmt: skip


def _bytes(value: object) -> bytes:
    assert isinstance(value, bytes)
    return value


class Rescind(ChannelMessage, frozen=True):
    """Host takes an offer back; the guest answers RELID_RELEASED when it is done with it."""

    KIND: ClassVar[Kind] = Kind.RESCIND
    LAYOUT: ClassVar[str] = "<I"
    relid: int


class RequestOffers(ChannelMessage, frozen=True):
    """Guest asks for the offers."""

    KIND: ClassVar[Kind] = Kind.REQUESTOFFERS


class AllOffersDelivered(ChannelMessage, frozen=True):
    """Host has sent every offer there was."""

    KIND: ClassVar[Kind] = Kind.ALLOFFERS_DELIVERED


class OpenChannel(ChannelMessage, frozen=True, kw_only=True):
    """Guest opens a channel whose ring lies behind a GPADL: 148 bytes."""

    KIND: ClassVar[Kind] = Kind.OPENCHANNEL
    LAYOUT: ClassVar[str] = "<IIIII120s"
    relid: int
    open_id: int
    ring_gpadl: int
    target_vp: int = 0              # below 2.4 the same word is the GPADL of the server context area
    downstream_page: int = 0        # where in the GPADL the host-to-guest ring begins, in pages
    user_data: bytes = bytes(USER_DATA_BYTES)

    def encode(self, version: int) -> bytes:
        """Give the 148 bytes."""
        return self._header() + _pack(
            self.LAYOUT, self.relid, self.open_id, self.ring_gpadl, self.target_vp, self.downstream_page,
            _user_data(self.user_data),
        )  # fmt: skip

    @classmethod
    def parse(cls, payload: bytes, version: int) -> Self:
        """Read the 148 bytes."""
        relid, open_id, gpadl, target, downstream, user = _unpack(cls.LAYOUT, payload, cls.KIND)
        return cls(
            relid=relid, open_id=open_id, ring_gpadl=gpadl, target_vp=target, downstream_page=downstream,
            user_data=_bytes(user),
        )  # fmt: skip


class OpenResult(ChannelMessage, frozen=True):
    """Host has opened the channel, or not."""

    KIND: ClassVar[Kind] = Kind.OPEN_RESULT
    LAYOUT: ClassVar[str] = "<III"
    relid: int
    open_id: int
    status: int


class CloseChannel(ChannelMessage, frozen=True):
    """Guest closes; there is no reply."""

    KIND: ClassVar[Kind] = Kind.CLOSECHANNEL
    LAYOUT: ClassVar[str] = "<I"
    relid: int


class GpadlHeader(ChannelMessage, frozen=True, kw_only=True):
    """Guest hands pages to the host: the beginning of the range buffer, as 64-bit words (vmbus_gpadl.py makes them)."""

    KIND: ClassVar[Kind] = Kind.GPADL_HEADER
    LAYOUT: ClassVar[str] = "<IIHH"
    WORDS_AT: ClassVar[int] = 20
    relid: int
    gpadl: int
    range_bytes: int
    range_count: int
    words: tuple[int, ...]

    def encode(self, version: int) -> bytes:
        """Give 20 bytes and the words."""
        fixed = _pack(self.LAYOUT, self.relid, self.gpadl, self.range_bytes, self.range_count)
        return _fitting(self._header() + fixed + _pack(f"<{len(self.words)}Q", *self.words))

    @classmethod
    def parse(cls, payload: bytes, version: int) -> Self:
        """Read them; there may be fewer words than the range buffer has, not more."""
        relid, gpadl, range_bytes, range_count = _unpack(cls.LAYOUT, payload, cls.KIND)
        words = _words(payload, cls.WORDS_AT)
        if range_bytes % 8 or not range_count or range_count * 8 > range_bytes:
            raise WireError(f"GPADL {gpadl:#x}: {range_count} ranges in {range_bytes} bytes")
        if len(words) * 8 > range_bytes:
            raise WireError(f"GPADL {gpadl:#x}: {len(words) * 8} bytes of ranges, announced are {range_bytes}")
        return cls(relid=relid, gpadl=gpadl, range_bytes=range_bytes, range_count=range_count, words=words)


class GpadlBody(ChannelMessage, frozen=True, kw_only=True):
    """More words of the range buffer. Bodies arrive in order; their number is for the reader of a trace."""

    KIND: ClassVar[Kind] = Kind.GPADL_BODY
    LAYOUT: ClassVar[str] = "<II"
    WORDS_AT: ClassVar[int] = 16
    number: int
    gpadl: int
    words: tuple[int, ...]

    def encode(self, version: int) -> bytes:
        """Give 16 bytes and the words."""
        return _fitting(self._header() + _pack(self.LAYOUT, self.number, self.gpadl) + _pack(f"<{len(self.words)}Q", *self.words))

    @classmethod
    def parse(cls, payload: bytes, version: int) -> Self:
        """Read them: at least one word."""
        number, gpadl = _unpack(cls.LAYOUT, payload, cls.KIND)
        words = _words(payload, cls.WORDS_AT)
        if not words:
            raise WireError(f"GPADL {gpadl:#x}: body {number} has no words")
        return cls(number=number, gpadl=gpadl, words=words)


def _words(payload: bytes, at: int) -> tuple[int, ...]:
    rest = len(payload) - at
    if rest % 8:
        raise WireError(f"{rest} bytes of page numbers: not a multiple of 8")
    return struct.unpack_from(f"<{rest // 8}Q", payload, at)


def _fitting(payload: bytes) -> bytes:
    if len(payload) > PAYLOAD_BYTES_MAX:
        raise WireError(f"{len(payload)} bytes, a message has at most {PAYLOAD_BYTES_MAX}")
    return payload


class GpadlCreated(ChannelMessage, frozen=True):
    """Host knows the pages, or refuses them."""

    KIND: ClassVar[Kind] = Kind.GPADL_CREATED
    LAYOUT: ClassVar[str] = "<III"
    relid: int
    gpadl: int
    status: int


class GpadlTeardown(ChannelMessage, frozen=True):
    """Guest wants its pages back."""

    KIND: ClassVar[Kind] = Kind.GPADL_TEARDOWN
    LAYOUT: ClassVar[str] = "<II"
    relid: int
    gpadl: int


class GpadlTorndown(ChannelMessage, frozen=True):
    """Host has let the pages go."""

    KIND: ClassVar[Kind] = Kind.GPADL_TORNDOWN
    LAYOUT: ClassVar[str] = "<I"
    gpadl: int


class RelidReleased(ChannelMessage, frozen=True):
    """Guest is done with a rescinded channel: the host may use the number again."""

    KIND: ClassVar[Kind] = Kind.RELID_RELEASED
    LAYOUT: ClassVar[str] = "<I"
    relid: int


class InitiateContact(ChannelMessage, frozen=True, kw_only=True):
    """Guest asks for a version: 40 bytes. From 5.0 the word of the interrupt page tells SINT, VTL and feature flags instead."""

    KIND: ClassVar[Kind] = Kind.INITIATE_CONTACT
    LAYOUT: ClassVar[str] = "<IIQQQ"
    TARGET: ClassVar[struct.Struct] = struct.Struct("<BBHI")
    version: int
    target_vp: int = 0
    interrupt_page: int = 0         # guest physical addresses, all three
    monitor_host_to_guest: int = 0
    monitor_guest_to_host: int = 0
    sint: int = 0
    vtl: int = 0
    features: int = 0

    def encode(self, version: int) -> bytes:
        """Give the 40 bytes; what they look like is decided by the version that is asked for, not by `version`."""
        word = self.interrupt_page
        if self.version >= Version.WIN10_RS3_1:
            word = int.from_bytes(_pack("<BBHI", self.sint, self.vtl, 0, self.features), "little")
        return self._header() + _pack(
            self.LAYOUT, self.version, self.target_vp, word, self.monitor_host_to_guest, self.monitor_guest_to_host
        )

    @classmethod
    def parse(cls, payload: bytes, version: int) -> Self:
        """Read the 40 bytes by the version that they ask for."""
        asked, target, word, host_to_guest, guest_to_host = _unpack(cls.LAYOUT, payload, cls.KIND)
        pages = {"monitor_host_to_guest": host_to_guest, "monitor_guest_to_host": guest_to_host}
        if asked < Version.WIN10_RS3_1:
            return cls(version=asked, target_vp=target, interrupt_page=word, **pages)
        sint, vtl, _, features = cls.TARGET.unpack(word.to_bytes(8, "little"))
        return cls(version=asked, target_vp=target, sint=sint, vtl=vtl, features=features, **pages)


class VersionResponse(ChannelMessage, frozen=True, kw_only=True):
    """Host takes the version, or not: 16 bytes, 20 with feature flags, 40 with monitor pages of the host. 2012 reads one byte."""

    KIND: ClassVar[Kind] = Kind.VERSION_RESPONSE
    supported: bool
    state: int = STATE_OK
    connection: int = 0             # from 5.0 where later messages go; below it repeats the version
    features: int | None = None     # None: not sent
    monitor_pages: tuple[int, int] | None = None

    def encode(self, version: int) -> bytes:
        """Give as many bytes as there is to say."""
        payload = self._header() + _pack("<BBHI", self.supported, self.state, 0, self.connection)
        if self.features is not None or self.monitor_pages is not None:
            payload += _pack("<I", self.features or 0)
        if self.monitor_pages is not None:
            payload += _pack("<IQQ", 0, *self.monitor_pages)
        return payload

    @classmethod
    def parse(cls, payload: bytes, version: int) -> Self:
        """Read as far as it goes; below 1.1 only the first byte, which may be the last."""
        if version < Version.WIN7:
            (supported,) = _unpack("<B", payload, cls.KIND)
            return cls(supported=bool(supported))
        supported, state, _, connection = _unpack("<BBHI", payload, cls.KIND)
        features, pages = None, None
        if len(payload) >= 20:
            (features,) = struct.unpack_from("<I", payload, 16)
        if len(payload) >= 40:
            pages = struct.unpack_from("<QQ", payload, 24)
        return cls(supported=bool(supported), state=state, connection=connection, features=features, monitor_pages=pages)


class Unload(ChannelMessage, frozen=True):
    """Guest leaves."""

    KIND: ClassVar[Kind] = Kind.UNLOAD


class UnloadResponse(ChannelMessage, frozen=True):
    """Host has forgotten everything about the guest."""

    KIND: ClassVar[Kind] = Kind.UNLOAD_RESPONSE


class ModifyChannel(ChannelMessage, frozen=True):
    """Guest wants the interrupts of a channel on another virtual CPU."""

    KIND: ClassVar[Kind] = Kind.MODIFYCHANNEL
    LAYOUT: ClassVar[str] = "<II"
    relid: int
    target_vp: int


class ModifyChannelResponse(ChannelMessage, frozen=True):
    """From now on they go there, or not."""

    KIND: ClassVar[Kind] = Kind.MODIFYCHANNEL_RESPONSE
    LAYOUT: ClassVar[str] = "<II"
    relid: int
    status: int


MESSAGES: dict[Kind, type[ChannelMessage]] = {cls.KIND: cls for cls in ChannelMessage.__subclasses__()}


def kind_of(payload: bytes, version: int) -> Kind:
    """Read the kind of a payload. WireError: too short for a header, too long for a slot, or unknown to that version."""
    if not HEADER_BYTES <= len(payload) <= PAYLOAD_BYTES_MAX:
        raise WireError(f"a message of {len(payload)} bytes, it has {HEADER_BYTES}..{PAYLOAD_BYTES_MAX}")
    number = int.from_bytes(payload[:4], "little")
    if number not in MESSAGES or (version < Version.WIN7 and number > KIND_MAX_2012):
        raise WireError(f"message type {number} is unknown to version {version_text(version)}")
    return Kind(number)


def decode(payload: bytes, version: int) -> ChannelMessage:
    """Read a payload as a peer of this version does. Raises WireError."""
    return MESSAGES[kind_of(payload, version)].parse(payload, version)
