# SPDX-License-Identifier: Apache-2.0
"""What the two processes of a benchmark share: a page of counters, and the frame of every measured loop.

A memfd of the benchmark's own, not a page of the machine; each word has one writer. Every transport uses
the same words at the same rate, so counting costs everyone alike.
"""

from __future__ import annotations

import mmap
import os
import time

STOP = 0  # written by the parent: the row's time is over
RECEIVED = 1  # by the receiver: events it has read and, where the transport knows that, written back
DONE = 2  # by the side that leaves its loop first
SIGNALS = 3  # by the sender, where a transport says when it signals
WORDS = 512
STRIDE = 64  # events between two looks at STOP and two stores of RECEIVED
END_S_MAX = 5.0  # how long a sender goes on feeding a receiver that has not seen STOP yet


class Page:
    """The mapped page."""

    def __init__(self, fd: int) -> None:
        self.fd = fd
        self._map = mmap.mmap(fd, 8 * WORDS)
        self.words = memoryview(self._map).cast("Q")

    @classmethod
    def make(cls) -> Page:
        """Create one; children open its path."""
        fd = os.memfd_create("pvbus-bench")
        os.ftruncate(fd, 8 * WORDS)
        return cls(fd)

    @classmethod
    def open(cls, path: str) -> Page:
        """Map the page of another process."""
        return cls(os.open(path, os.O_RDWR | os.O_CLOEXEC))

    def path(self) -> str:
        """Return what `open` takes, while this process lives."""
        return f"/proc/{os.getpid()}/fd/{self.fd}"

    def reset(self) -> None:
        """Set all to zero, while nobody counts."""
        for word in (STOP, RECEIVED, DONE, SIGNALS):
            self.words[word] = 0


class FeedError(RuntimeError):
    """The receiver did not end, though it was fed."""


class Feed:
    """Bounds the end of a sender: iterate, send in the body; over when the receiver is."""

    def __init__(self, page: Page, pause_s: float = 0.0) -> None:
        self._words = page.words
        self._pause_s = pause_s
        self._deadline = time.monotonic() + END_S_MAX

    def __iter__(self) -> Feed:
        """Be one's own iterator."""
        return self

    def __next__(self) -> None:
        """Stop when the receiver is done; raise FeedError when it never is."""
        if self._words[DONE]:
            raise StopIteration
        if time.monotonic() > self._deadline:
            raise FeedError(f"the receiver did not end within {END_S_MAX:.0f} s")
        if self._pause_s:
            time.sleep(self._pause_s)


def percentiles(times_ns: list[int]) -> tuple[float, float]:
    """Return p50 and p99 in microseconds."""
    ordered = sorted(times_ns)
    return ordered[len(ordered) // 2] / 1000, ordered[min(len(ordered) - 1, len(ordered) * 99 // 100)] / 1000
