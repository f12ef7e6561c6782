# SPDX-License-Identifier: Apache-2.0
"""`--frontend fuse`, over the device's file: a filter for calls that the kernel answers by itself for a regular file.

The device does not depend on it. Where no filter can be installed, and when its server has died, those calls get the kernel's own
answers.
"""

from __future__ import annotations

import errno
import os
import select
import socket
import sys
from pathlib import Path
from typing import TYPE_CHECKING

from pvbus.view.run.filter import Filter, StandIn
from pvbus.view.seccomp import abi, regular_calls
from pvbus.view.seccomp.regular import Regular
from pvbus.view.seccomp.seen import TREE
from pvbus.view.seccomp.sigio import Signals

if TYPE_CHECKING:
    from pvbus.view.run.fitting import Fitting
    from pvbus.view.run.room import Room
    from pvbus.view.seccomp.ledger import Ledger

DIRECTORY = "/dev/xen"


class RegularCalls(Filter):
    """The filter over the FUSE file, and its server."""

    title = "regular"

    def __init__(self) -> None:
        super().__init__()
        self.without_anybody = "its programs map no file privately any more"
        self._secret = b""

    @property
    def obituary(self) -> str:
        """What is said when its process has died."""
        return "the server of regular has died; for mmap and other calls the device's file is a regular one from now on"

    def code(self) -> bytes:
        """Give the filter."""
        abis = regular_calls.here()
        if not abis:
            raise OSError(errno.ENOSYS, f"the numbers of system calls are not known for {os.uname().machine}")
        return regular_calls.program(abis)

    def prepare(self, room: Room) -> None:
        """Install it if that can be. Of a run within a run the outer one's filter knows the devices, too."""
        assert room.devices is not None
        self._secret = room.devices.secret
        try:
            super().prepare(room)
        except OSError as error:
            self.title = ""
            if error.errno != errno.EBUSY or not _is_within_a_run():
                said = f"no filter over the device's file: {error.strerror}; for mmap and other calls it is a regular one"
                print(f"pvbus run: {said}", file=sys.stderr, flush=True)

    def serve(self, room: Room) -> None:
        """Answer the calls of every child, one after the other."""
        self.close_ways()
        regular = Regular(DIRECTORY, Signals(self._secret))
        ledgers: dict[int, Ledger] = {}
        poller = select.poll()
        with socket.socket(fileno=self.fds[0]) as control:
            poller.register(control, select.POLLIN)
            while True:
                for fd, events in poller.poll():
                    if fd in ledgers and events & select.POLLIN:
                        _serve(fd, ledgers[fd], regular)
                    elif fd in ledgers:  # the last process under the filter has gone
                        poller.unregister(fd)
                        del ledgers[fd]
                        os.close(fd)
                    elif (found := self.next_listener(control)) is not None:
                        listener, ledgers[found[0]] = found
                        abi.tune(listener)
                        poller.register(listener, select.POLLIN)
                    else:  # the run has ended: those that it has left are killed, and so are we
                        poller.unregister(control)


def _serve(listener: int, ledger: Ledger, regular: Regular) -> None:
    """Answer a call."""
    call = abi.receive(listener)
    if call is None:
        return
    ledger.taken(call.id)
    try:
        answer = regular.answer(call)
    except OSError:  # its caller has gone, or may not be looked at; or the device is that of a run within the run
        answer = None
    if answer is None:
        abi.let_through(listener, call.id)
    elif answer < 0:
        abi.refuse(listener, call, -answer)
    else:
        abi.answer(listener, call, answer)
    ledger.answered(call.id)


def _is_within_a_run() -> bool:
    """Whether there is another tree of devices besides this run's own."""
    return Path("/proc/self/mountinfo").read_bytes().count(TREE) > 1


def fittings() -> list[Fitting]:
    """Give the filter and what belongs to it."""
    regular = RegularCalls()
    return [regular, StandIn(regular)]
