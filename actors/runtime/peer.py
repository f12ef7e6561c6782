# SPDX-License-Identifier: Apache-2.0
"""One connection of an inbox: tell, ask with a continuation and a deadline, reply; never blocking, all of it
bounded.

A `Peer` is used from its inbox's thread only. What the socket does not take is queued here, descriptors
duplicated; what can never arrive is refused with `PeerGone` or counted, so that nothing is swallowed. Reading
is the inbox's part.
"""

from __future__ import annotations

import collections
import errno
import functools
import logging
import os
import select
import socket
import struct
from typing import TYPE_CHECKING, NamedTuple, Protocol

from pvbus.actors.runtime import wire
from pvbus.actors.runtime.clock import NS_PER_S
from pvbus.actors.runtime.wire import Failure, Message, WireError

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from pvbus.actors.runtime.clock import Timer
    from pvbus.actors.runtime.inbox import Inbox

    Then = Callable[[Message, list[int]], None]

PENDING_FRAMES_MAX = 1024
"""Frames queued for a peer whose socket is full (about 200 already lie in it): who is that far behind has
stopped.
"""

ACCEPTS_A_TURN_MAX = 16
"""Connections taken from one listener before the others get their turn."""

ACCEPT_PAUSE_NS = 100_000_000
"""How long a listener rests when there is no descriptor left: the waiting one would make epoll spin."""

_log = logging.getLogger("pvbus.runtime")


class PeerGone(ConnectionError):
    """Say that the peer has hung up or was closed; errno is EPIPE."""

    def __init__(self, name: str) -> None:
        super().__init__(errno.EPIPE, f"{name} is gone")


class Received(NamedTuple):
    """Hold what an actor gets; `request` 0 wants no reply. Its handler owns `fds`: close or keep them."""

    peer: Peer
    request: int
    message: Message
    fds: list[int]


class Reply(NamedTuple):
    """Hold a reply that waits in the inbox for its turn."""

    peer: Peer
    request: int
    message: Message
    fds: list[int]


class Hangup(NamedTuple):
    """Mark where in the inbox a peer's frames end."""

    peer: Peer


class Idle(Protocol):
    """Be the work that an actor does between messages, and its sleeping protocol."""

    def work(self) -> bool:
        """Do one bounded batch; return whether there was anything to do."""

    def may_sleep(self) -> bool:
        """Announce sleep, full barrier, look again; False, announcement taken back, if work appeared."""

    def awake(self) -> None:
        """Take the announcement back."""


class NoIdle:
    """Be the idle work of an actor that has none."""

    def work(self) -> bool:
        """Find nothing to do."""
        return False

    def may_sleep(self) -> bool:
        """Let the loop sleep."""
        return True

    def awake(self) -> None:
        """Take nothing back."""


