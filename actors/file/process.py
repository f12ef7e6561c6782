# SPDX-License-Identifier: Apache-2.0
"""An open file's process: answers its users' calls one at a time, hands out submission rings, sees to the release.

Users are connections: one a process that uses the file. The last reference is not counted here: the doorbell hangs up when
the last dup or forked copy is gone, the hypervisor sees that, releases, and says so.
"""

from __future__ import annotations

import collections
import contextlib
import errno
import functools
import os
import select
import socket
from typing import TYPE_CHECKING, Any, NamedTuple

from pvbus.actors.file import batch
from pvbus.actors.file.evtchn import EvtchnFile
from pvbus.actors.runtime import messages as m
from pvbus.actors.runtime import wire
from pvbus.actors.runtime.process import Peer, PeerGone, ProcessActor, Received, Start
from pvbus.actors.runtime.wire import Done, Failure, Message
from pvbus.shm.layout import (
    MAGIC_FILE,
    MAGIC_SUBMISSION,
    PORTS_MAX,
    SUBMISSION_ENTRIES,
    File,
    FilePage,
    Machine,
    SubmissionRing,
)
from pvbus.shm.memory import EventPath, Memory
from pvbus.shm.segment import sealed_memfd, stamp, write_text

if TYPE_CHECKING:
    from collections.abc import Callable, Generator

CALLS_WAITING_MAX = 1024  # users wait for their reply, so this is how many processes and threads share a file
CALL_DEADLINE_S = 20.0
USERS_MAX = 256  # each costs a submission ring, of which the machine has 2,048
REPEATS_MAX = 3  # hypervisors that may die under one call, before its user hears EPIPE


class User(NamedTuple):
    """A process that uses the file."""

    ring: int  # its submission ring's index
    ring_fd: int
    kick: int
    pid: int


class Call(NamedTuple):
    """An ioctl that waits, or is being executed; `repeats` counts the hypervisors that died under it."""

    received: Received
    steps: Callable[[], Generator[Message, Any, Message]]  # from the beginning
    running: Generator[Message, Any, Message]
    repeats: int = 0


