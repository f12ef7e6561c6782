# SPDX-License-Identifier: Apache-2.0
"""The heartbeat device: asks every two seconds of the machine's clock whether the guest lives.

A request carries a sequence number; the guest answers with that number plus one.
"""

from __future__ import annotations

import struct

import msgspec

from pvbus.actors.hypervisor.vmbus.endpoint import Packet
from pvbus.actors.hypervisor.vmbus.integration import (
    HEARTBEAT,
    NEGOTIATE,
    RESPONSE,
    V1_0,
    V3_0,
    IcError,
    IcMessage,
    Negotiation,
    decode,
)

PERIOD_NS = 2_000_000_000
VERSIONS = (V1_0, V3_0)
_BODY = struct.Struct("<Q32x")


def body(sequence: int) -> bytes:
    """Give the 40 bytes of a heartbeat."""
    return _BODY.pack(sequence)


def sequence_of(data: bytes) -> int:
    """Read them. Raises IcError."""
    if len(data) < _BODY.size:
        raise IcError(f"a heartbeat of {len(data)} bytes, it has {_BODY.size}")
    (sequence,) = _BODY.unpack_from(data)
    return int(sequence)


class HeartbeatState(msgspec.Struct):
    """What an heir needs."""

    talk: Negotiation = msgspec.field(default_factory=Negotiation)
    due_ns: int | None = None
    sequence: int = 0       # of the last request
    answered: int = 0       # the last request that was answered
    beats: int = 0
    missed: int = 0         # requests made while the one before had no answer
    wrong: int = 0          # answers that make no sense


class Heartbeat:
    """Negotiate, then ask and check."""

    echoes = False

    def __init__(self) -> None:
        self.state = HeartbeatState()

    @property
    def alive(self) -> bool:
        """Whether the last request has been answered."""
        return self.state.sequence > 0 and self.state.answered == self.state.sequence

    def on_open(self) -> list[Packet]:
        """Begin anew, with the question for versions."""
        self.state = HeartbeatState()
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
            if state.talk.answer(message, VERSIONS):
                state.due_ns = 0
        elif message.type == HEARTBEAT and sequence_of(message.body) == state.sequence + 1 and not self.alive:
            state.answered = state.sequence
            state.beats += 1
        else:
            raise IcError(f"type {message.type} out of turn")

    def on_close(self) -> None:
        """Stop asking."""
        self.state.due_ns = None

    def due_ns(self) -> int | None:
        """When the next request is due."""
        return self.state.due_ns

    def tick(self, now_ns: int) -> list[Packet]:
        """Ask; a period that has been slept through is not made up for."""
        state, agreed = self.state, self.state.talk.agreed
        if agreed is None or state.due_ns is None or now_ns < state.due_ns:
            return []
        if state.sequence and not self.alive:
            state.missed += 1
        state.sequence += 1
        state.due_ns = now_ns + PERIOD_NS
        frame, version = agreed
        return [
            IcMessage(
                type=HEARTBEAT, body=body(state.sequence), frame=frame, version=version, transaction=state.sequence & 0xFF
            ).packet()
        ]

    def save(self) -> bytes:
        """Give the state."""
        return msgspec.msgpack.encode(self.state)

    def restore(self, state: bytes) -> None:
        """Go on with the sequence, without another negotiation."""
        self.state = msgspec.msgpack.decode(state, type=HeartbeatState)
