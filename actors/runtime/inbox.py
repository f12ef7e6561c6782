# SPDX-License-Identifier: Apache-2.0
"""The epoll inbox: one loop that serves frames, doorbells, timers and an actor's own work, without a thread.

An `Inbox` belongs to the main thread of one process; only `put` and `call_soon` may be called from elsewhere.
`Peer`s are its connections. Frames of one peer are handled in their order, its hang-up after the last of
them. Nobody waits for a reply: `Peer.ask` takes a continuation and a deadline. Every frame that was sent is
handled, refused with `PeerGone`, or counted as undelivered and reported; none is swallowed. Driver logic must
not be added here.
"""

from __future__ import annotations

import collections
import contextlib
import errno
import logging
import math
import os
import queue
import select
import signal
import socket
import threading
from typing import TYPE_CHECKING, Any, NamedTuple

from pykka import ActorDeadError
from pykka._envelope import Envelope

from pvbus.actors.runtime import wire
from pvbus.actors.runtime.clock import NS_PER_S, Clock, Timer, Timers
from pvbus.actors.runtime.peer import Hangup, Idle, Listener, NoIdle, Peer, PeerGone, Received, Reply
from pvbus.actors.runtime.wire import Done, Failure, WireError

if TYPE_CHECKING:
    from collections.abc import Callable

__all__ = ["Idle", "Inbox", "InvariantError", "Peer", "PeerGone", "Received"]

FRAMES_A_TURN_MAX = 16
"""Frames taken from one peer before the others, the doorbells and the timers get their turn."""
FOREIGN_FRAMES_MAX = 16
"""A confused peer may be told so often what is wrong; then it loses its connection."""
LOCAL_MESSAGES_MAX = 65536
"""Envelopes of pykka references in this process: they are few, the bound keeps a loop from eating memory."""
POLL_ROUNDS = 8
"""Rounds of idle work between two looks at the sockets: a round is a batch already, a look costs a system call."""
_log = logging.getLogger("pvbus.runtime")


class InvariantError(AssertionError):
    """Say that our own code is wrong, as against a wrong request; it ends the process."""


class _Watch(NamedTuple):
    callback: Callable[[int], None]


