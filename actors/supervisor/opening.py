# SPDX-License-Identifier: Apache-2.0
"""One `open` on its way: hypervisor and CPUs learn of the file while its process starts; the user hears when both are done."""

from __future__ import annotations

import errno
import os
import select
import signal
import socket
from typing import TYPE_CHECKING, Any, NamedTuple

from pvbus.actors.runtime import messages as m
from pvbus.actors.runtime import wire
from pvbus.actors.runtime.asking import ATTACH_REQUEST
from pvbus.actors.runtime.process import Peer, Received, Stop, failure_of
from pvbus.actors.runtime.supervision import STOP_DEADLINE_S
from pvbus.actors.runtime.wire import Done, Failure, Message, socket_cookie
from pvbus.actors.supervisor import limits
from pvbus.shm.layout import PORTS_MAX, FilePage
from pvbus.shm.segment import sealed_memfd

if TYPE_CHECKING:
    from collections.abc import Sequence

    from pvbus.actors.runtime.supervision import Child
    from pvbus.actors.supervisor.process import Supervisor

CALL_DEADLINE_S = 20.0
CROWD_NS = 1_000_000_000  # a process that was told to end needs a millisecond
CROWD_MAX = 1024  # users that wait for room


class OpenFile(NamedTuple):
    """What the supervisor keeps of an open file, for the heirs of the processes that use it."""

    slot: int
    domain: int
    name: str
    page_fd: int
    door: socket.socket
    cookie: int  # of its users' end: how a descriptor that one process passes to another is recognised
    mode: int  # access mode of the open


class Opening:
    """One `open` on its way. Makes every descriptor that it takes at once: EMFILE, and nothing has happened."""

    child: Child

    def __init__(self, supervisor: Supervisor, slot: int, message: m.OpenEvtchn, received: Received) -> None:
        self.supervisor, self.message, self.received = supervisor, message, received
        self.missing = {"hypervisor", "process"}
        self.warm = False  # its process comes from the pool
        self.door, door = socket.socketpair()
        self.user_end, self.connection = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        self.hypervisors_end, self.files_end = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        limits.check_reserve(limits.RESERVE_FOR_OPENS, door.fileno())
        door.setblocking(False)
        door.shutdown(socket.SHUT_RD)  # what a user writes, descriptors too, would lie here for ever
        cookie, mode = socket_cookie(self.door.fileno()), message.mode & os.O_ACCMODE
        page_fd = sealed_memfd(f"pvbus-{supervisor.run_id}-{slot}", FilePage.BYTES)
        self.file = OpenFile(slot, message.domain, f"file/{message.domain}.{slot}", page_fd, door, cookie, mode)

    def tell_hypervisor(self, hypervisor: Peer) -> None:
        """Make the file known before its process is. If the hypervisor dies under that, open again with its heir."""

        def known(reply: Message, _fds: list[int]) -> None:
            if isinstance(reply, Failure) and reply.errno == errno.EPIPE and "answered" not in self.missing:
                self._leave()
                self._end_process()
                self.supervisor.heirs.ask_again(
                    hypervisor, self.received, lambda: self.supervisor.open_again(self.message, self.received)
                )
            else:
                self._done("hypervisor", reply)

        up = m.FileUp(slot=self.file.slot, domain=self.file.domain)
        fds = (self.hypervisors_end.fileno(), self.file.page_fd, self.file.door.fileno())
        hypervisor.ask(up, known, CALL_DEADLINE_S, fds=fds)
        self.hypervisors_end.close()

    def start(self, machine_fd: int) -> None:
        """Tell the forked process which file it is."""
        fds = {
            "machine": machine_fd,
            "page": self.file.page_fd,
            "door": self.file.door.fileno(),
            "hypervisor": self.files_end.fileno(),
            "user": self.connection.fileno(),
        }
        arguments: dict[str, Any] = {"slot": self.file.slot, "domain": self.file.domain, "comm": self.message.comm}
        arguments["opener_pid"] = self.message.pid or self.received.peer.pid
        arguments["inject"] = self.supervisor.config.inject.as_dict()
        attach_for(self.received.peer, self.user_end)  # its submission ring is made while everything else gets ready
        self.supervisor.ask_start(self.child, arguments, fds, self._started, self._refused)
        self.files_end.close()
        self.connection.close()

    def _started(self) -> None:
        self.supervisor.table.started(self.file.name)
        self._done("process", Done())

    def _refused(self, reply: Message) -> None:
        """Have a process that does not start killed. That it died or does not answer is judged by its exit (`lost`)."""
        if isinstance(reply, Failure) and reply.errno not in (errno.EPIPE, errno.ETIMEDOUT):
            self.fail(reply)
        self.supervisor.forkserver.kill(self.child.pid, signal.SIGKILL)

    def _done(self, what: str, reply: Message) -> None:
        if isinstance(reply, Failure):
            self.fail(reply)
            return
        self.missing.discard(what)
        if not self.missing:
            fds = (self.file.page_fd, self.supervisor.pages.public_for_users, self.user_end.fileno(), self.door.fileno())
            self._answer(m.Opened(slot=self.file.slot, ports_max=PORTS_MAX, mode=self.file.mode), fds)

    def lost(self) -> None:
        """Its process has died. One of the pool is replaced by a fork; that one's death fails the open."""
        if self.warm and not self.supervisor.stopping:
            self._leave()
            self.supervisor.open_again(self.message, self.received)
        else:
            self.fail(Failure(errno=errno.EIO, text=f"{self.file.name} died while it started"))

    def fail(self, reply: Message) -> None:
        """Answer the user with an error; the door closes, so whatever exists of the file is released."""
        if "answered" not in self.missing:
            self._answer(reply, ())
            self._end_process()

    def _end_process(self) -> None:
        control = self.supervisor.controls.get(self.file.name)
        if control is not None:
            control.ask(Stop(), ignore, STOP_DEADLINE_S)

    def _answer(self, reply: Message, fds: Sequence[int]) -> None:
        self.received.peer.reply(self.received.request, reply, tuple(fds))
        self._leave()

    def _leave(self) -> None:
        self.missing = {"answered"}
        self.supervisor.openings.pop(self.file.name, None)
        for end in (self.door, self.user_end, self.connection, self.hypervisors_end, self.files_end):
            end.close()
        self.supervisor.pool.refill_later()


