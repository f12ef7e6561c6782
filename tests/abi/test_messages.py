# SPDX-License-Identifier: Apache-2.0
"""Channel messages between Python and C: what either encodes, the other decodes, field by field, in both versions.

The C structures are those of hyperv_abi.h, which knows nothing of the project's own headers.
"""

import json
import random
import uuid
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from pvbus.actors.runtime import vmbus_wire as wire
from pvbus.actors.runtime.vmbus_facts import V0_13, V5_3, Kind, Version
from pvbus.actors.runtime.vmbus_gpadl import gpadl_messages
from pvbus.actors.runtime.vmbus_wire import ChannelMessage, decode
from pvbus.tests.abi.program import Abi, elements

VECTORS = json.loads((Path(__file__).parent.parent / "runtime" / "vmbus_vectors.json").read_text())["vectors"]
VERSIONS = {"0.13": V0_13, "5.3": V5_3}
ROUNDS = 20
Fields = dict[str, int]


def guid(name: str, value: uuid.UUID) -> Fields:
    """Give a GUID as C declares it."""
    a, b, c, d, e, f = value.fields
    return {f"{name}.a": a, f"{name}.b": b, f"{name}.c": c} | elements(f"{name}.d", bytes([d, e]) + f.to_bytes(6, "big"))


def numbers(message: Any, names: str) -> Fields:
    """Give fields whose names are the same on both sides."""
    return {name: int(getattr(message, name)) for name in names.split()}


def offer(m: wire.OfferChannel, version: Version) -> tuple[str, Fields]:
    """Describe an offer; before 1.1 it ends before the event connection."""
    fields = guid("class_id", m.class_id) | guid("instance_id", m.instance_id) | elements("user_data", m.user_data) | numbers(
        m, "revision context_bytes flags mmio_mb sub_index mmio_mb_optional relid monitor_id monitor_allocated"
    ) | {"latency": m.latency_100ns}  # fmt: skip
    return "offer", fields | (numbers(m, "dedicated connection") if version != V0_13 else {})


def gpadl_header(m: wire.GpadlHeader, _: Version) -> tuple[str, Fields]:
    """Describe a GPADL_HEADER whose first range begins with its first word."""
    fields = numbers(m, "relid gpadl range_bytes range_count")
    fields |= {"range.byte_count": m.words[0] & 0xFFFFFFFF, "range.byte_offset": m.words[0] >> 32}
    return "gpadl_header", fields | {f"range.pfn[{i}]": pfn for i, pfn in enumerate(m.words[1:])}


def gpadl_body(m: wire.GpadlBody, _: Version) -> tuple[str, Fields]:
    """Describe a GPADL_BODY."""
    return "gpadl_body", numbers(m, "number gpadl") | {f"pfn[{i}]": pfn for i, pfn in enumerate(m.words)}


def initiate(m: wire.InitiateContact, _: Version) -> tuple[str, Fields]:
    """Describe an INITIATE_CONTACT; from 5.0 the interrupt page's word is another."""
    pages = "version target_vp monitor_host_to_guest monitor_guest_to_host "
    new = m.version >= Version.WIN10_RS3_1
    return "initiate_5" if new else "initiate", numbers(m, pages + ("sint vtl features" if new else "interrupt_page"))


def version_response(m: wire.VersionResponse, version: Version) -> tuple[str, Fields]:
    """Describe a VERSION_RESPONSE as long as it is; a guest of 0.13 looks at its first byte."""
    fields = numbers(m, "supported state connection" if version != V0_13 else "supported")
    if m.monitor_pages is not None:
        pages = {f"monitor_page[{i}]": page for i, page in enumerate(m.monitor_pages)}
        return "version_response_3", fields | {"features": m.features or 0} | pages
    return ("version_response_2", fields | {"features": m.features}) if m.features is not None else ("version_response", fields)


def plain(name: str, fields: str = "") -> Callable[[Any, Version], tuple[str, Fields]]:
    """Describe a message whose fields are numbers of the same names."""
    return lambda m, _: (name, numbers(m, fields))


IN_C: dict[Kind, Callable[[Any, Version], tuple[str, Fields]]] = {
    Kind.OFFERCHANNEL: offer,
    Kind.RESCIND: plain("relid", "relid"), Kind.CLOSECHANNEL: plain("relid", "relid"),
    Kind.RELID_RELEASED: plain("relid", "relid"),
    Kind.REQUESTOFFERS: plain("header"), Kind.ALLOFFERS_DELIVERED: plain("header"), Kind.UNLOAD: plain("header"),
    Kind.UNLOAD_RESPONSE: plain("header"),
    Kind.OPENCHANNEL: lambda m, _: ("open", numbers(m, "relid open_id ring_gpadl target_vp downstream_page")
                                    | elements("user_data", m.user_data)),
    Kind.OPEN_RESULT: plain("open_result", "relid open_id status"),
    Kind.GPADL_HEADER: gpadl_header, Kind.GPADL_BODY: gpadl_body,
    Kind.GPADL_CREATED: plain("gpadl_created", "relid gpadl status"),
    Kind.GPADL_TEARDOWN: plain("gpadl_teardown", "relid gpadl"), Kind.GPADL_TORNDOWN: plain("gpadl_torndown", "gpadl"),
    Kind.INITIATE_CONTACT: initiate, Kind.VERSION_RESPONSE: version_response,
    Kind.MODIFYCHANNEL: plain("modify", "relid target_vp"),
    Kind.MODIFYCHANNEL_RESPONSE: plain("modify_response", "relid status"),
}  # fmt: skip


