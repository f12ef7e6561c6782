# SPDX-License-Identifier: Apache-2.0
"""The shutdown device: asks the guest to shut down, and hears whether it will."""

from __future__ import annotations

import errno
import os
import struct
from typing import TYPE_CHECKING

import msgspec

from pvbus.actors.hypervisor.vmbus.integration import (
    NEGOTIATE,
    RESPONSE,
    SHUTDOWN,
    V1_0,
    V3_0,
    IcError,
    IcMessage,
    IcVersion,
    Negotiation,
    decode,
)

if TYPE_CHECKING:
    from collections.abc import Callable

    from pvbus.actors.hypervisor.vmbus.endpoint import Packet

VERSIONS = (V1_0, V3_0, IcVersion(3, 1), IcVersion(3, 2))
FORCE = 1
TEXT_BYTES = 2048
_BODY = struct.Struct(f"<III{TEXT_BYTES}s")     # reason, time-out in seconds, flags, a text for the screen


def body(reason: int, timeout_s: int, flags: int, text: str = "") -> bytes:
    """Give the body of a request."""
    return _BODY.pack(reason, timeout_s, flags, text.encode()[: TEXT_BYTES - 1])


def body_of(data: bytes) -> tuple[int, int, int, str]:
    """Read it: reason, time-out, flags, text. Raises IcError."""
    if len(data) < _BODY.size:
        raise IcError(f"a shutdown of {len(data)} bytes, it has {_BODY.size}")
    reason, timeout_s, flags, text = _BODY.unpack_from(data)
    return reason, timeout_s, flags, text.split(b"\0", 1)[0].decode(errors="replace")


class ShutdownState(msgspec.Struct):
    """What an heir needs; the caller of a request that is under way is not his any more."""

    talk: Negotiation = msgspec.field(default_factory=Negotiation)
    transaction: int = 0
    wrong: int = 0


class Shutdown:
    """Negotiate; then one request at a time."""

    echoes = False

    def __init__(self) -> None:
        self.state = ShutdownState()
        self._on_answer: Callable[[int | None], None] | None = None
        self._deadline_ns: int | None = None

    @property
    def ready(self) -> bool:
        """Whether a driver has agreed to a version."""
        return self.state.talk.agreed is not None

    def shutdown(
        self, reason: int, deadline_ns: int, on_answer: Callable[[int | None], None], *, graceful: bool = True, text: str = ""
    ) -> list[Packet]:
        """Ask; give the packet to submit. The answer's status, or None (closed, or none until the deadline), goes to `on_answer`.

        ENOTCONN: no driver has agreed to a version; EBUSY: a request is under way.
        """
        agreed = self.state.talk.agreed
        if agreed is None:
            raise OSError(errno.ENOTCONN, os.strerror(errno.ENOTCONN))
        if self._on_answer is not None:
            raise OSError(errno.EBUSY, os.strerror(errno.EBUSY))
        self._on_answer, self._deadline_ns = on_answer, deadline_ns
        self.state.transaction = self.state.transaction % 0xFF + 1
        frame, version = agreed
        message = IcMessage(
            type=SHUTDOWN, body=body(reason, 0, 0 if graceful else FORCE, text), frame=frame, version=version,
            transaction=self.state.transaction,
        )  # fmt: skip
        return [message.packet()]

    def _end(self, status: int | None) -> None:
        on_answer, self._on_answer, self._deadline_ns = self._on_answer, None, None
        if on_answer is not None:
            on_answer(status)

    def on_open(self) -> list[Packet]:
        """Begin anew, with the question for versions."""
        self.state = ShutdownState()
        return [self.state.talk.ask(VERSIONS, 0)]

    def on_packets(self, packets: list[Packet]) -> list[Packet]:
        """Take answers; nothing is sent for them."""
        for packet in packets:
            try:
                self._take(decode(packet.payload))
            except IcError:
                self.state.wrong += 1
        return []

    def _take(self, message: IcMessage) -> None:
        state = self.state
        if not message.flags & RESPONSE:
            raise IcError(f"flags {message.flags}: no answer")
        if message.type == NEGOTIATE and state.talk.agreed is None:
            state.talk.answer(message, VERSIONS)
        elif message.type == SHUTDOWN and self._on_answer is not None and message.transaction == state.transaction:
            self._end(message.status)
        else:
            raise IcError(f"type {message.type}, transaction {message.transaction}: nothing waits for it")

    def on_close(self) -> None:
        """A request that is under way has no answer."""
        self.state.talk = Negotiation()
        self._end(None)

    def due_ns(self) -> int | None:
        """When a request is given up."""
        return self._deadline_ns

    def tick(self, now_ns: int) -> list[Packet]:
        """Give a request up; a late answer is not its successor's, which has another transaction number."""
        if self._deadline_ns is not None and now_ns >= self._deadline_ns:
            self._end(None)
        return []

    def save(self) -> bytes:
        """Give the state."""
        return msgspec.msgpack.encode(self.state)

    def restore(self, state: bytes) -> None:
        """Go on without another negotiation."""
        self.state = msgspec.msgpack.decode(state, type=ShutdownState)
