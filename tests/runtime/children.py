# SPDX-License-Identifier: Apache-2.0
"""Actors that the runtime's tests start in processes of their own; the fork server imports them by this
file's name.
"""

from __future__ import annotations

import errno
import os
import socket
from pathlib import Path
from typing import Any, ClassVar

from pvbus.actors.runtime.process import InvariantError, ProcessActor, Received
from pvbus.actors.runtime.wire import Done, Message


class EchoCall(Message, frozen=True, kw_only=True):
    """Ask for a number back; `how` makes the child misbehave."""

    value: int
    how: str = ""


class EchoFds(Message, frozen=True, kw_only=True):
    """Answer with what the child has open and what its named descriptors say."""

    fds_max: ClassVar[int | None] = 1
    open_fds: int
    argument: str
    title: str


class EchoProcess(ProcessActor):
    """Echo, fail, break or write a mark at its stop."""

    def __init__(
        self, name: str, control: socket.socket, arguments: dict[str, Any], fds: dict[str, int]
    ) -> None:
        super().__init__(name, control)
        self.arguments = arguments
        self.fds = fds
        if arguments.get("fail") == "init":
            raise OSError(errno.ENODEV, "no platform")

    def on_ready(self) -> None:
        if self.arguments.get("fail") == "ready":
            raise InvariantError("not ready")

    def on_message(self, received: Received) -> Message | None:
        message = received.message
        if not isinstance(message, EchoCall):
            return super().on_message(received)
        if message.how == "oserror":
            raise OSError(errno.EEXIST, "taken")
        if message.how == "invariant":
            raise InvariantError("two and two is five")
        if message.how == "exception":
            raise KeyError("lost")
        if message.how == "kill":
            os.kill(os.getpid(), 9)
        if message.how == "silent":
            return None
        if message.how == "fds":
            received.peer.reply(
                received.request,
                EchoFds(
                    open_fds=len(list(Path("/proc/self/fd").iterdir())) - 1,
                    argument=str(self.arguments.get("text")),
                    title=Path("/proc/self/cmdline").read_bytes().rstrip(b"\0").decode(),
                ),
                [self.fds["mark"]],
            )
            return None
        return Done(value=message.value)

    def on_stop(self) -> None:
        if "mark" in self.fds:
            os.write(self.fds["mark"], b"stopped")
        if self.arguments.get("fail") == "stop":
            raise InvariantError("cannot stop")
