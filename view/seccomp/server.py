# SPDX-License-Identifier: Apache-2.0
"""The front end: takes up the calls that filters hand over, and moves ports between sockets and the machine.

One loop, which never waits: NOTIFY and transfers are answered from shared memory, opens and the other ioctls when the machine
has answered. Whatever is none of ours is let through. When we die the sockets hang up, and whoever else has the listeners goes on
with the calls that wait (ledger.py); without anybody the kernel ends them with ENOSYS.
"""

from __future__ import annotations

import errno
import os
import select
from collections import deque
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

from pvbus.actors.client import evtchn, frontend
from pvbus.actors.runtime import messages as m
from pvbus.view.fuse.evtchn import ARGUMENT_BYTES, RELEASE_NS_MAX
from pvbus.view.seccomp import abi, bpf
from pvbus.view.seccomp.files import SocketFile, segments_of
from pvbus.view.seccomp.ledger import Ledger
from pvbus.view.seccomp.rights import is_the_drivers

if TYPE_CHECKING:
    from pvbus.actors.runtime.clock import Timer
    from pvbus.actors.runtime.inbox import Inbox
    from pvbus.actors.runtime.peer import Peer

_AT_FDCWD = 0xFFFFFF9C
_HOW_BYTES = 24
_EVERY_CHANGE = select.EPOLLIN | select.EPOLLOUT | select.EPOLLRDHUP | select.EPOLLET


class Waiting(NamedTuple):
    """A call that is to be answered, and through what."""

    listener: int
    call: abi.Call
    ledger: Ledger

    def answer(self, value: int) -> None:
        """End it with a value."""
        abi.answer(self.listener, self.call, value)
        self.ledger.answered(self.call.id)

    def refuse(self, number: int) -> None:
        """End it with an errno."""
        abi.refuse(self.listener, self.call, number)
        self.ledger.answered(self.call.id)

    def let_through(self) -> None:
        """Leave it to the kernel."""
        abi.let_through(self.listener, self.call.id)
        self.ledger.answered(self.call.id)

    def inject(self, fd: int, *, cloexec: bool) -> None:
        """End it with a descriptor. OSError EMFILE: it has not ended."""
        abi.inject(self.listener, self.call, fd, cloexec=cloexec)
        self.ledger.answered(self.call.id)

    @property
    def fd(self) -> int:
        """The descriptor that it is about."""
        return self.call.arguments[0] & 0xFFFFFFFF


