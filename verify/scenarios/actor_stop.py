# SPDX-License-Identifier: Apache-2.0
"""An actor is stopped while another one talks to it: is each message handled, refused to its sender, or counted (E13)?

Contexts: the teller (a server: tells, asks, and then serves its inbox), the supervisor, which tells the actor to stop and
reads nothing, and the actor (Inbox.get until it is told to stop, then Inbox.close). Inbox, Peer and the frames are the
production code; a socket is modelled, each of its calls one step, and epoll waits on a doorbell that whoever sends or hangs up
rings.
"""

from __future__ import annotations

import logging
import os
import select
import struct
from collections import deque
from collections.abc import Iterable
from functools import partial
from typing import TYPE_CHECKING, Any, Final

from pvbus.actors.runtime.clock import ManualClock
from pvbus.actors.runtime.inbox import Inbox, PeerGone
from pvbus.actors.runtime.wire import Done, Failure, Message, encode
from pvbus.shm._core_explored import Memory
from pvbus.verify.explorer.scenario import Scenario, Start, claimed, within

if TYPE_CHECKING:
    from pvbus.verify.explorer.model import Model

PAGE: Final = 4096
_SENT: Final = 20  # bits of a connection's word: what the first end has sent, then the second; then who has closed, or shut
_CLOSED: Final = 2 * _SENT
_SHUT: Final = _CLOSED + 2
_FD_FIRST: Final = 1 << 20  # no descriptor is one of these

logging.getLogger("pvbus.runtime").addFilter(lambda record: "explored" not in record.getMessage())


class Told(Message, frozen=True, kw_only=True):
    """What the teller says."""

    number: int


class Halt(Message, frozen=True, kw_only=True):
    """What the supervisor says."""


class Connection:
    """A pair of sockets. Its word holds all that its ends could see, so who calls has observed it."""

    def __init__(self, memory: Memory, number: int) -> None:
        self.memory, self.word = memory, 8 * number
        self.frames: tuple[deque[bytes], deque[bytes]] = (deque(), deque())  # by who has sent them


class Socket:
    """One end of a connection, as far as Peer and Inbox use it."""

    def __init__(self, connection: Connection, end: int, model: Model, bells: tuple[int, int]) -> None:
        self._connection, self._end, self._model, self._bells = connection, end, model, bells
        self._sent = 0
        self.is_over = False

    def fileno(self) -> int:
        """Give a number that is no descriptor."""
        return _FD_FIRST + self._connection.word + self._end

    def setblocking(self, flag: bool) -> None:  # as a socket has it
        """Never block."""

    def getsockopt(self, *_: int) -> bytes:
        """Give nobody's credentials."""
        return struct.pack("iII", 0, 0, 0)

    def _step(self, bits: int, site: str) -> int:
        return self._connection.memory.fetch_or64(self._connection.word, bits, site)

    def send(self, data: bytes, _flags: int) -> int:
        """Send a frame; EPIPE once the other end has closed, or reads no more."""
        self._sent += 1
        seen = self._step(1 << self._end * _SENT + self._sent - 1, "send")
        other = 1 - self._end
        if seen >> _CLOSED + other & 1 or seen >> _SHUT + other & 1:
            raise BrokenPipeError
        self._connection.frames[self._end].append(data)
        self._model.ring(self._bells[other], "send.wakes")
        return len(data)

    def recvmsg(self, *_: int) -> tuple[bytes, list[Any], int, None]:
        """Take a frame; empty once there is none and the other end has closed, or this one reads no more."""
        seen = self._step(0, "recv")
        frames = self._connection.frames[1 - self._end]
        if frames:
            return frames.popleft(), [], 0, None
        if seen >> _CLOSED + 1 - self._end & 1 or seen >> _SHUT + self._end & 1:
            return b"", [], 0, None
        raise BlockingIOError

    def is_readable(self) -> bool:
        """Tell what epoll would."""
        seen = self._step(0, "epoll")
        return bool(self._connection.frames[1 - self._end]) or bool(seen >> _CLOSED + 1 - self._end & 1)

    def shutdown(self, _how: int) -> None:
        """Read no more; what has been sent stays to be read."""
        self._step(1 << _SHUT + self._end, "shutdown")

    def close(self) -> None:
        """Hang up."""
        if self.is_over:
            return
        self._step(1 << _CLOSED + self._end, "close")
        if self._connection.frames[1 - self._end]:
            raise AssertionError("closed over frames that were not read: the sender would be told of a reset")
        self._model.ring(self._bells[1 - self._end], "close.wakes")


