# SPDX-License-Identifier: Apache-2.0
"""Serves trees that are mounted, from one connection to a machine, and sends its uevents. A process of its own runs it.

One loop for all trees. What may wait, a bind for example, is done by a thread and answered by the loop.
"""

from __future__ import annotations

import errno
import os
import selectors
import traceback
from collections import deque
from concurrent.futures import ThreadPoolExecutor
from typing import TYPE_CHECKING

from pvbus.actors.workqueue.sysfs import synthetic
from pvbus.view.fuse.node import Directory, Node, Symlink, Text
from pvbus.view.fuse.session import Session
from pvbus.view.fuse.xattr import Like
from pvbus.view.sysfs.late import LateText
from pvbus.view.sysfs.points import BUS, MISC, MISC_MAJOR, PARENT
from pvbus.view.sysfs.source import BusSource
from pvbus.view.sysfs.tree import Tree

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping

    from pvbus.actors.client import Machine
    from pvbus.view.sysfs.uevents import UeventSender

WAITING_WRITES_MAX = 16     # further ones wait for these


class SysfsServer:
    """The trees of one domain, by where they stand; `sender` was made in the network namespace of the programs.

    `fds` are those of FUSE mounts: BUS and PARENT, MISC, or all three. `minor` is the event-channel device's number.
    """

    def __init__(self, machine: Machine, domain: int, fds: Mapping[str, int], sender: UeventSender, minor: int) -> None:
        self._selector = selectors.DefaultSelector()
        self._threads = ThreadPoolExecutor(WAITING_WRITES_MAX, thread_name_prefix="pvbus-write")
        self._answers: deque[tuple[Callable[[int], None], int]] = deque()
        self._doorbell = os.eventfd(0, os.EFD_CLOEXEC | os.EFD_NONBLOCK)
        self._selector.register(self._doorbell, selectors.EVENT_READ, self._answer)
        self.sessions: list[Session] = []
        roots: dict[str, Node] = {}
        self._source = BusSource(machine, domain, sender.send) if BUS in fds else None
        if self._source is not None:
            tree = Tree(self._source, self.later)
            roots |= {BUS: tree.bus, PARENT: tree.parent}
        if MISC in fds:
            roots[MISC] = misc_device(minor, sender.send, self.later)
        for point, fd in fds.items():
            session = Session(fd, roots[point], like=Like.SYSFS)
            self.sessions.append(session)
            self._selector.register(session, selectors.EVENT_READ, session.serve)

    def later(self, work: Callable[[], None], answer: Callable[[int], None]) -> None:
        """Do something that may wait; then, in the loop, `answer` with its errno or 0."""

        def run() -> None:
            number = errno.EIO
            try:
                work()
                number = 0
            except OSError as failed:
                number = failed.errno or errno.EIO
            except Exception:  # ours: its caller gets EIO, and we go on
                traceback.print_exc()
            finally:
                self._answers.append((answer, number))
                os.eventfd_write(self._doorbell, 1)

        self._threads.submit(run)

    def _answer(self) -> None:
        os.eventfd_read(self._doorbell)
        while self._answers:
            answer, number = self._answers.popleft()
            answer(number)

    def run(self) -> None:
        """Serve until everything is unmounted: the last process of the mount namespace has ended."""
        while any(not session.closed for session in self.sessions):
            for key, _ in self._selector.select():
                key.data()
                if isinstance(key.fileobj, Session) and key.fileobj.closed:
                    self._selector.unregister(key.fileobj)

    def close(self) -> None:
        """Stop serving: programs that still look get errors."""
        if self._source is not None:
            self._source.close()
        self._threads.shutdown(wait=False, cancel_futures=True)
        for session in self.sessions:
            session.close()
        self._selector.close()
        os.close(self._doorbell)


def misc_device(minor: int, send: Callable[[Mapping[str, str]], None], later: Callable[..., None]) -> Directory:
    """Make the directory of the event-channel device in /sys/devices/virtual/misc."""
    variables = {"MAJOR": str(MISC_MAJOR), "MINOR": str(minor), "DEVNAME": "xen/evtchn"}

    def store(data: bytes) -> None:
        action, said = synthetic(data.decode(errors="replace"))
        head = {"ACTION": action, "DEVPATH": f"/{MISC}", "SUBSYSTEM": "misc"}
        send(head | dict(one.partition("=")[::2] for one in said) | variables)

    return Directory({
        "dev": Text(lambda: f"{MISC_MAJOR}:{minor}\n"),
        "uevent": LateText(later, lambda: "".join(f"{key}={value}\n" for key, value in variables.items()), store),
        "subsystem": Symlink("../../../../class/misc"),
    })
