# SPDX-License-Identifier: Apache-2.0
"""Files whose writes may wait: a bind waits for the driver's probe, and a driver may look at this very tree meanwhile.

So such a write leaves the session's loop, and is answered from a thread. Reads stay in the loop: the bus answers them at once.
"""

from __future__ import annotations

import errno
from collections.abc import Callable
from typing import TYPE_CHECKING

from pvbus.view.fuse.node import TEXT_BYTES_MAX, Handle, Text, error

if TYPE_CHECKING:
    from pvbus.view.fuse.request import Request

Later = Callable[[Callable[[], None], Callable[[int], None]], object]
"""Runs the first outside of the loop; then, in the loop, the second with the errno that came of it, 0 for none."""


class LateText(Text):
    """A text of sysfs whose `store` may wait."""

    def __init__(
        self, later: Later, show: Callable[[], str | bytes] | None, store: Callable[[bytes], None] | None = None
    ) -> None:
        super().__init__(show, store)
        self.later = later

    def open(self, request: Request, flags: int) -> Handle:
        """Open it; EACCES for what it cannot do."""
        return _LateHandle(self, super().open(request, flags))


class _LateHandle(Handle):
    def __init__(self, text: LateText, reading: Handle) -> None:
        self._text, self._reading = text, reading

    def read(self, request: Request, offset: int, size: int, flags: int) -> bytes | int | None:
        return self._reading.read(request, offset, size, flags)

    def truncate(self, request: Request, size: int) -> None:
        """Nothing is kept that could be cut."""

    def write(self, request: Request, offset: int, data: bytes, flags: int) -> None:
        store = self._text.store
        if store is None or len(data) > TEXT_BYTES_MAX:
            raise error(errno.EINVAL)

        self._text.later(
            lambda: store(data), lambda number: request.fail(number) if number else request.written(len(data))
        )
