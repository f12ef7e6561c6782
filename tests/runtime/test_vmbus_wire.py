# SPDX-License-Identifier: Apache-2.0
"""The channel messages of VMBus: codec, golden bytes and C declarations say the same; bad bytes are WireErrors."""

import json
import random
import uuid
from pathlib import Path
from typing import Any

import msgspec
import pytest

from pvbus.actors.runtime import vmbus_facts, vmbus_wire
from pvbus.actors.runtime.vmbus_facts import (
    DEVICE_CLASSES,
    GUEST_TO_HOST,
    HOST_TO_GUEST,
    V0_13,
    V5_3,
    Kind,
    Version,
    WireError,
    modalias,
)
from pvbus.actors.runtime.vmbus_gpadl import gpadl_messages, parse_ranges
from pvbus.actors.runtime.vmbus_wire import (
    MESSAGES,
    ChannelMessage,
    GpadlBody,
    GpadlHeader,
    InitiateContact,
    OfferChannel,
    OpenChannel,
    VersionResponse,
    decode,
    kind_of,
)
from pvbus.shm import _core, _core_explored

VECTORS: list[dict[str, Any]] = json.loads(Path(__file__).with_name("vmbus_vectors.json").read_text())["vectors"]
VERSIONS = {"0.13": V0_13, "5.3": V5_3}
each_vector = pytest.mark.parametrize("vector", VECTORS, ids=lambda vector: f"{vector['version']} {vector['name']}")


def value_of(vector: dict[str, Any]) -> ChannelMessage:
    """Build the message that a vector describes."""
    cls = getattr(vmbus_wire, vector["message"])
    fields: dict[str, Any] = {}
    for name, value in vector["value"].items():
        if name in ("class_id", "instance_id"):
            fields[name] = uuid.UUID(value)
        elif name == "user_data":
            fields[name] = bytes.fromhex(value)
        else:
            fields[name] = tuple(value) if isinstance(value, list) else value
    message = cls(**fields)
    assert isinstance(message, ChannelMessage)
    return message


@each_vector
def test_a_message_becomes_exactly_the_golden_bytes(vector: dict[str, Any]) -> None:
    assert value_of(vector).encode(VERSIONS[vector["version"]]).hex() == vector["hex"]


@each_vector
def test_the_golden_bytes_become_exactly_the_message(vector: dict[str, Any]) -> None:
    assert decode(bytes.fromhex(vector["hex"]), VERSIONS[vector["version"]]) == value_of(vector)


@each_vector
def test_the_fields_of_a_vector_cover_its_bytes_without_gap_and_lie_where_c_puts_them(vector: dict[str, Any]) -> None:
    table, struct, at = _core.VMBUS_LAYOUT, vector["struct"], 0
    for name, offset, size, data in vector["fields"]:
        assert (offset, len(data)) == (at, 2 * size), name
        assert vector["hex"][2 * at : 2 * (at + size)] == data
        known = table.get(f"{struct}.{name}", table.get(f"header.{name}"))
        assert known == offset or name in ("pad2", "pad3"), name
        at += size

    assert at == vector["size"] == len(vector["hex"]) // 2
    fixed = struct not in ("gpadl_header", "gpadl_body", "version_response")
    assert at == table[struct] if fixed else at <= table[struct]


@each_vector
def test_a_message_that_ends_too_early_is_refused_with_the_number_of_its_bytes(vector: dict[str, Any]) -> None:
    payload, version = bytes.fromhex(vector["hex"]), VERSIONS[vector["version"]]
    needed = {"GpadlHeader": 20, "GpadlBody": 24, "VersionResponse": 9 if version == V0_13 else 16}.get(
        vector["message"], vector["size"]
    )
    for length in range(needed):
        with pytest.raises(WireError, match=r"\d"):
            decode(payload[:length], version)


def test_every_kind_has_a_vector_in_each_version_that_knows_it() -> None:
    shown = {(vector["version"], vector["struct"]) for vector in VECTORS}
    names = {kind: kind.name.lower() for kind in Kind}

    assert set(MESSAGES) == set(Kind)
    assert {name for name in names.values() if ("5.3", name) not in shown} == set()
    in_2012 = {names[kind] for kind in Kind if kind <= Kind.UNLOAD} - {"offerchannel"} | {"offer_2012"}
    assert in_2012 - {struct for version, struct in shown if version == "0.13"} == set()


