# SPDX-License-Identifier: Apache-2.0
"""How the pages of a GPADL travel: a range buffer of 64-bit words, cut over one GPADL_HEADER and as many GPADL_BODY as it takes.

    word 0          1..n           n+1 ...
    +---------------+--------------+----------
    | count, offset | page numbers | next range        count in bits 31:0, offset into the first page in 63:32
    +---------------+--------------+----------

The guest cuts, the host puts together. Pure.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, NamedTuple

from pvbus.actors.runtime.vmbus_facts import GPADL_BODY_PFNS, GPADL_HEADER_PFNS, GPADL_RANGE_BYTES_MAX, PAGE_BYTES, WireError
from pvbus.actors.runtime.vmbus_wire import GpadlBody, GpadlHeader

if TYPE_CHECKING:
    from collections.abc import Sequence


class Range(NamedTuple):
    """Give one range of a GPADL: so many bytes, from an offset into the first page, over these pages."""

    byte_count: int
    byte_offset: int
    pfns: tuple[int, ...]


def parse_ranges(words: Sequence[int], count: int) -> tuple[Range, ...]:
    """Cut a complete range buffer into its ranges. WireError: empty, offset beyond a page, too few or too many words."""
    ranges, at = [], 0
    for i in range(count):
        if at >= len(words):
            raise WireError(f"range {i} of {count} begins behind {len(words)} words")
        byte_count, byte_offset = words[at] & 0xFFFFFFFF, words[at] >> 32
        if not byte_count or byte_offset >= PAGE_BYTES:
            raise WireError(f"range {i}: {byte_count} bytes at offset {byte_offset}")
        pages = -(-(byte_offset + byte_count) // PAGE_BYTES)
        if at + 1 + pages > len(words):
            raise WireError(f"range {i}: {pages} pages, {len(words) - at - 1} words are left")
        ranges.append(Range(byte_count, byte_offset, tuple(words[at + 1 : at + 1 + pages])))
        at += 1 + pages
    if at != len(words):
        raise WireError(f"{len(words) - at} words behind the last of {count} ranges")
    return tuple(ranges)


def gpadl_messages(
    relid: int, gpadl: int, byte_count: int, pfns: Sequence[int], byte_offset: int = 0
) -> list[GpadlHeader | GpadlBody]:
    """Split one range over a header (26 page numbers) and bodies (28 each), numbered from 1. Mirror vmbus_establish_gpadl."""
    words = (byte_count | byte_offset << 32, *pfns)
    if len(words) * 8 > GPADL_RANGE_BYTES_MAX:
        raise WireError(f"{len(pfns)} pages do not fit a range buffer of {GPADL_RANGE_BYTES_MAX} bytes")
    parse_ranges(words, 1)
    cut = 1 + GPADL_HEADER_PFNS
    header = GpadlHeader(relid=relid, gpadl=gpadl, range_bytes=len(words) * 8, range_count=1, words=words[:cut])
    bodies = [
        GpadlBody(number=number, gpadl=gpadl, words=words[at : at + GPADL_BODY_PFNS])
        for number, at in enumerate(range(cut, len(words), GPADL_BODY_PFNS), 1)
    ]
    return [header, *bodies]