class Frontend:
    """Serves listeners. `machine` is a connection to the machine's supervisor in `inbox`, whose loop runs all of this.

    `is_device(path)` says whether a path, as seen from here, is the place of the device in the program's tree.
    """

    def __init__(self, inbox: Inbox, machine: Peer, domain: int, is_device: Callable[[str], bool]) -> None:
        self.inbox = inbox
        self.machine = machine
        self.domain = domain
        self.is_device = is_device
        self.files: dict[int, SocketFile] = {}  # by the inode of the user's end
        self._releasing: dict[SocketFile, Timer] = {}
        self._behind: deque[Callable[[], None]] = deque()
        known = bpf.here()
        self._handlers: dict[int, Callable[[Waiting], None]] = {
            known.ioctl: self._ioctl,
            known.read: self._transfer,
            known.readv: self._transfer,
            known.write: self._transfer,
            known.writev: self._transfer,
            known.fcntl: self._edges_wanted,
            known.epoll_ctl: self._edges_wanted,
        }
        self._known = known

    def add_listener(self, listener: int, ledger: Ledger) -> None:
        """Serve one more filter, until its last process has ended; the descriptor is ours."""
        os.set_blocking(listener, False)
        abi.tune(listener)
        self.inbox.add_fd(listener, select.EPOLLIN, lambda events: self._listen(listener, ledger, events))

    def _listen(self, listener: int, ledger: Ledger, events: int) -> None:
        if not events & select.EPOLLIN:  # EPOLLHUP: the last process under the filter has gone
            self.inbox.remove_fd(listener)
            os.close(listener)
            return
        call = abi.receive(listener)
        if call is not None:
            ledger.taken(call.id)
            self._guarded(Waiting(listener, call, ledger), self._handlers.get(call.number, self._open))

    @staticmethod
    def _guarded(waiting: Waiting, handle: Callable[[Waiting], None]) -> None:
        """Every call gets an answer, whatever goes wrong in finding it."""
        try:
            handle(waiting)
        except OSError as error:
            waiting.refuse(error.errno or errno.EIO)
        except BaseException:
            waiting.refuse(errno.EIO)
            raise

    def _file_of(self, waiting: Waiting, fd: int = -1) -> SocketFile | None:
        """Which of our files the call is about; None for anything else."""
        try:
            target = os.readlink(f"/proc/{waiting.call.tid}/fd/{waiting.fd if fd < 0 else fd}")  # noqa: PTH115 - on the path of a notify
        except OSError:
            return None
        kind, _, inode = target.partition("[")
        return self.files.get(int(inode[:-1])) if kind == "socket:" else None

    # ---- open

    def _open(self, waiting: Waiting) -> None:
        """Mirror evtchn_open for the device's path; leave every other to the kernel."""
        flags = self._flags_of_ours(waiting.call)
        if flags is None:
            waiting.let_through()
            return
        name = Path(f"/proc/{waiting.call.tid}/comm").read_text(encoding="utf-8", errors="replace").rstrip("\n")
        message = m.OpenEvtchn(domain=self.domain, comm=name, mode=flags & os.O_ACCMODE, pid=waiting.call.tid)

        def opened(file: frontend.FrontendFile) -> None:
            self._guarded(waiting, lambda _: self._inject(waiting, file, flags))

        self._after_releases(lambda: frontend.open_file(self.inbox, self.machine, message, opened, waiting.refuse))

    def _flags_of_ours(self, call: abi.Call) -> int | None:
        """Give the flags of an open of the device; None for one of anything else, and for what the kernel will refuse."""
        known, a = self._known, call.arguments
        directory = _AT_FDCWD
        if call.number in (known.open, known.creat):
            path_at, flags = a[0], a[1] if call.number == known.open else os.O_WRONLY
        else:
            path_at, directory, flags = a[1], a[0] & 0xFFFFFFFF, a[2]
        raw = abi.read_string(call.tid, path_at)
        if raw is None or raw.rpartition(b"/")[2] != b"evtchn":
            return None
        if call.number == known.openat2:
            how = abi.read_memory(call.tid, a[2], _HOW_BYTES) if a[3] >= _HOW_BYTES else None
            if how is None:
                return None
            flags = int.from_bytes(how[:8], "little")
        path = os.fsdecode(raw)
        base = "root" if path.startswith("/") else "cwd" if directory == _AT_FDCWD else f"fd/{directory}"
        place = f"/proc/{call.tid}/{base}/{path}"
        return flags if self.is_device(place) and is_the_drivers(call.tid, place, flags) else None

    def _inject(self, waiting: Waiting, file: frontend.FrontendFile, flags: int) -> None:
        try:
            made = SocketFile(file, flags & os.O_ACCMODE, nonblock=bool(flags & os.O_NONBLOCK))
        except OSError:
            file.close(lambda: None)
            raise
        self.files[made.inode] = made
        file.on_ready = made.pump
        self.inbox.add_fd(made.ours.fileno(), _EVERY_CHANGE, lambda _: self._changed(made))
        try:
            waiting.inject(made.theirs.fileno(), cloexec=bool(flags & os.O_CLOEXEC))
        finally:  # where the caller has gone, or has no room: nobody holds the other end, and that is a hang-up
            made.handed_over()

    def _edges_wanted(self, waiting: Waiting) -> None:
        """O_ASYNC by fcntl, FIOASYNC, epoll_ctl: the kernel carries them out; from now on edges are those of the device."""
        is_epoll = waiting.call.number == self._known.epoll_ctl
        file = self._file_of(waiting, waiting.call.arguments[2] & 0xFFFFFFFF) if is_epoll else self._file_of(waiting)
        if file is not None:
            event = abi.read_memory(waiting.call.tid, waiting.call.arguments[3], 4) if is_epoll else None
            file.edges |= not is_epoll or (event is not None and bool(int.from_bytes(event, "little") & select.EPOLLET))
        waiting.let_through()

    # ---- release

    def _changed(self, file: SocketFile) -> None:
        """The user has written, has read, or has closed its last descriptor."""
        if file.take_writes():
            file.fill()
        else:
            self._release(file)

    def _hear_of_closes(self) -> None:
        """Begin the release of what was closed before now: who calls may count on the numbers of its ports."""
        poller = select.poll()
        by_fd = {file.ours.fileno(): file for file in self.files.values()}
        for fd in by_fd:
            poller.register(fd, 0)
        for fd, events in poller.poll(0):
            if events & select.POLLHUP:
                self._changed(by_fd[fd])

    def _release(self, file: SocketFile) -> None:
        """Mirror evtchn_release (A10.4): the user's last descriptor is closed."""
        if self.files.pop(file.inode, None) is None:
            return
        self.inbox.remove_fd(file.ours.fileno())
        file.ours.close()

        def released() -> None:
            timer = self._releasing.pop(file, None)
            if timer is not None:
                timer.cancel()
            while self._behind and not self._releasing:
                self._behind.popleft()()

        self._releasing[file] = self.inbox.call_at(self.inbox.clock.now_ns() + RELEASE_NS_MAX, released)
        file.file.close(released)

    def _after_releases(self, action: Callable[[], None]) -> None:
        """Act once every file is released whose close came before."""
        self._hear_of_closes()
        if self._releasing:
            self._behind.append(action)
        else:
            action()

    # ---- the calls on a file

    def _ioctl(self, waiting: Waiting) -> None:
        """Mirror evtchn_ioctl (A9)."""
        file = self._file_of(waiting)
        if file is None:
            waiting.let_through()
            return
        call = waiting.call
        request = call.arguments[1] & 0xFFFFFFFF
        if request == bpf.FIOASYNC:
            self._edges_wanted(waiting)
            return
        file.take_writes()  # what was written before takes effect before
        size = ARGUMENT_BYTES.get(request)
        if size is None:
            file.pump()  # whoever asks for nothing finds that all is done
            waiting.refuse(errno.ENOSYS)
            return
        argument = abi.read_memory(call.tid, call.arguments[2], size) if size else b""
        if file.hung_up:
            waiting.refuse(errno.EIO)
        elif request == evtchn.IOCTL_NOTIFY and argument is not None:
            file.file.notify(int.from_bytes(argument, "little"))
            waiting.answer(0)
        else:
            self._after_releases(lambda: self._ioctl_now(waiting, file, request, argument))

    def _ioctl_now(self, waiting: Waiting, file: SocketFile, request: int, argument: bytes | None) -> None:
        is_reset = request == evtchn.IOCTL_RESET

        def answered(number: int, value: int) -> None:
            if is_reset:
                file.paused = False
                if not number:
                    file.was_reset(waiting.call.tid, waiting.fd)
                file.pump()
            if number:
                waiting.refuse(number)
            else:
                waiting.answer(value)

        file.paused = file.paused or is_reset
        file.file.ioctl(request, argument, lambda number, value: self._guarded(waiting, lambda _: answered(number, value)))

    def _transfer(self, waiting: Waiting) -> None:
        """Mirror evtchn_read and evtchn_write for lengths that the socket would not round as the driver does."""
        file = self._file_of(waiting)
        if file is None:
            waiting.let_through()
            return
        known, call = self._known, waiting.call
        address, count = call.arguments[1:3]
        if count >= 1 << 47:  # the kernel refuses it before any driver is asked
            waiting.let_through()
            return
        vectored = call.number in (known.readv, known.writev)
        segments = segments_of(call.tid, address, count) if vectored else [(address, count)]
        if call.number in (known.read, known.readv):
            result = file.read(call.tid, waiting.fd, segments)
        else:
            file.take_writes()
            result = file.write(call.tid, segments)
        if result is None:
            waiting.let_through()
        else:
            waiting.answer(result)