class Inbox:
    """Be a pykka ActorInbox over epoll. The actor sets `idle`, `on_hangup` and `name`."""

    def __init__(self, clock: Clock, name: str = "inbox") -> None:
        self.clock = clock
        self.name = name
        self.idle: Idle = NoIdle()
        self._serve: Callable[[int, int], None] | None = None
        self.on_hangup: Callable[[Peer], None] = lambda _peer: None
        self.closed = False
        self.undelivered = 0
        self.last_undelivered = ""
        self.foreign_frames = 0
        self._lock = threading.RLock()
        self._queue: collections.deque[Envelope[Any] | Reply | Hangup] = collections.deque()
        self._failing: collections.deque[tuple[Peer, int]] = collections.deque()
        self._soon: collections.deque[Callable[[], None]] = collections.deque()
        self._timers = Timers()
        self._sources: dict[int, Peer | _Watch] = {}
        self._asleep = False
        # Items that lay in the queue at the last look at the sockets; the next look follows them.
        self._credit = 0
        self._signal_ends: tuple[socket.socket, ...] = ()
        self._epoll = select.epoll()
        self._wake_fd = os.eventfd(0, os.EFD_NONBLOCK | os.EFD_CLOEXEC)
        self.add_fd(self._wake_fd, select.EPOLLIN, lambda _events: _drain_eventfd(self._wake_fd))

    # What the loop watches.

    def add_peer(self, sock: socket.socket, name: str) -> Peer:
        """Own a connected SEQPACKET socket from now on."""
        peer = Peer(self, sock, name)
        self._epoll.register(sock.fileno(), select.EPOLLIN)
        self._sources[sock.fileno()] = peer
        return peer

    def peers(self) -> list[Peer]:
        """Return the connections that are open."""
        return [source for source in self._sources.values() if isinstance(source, Peer)]

    def add_listener(self, sock: socket.socket, on_accept: Callable[[socket.socket], None]) -> None:
        """Call `on_accept(connection)` for each connection; the listening socket stays the caller's (`remove_fd`)."""
        Listener(self, sock, on_accept)

    def add_fd(self, fd: int, eventmask: int, callback: Callable[[int], None]) -> None:
        """Call `callback(events)` while epoll reports them; the descriptor stays the caller's."""
        self._epoll.register(fd, eventmask)
        self._sources[fd] = _Watch(callback)

    def remove_fd(self, fd: int) -> None:
        """Stop watching; call it before closing: a copy elsewhere would keep the registration."""
        if self._sources.pop(fd, None) is not None:
            self._epoll.unregister(fd)

    def sleep_in(self, serve: Callable[[int, int], None]) -> None:
        """Sleep in `serve(epoll fd, timeout in ms or -1)`: it works between doorbells and returns when another descriptor of
        the set is ready, or the time is over. For a room whose idle loop is native.
        """
        self._serve = serve

    def call_at(self, time_ns: int, callback: Callable[[], None]) -> Timer:
        """Call `callback()` from the loop once the clock has reached `time_ns`; the handle has `cancel()`."""
        return self._timers.add(time_ns, callback)

    def call_soon(self, callback: Callable[[], None]) -> None:
        """Call `callback()` from the loop; safe from signal handlers and other threads."""
        self._soon.append(callback)
        self._wake()

    def wake_on_signals(self) -> None:
        """Have every signal of this process end the loop's sleep: its handler may come just before epoll
        sleeps, and would then run only after it. The process's main thread calls this; a second call does nothing.
        """
        if self._signal_ends:
            return
        receiving, sending = self._signal_ends = socket.socketpair()
        receiving.setblocking(False)
        sending.setblocking(False)
        signal.set_wakeup_fd(sending.fileno(), warn_on_full_buffer=False)
        self.add_fd(receiving.fileno(), select.EPOLLIN, lambda _events: _drain(receiving))

    def fail_soon(self, peer: Peer, request: int) -> None:
        """Fail an ask with EPIPE from the loop, never inside the call that asked. (For `Peer`.)"""
        self._failing.append((peer, request))

    def watch_output(self, peer: Peer, *, wanted: bool) -> None:
        """Ask epoll for writability of a peer, or no longer. (For `Peer`.)"""
        if not self.closed and not peer.hung_up and not peer.closed:
            self._epoll.modify(peer.sock.fileno(), select.EPOLLIN | (select.EPOLLOUT if wanted else 0))

    def forget(self, peer: Peer) -> None:
        """Stop watching a peer. (For `Peer`.)"""
        if self._sources.get(peer.sock.fileno()) is peer:
            self.remove_fd(peer.sock.fileno())

    def cut(self, peer: Peer) -> None:
        """Treat the peer as hung up: read no more of it, and close it after what it sent was handled."""
        if not peer.hung_up and not peer.closed:
            peer.hung_up = True
            self.forget(peer)
            self._queue.append(Hangup(peer))
            self._wake()

    # pykka's ActorInbox.

    def put(self, envelope: Envelope[Any], /) -> None:
        """Take an envelope of a pykka reference, from any thread; ActorDeadError, and counted, if closed."""
        # The lock makes "closed?" and "append" one step: pykka's own tell looks first and puts later, and
        # what it puts behind a stop is never seen again. Here it is refused, or it is in the queue that
        # close() counts.
        with self._lock:
            if self.closed:
                self.undelivered += 1
                text = f"{self.name} has stopped; not delivered: {type(envelope.message).__name__}"
                raise ActorDeadError(text)
            if len(self._queue) >= LOCAL_MESSAGES_MAX:
                raise queue.Full
            self._queue.append(envelope)
        self._wake()

    def empty(self) -> bool:
        """Return whether nothing waits that was taken in already."""
        return not self._queue

    def get(self) -> Envelope[Any]:
        """Return the next message, and serve everything else until there is one."""
        rounds = 0
        while not self.closed:
            self._run_soon()
            if self._queue and self._credit <= 0:
                self._turn(sleep=False)  # Local messages that keep coming must not starve the sockets.
            worked = self.idle.work()
            envelope = self._next()
            if envelope is not None:
                return envelope
            if not worked and not self._soon and not self._failing and self.idle.may_sleep():
                self._turn(sleep=True)
                rounds = 0
                continue
            rounds += 1
            if rounds % POLL_ROUNDS == 0:
                self._turn(sleep=False)
        text = f"{self.name} is closed"
        raise ActorDeadError(text)

    def _next(self) -> Envelope[Any] | None:
        while self._queue:
            item = self._queue.popleft()
            self._credit -= 1
            if isinstance(item, Reply):
                item.peer.complete(item.request, item.message, item.fds)
            elif isinstance(item, Hangup):
                if not item.peer.closed:
                    item.peer.fail_all(errno.EPIPE)
                    item.peer.close()
                    self.on_hangup(item.peer)
            elif isinstance(item.message, Received) and item.message.peer.closed:
                self._lose(item.message)
            else:
                return item
        return None

    # The loop.

    def _wake(self) -> None:
        if self._asleep:
            with contextlib.suppress(OSError):
                os.eventfd_write(self._wake_fd, 1)

    def _run_soon(self) -> None:
        for _ in range(len(self._failing)):
            peer, request = self._failing.popleft()
            peer.fail(request, errno.EPIPE)
        for _ in range(len(self._soon)):
            self._soon.popleft()()

    def _timeout_s(self) -> float | None:
        """Return how long to sleep. None is for ever: a bound here would hide a lost wake-up."""
        if self._soon or self._queue or self._failing:
            return 0
        next_ns = self._timers.next_ns()
        if next_ns is None:
            return None
        wait_s = max(0, next_ns - self.clock.now_ns()) / NS_PER_S
        cap_ms: int | None = getattr(self.clock, "sleep_ms_max", None)
        return wait_s if cap_ms is None else min(wait_s, cap_ms / 1000)

    def _turn(self, *, sleep: bool) -> None:
        if sleep:
            # `_asleep` before the look at the queues: who appends behind that look sees it and writes the eventfd.
            self._asleep = True
            while True:
                timeout_s = self._timeout_s()
                if self._serve is None:
                    events = self._epoll.poll(timeout_s)
                else:
                    self._serve(self._epoll.fileno(), -1 if timeout_s is None else math.ceil(timeout_s * 1000))
                    events = self._epoll.poll(0)
                next_ns = self._timers.next_ns()
                # A clock that may jump is asked again and again; that is no waking, and must not hide a lost one.
                if events or timeout_s == 0 or (next_ns is not None and next_ns <= self.clock.now_ns()):
                    break
            self._asleep = False
            self.idle.awake()
        else:
            events = self._epoll.poll(0)
        self._dispatch([(self._sources.get(fd), fd, mask) for fd, mask in events])
        now_ns = self.clock.now_ns()
        for _ in range(len(self._timers)):
            callback = self._timers.pop_due(now_ns)
            if callback is None:
                break
            callback()
        self._credit = len(self._queue)

    def _dispatch(self, events: list[tuple[Peer | _Watch | None, int, int]]) -> None:
        readable: list[Peer] = []
        for source, fd, mask in events:
            if source is None or self._sources.get(fd) is not source:
                continue  # A callback before this one has removed it.
            if isinstance(source, _Watch):
                source.callback(mask)
                continue
            if mask & select.EPOLLOUT:
                source.flush()
            if mask & ~select.EPOLLOUT:
                readable.append(source)
        for _ in range(FRAMES_A_TURN_MAX):
            readable = [
                peer for peer in readable if not peer.closed and not peer.hung_up and self._read(peer)
            ]
            if not readable:
                break

    def _read(self, peer: Peer) -> bool:
        """Take one frame in; return whether there may be more."""
        fds: list[int] = []
        try:
            data, fds = wire.recv_frame_once(peer.sock, socket.MSG_DONTWAIT)
            if not data:
                self.cut(peer)
                return False
            frame = wire.decode(data)
            wire.check_fds(frame.message, len(fds), frame.request, reply=frame.reply)
        except BlockingIOError:
            return False
        except ConnectionResetError:
            peer.resets += 1
            _log.warning("%s: %s closed with frames of ours unread", self.name, peer.name)
            return True
        except WireError as error:
            wire.close_fds(fds)
            self._foreign(peer, error)
            return not peer.hung_up
        if frame.reply:
            self._queue.append(Reply(peer, frame.request, frame.message, fds))
        elif isinstance(frame.message, Failure):
            # A complaint about a frame of ours. Never answered and never an actor's: two sides could complain
            # for ever.
            peer.complaints += 1
            _log.warning("%s: %s complains: %s", self.name, peer.name, frame.message.as_oserror())
        else:
            self._queue.append(Envelope(Received(peer, frame.request, frame.message, fds)))
        return True

    def _foreign(self, peer: Peer, error: WireError) -> None:
        """Answer a frame that is wrong, or whose descriptors found no room here: that is not its sender's fault."""
        failure = Failure(errno=error.number, text=str(error)[:512])
        wrong = error.number == errno.EBADMSG
        peer.foreign_frames += wrong
        self.foreign_frames += wrong
        if error.reply:
            self._queue.append(Reply(peer, error.request, failure, []))
        elif not wrong and not error.request:
            _log.warning("%s: %s", self.name, error)  # a tell: nobody waits, and its sender sees the hang-up
        elif not self.closed:
            with contextlib.suppress(PeerGone):
                if error.request:
                    peer.reply(error.request, failure)
                else:
                    peer.tell(failure)
        if peer.foreign_frames >= FOREIGN_FRAMES_MAX:
            _log.warning("%s: %s sent %d foreign frames: closed", self.name, peer.name, peer.foreign_frames)
            self.cut(peer)

    # The end.

    def _lose(self, received: Received | Reply) -> None:
        wire.close_fds(received.fds)
        received.peer.undelivered += 1
        self.undelivered += 1
        self.last_undelivered = type(received.message).__name__

    def close(self, *, answer: bool = True) -> int:
        """End the loop and return how many messages were never handled; they are counted and reported in one
        log line.

        Unhandled requests are answered with Failure(ESHUTDOWN), and so are our own pending asks.
        `answer=False` is for a broken actor, whose callers shall see a hang-up and turn to its heir: no
        answers, no continuations.
        """
        with self._lock:
            if self.closed:
                return self.undelivered
            self.closed = True
        peers = self.peers()
        for peer in peers:
            # From here on a sender gets EPIPE; what it sent before is all in the socket, so the count is exact.
            with contextlib.suppress(OSError):
                peer.sock.shutdown(socket.SHUT_RD)
            while self._read(peer):
                pass
        peers += [item.peer for item in self._queue if isinstance(item, Hangup) and item.peer not in peers]
        while self._queue:
            self._refuse(self._queue.popleft(), answer=answer)
        failure = self._end_asks(peers) if answer else None
        for peer in peers:
            if answer:
                peer.flush()
            peer.close()
        self.abandon()
        if self.undelivered:
            _log.warning("%s stopped with %d undelivered: %s", self.name, self.undelivered, self.last_undelivered)
        if failure is not None:
            raise failure
        return self.undelivered

    def _end_asks(self, peers: list[Peer]) -> Exception | None:
        """Run the continuations that still wait; return the first exception of one, to be raised at the very
        end.
        """
        failure: Exception | None = None
        waiting = [(peer, request, errno.EPIPE) for peer, request in self._failing]
        waiting += [(peer, request, errno.ESHUTDOWN) for peer in peers for request in peer.asked()]
        for peer, request, number in waiting:
            try:
                peer.fail(request, number)
            except PeerGone:
                pass
            except Exception as error:
                failure = failure or error
        return failure

    def _refuse(self, item: Envelope[Any] | Reply | Hangup, *, answer: bool) -> None:
        if isinstance(item, Hangup):
            return
        if isinstance(item, Reply):
            with contextlib.suppress(PeerGone):  # its continuation may want to go on asking
                (item.peer.complete if answer else lambda *_: self._lose(item))(item.request, item.message, item.fds)
            return
        if isinstance(item.message, Received):
            if item.message.message.moot_when_stopped and answer:
                item.message.peer.reply(item.message.request, Done())
                return
            self._lose(item.message)
            if answer:
                item.message.peer.reply(item.message.request, Failure(errno=errno.ESHUTDOWN, text=self.name))
            return
        self.undelivered += 1
        if item.reply_to is not None:
            error = ActorDeadError(f"{self.name} stopped before handling {type(item.message).__name__}")
            item.reply_to.set_exception((ActorDeadError, error, None))

    def abandon(self) -> None:
        """Close our descriptors and nothing else: what a forked child does with its parent's inbox.

        Nothing is unregistered: the epoll instance itself is shared with the parent until ours is closed.
        """
        self.closed = True
        for item in self._queue:
            held = item if isinstance(item, Reply) else item.message if isinstance(item, Envelope) else None
            if isinstance(held, Received | Reply):
                wire.close_fds(held.fds)
        for peer in self.peers():
            peer.abandon()
        for end in self._signal_ends:
            signal.set_wakeup_fd(-1)
            end.close()
        self._signal_ends = ()
        self._sources.clear()
        self._epoll.close()
        os.close(self._wake_fd)


def _drain_eventfd(fd: int) -> None:
    with contextlib.suppress(BlockingIOError):
        os.eventfd_read(fd)


def _drain(sock: socket.socket) -> None:
    with contextlib.suppress(BlockingIOError):
        sock.recv(4096)
