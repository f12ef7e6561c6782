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
from pvbus.actors.runtime.process import ATTACH_REQUEST, Peer, Received, Stop, failure_of
from pvbus.actors.runtime.wire import Done, Failure, Message
from pvbus.actors.supervisor import limits
from pvbus.shm.layout import PORTS_MAX, FilePage
from pvbus.shm.segment import sealed_memfd

if TYPE_CHECKING:
    from collections.abc import Sequence

    from pvbus.actors.runtime.supervision import Child
    from pvbus.actors.supervisor.process import Supervisor

CALL_DEADLINE_S = 20.0
STOP_DEADLINE_S = 5.0
CROWD_NS = 1_000_000_000  # a process that was told to end needs a millisecond
CROWD_MAX = 1024  # users that wait for room


class OpenFile(NamedTuple):
    """What the supervisor keeps of an open file, for the heirs of the processes that use it."""

    slot: int
    domain: int
    name: str
    page_fd: int
    door: socket.socket


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
        page_fd = sealed_memfd(f"pvbus-{supervisor.run_id}-{slot}", FilePage.BYTES)
        self.file = OpenFile(slot, message.domain, f"file/{message.domain}.{slot}", page_fd, door)

    def tell_hypervisor(self, hypervisor: Peer) -> None:
        """Make the file known before its process is."""
        up = m.FileUp(slot=self.file.slot, domain=self.file.domain)
        fds = (self.hypervisors_end.fileno(), self.file.page_fd, self.file.door.fileno())
        hypervisor.ask(up, lambda reply, _fds: self._done("hypervisor", reply), CALL_DEADLINE_S, fds=fds)
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
        arguments["opener_pid"] = self.received.peer.pid
        arguments["inject"] = self.supervisor.config.inject.as_dict()
        # On the user's behalf: its submission ring is made while everything else gets ready.
        attach = wire.encode(m.Attach(pid=self.received.peer.pid), ATTACH_REQUEST)
        wire.send_frame(self.user_end, attach, flags=socket.MSG_DONTWAIT)
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
            fds = (self.file.page_fd, self.door.fileno(), self.supervisor.pages.public_for_users, self.user_end.fileno())
            self._answer(m.Opened(slot=self.file.slot, ports_max=PORTS_MAX), fds)

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


def ignore(_reply: Message, _fds: list[int]) -> None:
    """Take the reply of an ask whose failure shows elsewhere: a process's exit is reported by the fork server."""