def test_the_direction_of_a_vector_is_that_of_its_kind() -> None:
    for vector in VECTORS:
        kind = kind_of(bytes.fromhex(vector["hex"]), VERSIONS[vector["version"]])
        assert kind in (HOST_TO_GUEST if vector["direction"] == "host to guest" else GUEST_TO_HOST)
    assert not HOST_TO_GUEST & GUEST_TO_HOST


def test_every_field_of_the_c_declarations_is_in_a_vector_and_both_modules_declare_the_same() -> None:
    shown = {f"{vector['struct']}.{row[0]}" for vector in VECTORS for row in vector["fields"]}
    declared = {name for name in _core.VMBUS_LAYOUT if "." in name and not name.startswith("header.")}

    assert declared - shown == set()
    assert _core.VMBUS_LAYOUT == _core_explored.VMBUS_LAYOUT
    assert _core.VMBUS_LAYOUT["USER_DATA"] == vmbus_facts.USER_DATA_BYTES
    assert _core.VMBUS_LAYOUT["PAYLOAD_MAX"] == vmbus_facts.PAYLOAD_BYTES_MAX


@pytest.mark.parametrize(("version", "size"), [(V0_13, 190), (V5_3, 196)])
def test_an_offer_ends_before_the_event_connection_in_0_13(version: Version, size: int) -> None:
    offer = OfferChannel(class_id=DEVICE_CLASSES["echo"], instance_id=uuid.UUID(int=1), relid=3, connection=9)

    assert len(offer.encode(version)) == size


def test_a_2012_guest_reads_one_byte_of_the_version_response() -> None:
    payload = VersionResponse(supported=True, state=2, connection=4).encode(V5_3)

    assert decode(payload[:9], V0_13) == VersionResponse(supported=True)
    assert decode(payload, V0_13) == VersionResponse(supported=True)


@pytest.mark.parametrize("asked", [V0_13, Version.WIN10_RS3_0, Version.WIN10_RS3_1, V5_3])
def test_the_version_that_is_asked_for_decides_the_layout_of_a_contact_not_the_one_in_force(asked: Version) -> None:
    old = asked < Version.WIN10_RS3_1
    contact = InitiateContact(version=asked, interrupt_page=0x81000) if old else InitiateContact(version=asked, sint=2)

    assert decode(contact.encode(V5_3), V0_13) == contact == decode(contact.encode(V0_13), V5_3)


@pytest.mark.parametrize("number", [0, 17, 22, 24, 25, 2**31, 2**32 - 1])
def test_a_type_that_the_version_does_not_know_is_refused_by_its_number(number: int) -> None:
    payload = number.to_bytes(4, "little") + bytes(60)

    with pytest.raises(WireError, match=f"{number} is unknown to version 0.13"):
        decode(payload, V0_13)


@pytest.mark.parametrize("number", [18, 19, 20, 21, 23, 25])
def test_a_type_of_a_part_that_is_not_served_is_unknown_in_5_3_too(number: int) -> None:
    with pytest.raises(WireError, match=f"{number} is unknown to version 5.3"):
        decode(number.to_bytes(4, "little") + bytes(60), V5_3)


def test_more_bytes_than_a_message_has_belong_to_later_versions_up_to_the_size_of_a_slot() -> None:
    opening = OpenChannel(relid=1, open_id=2, ring_gpadl=3)

    assert decode(opening.encode(V5_3) + bytes(8), V5_3) == opening
    with pytest.raises(WireError, match="241"):
        decode(opening.encode(V5_3) + bytes(93), V5_3)


def test_what_does_not_fit_a_field_or_a_slot_is_refused_when_it_is_encoded() -> None:
    for message in (
        OpenChannel(relid=2**32, open_id=2, ring_gpadl=3),
        OpenChannel(relid=1, open_id=2, ring_gpadl=3, user_data=bytes(121)),
        GpadlBody(number=1, gpadl=1, words=(0,) * 29),
        GpadlBody(number=1, gpadl=1, words=(2**64,)),
        InitiateContact(version=V5_3, sint=256),
    ):
        with pytest.raises(WireError):
            message.encode(V5_3)


