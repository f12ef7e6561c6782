# SPDX-License-Identifier: Apache-2.0
"""The page that a domain's kernel shares with xenstored: two rings of a kilobyte, ours the requests, its own the responses.

    0           1024        2048      2052      2056      2060      2064
    | requests  | responses | req_cons| req_prod| rsp_cons| rsp_prod| …       (xen/io/xs_wire.h)

We write requests, req_prod and rsp_cons; xenstored the rest. Indices run freely; what comes from the other side is read once
and checked. A producer's index is stored with release behind its bytes, and loaded with acquire before them; the same holds
for a consumer's. The notification is the caller's business.
"""

from __future__ import annotations

from pvbus.shm.memory import Memory

PAGE_BYTES = 4096
RING_BYTES = 1024
REQUESTS, RESPONSES = 0, 1024
REQ_CONS, REQ_PROD, RSP_CONS, RSP_PROD = 2048, 2052, 2056, 2060


class RingBroken(Exception):
    """An index of the other side's is impossible."""


class Ring:
    """Our side of the page."""

    def __init__(self, page: Memory) -> None:
        self.page = page

    def put(self, data: bytes) -> int:
        """Write as much of a request as there is room for; give how much. Notify xenstored if it is any."""
        produced = self.page.load32(REQ_PROD)
        used = produced - self.page.load32_acquire(REQ_CONS) & 0xFFFFFFFF
        if used > RING_BYTES:
            raise RingBroken(f"req_cons leaves {used} bytes in a ring of {RING_BYTES}")
        size = min(len(data), RING_BYTES - used)
        for at in range(size):
            self.page.store8(REQUESTS + (produced + at) % RING_BYTES, data[at])
        if size:
            self.page.store32_release(REQ_PROD, produced + size & 0xFFFFFFFF)
        return size

    def take(self) -> bytes:
        """Read all of the responses that lie there. Notify xenstored if it is any: it may wait for the room."""
        consumed = self.page.load32(RSP_CONS)
        size = self.page.load32_acquire(RSP_PROD) - consumed & 0xFFFFFFFF
        if size > RING_BYTES:
            raise RingBroken(f"rsp_prod says {size} bytes in a ring of {RING_BYTES}")
        data = bytes(self.page.load8(RESPONSES + (consumed + at) % RING_BYTES) for at in range(size))
        if size:
            self.page.store32_release(RSP_CONS, consumed + size & 0xFFFFFFFF)
        return data
