# SPDX-License-Identifier: Apache-2.0
"""The front end's loop: takes up the calls that the filter hands over, and moves ports between sockets and the machine.

One thread does all that is quick: NOTIFY, transfers, whatever is none of ours. Opens and the other ioctls are calls to the
machine, which may wait; each file makes its own in a thread of its own, so that no user waits for another one's file. Their
ends come back to the loop, which alone answers, and alone touches `SocketFile`.
"""

from __future__ import annotations

import collections
import errno
import os
import queue
import select
import threading
from collections.abc import Callable
from dataclasses import dataclass

from pvbus.actors.client import EvtchnFile
from pvbus.view.seccomp import abi, bpf
from pvbus.view.seccomp.files import SocketFile, inode_of, segments_of

_ARGUMENT_BYTES = {
    0x00044500: 4,  # BIND_VIRQ
    0x00084501: 8,  # BIND_INTERDOMAIN
    0x00044502: 4,  # BIND_UNBOUND_PORT
    0x00044503: 4,  # UNBIND
    0x00044504: 4,  # NOTIFY
    0x00024506: 2,  # RESTRICT_DOMID
    0x00044507: 4,  # BIND_STATIC
}
_NOTIFY, _RESET = 0x00044504, 0x00004505
_AT_FDCWD = 0xFFFFFF9C
_HOW_BYTES = 24
RELEASE_S_MAX = 30.0  # longer than a call to the machine may take
_ALL_AT_ONCE = select.EPOLLIN | select.EPOLLOUT | select.EPOLLRDHUP | select.EPOLLET

Opener = Callable[[str, int], EvtchnFile]
"""Opens the machine's device for a thread of that name with these flags (the access mode), non-blocking."""


@dataclass(frozen=True)
class Opening:
    """What an open asked for."""

    path: bytes
    directory: int
    flags: int