class FileProcess(ProcessActor):
    """One open file."""

    def __init__(self, name: str, control: socket.socket, arguments: dict[str, Any], fds: dict[str, int]) -> None:
        super().__init__(name, control)
        self.slot: int = arguments["slot"]
        self.page = Memory(fds["page"], FilePage.BYTES)
        self.machine = Memory(fds["machine"], Machine.BYTES)
        path = EventPath(self.machine, {})
        path.attach_file(self.slot, self.page)
        variants = self.machine.load32(Machine.VARIANTS)
        self.file = EvtchnFile(self.slot, self.page, path, variants, arguments.get("inject"))
        self.door = socket.socket(fileno=fds["door"])
        self.hypervisor: Peer = self.inbox.add_peer(socket.socket(fileno=fds["hypervisor"]), "hypervisor")
        self.users: dict[Peer, User | None] = {}
        self._add_user(fds["user"])
        self.waiting: collections.deque[Call] = collections.deque()
        self.active: Call | None = None
        self.detaching: list[Received] = []
        self.orphaned = False
        self.attaching: set[Peer] = set()
        self.leaving: list[tuple[User, Callable[[], None]]] = []
        self._format(arguments)

    @classmethod
    def rehearse(cls) -> None:
        """Live through a start, an Attach and an ioctl on pages and sockets of no machine.

        What a fork shares is copied when it is first written, reference counts included; that takes longer than the start
        itself, and a spare child has it behind it.
        """
        ends = [socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET) for _ in range(3)]
        (control, _), (hypervisor, hypervisors), (user, users) = ends
        door, users_door = socket.socketpair()
        pages = {"page": sealed_memfd("pvbus-spare", FilePage.BYTES), "machine": sealed_memfd("pvbus-spare", Machine.BYTES)}
        fds = {**pages, "hypervisor": hypervisor.detach(), "user": user.detach(), "door": door.detach()}
        start = Start(name="", entry="", arguments={"slot": 0, "domain": 0, "opener_pid": 0, "comm": ""}, fds=list(fds))
        wire.decode(wire.encode(start, 1))
        actor = cls("file/spare", control, start.arguments, fds)
        wire.send_frame(users, wire.encode(m.Attach(pid=0), 1))
        actor.on_receive(actor.inbox.get().message)
        wire.send_frame(hypervisors, wire.encode(Done(value=0), 1, reply=True))
        for request in (2, 3):  # one frame of each peer in turn: the reply is handled before the second of these
            wire.send_frame(users, wire.encode(m.Ioctl(request=0, argument=None), request))
            actor.on_receive(actor.inbox.get().message)
        actor.inbox.abandon()
        for user_of in filter(None, actor.users.values()):
            wire.close_fds((user_of.ring_fd, user_of.kick))
        actor.page.close()
        actor.machine.close()
        actor.door.close()
        users_door.close()
        wire.close_fds(pages.values())
        for _, far in ends:
            far.close()

    def _format(self, arguments: dict[str, Any]) -> None:
        stamp(self.page, MAGIC_FILE)
        for at, value in (
            (FilePage.CAPACITY, PORTS_MAX), (FilePage.PORTS_MAX, PORTS_MAX), (FilePage.BITMAP_AT, FilePage.BITMAP),
            (FilePage.RING_AT, FilePage.RING), (FilePage.DOMAIN, arguments["domain"]),
        ):  # fmt: skip
            self.page.store32(at, value)
        self.machine.store32(Machine.file(self.slot, File.OPENER_PID), arguments["opener_pid"])
        self.machine.store32(Machine.file(self.slot, File.PROCESS_PID), os.getpid())
        write_text(self.machine, Machine.file(self.slot, File.NAME), File.NAME_BYTES, f"evtchn:{arguments['comm'][:15]}")

    def _add_user(self, fd: int) -> None:
        self.users[self.inbox.add_peer(socket.socket(fileno=fd), f"user of {self.name}")] = None

    # ---- messages

    def on_message(self, received: Received) -> Message | None:
        """Answer users, and hear of the release."""
        message = received.message
        if received.peer is self.hypervisor:
            if isinstance(message, m.Released):
                self._released()
                return None
            return super().on_message(received)
        if received.peer is self.supervisor and isinstance(message, m.Rewire):
            self._rewire(received.fds[0])
            return Done()
        if received.peer not in self.users:
            raise OSError(errno.EPERM, f"{received.peer.name} does not use this file")
        if isinstance(message, m.Ioctl):
            self._enqueue(received, functools.partial(self._steps, message))
        elif isinstance(message, m.Binds):
            self._enqueue(received, functools.partial(batch.binds, self.file, message, []))
        elif isinstance(message, m.Attach):
            self._attach(received, message)
        elif isinstance(message, m.Adopt):
            if len(received.fds) != 1:
                raise OSError(errno.EBADMSG, "Adopt comes with a connection")
            if len(self.users) >= USERS_MAX:
                raise OSError(errno.EMFILE, f"{USERS_MAX} processes use this file")
            self._add_user(received.fds[0])
        elif isinstance(message, m.Detach):
            self.detaching.append(received)
            self._drop_user(received.peer, lambda: self._detached(received))
        else:
            return super().on_message(received)
        return None

    def _enqueue(self, received: Received, steps: Callable[[], Generator[Message, Any, Message]]) -> None:
        if len(self.waiting) >= CALLS_WAITING_MAX:
            raise OSError(errno.EBUSY, f"{CALLS_WAITING_MAX} calls are waiting")
        self.waiting.append(Call(received, steps, steps()))
        self._next()

    # ---- ioctls, one at a time: the bind lock

    def _next(self) -> None:
        while self.active is None and self.waiting:
            self.active = self.waiting.popleft()
            self._step(None, None)

    def _steps(self, message: m.Ioctl) -> Generator[Message, Any, Message]:
        """Run the ioctl lazily: even its first check happens under the bind lock."""
        return Done(value=(yield from self.file.ioctl(message.request, message.argument)))

    def _step(self, value: int | m.Values | None, error: OSError | None) -> None:
        call = self.active
        if call is None:
            return
        try:
            if error is not None:
                request = call.running.throw(error)
            else:
                request = next(call.running) if value is None else call.running.send(value)
        except StopIteration as stop:
            self._end(call, stop.value)
        except OSError as failed:
            if failed.errno == errno.EPIPE and call.repeats < REPEATS_MAX:
                self.active = None
                self.waiting.appendleft(Call(call.received, call.steps, call.steps(), call.repeats + 1))
                self._next()
            else:
                self._end(call, Failure(errno=failed.errno or errno.EIO, text=failed.strerror or ""))
        else:
            self._ask(request)

    def _ask(self, request: Message) -> None:
        peer = self.hypervisor
        peer.ask(request, lambda reply, _fds: self._answered(peer, reply), CALL_DEADLINE_S)

    def _answered(self, peer: Peer, reply: Message) -> None:
        if isinstance(reply, Done):
            self._step(reply.value, None)
        elif isinstance(reply, m.Values):
            self._step(reply, None)
        elif isinstance(reply, Failure) and reply.errno == errno.EPIPE and peer is self.hypervisor:
            self.orphaned = True  # goes on in _rewire
        elif isinstance(reply, Failure):
            self._step(None, reply.as_oserror())

    def _rewire(self, fd: int) -> None:
        """Go on with the hypervisor's heir: submission rings first, then undo and repeat the call that was in flight."""
        self.hypervisor = self.inbox.add_peer(socket.socket(fileno=fd), "hypervisor")
        for user in self.users.values():
            if user is not None:
                again = m.AttachSubmission(pid=user.pid, index=user.ring)
                self.hypervisor.ask(again, lambda _reply, _fds: None, CALL_DEADLINE_S, fds=(user.ring_fd, user.kick))
        leaving, self.leaving = self.leaving, []
        for user, then in leaving:
            again = m.AttachSubmission(pid=user.pid, index=user.ring)
            self.hypervisor.ask(again, lambda _reply, _fds: None, CALL_DEADLINE_S, fds=(user.ring_fd, user.kick))
            self._forget(user, then)
        with contextlib.suppress(PeerGone):  # the heir died, too: the next one is told
            self.hypervisor.tell(m.Rejoined())
        if self.orphaned:
            self.orphaned = False
            self._step(None, OSError(errno.EPIPE, "the hypervisor died"))
        for received in list(self.detaching):
            self._detached(received)

    def _end(self, call: Call, reply: Message) -> None:
        self.active = None
        self.machine.store32(Machine.file(self.slot, File.PORTS), self.file.nr_evtchns)
        self.machine.store32(Machine.file(self.slot, File.RESTRICTED), self.file.restrict_domid)
        _answer(call.received, reply)
        self._next()

    # ---- users

    def _attach(self, received: Received, message: m.Attach) -> None:
        """Give a process its submission ring and doorbell, once the hypervisor drains it."""
        if self.users[received.peer] is not None or received.peer in self.attaching:
            raise OSError(errno.EALREADY, "this connection has its submission ring")
        kick = os.eventfd(0, os.EFD_NONBLOCK | os.EFD_CLOEXEC)
        try:
            ring_fd = sealed_memfd(f"pvbus-{self.name}-submission", SubmissionRing.BYTES)
        except OSError:
            os.close(kick)
            raise
        ring = Memory(ring_fd, SubmissionRing.BYTES)
        stamp(ring, MAGIC_SUBMISSION)
        ring.store32(SubmissionRing.ENTRIES, SUBMISSION_ENTRIES)
        ring.close()
        self.attaching.add(received.peer)

        def attached(reply: Message, _fds: list[int]) -> None:
            self.attaching.discard(received.peer)
            if not isinstance(reply, Done):
                os.close(ring_fd)
                os.close(kick)
                _answer(received, reply)
                return
            if received.peer in self.users:
                self.users[received.peer] = User(reply.value, ring_fd, kick, message.pid)
                _answer(received, m.Attached(index=reply.value), (ring_fd, kick))
            else:  # it died meanwhile
                self._forget(User(reply.value, ring_fd, kick, message.pid), lambda: None)

        self.hypervisor.ask(m.AttachSubmission(pid=message.pid), attached, CALL_DEADLINE_S, fds=(ring_fd, kick))

    def _drop_user(self, peer: Peer, then: Callable[[], None]) -> None:
        """Forget the submission ring of a process. Its connection stays: forked children share it, and adopt through it."""
        user = self.users.get(peer)
        self.users[peer] = None
        if user is None:
            then()
        else:
            self._forget(user, then)

    def _forget(self, user: User, then: Callable[[], None]) -> None:
        """Have a ring drained a last time and forgotten; if the hypervisor dies under that, by its heir."""

        def gone(reply: Message, _fds: list[int]) -> None:
            if isinstance(reply, Failure) and reply.errno == errno.EPIPE:
                self.leaving.append((user, then))
                return
            os.close(user.ring_fd)
            os.close(user.kick)
            then()

        self.hypervisor.ask(m.DetachSubmission(index=user.ring), gone, CALL_DEADLINE_S)

    def _detached(self, received: Received) -> None:
        """Release now if that was the last reference: the doorbell has hung up; otherwise others have it."""
        if received not in self.detaching:
            return  # looked at already, after a hypervisor died
        if not self._door_has_hung_up():
            self.detaching.remove(received)
            _answer(received, Done())
            return
        with contextlib.suppress(PeerGone):
            self.hypervisor.ask(m.ReleaseFile(), lambda _reply, _fds: None, CALL_DEADLINE_S)

    def _door_has_hung_up(self) -> bool:
        poller = select.poll()
        poller.register(self.door.fileno(), 0)
        return bool(poller.poll(0))

    def _released(self) -> None:
        """The ports are free: tell who waits in close(), then end."""
        for received in self.detaching:
            _answer(received, Done(value=1))
        self.stop()

    def on_hangup(self, peer: Peer) -> None:
        """A user process has gone: what it had submitted is executed, its ring forgotten."""
        if peer is self.hypervisor:
            return  # the supervisor starts an heir and sends Rewire, or ends us
        self._drop_user(peer, lambda: None)
        del self.users[peer]


def _answer(received: Received, reply: Message, fds: tuple[int, ...] = ()) -> None:
    with contextlib.suppress(PeerGone):  # the caller died meanwhile; its references close with it
        received.peer.reply(received.request, reply, fds)
