# SPDX-License-Identifier: Apache-2.0
"""GPADLs: lists of guest pages, put together from GPADL_HEADER and GPADL_BODY, and found in the guest's memory.

    (none) ──HEADER──► InProgress ──last BODY──► Accepted ──TEARDOWN──► (none)
                            │ pages unknown          │ TEARDOWN while the channel has it mapped
                            ▼                        ▼
                         (none)                 TearingDown ──channel closed──► (none)

Whether pages are known is decided at once, so there is no state in which the device thinks about it. The handle is the guest's
choice and names a GPADL of any channel of the connection: GPADL_BODY and GPADL_TORNDOWN carry nothing else. Part of server.py's
state; nobody else writes it.
"""

from __future__ import annotations

import enum
from typing import TYPE_CHECKING, Protocol

import msgspec

from pvbus.actors.hypervisor.vmbus.channel import RingPages
from pvbus.actors.runtime.vmbus_facts import PAGE_BYTES, WireError
from pvbus.actors.runtime.vmbus_gpadl import parse_ranges

if TYPE_CHECKING:
    from collections.abc import Iterable

    from pvbus.actors.runtime.vmbus_wire import GpadlBody, GpadlHeader
    from pvbus.shm.memory import Memory

GPADLS_MAX = 512
WORDS_MAX = 32768
"""128 MiB of a guest's memory: all GPADLs of a connection together. It bounds the snapshot, too."""

RING_PAGES_MIN = 2
"""A control page and a page of data."""


class GuestMemory(Protocol):
    """The guest's pages by frame number."""

    def find(self, frame: int) -> tuple[Memory, int] | None:
        """Give the mapping of a page and the page's offset in it; None if the guest has no such page."""


class GpadlState(enum.StrEnum):
    """Where a GPADL stands."""

    IN_PROGRESS = "in progress"
    ACCEPTED = "accepted"
    TEARING_DOWN = "tearing down"


class Gpadl(msgspec.Struct, kw_only=True):
    """One list of pages."""

    gpadl: int
    relid: int
    range_bytes: int
    range_count: int
    words: list[int]
    state: GpadlState = GpadlState.IN_PROGRESS

    @property
    def missing_words(self) -> int:
        """How many words have not arrived yet."""
        return self.range_bytes // 8 - len(self.words)


class GpadlTable:
    """All GPADLs of a connection. Its methods raise WireError for what the guest must not do."""

    def __init__(self, memory: GuestMemory) -> None:
        self._memory = memory
        self._table: dict[int, Gpadl] = {}

    def __len__(self) -> int:
        return len(self._table)

    def get(self, gpadl: int) -> Gpadl | None:
        """Look one up."""
        return self._table.get(gpadl)

    def of(self, relid: int) -> list[Gpadl]:
        """Give those of a channel."""
        return [gpadl for gpadl in self._table.values() if gpadl.relid == relid]

    def all(self) -> list[Gpadl]:
        """Give every one, for a snapshot."""
        return list(self._table.values())

    def load(self, gpadls: Iterable[Gpadl]) -> None:
        """Take over those of a snapshot."""
        self._table = {gpadl.gpadl: gpadl for gpadl in gpadls}

    def begin(self, header: GpadlHeader) -> Gpadl:
        """Enter a GPADL. WireError: the handle is taken, or there are too many pages."""
        if header.gpadl in self._table:
            raise WireError(f"GPADL {header.gpadl:#x} exists")
        announced = header.range_bytes // 8 + sum(gpadl.range_bytes // 8 for gpadl in self._table.values())
        if len(self._table) >= GPADLS_MAX or announced > WORDS_MAX:
            raise WireError(f"GPADL {header.gpadl:#x}: {len(self._table)} others, {announced} words with it")
        entry = Gpadl(
            gpadl=header.gpadl, relid=header.relid, range_bytes=header.range_bytes, range_count=header.range_count,
            words=list(header.words),
        )  # fmt: skip
        self._table[header.gpadl] = entry
        return entry

    def extend(self, body: GpadlBody) -> Gpadl:
        """Append a body. WireError: nothing is being put together under that handle, or more words than announced."""
        entry = self._table.get(body.gpadl)
        if entry is None or entry.state is not GpadlState.IN_PROGRESS:
            raise WireError(f"a body for GPADL {body.gpadl:#x}, which is not in progress")
        if len(body.words) > entry.missing_words:
            raise WireError(f"GPADL {body.gpadl:#x}: {len(body.words)} words, {entry.missing_words} are missing")
        entry.words.extend(body.words)
        return entry

    def complete(self, entry: Gpadl) -> bool:
        """Whether every word is there and every page known; then it is accepted, otherwise gone."""
        try:
            known = all(
                self._memory.find(pfn) is not None for part in parse_ranges(entry.words, entry.range_count) for pfn in part.pfns
            )
        except WireError:
            known = False
        if known:
            entry.state = GpadlState.ACCEPTED
        else:
            del self._table[entry.gpadl]
        return known

    def remove(self, gpadl: int) -> None:
        """Forget one."""
        del self._table[gpadl]

    def clear(self) -> None:
        """Forget all."""
        self._table.clear()

    def ring_pages(self, gpadl: int, relid: int, downstream_page: int, *, resumed: bool = False) -> RingPages | None:
        """Give the rings behind a GPADL of this channel; None if they are not two rings in one piece of memory.

        For a channel that was open before its server died (resumed), the guest may have asked for the pages already.
        """
        entry = self._table.get(gpadl)
        usable = (GpadlState.ACCEPTED, GpadlState.TEARING_DOWN) if resumed else (GpadlState.ACCEPTED,)
        if entry is None or entry.relid != relid or entry.state not in usable or entry.range_count != 1:
            return None
        (part,) = parse_ranges(entry.words, 1)
        pages = len(part.pfns)
        if part.byte_offset or part.byte_count != pages * PAGE_BYTES:
            return None
        if not RING_PAGES_MIN <= downstream_page <= pages - RING_PAGES_MIN:
            return None
        first = self._memory.find(part.pfns[0])
        if first is None:
            return None
        memory, offset = first
        for i, pfn in enumerate(part.pfns):
            found = self._memory.find(pfn)
            if found is None or found[0] is not memory or found[1] != offset + i * PAGE_BYTES:
                return None
        return RingPages(memory, offset, pages * PAGE_BYTES, downstream_page * PAGE_BYTES)