class Frontend:
    """Serves one listener until the last filtered process has ended and its files are closed.

    `is_device(path)` says whether a path, as seen from here, is the place of the device in the program's tree.
    """

    def __init__(self, listener: int, open_file: Opener, is_device: Callable[[str], bool]) -> None:
        self.listener = listener
        self.open_file = open_file
        self.is_device = is_device
        self.machine = bpf.here()
        self.files: dict[int, SocketFile] = {}  # by the inode of the user's end
        self._by_fd: dict[int, tuple[SocketFile, bool]] = {}  # what the loop waits on: ours (True) or the machine's doorbell
        self._workers: dict[int, _Worker] = {}
        self._opener = _Worker(self._later)
        self._releases: set[threading.Event] = set()
        self._done: collections.deque[Callable[[], None]] = collections.deque()
        self._bell = os.eventfd(0, os.EFD_NONBLOCK | os.EFD_CLOEXEC)
        self._epoll = select.epoll()
        self._epoll.register(listener, select.EPOLLIN)
        self._epoll.register(self._bell, select.EPOLLIN)
        self._listening = True
        self._stopped = False
        known = self.machine
        self._handlers: dict[int, Callable[[abi.Call], None]] = {
            known.ioctl: self._ioctl,
            known.read: self._transfer,
            known.readv: self._transfer,
            known.write: self._transfer,
            known.writev: self._transfer,
        }

    # ---- the loop

    def run(self) -> None:
        """Serve until nobody is left to serve, or `stop` is called. What is still open is released then."""
        abi.tune(self.listener)
        try:
            while not self._stopped and (self._listening or self.files):
                for fd, events in self._epoll.poll():
                    self._serve(fd, events)
        finally:
            self._close()

    def stop(self) -> None:
        """End `run`, from any thread."""
        self._later(self._stop)

    def _stop(self) -> None:
        self._stopped = True

    def _serve(self, fd: int, events: int) -> None:
        if fd == self.listener:
            if events & select.EPOLLIN:
                self._take_up()
            else:  # EPOLLHUP: the last process under the filter has gone
                self._listening = False
                self._epoll.unregister(fd)
        elif fd == self._bell:
            os.eventfd_read(fd)
            while self._done:
                self._done.popleft()()
        elif fd in self._by_fd:
            file, is_ours = self._by_fd[fd]
            if not is_ours:
                file.pump()
                if file.dead:
                    self._forget_doorbell(file)
            elif file.take_writes():
                file.fill()
            else:
                self._release(file)

    def _later(self, what: Callable[[], None]) -> None:
        """Have the loop do something; called by the threads of files."""
        self._done.append(what)
        os.eventfd_write(self._bell, 1)

    def _take_up(self) -> None:
        call = abi.receive(self.listener)
        if call is None:
            return
        handler = self._handlers.get(call.number, self._open)
        self._answer(call, lambda: handler(call))

    def _answer(self, call: abi.Call, handle: Callable[[], None]) -> None:
        """Every call gets an answer, whatever goes wrong in finding it."""
        try:
            handle()
        except OSError as error:
            abi.refuse(self.listener, call, error.errno or errno.EIO)
        except BaseException:
            abi.refuse(self.listener, call, errno.EIO)
            raise

    def _file_of(self, call: abi.Call) -> SocketFile | None:
        """Which of our files the call's first argument is; None for anything else."""
        try:
            target = os.readlink(f"/proc/{call.tid}/fd/{call.arguments[0] & 0xFFFFFFFF}")
        except OSError:
            return None
        kind, _, inode = target.partition("[")
        return self.files.get(int(inode[:-1])) if kind == "socket:" else None

    # ---- open

    def _open(self, call: abi.Call) -> None:
        opening = self._opening(call)
        if opening is None or not self._is_ours(call, opening):
            abi.let_through(self.listener, call)
            return
        self._hear_of_closes()
        name = _name_of(call.tid)
        self._opener.put(lambda: self._open_now(call, opening, name), self._releases)

    def _opening(self, call: abi.Call) -> Opening | None:
        """Copy what the call says; None for what the kernel will refuse, or what opens no file."""
        known, a = self.machine, call.arguments
        if call.number in (known.open, known.creat):
            path_at, directory, flags = a[0], _AT_FDCWD, a[1] if call.number == known.open else os.O_WRONLY
        else:
            path_at, directory, flags = a[1], a[0] & 0xFFFFFFFF, a[2]
        path = abi.read_string(call.tid, path_at)
        if path is None or path.rpartition(b"/")[2] != b"evtchn":
            return None
        if call.number == known.openat2:
            how = abi.read_memory(call.tid, a[2], _HOW_BYTES) if a[3] >= _HOW_BYTES else None
            if how is None:
                return None
            flags = int.from_bytes(how[:8], "little")
        return None if flags & os.O_PATH else Opening(path, directory, flags)

    def _is_ours(self, call: abi.Call, opening: Opening) -> bool:
        """Whether the path leads to the device, as its caller sees it."""
        path = os.fsdecode(opening.path)
        if path.startswith("/"):
            return self.is_device(f"/proc/{call.tid}/root{path}")
        base = "cwd" if opening.directory == _AT_FDCWD else f"fd/{opening.directory}"
        return self.is_device(f"/proc/{call.tid}/{base}/{path}")

    def _open_now(self, call: abi.Call, opening: Opening, name: str) -> None:
        """In the opener's thread: the machine makes the file, the loop injects it."""
        try:
            mode = opening.flags & os.O_ACCMODE
            file = self.open_file(name, opening.flags)
        except OSError as error:
            number = error.errno or errno.EIO
            self._later(lambda: abi.refuse(self.listener, call, number))
            return
        self._later(lambda: self._answer(call, lambda: self._inject(call, file, opening.flags, mode)))

    def _inject(self, call: abi.Call, file: EvtchnFile, flags: int, mode: int) -> None:
        try:
            made = SocketFile(file, mode, nonblock=bool(flags & os.O_NONBLOCK))
        except OSError:
            self._opener.put(file.close, self._releases)
            raise
        self._register(made)
        try:
            abi.inject(self.listener, call, made.theirs.fileno(), cloexec=bool(flags & os.O_CLOEXEC))
        finally:  # where the caller has gone, or has no room: nobody holds the other end, and that is a hang-up
            made.handed_over()

    def _register(self, file: SocketFile) -> None:
        self.files[file.inode] = file
        self._workers[file.inode] = _Worker(self._later)
        self._by_fd[file.ours.fileno()] = (file, True)
        self._by_fd[file.file.fileno()] = (file, False)
        self._epoll.register(file.file.fileno(), select.EPOLLIN)
        self._epoll.register(file.ours.fileno(), _ALL_AT_ONCE)

    # ---- release

    def _hear_of_closes(self) -> None:
        """Begin the release of what was closed before now: the caller may count on the numbers of its ports."""
        poller = select.poll()
        by_fd = {file.ours.fileno(): file for file in self.files.values()}
        for fd in by_fd:
            poller.register(fd, 0)
        for fd, events in poller.poll(0):
            if events & select.POLLHUP and not by_fd[fd].take_writes():
                self._release(by_fd[fd])

    def _forget_doorbell(self, file: SocketFile) -> None:
        if self._by_fd.pop(file.file.fileno(), None) is not None:
            self._epoll.unregister(file.file.fileno())

    def _release(self, file: SocketFile) -> None:
        """The user's last descriptor is closed: so is the machine's file, behind the calls that are under way."""
        del self.files[file.inode]
        self._forget_doorbell(file)
        del self._by_fd[file.ours.fileno()]
        self._epoll.unregister(file.ours.fileno())
        ended = threading.Event()
        self._releases.add(ended)
        worker = self._workers.pop(file.inode)

        def release() -> None:
            try:
                file.close()
            finally:
                ended.set()
                self._later(lambda: self._releases.discard(ended))

        worker.put(release, frozenset())
        worker.end()

    def _close(self) -> None:
        for file in list(self.files.values()):
            file.hang_up()
            self._release(file)
        for ended in list(self._releases):
            ended.wait(RELEASE_S_MAX)
        self._opener.end()
        self._epoll.close()
        os.close(self._bell)
        os.close(self.listener)  # whoever still makes a filtered call gets ENOSYS

    # ---- the calls on a file

    def _ioctl(self, call: abi.Call) -> None:
        file = self._file_of(call)
        if file is None:
            abi.let_through(self.listener, call)
            return
        if not file.take_writes():
            raise OSError(errno.EBADF, os.strerror(errno.EBADF))
        request = call.arguments[1] & 0xFFFFFFFF
        size = _ARGUMENT_BYTES.get(request, 0)
        argument = abi.read_memory(call.tid, call.arguments[2], size) if size else b""
        if request == _NOTIFY or (request != _RESET and not size):  # answered from shared memory, or without the machine
            if argument is not None:
                abi.answer(self.listener, call, file.call(request, argument) if size else self._unknown())
                return
        self._hear_of_closes()
        file.paused = request == _RESET
        self._workers[file.inode].put(lambda: self._ioctl_now(call, file, request, argument), self._releases)

    @staticmethod
    def _unknown() -> int:
        raise OSError(errno.ENOSYS, os.strerror(errno.ENOSYS))

    def _ioctl_now(self, call: abi.Call, file: SocketFile, request: int, argument: bytes | None) -> None:
        """In the file's own thread: what the machine says, the loop passes on."""
        try:
            value, number = file.call(request, argument), 0
        except OSError as error:
            value, number = 0, error.errno or errno.EIO
        self._later(lambda: self._answer(call, lambda: self._ioctl_ended(call, file, request, value, number)))

    def _ioctl_ended(self, call: abi.Call, file: SocketFile, request: int, value: int, number: int) -> None:
        if request == _RESET:
            try:
                if not number:
                    file.was_reset(call.tid, call.arguments[0] & 0xFFFFFFFF)
            finally:
                file.paused = False
                file.pump()
        if number:
            abi.refuse(self.listener, call, number)
        else:
            abi.answer(self.listener, call, value)

    def _transfer(self, call: abi.Call) -> None:
        file = self._file_of(call)
        if file is None:
            abi.let_through(self.listener, call)
            return
        known, (fd, address, count) = self.machine, call.arguments[:3]
        vectored = call.number in (known.readv, known.writev)
        segments = segments_of(call.tid, address, count, abi.read_memory) if vectored else [(address, count)]
        if call.number in (known.read, known.readv):
            result = file.read(call.tid, fd & 0xFFFFFFFF, segments)
        else:
            file.take_writes()
            result = file.write(call.tid, segments)
        if result is None:
            abi.let_through(self.listener, call)
        else:
            abi.answer(self.listener, call, result)