@pytest.mark.parametrize(("pages", "bodies"), [(1, 0), (26, 0), (27, 1), (54, 1), (55, 2), (256, 9), (8190, 292)])
def test_pages_are_cut_over_header_and_bodies_and_come_together_again(pages: int, bodies: int) -> None:
    pfns = range(0x100000, 0x100000 + pages)
    header, *rest = [decode(message.encode(V5_3), V5_3) for message in gpadl_messages(3, 0xE1E10, pages * 4096, pfns)]

    assert isinstance(header, GpadlHeader)
    words = list(header.words)
    for number, body in enumerate(rest, 1):
        assert isinstance(body, GpadlBody)
        assert (body.number, body.gpadl) == (number, 0xE1E10)
        words += body.words
    assert len(rest) == bodies
    assert header.range_bytes == 8 * len(words)
    assert parse_ranges(words, header.range_count) == ((pages * 4096, 0, tuple(pfns)),)


def test_a_list_of_pages_that_does_not_fit_its_own_range_is_refused() -> None:
    for byte_count, pages, offset in (
        (4096, 2, 0), (8193, 2, 0), (8192, 2, 1), (0, 0, 0), (4096, 1, 4096), (8191 * 4096, 8191, 0),
    ):  # fmt: skip
        with pytest.raises(WireError):
            gpadl_messages(1, 2, byte_count, range(pages), offset)


@pytest.mark.parametrize(("words", "count"), [
    ([], 1), ([4096], 1), ([4096, 7], 2), ([4096, 7, 8], 1), ([0, 7], 1), ([4096 | 4096 << 32, 7, 8], 1), ([4096, 7, 8192, 9], 2),
])  # fmt: skip
def test_a_range_buffer_that_does_not_add_up_is_refused(words: list[int], count: int) -> None:
    with pytest.raises(WireError, match=r"\d"):
        parse_ranges(words, count)


def test_several_ranges_lie_one_behind_the_other() -> None:
    assert parse_ranges([4096, 7, 4097 | 4095 << 32, 8, 9], 2) == ((4096, 0, (7,)), (4097, 4095, (8, 9)))


@pytest.mark.parametrize(("range_bytes", "range_count", "words"), [(12, 1, 1), (16, 0, 2), (16, 3, 2), (8, 1, 2)])
def test_a_gpadl_header_that_contradicts_itself_is_refused(range_bytes: int, range_count: int, words: int) -> None:
    header = GpadlHeader(relid=1, gpadl=0xE1E10, range_bytes=range_bytes, range_count=range_count, words=(4096,) * words)

    with pytest.raises(WireError, match="0xe1e10"):
        decode(header.encode(V5_3), V5_3)


def test_page_numbers_that_end_in_the_middle_are_refused() -> None:
    with pytest.raises(WireError, match="12 bytes"):
        decode(GpadlBody(number=1, gpadl=1, words=(1,)).encode(V5_3) + bytes(4), V5_3)


def test_random_bytes_are_decoded_or_refused_and_nothing_else() -> None:
    chance = random.Random(5)
    decoded = 0
    for _ in range(20_000):
        payload = chance.randrange(26).to_bytes(4, "little") + chance.randbytes(chance.choice((0, 4, 8, 16, 140, 200, 236, 300)))
        version = chance.choice((V0_13, V5_3))
        try:
            message = decode(payload, version)
        except WireError:
            continue
        decoded += 1
        again = message.encode(version)
        assert decode(again, version) == message

    assert decoded > 5_000


def test_a_guid_has_windows_byte_order_on_the_wire_and_in_the_modalias() -> None:
    assert modalias(DEVICE_CLASSES["heartbeat"]) == "vmbus:394f16571591784eab55382f3bd5422d"
    assert modalias(DEVICE_CLASSES["shutdown"]) == "vmbus:31600b0e13523449818b38d90ced39db"
    assert modalias(DEVICE_CLASSES["scsi"]) == "vmbus:d96361baa104294db60572e2ffb1dc7f"


def test_what_changes_with_a_version_changes_where_the_versions_say() -> None:
    order = sorted(Version)

    assert [vmbus_facts.connection_id(v) for v in order] == [1] * 6 + [4] * 5
    assert [vmbus_facts.uses_interrupt_page(v) for v in order] == [True] * 2 + [False] * 9
    assert [vmbus_facts.has_dedicated_interrupts(v) for v in order] == [False] + [True] * 10
    assert [vmbus_facts.has_unload_response(v) for v in order] == [False] + [True] * 10
    assert [vmbus_facts.has_modify_response(v) for v in order] == [False] * 9 + [True] * 2
    assert vmbus_facts.version_text(V0_13) == "0.13"


def test_messages_are_values() -> None:
    opening = OpenChannel(relid=1, open_id=2, ring_gpadl=3)

    with pytest.raises(AttributeError):
        opening.relid = 2  # type: ignore[misc]
    assert opening == msgspec.structs.replace(opening)