def in_c(message: ChannelMessage, version: Version) -> tuple[str, Fields]:
    """Give the C structure of a message, and its fields."""
    name, fields = IN_C[message.KIND](message, version)
    return name, {"type": int(message.KIND)} | fields


def check(abi: Abi, message: ChannelMessage, version: Version) -> None:
    """Send a message both ways."""
    name, fields = in_c(message, version)
    payload = message.encode(version)

    assert abi.decode(name, payload) == {field: value for field, value in fields.items() if value}
    by_c = abi.encode(name, fields)[: len(payload)]
    assert by_c == payload
    assert decode(by_c, version) == message


def chances(seed: int) -> list[tuple[ChannelMessage, Version]]:
    """Make a message of every kind, its fields at random, in each version that knows it."""
    dice = random.Random(seed)

    def u(bits: int) -> int:
        return dice.choice((dice.getrandbits(bits), 0, 2**bits - 1))

    def some(cls: Any, fields: str) -> ChannelMessage:
        made: ChannelMessage = cls(**{field: u(32) for field in fields.split()})
        return made

    old = wire.InitiateContact(
        version=dice.choice((V0_13, Version.WIN8, Version.WIN10)), target_vp=u(32), interrupt_page=u(64),
        monitor_host_to_guest=u(64), monitor_guest_to_host=u(64),
    )  # fmt: skip
    new = wire.InitiateContact(
        version=V5_3, target_vp=u(32), sint=u(8), vtl=u(8), features=u(32), monitor_host_to_guest=u(64),
        monitor_guest_to_host=u(64),
    )  # fmt: skip
    pages = dice.choice((1, 25, 26, 27, 54, 55))
    gpadl = gpadl_messages(u(32), u(32), pages * 4096, [u(52) for _ in range(pages)])
    both: list[ChannelMessage] = [
        wire.OpenChannel(relid=u(32), open_id=u(32), ring_gpadl=u(32), target_vp=u(32), downstream_page=u(32),
                         user_data=dice.randbytes(120)),
        some(wire.Rescind, "relid"), some(wire.CloseChannel, "relid"), some(wire.RelidReleased, "relid"), wire.RequestOffers(),
        wire.AllOffersDelivered(), wire.Unload(), some(wire.OpenResult, "relid open_id status"), *gpadl,
        some(wire.GpadlCreated, "relid gpadl status"), some(wire.GpadlTeardown, "relid gpadl"), some(wire.GpadlTorndown, "gpadl"),
        old, new,
    ]  # fmt: skip
    known: dict[str, Any] = {
        "class_id": uuid.UUID(bytes=dice.randbytes(16)), "instance_id": uuid.UUID(bytes=dice.randbytes(16)), "relid": u(32),
        "latency_100ns": u(64), "revision": u(32), "context_bytes": u(32), "flags": u(16), "mmio_mb": u(16),
        "user_data": dice.randbytes(120), "sub_index": u(16), "mmio_mb_optional": u(16), "monitor_id": u(8),
        "monitor_allocated": bool(u(1)),
    }  # fmt: skip
    late = [
        wire.OfferChannel(**known, dedicated=bool(u(1)), connection=u(32)), wire.UnloadResponse(),
        some(wire.ModifyChannel, "relid target_vp"), some(wire.ModifyChannelResponse, "relid status"),
        wire.VersionResponse(supported=bool(u(1)), state=u(8), connection=u(32)),
        wire.VersionResponse(supported=bool(u(1)), state=u(8), connection=u(32), features=u(32)),
        wire.VersionResponse(supported=True, state=u(8), connection=u(32), features=u(32), monitor_pages=(u(64), u(64))),
    ]
    early = [wire.OfferChannel(**known), wire.VersionResponse(supported=bool(u(1)))]
    return [(m, V5_3) for m in [*both, *late]] + [(m, V0_13) for m in [*both, *early]]


@pytest.mark.parametrize("vector", VECTORS, ids=lambda vector: f"{vector['version']} {vector['name']}")
def test_c_reads_the_golden_bytes_as_python_does_and_writes_them_again(abi: Abi, vector: dict[str, Any]) -> None:
    version = VERSIONS[vector["version"]]

    check(abi, decode(bytes.fromhex(vector["hex"]), version), version)


@pytest.mark.parametrize("seed", range(ROUNDS))
def test_any_message_is_the_same_to_c_and_to_python_in_both_directions(abi: Abi, seed: int) -> None:
    for message, version in chances(seed):
        check(abi, message, version)


def test_every_message_that_is_spoken_has_a_structure_in_c() -> None:
    assert set(IN_C) == set(Kind) == {message.KIND for message, _ in chances(0)}


def test_a_field_in_the_wrong_place_is_seen(abi: Abi) -> None:
    message = wire.OpenResult(1, 2, 3)
    payload = bytearray(message.encode(V5_3))
    payload[8:12], payload[12:16] = payload[12:16], payload[8:12]

    name, fields = in_c(message, V5_3)
    assert abi.decode(name, bytes(payload)) != fields
