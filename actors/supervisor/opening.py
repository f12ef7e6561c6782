# SPDX-License-Identifier: Apache-2.0
"""One `open` on its way: hypervisor and CPUs learn of the file while its process starts; the user hears when both are done."""

from __future__ import annotations

import errno
import os
import socket
from typing import TYPE_CHECKING, Any, NamedTuple

from pvbus.actors.runtime import messages as m
from pvbus.actors.runtime.process import Peer, Received, Stop
from pvbus.actors.runtime.wire import Done, Failure, Message, socket_cookie
from pvbus.shm.layout import PORTS_2L

if TYPE_CHECKING:
    from collections.abc import Sequence

    from pvbus.actors.runtime.supervision import Child
    from pvbus.actors.supervisor.process import Supervisor

CALL_DEADLINE_S = 20.0
STOP_DEADLINE_S = 5.0


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
    """One `open` on its way: hypervisor and CPUs learn of it while its process starts; the user hears when both are done."""

    def __init__(self, supervisor: Supervisor, file: OpenFile, child: Child, received: Received, door: socket.socket) -> None:
        self.supervisor, self.file, self.child, self.received, self.door = supervisor, file, child, received, door
        self.missing = {"hypervisor", "process"}
        self.arguments: dict[str, Any] = {"slot": file.slot, "domain": file.domain, "opener_pid": received.peer.pid}
        self.user_end, self.connection = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        self.hypervisors_end, self.files_end = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)

    def tell_hypervisor(self, hypervisor: Peer, message: m.OpenEvtchn) -> None:
        """Make the file known before its process is. If the hypervisor dies under that, open again with its heir."""
        self.arguments["comm"] = message.comm

        def known(reply: Message, _fds: list[int]) -> None:
            if isinstance(reply, Failure) and reply.errno == errno.EPIPE and "answered" not in self.missing:
                received = self.received
                self.received = received._replace(request=0)  # this one fails, and nobody hears of it
                self.fail(reply)
                self.supervisor.ask_heir(hypervisor, received, lambda: self.supervisor.open_evtchn(message, received))
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
        self.supervisor.ask_start(self.child, self.arguments, fds, self._started)
        self.files_end.close()
        self.connection.close()

    def _started(self) -> None:
        self.supervisor.table.started(self.file.name)
        self._done("process", Done())

    def _done(self, what: str, reply: Message) -> None:
        if isinstance(reply, Failure):
            self.fail(reply)
            return
        self.missing.discard(what)
        if not self.missing:
            fds = (self.file.page_fd, self.supervisor.pages.public_for_users, self.user_end.fileno(), self.door.fileno())
            self._answer(m.Opened(slot=self.file.slot, ports_max=PORTS_2L, mode=self.file.mode), fds)

    def fail(self, reply: Message) -> None:
        """Answer the user with an error; the door closes, so whatever exists of the file is released."""
        if "answered" not in self.missing:
            self._answer(reply, ())
            control = self.supervisor.controls.get(self.file.name)
            if control is not None:
                control.ask(Stop(), ignore, STOP_DEADLINE_S)

    def _answer(self, reply: Message, fds: Sequence[int]) -> None:
        self.received.peer.reply(self.received.request, reply, tuple(fds))
        self.missing = {"answered"}
        self.supervisor.openings.pop(self.file.name, None)
        self.door.close()
        self.user_end.close()


def reopen(supervisor: Supervisor, received: Received) -> None:
    """Make one more process a user of the open file whose descriptor it sent: it was passed that, and has no connection."""
    if len(received.fds) != 1:
        raise OSError(errno.EBADMSG, "Reopen comes with a descriptor")
    try:
        cookie = socket_cookie(received.fds[0])
    finally:
        os.close(received.fds[0])  # before anything waits: it is a reference, too
    file = next((file for file in supervisor.files.values() if file.cookie == cookie), None)
    control = supervisor.controls.get(file.name) if file is not None else None
    if file is None or control is None:
        raise OSError(errno.EINVAL, f"this is no event-channel file that is open on machine {supervisor.config.name}")
    ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)

    def adopted(reply: Message, _fds: list[int]) -> None:
        if supervisor.files.get(file.name) is not file or getattr(reply, "errno", 0) == errno.EPIPE:
            reply = Failure(errno=errno.EIO, text="the file's process has died")
        if isinstance(reply, Done):
            fds = (file.page_fd, supervisor.pages.public_for_users, ours.fileno())
            received.peer.reply(received.request, m.Opened(slot=file.slot, ports_max=PORTS_2L, mode=file.mode), fds)
        else:
            received.peer.reply(received.request, reply)
        ours.close()

    control.ask(m.Adopt(), adopted, CALL_DEADLINE_S, fds=(theirs.fileno(),))
    theirs.close()


def ignore(_reply: Message, _fds: list[int]) -> None:
    """Take the reply of an ask whose failure shows elsewhere: a process's exit is reported by the fork server."""
