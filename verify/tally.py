# SPDX-License-Identifier: Apache-2.0
"""The book of a stress run: how often each end of a port was raised, and how often it was seen.

A page of 64-bit words in a memfd of our own, *not* a page of the machine: the coordinator makes it, user
processes map it by descriptor, and every word has exactly one writer. So plain aligned eight-byte stores do
here; the order that the checks need (raised, then notify, then read, then looked up) is carried by the
machine's own barriers, which lie between the sender's store and the receiver's load. Nothing that the
machine needs may be kept here.

    word  0        PHASE, written by the coordinator
    words 1 … 63   one word a user process, its own: rounds it has done (or, for ping: that it has ended)
    words 64 …     eight words a link; a link is one receiving end of a port
                   +0 RAISED  before the sender's notify          (sender)
                   +1 DONE    after it returned                   (sender)
                   +2 SEEN    events read                         (receiver)
                   +3 LAST    RAISED as it was after the last read (receiver)
"""

from __future__ import annotations

import mmap
import os
from dataclasses import dataclass

PHASE = 0
RUN, STOP = 0, 1
USERS_MAX = 63
LINKS_FIRST = 64
LINK_WORDS = 8
RAISED, DONE, SEEN, LAST = range(4)


class Tally:
    """The mapped page; `words` is what everyone counts in."""

    def __init__(self, fd: int, links: int) -> None:
        self.fd = fd
        self.links = links
        self._map = mmap.mmap(fd, self.bytes_for(links))
        self._bytes = memoryview(self._map)
        self.words = self._bytes.cast("Q")

    @staticmethod
    def bytes_for(links: int) -> int:
        """Return how many bytes that many links need."""
        return 8 * (LINKS_FIRST + LINK_WORDS * links)

    @classmethod
    def make(cls, links: int) -> Tally:
        """Create the page; the descriptor is inherited by whom it is passed to."""
        fd = os.memfd_create("pvbus-tally", os.MFD_CLOEXEC)
        os.ftruncate(fd, cls.bytes_for(links))
        return cls(fd, links)

    def at(self, link: int) -> int:
        """Return the index of a link's first word."""
        if not 0 <= link < self.links:
            raise IndexError(f"link {link} of {self.links}")
        return LINKS_FIRST + LINK_WORDS * link

    def close(self) -> None:
        """Unmap and close."""
        self.words.release()
        self._bytes.release()
        self._map.close()
        os.close(self.fd)


@dataclass(frozen=True)
class Link:
    """What a checker must know of a receiving end."""

    index: int
    domain: int
    port: int
    exact: bool  # its sender never notifies before the last one was seen: as many seen as raised
    text: str


def faults(tally: Tally, link: Link, sender_alive: bool = True) -> list[str]:
    """Judge a link at rest. A notify of a dead sender counts only if it had returned."""
    at = tally.at(link.index)
    raised, done, seen, last = (tally.words[at + field] for field in (RAISED, DONE, SEEN, LAST))
    where = f"{link.domain}:{link.port} ({link.text})"
    found = []
    if seen > raised:
        found.append(f"port {where}: {seen} events read, {raised} raised: something came that was not raised")
    due = raised if sender_alive else done
    if link.exact and seen < due:
        found.append(f"port {where}: {seen} events read of {due} raised one at a time: lost")
    elif last < due:
        found.append(f"port {where}: notify {due} came after the last event read (at notify {last}): lost")
    return found
