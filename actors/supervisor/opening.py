# SPDX-License-Identifier: Apache-2.0
"""One `open` on its way: hypervisor and CPUs learn of the file while its process starts; the user hears when both are done."""

from __future__ import annotations

import socket
from typing import TYPE_CHECKING, Any, NamedTuple

from pvbus.actors.runtime import messages as m
from pvbus.actors.runtime.process import Peer, Received, Stop
from pvbus.actors.runtime.wire import Done, Failure, Message
from pvbus.shm.layout import PORTS_MAX

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


class Opening:
    """One `open` on its way: hypervisor and CPUs learn of it while its process starts; the user hears when both are done."""

    def __init__(self, supervisor: Supervisor, file: OpenFile, child: Child, received: Received, door: socket.socket) -> None:
        self.supervisor, self.file, self.child, self.received, self.door = supervisor, file, child, received, door
        self.missing = {"hypervisor", "process"}
        self.arguments: dict[str, Any] = {"slot": file.slot, "domain": file.domain, "opener_pid": received.peer.pid}
        self.arguments["inject"] = supervisor.config.inject.as_dict()
        self.user_end, self.connection = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        self.hypervisors_end, self.files_end = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)

    def tell_hypervisor(self, hypervisor: Peer, comm: str) -> None:
        """Make the file known before its process is."""
        self.arguments["comm"] = comm
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
            fds = (self.file.page_fd, self.door.fileno(), self.supervisor.pages.public_for_users, self.user_end.fileno())
            self._answer(m.Opened(slot=self.file.slot, ports_max=PORTS_MAX), fds)

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


def ignore(_reply: Message, _fds: list[int]) -> None:
    """Take the reply of an ask whose failure shows elsewhere: a process's exit is reported by the fork server."""