class Peer:
    """One connection of an inbox. Use it from the inbox's thread only; `Inbox.add_peer` makes it."""

    def __init__(self, inbox: Inbox, sock: socket.socket, name: str) -> None:
        sock.setblocking(False)
        self.name = name
        self.sock = sock
        credentials = sock.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, struct.calcsize("iII"))
        self.pid, self.uid, _ = struct.unpack("iII", credentials)
        self.closed = False
        self.foreign_frames = 0
        self.undelivered = 0
        self.late_replies = 0
        self.complaints = 0
        self.resets = 0
        self.hung_up = False
        self._deaf = False
        self._inbox = inbox
        self._requests = 0
        self._asked: dict[int, tuple[Then, Timer]] = {}
        self._outgoing: collections.deque[tuple[bytes, list[int]]] = collections.deque()

    def __repr__(self) -> str:
        return f"<Peer {self.name}{' closed' if self.closed else ''}>"

    def tell(self, message: Message, fds: Sequence[int] = ()) -> None:
        """Send a message that wants no reply; PeerGone if it cannot arrive any more. Never blocks; `fds` stay
        yours.
        """
        wire.check_fds(message, len(fds))
        self._send(wire.encode(message), fds)

    def ask(self, message: Message, then: Then, deadline_s: float = 5.0, fds: Sequence[int] = ()) -> int:
        """Send a request and return its id; `then(reply, fds)` is called from the loop, exactly once.

        What it gets is the reply, or Failure(ETIMEDOUT) at the deadline, Failure(EPIPE) when the peer is gone
        (also if it was before), Failure(EMFILE) when no descriptor is left for `fds`, Failure(EMSGSIZE) for
        what no frame has room for, Failure(ESHUTDOWN) when our inbox closes. PeerGone only if our inbox is closed already.
        """
        inbox = self._inbox
        if inbox.closed:
            raise PeerGone(self.name)
        wire.check_fds(message, len(fds))
        request = self._requests + 1
        timer = self.expect(request, then, deadline_s)
        try:
            self._send(wire.encode(message, request), fds)
        except PeerGone:
            inbox.fail_soon(self, request)
        except WireError:  # words of a user that just fitted a frame when they came: with our number they are too long
            inbox.call_soon(functools.partial(self.fail, request, errno.EMSGSIZE))
        except OSError as error:
            inbox.call_soon(functools.partial(self.fail, request, error.errno or errno.EIO))
        except BaseException:
            del self._asked[request]
            timer.cancel()
            raise
        return request

    def expect(self, request: int, then: Then, deadline_s: float) -> Timer:
        """Have `then` called as for `ask`, for a request that somebody else has sent on this socket."""
        self._requests = max(self._requests, request)
        timer = self._inbox.call_at(
            self._inbox.clock.now_ns() + round(deadline_s * NS_PER_S),
            functools.partial(self.complete, request, Failure(errno=errno.ETIMEDOUT), []),
        )
        self._asked[request] = (then, timer)
        return timer

    def reply(self, request: int, message: Message, fds: Sequence[int] = ()) -> None:
        """Answer a request. That the peer is gone is not the answerer's business: counted as undelivered."""
        if request == 0:
            return
        try:
            wire.check_fds(message, len(fds))
            data = wire.encode(message, request, reply=True)
        except WireError as error:
            data = wire.encode(Failure(errno=errno.EMSGSIZE, text=str(error)), request, reply=True)
            fds = ()
        try:
            self._send(data, fds)
        except PeerGone:
            self.undelivered += 1
        except OSError as error:  # it cannot go with its descriptors; without any it can always be queued
            self.reply(request, Failure(errno=error.errno or errno.EIO, text=error.strerror or ""))

    def complete(self, request: int, message: Message, fds: list[int]) -> None:
        """Hand a reply to its continuation; a late or unknown one is dropped and counted. (For the inbox.)"""
        then, timer = self._asked.pop(request, (None, None))
        if then is None or timer is None:
            self.late_replies += 1
            wire.close_fds(fds)
            return
        timer.cancel()
        then(message, fds)

    def asked(self) -> list[int]:
        """Return the ids of the requests that wait for their reply."""
        return list(self._asked)

    def fail(self, request: int, number: int) -> None:
        """Fail one ask, if it still waits. (For the inbox.)"""
        if request in self._asked:
            self.complete(request, Failure(errno=number), [])

    def _send(self, data: bytes, fds: Sequence[int]) -> None:
        if self.closed or self._deaf:
            raise PeerGone(self.name)
        if not self._outgoing:
            try:
                wire.send_frame(self.sock, data, fds, socket.MSG_DONTWAIT)
            except BlockingIOError:
                pass
            except ConnectionError:
                self._deaf = True  # What it sent before is still read; its hang-up follows.
                raise PeerGone(self.name) from None
            else:
                return
        if len(self._outgoing) >= PENDING_FRAMES_MAX:
            _log.warning("%s does not read: closed with %d frames for it", self.name, len(self._outgoing))
            self.undelivered += 1
            self._drop_outgoing()
            self._deaf = True
            self._inbox.cut(self)
            raise PeerGone(self.name)
        self._outgoing.append((data, _dup_all(fds)))
        self._inbox.watch_output(self, wanted=True)

    def flush(self) -> None:
        """Send what is queued, as far as the socket takes it. (For the inbox.)"""
        while self._outgoing:
            data, fds = self._outgoing[0]
            try:
                wire.send_frame(self.sock, data, fds, socket.MSG_DONTWAIT)
            except BlockingIOError:
                return
            except ConnectionError:
                self._deaf = True
                self._drop_outgoing()
                break
            except OSError as error:
                if not fds:
                    raise
                self._outgoing.popleft()
                wire.close_fds(fds)
                self._refuse(data, error)
                continue
            self._outgoing.popleft()
            wire.close_fds(fds)
        self._inbox.watch_output(self, wanted=False)

    def _refuse(self, data: bytes, error: OSError) -> None:
        """Fail a call whose descriptors cannot go; a reply's asker is told instead."""
        frame = wire.decode(data)
        number = error.errno or errno.EIO
        if frame.reply:
            failure = Failure(errno=number, text=error.strerror or "")
            self._outgoing.appendleft((wire.encode(failure, frame.request, reply=True), []))
        elif frame.request:
            self._inbox.call_soon(functools.partial(self.fail, frame.request, number))
        else:
            self.undelivered += 1

    def _drop_outgoing(self) -> None:
        self.undelivered += len(self._outgoing)
        for _, fds in self._outgoing:
            wire.close_fds(fds)
        self._outgoing.clear()

    def close(self) -> None:
        """Hang up. Pending asks fail with EPIPE from the loop; frames not yet sent or handled are counted
        undelivered.
        """
        if self.closed:
            return
        self._inbox.forget(self)
        self.closed = True
        self._drop_outgoing()
        self.sock.close()
        for request in self._asked:
            self._inbox.fail_soon(self, request)

    def abandon(self) -> None:
        """Close our descriptors and do nothing else. (For the inbox.)"""
        self.closed = True
        for _, fds in self._outgoing:
            wire.close_fds(fds)
        self._outgoing.clear()
        self.sock.close()

    def fail_all(self, number: int) -> None:
        """Fail every pending ask now. (For the inbox.)"""
        for request in self.asked():
            self.fail(request, number)


class Listener:
    """Take connections from a listening socket for an inbox, which keeps it alive through its callback."""

    def __init__(self, inbox: Inbox, sock: socket.socket, on_accept: Callable[[socket.socket], None]) -> None:
        sock.setblocking(False)
        self._inbox = inbox
        self._sock = sock
        self._on_accept = on_accept
        self._watch()

    def _watch(self) -> None:
        if self._sock.fileno() >= 0:  # closed while it rested
            self._inbox.add_fd(self._sock.fileno(), select.EPOLLIN, self._accept)

    def _accept(self, _events: int) -> None:
        for _ in range(ACCEPTS_A_TURN_MAX):
            try:
                connection, _address = self._sock.accept()
            except (BlockingIOError, ConnectionAbortedError):
                return
            except OSError as error:
                _log.warning("%s: no connection can be taken: %s", self._inbox.name, error)
                self._inbox.remove_fd(self._sock.fileno())
                self._inbox.call_at(self._inbox.clock.now_ns() + ACCEPT_PAUSE_NS, self._watch)
                return
            self._on_accept(connection)


def _dup_all(fds: Sequence[int]) -> list[int]:
    copies: list[int] = []
    try:
        for fd in fds:
            copies.append(os.dup(fd))  # noqa: PERF401 -- those made are closed if the next fails
    except OSError:
        wire.close_fds(copies)
        raise
    return copies
