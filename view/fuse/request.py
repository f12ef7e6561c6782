# SPDX-License-Identifier: Apache-2.0
"""What a handler gets of a request: who asks, and the means to answer."""

from __future__ import annotations

import errno
from typing import TYPE_CHECKING

from pvbus.view.fuse import abi

if TYPE_CHECKING:
    from pvbus.view.fuse.node import Handle
    from pvbus.view.fuse.session import Session


class Request:
    """One that the kernel waits for: who asks, and the means to answer, once."""

    __slots__ = ("nodeid", "pid", "session", "unique")

    def __init__(self, session: Session, unique: int, nodeid: int, pid: int) -> None:
        self.session = session
        self.unique = unique
        self.nodeid = nodeid
        self.pid = pid  # of the calling thread

    def reply(self, payload: bytes = b"") -> None:
        """Answer with bytes: what was read, or nothing."""
        self.session.answer(self.unique, 0, payload)

    def fail(self, number: int) -> None:
        """Answer with an errno."""
        self.session.answer(self.unique, number)

    def interrupted(self) -> None:
        """Answer a READ that has waited and that a signal ends: as the signal wants it where that can be had, else with EINTR."""
        if self.session.disguise is None:
            self.fail(errno.EINTR)
        else:
            self.session.disguise.interrupted(self)

    def unknown(self) -> int | None:
        """Have IOCTL answered with ENOSYS, as this driver does, where that can be had; give ENOTTY below zero where it cannot."""
        if self.session.disguise is None:
            return -errno.ENOTTY
        self.session.disguise.unknown(self)
        return None

    def written(self, count: int) -> None:
        """Answer WRITE."""
        self.session.put(self.unique, abi.WRITE_ANSWER.pack(abi.WRITE_ANSWER.size, 0, self.unique, count, 0))

    def result(self, value: int) -> None:
        """Answer IOCTL: a value, or an errno below zero."""
        self.session.put(self.unique, abi.IOCTL_ANSWER.pack(abi.IOCTL_ANSWER.size, 0, self.unique, value, 0, 0, 0))

    def revents(self, mask: int) -> None:
        """Answer POLL."""
        self.session.put(self.unique, abi.POLL_ANSWER.pack(abi.POLL_ANSWER.size, 0, self.unique, mask, 0))

    def opened(self, handle: Handle) -> None:
        """Answer OPEN."""
        self.session.answer_open(self, handle)
