# SPDX-License-Identifier: Apache-2.0
"""The connection of a guest with the VMBus host: its version, what INITIATE_CONTACT asked for, and the interrupt page.

    interrupt page    0 ..... 2047   host to guest, a bit a relid
                      2048 .. 4095   guest to host

Part of server.py's state; the interrupt page is the guest's, and only below version 2.4.
"""

from __future__ import annotations

import enum
from typing import TYPE_CHECKING

import msgspec

from pvbus.actors.hypervisor.vmbus.channel import CHANNELS_MAX
from pvbus.actors.runtime.vmbus_facts import (
    PAGE_BYTES,
    SPOKEN,
    STATE_OK,
    STATE_UNKNOWN_FAILURE,
    VMBUS_SINT,
    Version,
    uses_interrupt_page,
)
from pvbus.actors.runtime.vmbus_facts import connection_id as connection_of
from pvbus.actors.runtime.vmbus_wire import InitiateContact, VersionResponse

if TYPE_CHECKING:
    from collections.abc import Iterator

    from pvbus.actors.hypervisor.vmbus.gpadl import GuestMemory
    from pvbus.shm.memory import Memory

GUEST_TO_HOST_HALF = 2048
_WORDS = CHANNELS_MAX // 64 + 1


class ConnectionState(enum.StrEnum):
    """Where the connection stands."""

    DISCONNECTED = "disconnected"
    CONNECTING = "connecting"           # devices of the connection before still close
    CONNECTED = "connected"
    DISCONNECTING = "disconnecting"


class Link(msgspec.Struct, kw_only=True):
    """The record of a connection."""

    state: ConnectionState = ConnectionState.DISCONNECTED
    version: int = 0
    contact: InitiateContact | None = None      # the one in force, or the one to be answered
    target_vp: int = 0                          # where messages go (from 3.0)
    offers_requested: bool = False


def contact_problem(contact: InitiateContact, memory: GuestMemory, vcpus: int) -> str:
    """Say why a contact in a version that we speak cannot be accepted; empty if it can. The version itself is no problem."""
    if contact.version not in SPOKEN:
        return ""
    pages = [contact.monitor_host_to_guest, contact.monitor_guest_to_host]
    if uses_interrupt_page(contact.version):
        if not contact.interrupt_page:
            return "no interrupt page"
        pages.append(contact.interrupt_page)
    for address in pages:
        if address and (address % PAGE_BYTES or memory.find(address // PAGE_BYTES) is None):
            return f"the guest has no page at {address:#x}"
    if contact.version >= Version.WIN10_RS3_1 and (contact.sint, contact.vtl) != (VMBUS_SINT, 0):
        return f"SINT {contact.sint} of VTL {contact.vtl}"
    if contact.version >= Version.WIN8_1 and contact.target_vp >= vcpus:
        return f"VP {contact.target_vp} of {vcpus}"
    return ""


def version_response(contact: InitiateContact, problem: str) -> VersionResponse:
    """Answer a contact. A guest that reads one byte only must find a problem there, too."""
    if contact.version not in SPOKEN or (problem and contact.version < Version.WIN7):
        return VersionResponse(supported=False)
    if problem:
        return VersionResponse(supported=True, state=STATE_UNKNOWN_FAILURE)
    told = connection_of(contact.version) if contact.version >= Version.WIN10_RS3_1 else contact.version
    return VersionResponse(supported=True, state=STATE_OK, connection=told)


class Connection:
    """The interrupt page of a link."""

    def __init__(self, memory: GuestMemory) -> None:
        self._memory = memory

    def _page(self, link: Link) -> tuple[Memory, int] | None:
        if link.contact is None or not uses_interrupt_page(link.version):
            return None
        return self._memory.find(link.contact.interrupt_page // PAGE_BYTES)

    def set_signal(self, link: Link, relid: int) -> None:
        """Set a channel's bit in the host-to-guest half, before the flag that makes the guest look."""
        page = self._page(link)
        if page is not None:
            memory, offset = page
            memory.test_and_set_bit(offset + relid // 64 * 8, relid % 64)

    def set_guest_signal(self, link: Link, relid: int, *, wrong_word: bool = False) -> None:
        """Mirror vmbus_set_event (below 2.4): set a channel's bit in the guest's half, on the guest's behalf.

        `wrong_word`: as the driver of 2012 does on 64 bits (H11), whose index of 32-bit words counts 64-bit ones.
        """
        page = self._page(link)
        if page is not None:
            memory, offset = page
            word = relid // 32 * (2 if wrong_word else 1)
            memory.test_and_set_bit(offset + GUEST_TO_HOST_HALF + word // 2 * 8, word % 2 * 32 + relid % 32)

    def take_signals(self, link: Link) -> Iterator[int]:
        """Take the bits that the guest has set in its half; give their relids."""
        page = self._page(link)
        if page is None:
            return
        memory, offset = page
        for word in range(_WORDS):
            at = offset + GUEST_TO_HOST_HALF + word * 8
            bits = memory.exchange64(at, 0) if memory.load64(at) else 0
            while bits:
                bit = (bits & -bits).bit_length() - 1
                bits &= bits - 1
                yield word * 64 + bit