class Poller:
    """The epoll instance of an inbox."""

    def __init__(self, model: Model, bell: int) -> None:
        self._model, self._bell = model, bell
        self._sockets: dict[int, Socket] = {}

    def add(self, socket: Socket) -> None:
        """Know the socket behind a number."""
        self._sockets[socket.fileno()] = socket

    def register(self, _fd: int, _mask: int) -> None:
        """All that are known are watched."""

    modify = register

    def unregister(self, fd: int) -> None:
        """Watch it no longer."""
        self._sockets.pop(fd, None)

    def poll(self, timeout: float | None = None) -> list[tuple[int, int]]:
        """Look once, or sleep until there is something; time does not pass here."""
        while True:
            ready = [(fd, select.EPOLLIN) for fd, socket in self._sockets.items() if socket.is_readable()]
            if ready or timeout == 0:
                return ready
            self._model.wait(self._bell, "epoll.wait")
            self._model.take(self._bell, "epoll.woken")

    def close(self) -> None:
        """It holds nothing."""


class ExploredInbox(Inbox):
    """The production inbox over a modelled epoll."""

    def __init__(self, model: Model, bell: int, name: str) -> None:
        super().__init__(ManualClock(), f"{name} (explored)")
        self._epoll.close()
        self._epoll: Any = Poller(model, bell)
        self._ended = False
        self.lost: list[int] = []

    def _lose(self, received: Any) -> None:
        super()._lose(received)
        self.lost.append(received.message.number)

    def connect(self, socket: Any, name: str) -> Any:
        """Own one end of a connection."""
        self._epoll.add(socket)
        return self.add_peer(socket, f"{name} (explored)")

    def abandon(self) -> None:
        """End in order."""
        super().abandon()
        self._ended = True

    def drop(self) -> None:
        """End an execution that was cut: close the one descriptor that is real."""
        if not self._ended:
            os.close(self._wake_fd)


class ActorStop(Scenario):
    """`tells` messages without an answer, then `asks` with one."""

    ranges = within(tells=(0, 16), asks=(0, 16))
    name = "actor-stop"
    claims = claimed("sc", {}, {"tells": 0}, {"tells": 2, "asks": 0})  # system calls keep their order under every model
    inbox_type: type[ExploredInbox] = ExploredInbox

    def __init__(self, *, tells: int = 1, asks: int = 1) -> None:
        self.tells, self.asks = tells, asks
        self.inboxes: list[ExploredInbox] = []
        self.sockets: list[Socket] = []

    def prepare(self, model: Model, variants: int) -> None:
        """Make the word of each connection, and the doorbells."""
        self.bells = {name: model.bell(name) for name in ("teller", "actor", "supervisor")}
        self.memory = Memory(model, PAGE)
        model.name(self.memory, "sockets")

    def start(self, model: Model) -> Iterable[Start]:
        """Give the three, connected."""
        for socket in self.sockets:
            socket.is_over = True
        for inbox in self.inboxes:
            inbox.drop()
        self.handled: list[int] = []
        self.refused: list[int] = []
        self.answers: list[str] = []
        ends = []
        for number, other in enumerate(("teller", "supervisor")):
            connection = Connection(self.memory, number)
            bells = self.bells[other], self.bells["actor"]
            ends.append([Socket(connection, end, model, bells) for end in (0, 1)])
        self.sockets = [socket for pair in ends for socket in pair]
        self.teller = ExploredInbox(model, self.bells["teller"], "teller")
        self.actor = self.inbox_type(model, self.bells["actor"], "actor")
        self.inboxes = [self.teller, self.actor]
        peer = self.teller.connect(ends[0][0], "actor")
        self.actor.connect(ends[0][1], "teller")
        self.actor.connect(ends[1][1], "supervisor")
        yield "teller", partial(self._tell, peer), True
        yield "actor", self._act, False
        yield "supervisor", partial(self._stop, ends[1][0]), False

    def _tell(self, peer: Any) -> None:
        for number in range(self.tells):
            try:
                peer.tell(Told(number=number))
            except PeerGone:
                self.refused.append(number)
        for number in range(self.tells, self.tells + self.asks):
            peer.ask(Told(number=number), lambda reply, _fds: self.answers.append(type(reply).__name__))
        self.teller.get()

    def _act(self) -> None:
        while True:
            received = self.actor.get().message
            if isinstance(received.message, Halt):
                break
            self.handled.append(received.message.number)
            received.peer.reply(received.request, Done())
        self.actor.close()

    def _stop(self, socket: Socket) -> None:
        socket.send(encode(Halt()), 0)

    def broken(self, model: Model, stuck: list[str]) -> str | None:
        """Each message is handled, refused or counted, one of the three; a question may be refused by its answer instead."""
        for number in range(self.tells + self.asks):
            fates = [self.handled.count(number), self.refused.count(number), self.actor.lost.count(number)]
            is_question = number >= self.tells
            if sum(fates) != 1 and not (is_question and sum(fates) == 0 and Failure.__name__ in self.answers):
                return f"message {number} was handled, refused, counted {fates} times"
        if self.actor.undelivered != len(self.actor.lost):
            return f"{len(self.actor.lost)} messages were not handled, {self.actor.undelivered} are counted"
        if not stuck and len(self.answers) != self.asks:
            return f"{self.asks} questions had {len(self.answers)} answers"
        return None