class _Worker:
    """A thread that does one thing after the other; it starts with the first. What it does, nobody else waits for."""

    def __init__(self, later: Callable[[Callable[[], None]], None]) -> None:
        self._later = later
        self._tasks: queue.SimpleQueue[Callable[[], None] | None] = queue.SimpleQueue()
        self._thread: threading.Thread | None = None

    def put(self, task: Callable[[], None], after: set[threading.Event] | frozenset[threading.Event]) -> None:
        """Do a task, once these releases have ended. Each waiting task is a thread of a user's, which bounds them."""
        before = tuple(after)

        def run() -> None:
            for ended in before:
                ended.wait(RELEASE_S_MAX)
            task()

        if self._thread is None:
            self._thread = threading.Thread(target=self._run, name="pvbus seccomp file", daemon=True)
            self._thread.start()
        self._tasks.put(run)

    def end(self) -> None:
        """End the thread after what it has been given."""
        self._tasks.put(None)

    def _run(self) -> None:
        while (task := self._tasks.get()) is not None:
            try:
                task()
            except BaseException as error:
                self._later(_raiser(error))
                return


def _raiser(error: BaseException) -> Callable[[], None]:
    """What goes wrong in a thread ends the front end, and is not lost."""

    def again() -> None:
        raise error

    return again


def _name_of(tid: int) -> str:
    """Give the name of a thread, by which the machine shows its file."""
    with open(f"/proc/{tid}/comm", encoding="utf-8", errors="replace") as comm:  # noqa: PTH123 - shorter
        return comm.read().rstrip("\n")


__all__ = ["Frontend", "Opener", "inode_of"]
