# SPDX-License-Identifier: Apache-2.0
"""Numbers and names of VMBus that host and guest share: versions and what changes with each, kinds of messages, status words,
classes of devices.

Read by everybody, written by nobody. The messages themselves are in vmbus_wire.py; nothing that has a state may be added here.
"""

from __future__ import annotations

import enum
import uuid

HEADER_BYTES = 8
PAYLOAD_BYTES_MAX = 240
"""A message slot has 256 bytes, 16 of them its header."""
PAGE_BYTES = 4096
USER_DATA_BYTES = 120
GPADL_HEADER_PFNS = 26
GPADL_BODY_PFNS = 28
GPADL_RANGE_BYTES_MAX = 0xFFFF - 7
"""The length of the range buffer travels in 16 bits, and it is a multiple of 8."""

MESSAGE_TYPE = 1
"""Type of the SynIC message that carries all of these."""

STATUS_SUCCESS = 0
STATUS_UNSUCCESSFUL = 0x8000FFFF
STATUS_REFUSED = 0xC0000236

STATE_OK, STATE_LOW_RESOURCES, STATE_UNKNOWN_FAILURE = range(3)
"""Second byte of a VERSION_RESPONSE."""

VP_NO_INTERRUPT = 0xFFFFFFFF
"""In an OPENCHANNEL: the guest wants no interrupts. In a MODIFYCHANNEL it is not allowed."""

VMBUS_SINT = 2


class Version(enum.IntEnum):
    """Protocol versions, major << 16 | minor; `SPOKEN` are those that pvbus negotiates."""

    WS2008 = 0x0000_000D    # 0.13, the 2012 driver
    WIN7 = 0x0001_0001
    WIN8 = 0x0002_0004
    WIN8_1 = 0x0003_0000
    WIN10 = 0x0004_0000
    WIN10_RS3_0 = 0x0004_0001
    WIN10_RS3_1 = 0x0005_0000
    WIN10_RS4 = 0x0005_0001
    WIN10_RS5 = 0x0005_0002
    IRON = 0x0005_0003      # 5.3
    COPPER = 0x0006_0000


V0_13, V5_3 = Version.WS2008, Version.IRON
SPOKEN = (V5_3, V0_13)
"""In the order in which a guest tries them."""


def version_text(version: int) -> str:
    """Give a version as people write it: 5.3."""
    return f"{version >> 16}.{version & 0xFFFF}"


def connection_id(version: int) -> int:
    """Give the connection to which a guest of this version posts: 4 from 5.0, else 1."""
    return 4 if version >= Version.WIN10_RS3_1 else 1


def uses_interrupt_page(version: int) -> bool:
    """Whether signals are bits of the interrupt page (below 2.4), not event flags named by relid."""
    return version < Version.WIN8


def has_dedicated_interrupts(version: int) -> bool:
    """Whether an offer names an event connection of its own (from 1.1)."""
    return version >= Version.WIN7


def has_unload_response(version: int) -> bool:
    """Whether UNLOAD is answered (from 1.1)."""
    return version >= Version.WIN7


def has_modify_response(version: int) -> bool:
    """Whether MODIFYCHANNEL is answered (from 5.3)."""
    return version >= Version.IRON


class Kind(enum.IntEnum):
    """Numbers of the channel messages. The 2012 header knows 1..16."""

    OFFERCHANNEL = 1
    RESCIND = 2
    REQUESTOFFERS = 3
    ALLOFFERS_DELIVERED = 4
    OPENCHANNEL = 5
    OPEN_RESULT = 6
    CLOSECHANNEL = 7
    GPADL_HEADER = 8
    GPADL_BODY = 9
    GPADL_CREATED = 10
    GPADL_TEARDOWN = 11
    GPADL_TORNDOWN = 12
    RELID_RELEASED = 13
    INITIATE_CONTACT = 14
    VERSION_RESPONSE = 15
    UNLOAD = 16
    UNLOAD_RESPONSE = 17
    MODIFYCHANNEL = 22
    MODIFYCHANNEL_RESPONSE = 24


KIND_MAX_2012 = Kind.UNLOAD
HOST_TO_GUEST = frozenset({
    Kind.OFFERCHANNEL, Kind.RESCIND, Kind.ALLOFFERS_DELIVERED, Kind.OPEN_RESULT, Kind.GPADL_CREATED, Kind.GPADL_TORNDOWN,
    Kind.VERSION_RESPONSE, Kind.UNLOAD_RESPONSE, Kind.MODIFYCHANNEL_RESPONSE,
})  # fmt: skip
GUEST_TO_HOST = frozenset(Kind) - HOST_TO_GUEST

DEVICE_CLASSES = {
    "network": uuid.UUID("f8615163-df3e-46c5-913f-f2d2f965ed0e"),
    "ide": uuid.UUID("32412632-86cb-44a2-9b5c-50d1417354f5"),
    "scsi": uuid.UUID("ba6163d9-04a1-4d29-b605-72e2ffb1dc7f"),
    "keyboard": uuid.UUID("f912ad6d-2b17-48ea-bd65-f927a61c7684"),
    "mouse": uuid.UUID("cfa8b69e-5b4a-4cc0-b98b-8ba1a1f3f95a"),
    "video": uuid.UUID("da0a7802-e377-4aac-8e77-0558eb1073f8"),
    "heartbeat": uuid.UUID("57164f39-9115-4e78-ab55-382f3bd5422d"),
    "shutdown": uuid.UUID("0e0b6031-5213-4934-818b-38d90ced39db"),
    "timesync": uuid.UUID("9527e630-d0ae-497b-adce-e80ab0175caf"),
    "kvp": uuid.UUID("a9a0f4e7-5a45-4d96-b827-8a841e8c03e6"),
    "vss": uuid.UUID("35fa2e29-ea23-4236-96ae-3a6ebacba440"),
    "dynamic-memory": uuid.UUID("525074dc-8985-46e2-8057-a307dc18a502"),
    "file-copy": uuid.UUID("34d14be3-dee4-41c8-9ae7-6b174977c192"),
    "fibre-channel": uuid.UUID("2f9bcc4a-0069-4af3-b76b-6fd0be528cda"),
    "network-direct": uuid.UUID("8c2eaf3d-32a7-4b09-ab99-bd1f1c86b501"),
    "pci": uuid.UUID("44c4f61d-4444-4400-9d52-802e27ede19f"),
    "activation-1": uuid.UUID("f8e65716-3cb3-4a06-9a60-1889c5cccab5"),
    "activation-2": uuid.UUID("3375baf4-9e15-4b30-b765-67acb10d607b"),
    "remote-desktop": uuid.UUID("276aacf4-ac15-426c-98dd-7521ad3f01fe"),
    "echo": uuid.UUID("70766275-7300-4563-a86f-000000000001"),   # ours, for tests
}
"""Class GUIDs by the name that the command line takes."""

HOST_DEVICES = {
    "echo": uuid.UUID("70766275-7300-4563-a86f-000000000101"),     # ours, as its class is
    "heartbeat": uuid.UUID("fd149e91-82e0-4a7d-afa6-2a4166cbd7c0"),
    "shutdown": uuid.UUID("b6650ff7-33bc-4840-8048-e0676786f393"),
}
"""The classes that the host has a synthetic device of, and which instance it offers from the start (`devices`)."""


def modalias(class_id: uuid.UUID) -> str:
    """Give `vmbus:` and the raw 16 bytes of the class in hex, as uevents and the modalias attribute carry it."""
    return "vmbus:" + class_id.bytes_le.hex()


class WireError(ValueError):
    """Say what is wrong with the bytes of a channel message."""