class Crowd:
    """Opens that found no room while a file was being closed: `close()` returns before its process has ended.

    They try again when one has, or give up a second later; without a file that goes EMFILE is answered at once.
    """

    def __init__(self, supervisor: Supervisor) -> None:
        self.supervisor = supervisor
        self._waiting: list[tuple[m.OpenEvtchn, Received, int]] = []

    def takes(self, message: m.OpenEvtchn, received: Received, error: OSError, until_ns: int = 0) -> bool:
        """Whether the open waits here, instead of being refused with `error`."""
        if error.errno != errno.EMFILE or len(self._waiting) >= CROWD_MAX or not self._one_is_closing():
            return False
        inbox = self.supervisor.inbox
        if until_ns == 0:
            until_ns = inbox.clock.now_ns() + CROWD_NS
            inbox.call_at(until_ns, self.look)
        if inbox.clock.now_ns() >= until_ns:
            return False
        self._waiting.append((message, received, until_ns))
        return True

    def _one_is_closing(self) -> bool:
        poller = select.poll()
        for file in self.supervisor.files.values():
            poller.register(file.door.fileno(), 0)
        return bool(poller.poll(0))

    def look(self) -> None:
        """Try again."""
        waiting, self._waiting = self._waiting, []
        for message, received, until_ns in waiting:
            try:
                self.supervisor.open_evtchn(message, received)
            except OSError as error:
                if not self.takes(message, received, error, until_ns):
                    received.peer.reply(received.request, failure_of(error))


def hand_on(supervisor: Supervisor, file: OpenFile, hypervisor: Peer) -> None:
    """Give an open file to the hypervisor's heir. If there is no descriptor for that, the file is lost: its process ends."""
    pid = supervisor.table[file.name].pid

    def known(reply: Message, _fds: list[int]) -> None:
        if isinstance(reply, Failure) and reply.errno == errno.EMFILE:
            supervisor.forkserver.kill(pid, signal.SIGKILL)

    try:
        theirs, files_end = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    except OSError:
        supervisor.forkserver.kill(pid, signal.SIGKILL)
        return
    up = m.FileUp(slot=file.slot, domain=file.domain, reborn=True)
    hypervisor.ask(up, known, CALL_DEADLINE_S, fds=(theirs.fileno(), file.page_fd, file.door.fileno()))
    supervisor.controls[file.name].ask(m.Rewire(), known, CALL_DEADLINE_S, fds=(files_end.fileno(),))
    theirs.close()
    files_end.close()


def forget(file: OpenFile) -> None:
    """Close what the supervisor keeps of a file."""
    os.close(file.page_fd)
    file.door.close()


def reopen(supervisor: Supervisor, received: Received) -> None:
    """Make one more process a user of the open file whose descriptor it sent: it was passed that, and has no connection."""
    if len(received.fds) != 1:
        raise OSError(errno.EBADMSG, "Reopen comes with a descriptor")
    cookie = socket_cookie(received.fds[0])
    file = next((file for file in supervisor.files.values() if file.cookie == cookie), None)
    control = supervisor.controls.get(file.name) if file is not None else None
    if file is None or control is None:
        raise OSError(errno.EINVAL, f"this is no event-channel file that is open on machine {supervisor.config.name}")
    ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    attach_for(received.peer, ours)

    def adopted(reply: Message, _fds: list[int]) -> None:
        if supervisor.files.get(file.name) is not file or getattr(reply, "errno", 0) == errno.EPIPE:
            reply = Failure(errno=errno.EIO, text="the file's process has died")
        if isinstance(reply, Done):
            fds = (file.page_fd, supervisor.pages.public_for_users, ours.fileno())
            received.peer.reply(received.request, m.Opened(slot=file.slot, ports_max=PORTS_MAX, mode=file.mode), fds)
        else:
            received.peer.reply(received.request, reply)
        ours.close()

    control.ask(m.Adopt(), adopted, CALL_DEADLINE_S, fds=(theirs.fileno(),))
    theirs.close()
    os.close(received.fds[0])  # while that waits it would be a reference, too; what raises above has it closed


def attach_for(user: Peer, user_end: socket.socket) -> None:
    """Send a user's first Attach on its behalf, on the connection that it is about to get."""
    attach = wire.encode(m.Attach(pid=user.pid), ATTACH_REQUEST)
    wire.send_frame(user_end, attach, flags=socket.MSG_DONTWAIT)


def ignore(_reply: Message, _fds: list[int]) -> None:
    """Take the reply of an ask whose failure shows elsewhere: a process's exit is reported by the fork server."""
