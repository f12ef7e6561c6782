# SPDX-License-Identifier: Apache-2.0
"""An open event-channel file, as its user holds it.

read, write, poll and notify are native methods on shared memory (shm/native/user_file.c): they reach the machine without a
message. The ioctls are calls to the file's process. What all references of one process share is `_Shared`; a forked child
makes its own connection and its own submission ring at first use.
"""

from __future__ import annotations

import contextlib
import errno
import fcntl
import os
import select
import socket
import struct
import threading
import weakref
from typing import TYPE_CHECKING, Self

from pvbus.actors.runtime import messages as m
from pvbus.actors.runtime.asking import ATTACH_REQUEST, ask_blocking, await_blocking
from pvbus.actors.runtime.peer import PeerGone
from pvbus.actors.runtime.wire import Done, Message, close_fds, encode, send_frame, socket_cookie
from pvbus.shm.layout import MAGIC_FILE, MAGIC_PUBLIC, MAGIC_SUBMISSION, FilePage, PublicPage, SubmissionRing
from pvbus.shm.memory import Context, Memory, UserFile
from pvbus.shm.segment import check

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator

    from typing_extensions import Buffer

CALL_TIMEOUT_S = 25.0  # longer than every deadline behind it, so that the machine's own answer comes first

IOCTL_BIND_VIRQ = 0x00044500
IOCTL_BIND_INTERDOMAIN = 0x00084501
IOCTL_BIND_UNBOUND_PORT = 0x00044502
IOCTL_UNBIND = 0x00044503
IOCTL_NOTIFY = 0x00044504
IOCTL_RESET = 0x00004505
IOCTL_RESTRICT_DOMID = 0x00024506
IOCTL_BIND_STATIC = 0x00044507
_OF_THE_VFS = frozenset({0x5421, 0x5450, 0x5451, 0x5452})  # FIONBIO, FIONCLEX, FIOCLEX, FIOASYNC: the driver never sees them
BINDS_A_MESSAGE = 1024  # well below what a frame holds, and a fraction of a second
_ARGUMENT_BYTES_MAX = 64  # the longest structure has 8


_all_shared: weakref.WeakSet[_Shared] = weakref.WeakSet()

_life = threading.RLock()
"""Guards who refers to what: `references`, `under_way` and `door` of every _Shared. Never held while anything waits, and held
across a fork, so that a child does not inherit a descriptor that nobody counts. Reentrant: a finalizer may close a file.
"""


def _after_fork_in_child() -> None:
    _life.release()
    for shared in list(_all_shared):
        shared._forked()  # noqa: SLF001 - of this module


os.register_at_fork(before=_life.acquire, after_in_parent=_life.release, after_in_child=_after_fork_in_child)


class _Shared:
    """What the references of this process share: mappings, doorbell, connection."""

    def __init__(self, fds: list[int], opened: m.Opened) -> None:
        page_fd, public_fd, connection, self.door = fds
        mode = opened.mode & os.O_ACCMODE
        self.mode = (mode in (os.O_RDONLY, os.O_RDWR), mode in (os.O_WRONLY, os.O_RDWR))
        self.cookie = socket_cookie(self.door)
        self.connection = socket.socket(fileno=connection)
        self.lock = threading.Lock()
        self.asking = 0  # the thread whose call waits for its reply
        self.references = 0
        self.finishing = False
        self.under_way: set[object] = set()  # calls: like a blocked read, they keep the file open
        self.kick = -1
        try:
            fds = [page_fd, public_fd, self.door]
            self.page = Memory(page_fd, FilePage.BYTES)
            self.public = Memory(public_fd, PublicPage.BYTES, False)
            os.close(page_fd)  # before the ring's two come: who is short of descriptors needs no more than these four
            os.close(public_fd)
            fds = [self.door]
            first = m.Attach(pid=os.getpid())
            self.ring, self.kick = self._ring_of(*await_blocking(self.connection, first, ATTACH_REQUEST, CALL_TIMEOUT_S))
        except BaseException as error:
            self.connection.close()
            close_fds(fds)
            if isinstance(error, PeerGone):
                raise OSError(errno.EIO, "the file's process has died") from None
            raise
        self.context = Context(self.page, self.ring, self.public, self.door, self.kick, 0, opened.ports_max)
        self.context.set_hooks(self.finish, self.rejoin)
        _all_shared.add(self)

    def _ring_of(self, reply: Message, fds: list[int]) -> tuple[Memory, int]:
        if not isinstance(reply, m.Attached) or len(fds) != 2:
            raise OSError(errno.EPROTO, f"unexpected {type(reply).__name__}")
        ring = Memory(fds[0], SubmissionRing.BYTES)
        os.close(fds[0])
        check(ring, MAGIC_SUBMISSION, "the submission ring")
        check(self.page, MAGIC_FILE, "the file's page")  # its process has written it before it answered
        check(self.public, MAGIC_PUBLIC, "the public page")
        return ring, fds[1]

    def _forked(self) -> None:
        """In a forked child: who held the lock and who was in a call is not here. What only they kept open is closed."""
        self.lock = threading.Lock()
        self.asking = 0
        self.under_way = set()
        if self.references == 0 and self.door >= 0:
            os.close(self.door)
            self.door = -1
            self._close_rest()

    def _reconnect(self) -> None:
        """In a forked child: the connection is the parent's, make one of our own."""
        self._replace_connection(self._another_connection())

    def _replace_connection(self, ours: socket.socket) -> None:
        old, self.connection = self.connection, ours  # first: a thread may fork at any moment
        old.close()

    def _another_connection(self) -> socket.socket:
        """Hand the file's process the end of one more connection. If it has no room for that, this one hangs up."""
        ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        try:
            with theirs:
                send_frame(self.connection, encode(m.Adopt()), (theirs.fileno(),))
        except OSError as error:
            ours.close()
            if error.errno == errno.EMFILE:
                raise
            raise PeerGone("the file's process") from error
        return ours

    def _ask_on(self, another: socket.socket, message: Message) -> tuple[Message, list[int]]:
        """Ask on one more connection; if the process that hung up there still has the one that we had, it was short of room."""
        try:
            return ask_blocking(another, message, timeout_s=CALL_TIMEOUT_S)
        except PeerGone:
            poller = select.poll()
            poller.register(self.connection.fileno(), 0)
            if poller.poll(0):
                raise
            raise OSError(errno.EMFILE, "the file's process has no room for one more connection (ulimit -n)") from None

    @contextlib.contextmanager
    def _in_call(self) -> Iterator[None]:
        """Keep the file open meanwhile, whatever other threads close. EBADF when it is not."""
        token = object()
        with _life:
            if not self.is_open():
                raise OSError(errno.EBADF, os.strerror(errno.EBADF))
            under_way = self.under_way
            under_way.add(token)
        try:
            yield
        except PeerGone:
            raise OSError(errno.EIO, "the file's process has died") from None
        finally:
            under_way.discard(token)  # a signal handler may have forked: then it is the parent's set, and not looked at
            self.finish()

    def is_open(self) -> bool:
        """Whether it can be used, or a close has begun. (Under _life.)"""
        return self.door >= 0 and not self.finishing

    def rejoin(self) -> None:
        """Give a forked child its own connection and submission ring; its threads may come here together."""
        with self._in_call(), self.lock:
            if not self.context.stale:
                return
            ours = self._another_connection()
            try:
                ring, kick = self._ring_of(*self._ask_on(ours, m.Attach(pid=os.getpid())))
            except BaseException:  # it failed this call; the next one tries again, through the connection that we have
                ours.close()
                raise
            self._replace_connection(ours)
            self.ring = ring
            old, self.kick = self.kick, kick
            self.context.rebind(ring, kick, 0)
            os.close(old)

    def ask(self, message: Message) -> Message:
        """Call the file's process. OSError with the driver's errno; EIO when it has died."""
        with self._in_call():
            if self.context.stale:
                self.rejoin()
            reply = self._ask(message)
            if isinstance(message, m.Ioctl) and message.request == IOCTL_RESET:
                self.context.drain_door()
        return reply

    def call(self, message: Message) -> int:
        """Call the file's process for a number."""
        reply = self.ask(message)
        if not isinstance(reply, Done):
            raise OSError(errno.EPROTO, f"unexpected {type(reply).__name__}")
        return reply.value

    def _ask(self, message: Message) -> Message:
        me = threading.get_ident()
        if self.asking == me:  # a signal handler calls while our own call waits, and its reply is none of ours
            with self._another_connection() as connection:
                return self._ask_on(connection, message)[0]
        with self.lock:
            self.asking = me
            try:
                return ask_blocking(self.connection, message, timeout_s=CALL_TIMEOUT_S)[0]
            finally:
                self.asking = 0

    def finish(self) -> None:
        """Close, once no reference is left and no call is blocked: a blocked reader keeps the ports alive."""
        with _life:
            if self.references > 0 or self.under_way or not self.is_open() or self.context.await_idle():
                return
            self.finishing = True
        own = not self.context.stale
        if not own:
            with contextlib.suppress(OSError):  # else the parent's connection stays the parent's, and nobody waits for us
                self._reconnect()
                own = True
        with _life:  # a fork sees it open and closes its copy, or sees it closed
            os.close(self.door)
            self.door = -1
        if own:  # synchronous: after the last close the ports are free, as on the device
            with contextlib.suppress(OSError):
                ask_blocking(self.connection, m.Detach(), timeout_s=CALL_TIMEOUT_S)
        self._close_rest()

    def _close_rest(self) -> None:
        self.context.set_hooks(None, None)  # they refer back to us
        self.connection.close()
        os.close(self.kick)


class EvtchnFile(UserFile):
    """One reference to an open /dev/xen/evtchn. Made by `Machine.open_evtchn` and `dup`.

    `read`, `readinto`, `read_ports`, `readv`, `write`, `enable`, `writev`, `notify`, `notify_many` and `poll` are native. Every
    call raises OSError with the driver's errno. Usable as a context manager, and wherever a descriptor is asked for (`fileno`).
    """

    _shared: _Shared
    _fd: int

    @classmethod
    def _open(cls, fds: list[int], opened: m.Opened, *, nonblock: bool, cloexec: bool) -> Self:
        shared = _Shared(fds, opened)
        os.set_blocking(shared.door, not nonblock)
        try:
            self = cls._reference(shared)
        except OSError:  # no descriptor for the reference: the file is closed again
            shared.finish()
            raise
        os.set_inheritable(self._fd, not cloexec)
        return self

    @classmethod
    def _passed(cls, fds: list[int], opened: m.Opened, fd: int) -> Self:
        """The first reference of this process to a file whose descriptor it was passed; `fd` is ours from now on."""
        try:
            door = os.dup(fd)
        except OSError:
            close_fds(fds)
            raise
        return cls._reference(_Shared([*fds, door], opened), fd)

    @classmethod
    def _known(cls, fd: int) -> Self | None:
        """A reference to a file that this process uses already; None if it does not."""
        cookie = socket_cookie(fd)
        with _life:
            shared = next((one for one in _all_shared if one.cookie == cookie and one.references > 0), None)
            return cls._reference(shared, fd) if shared is not None else None

    @classmethod
    def _reference(cls, shared: _Shared, fd: int = -1) -> Self:
        self = cls(shared.context, *shared.mode)
        with _life:
            if not shared.is_open():
                raise OSError(errno.EBADF, os.strerror(errno.EBADF))
            self._fd = os.dup(shared.door) if fd < 0 else fd
            self._shared = shared
            shared.references += 1
        return self

    # ---- the eight ioctls

    def ioctl(self, request: int, argument: Buffer | None = None) -> int:
        """Mirror `ioctl`: the real request numbers, a buffer (None is the bad pointer). Gives the driver's value."""
        self._check_open()
        request &= 0xFFFFFFFF
        if request in _OF_THE_VFS:
            fcntl.ioctl(self._fd, request, bytes(argument or b"\0\0\0\0"))
            return 0
        data = None if argument is None else bytes(argument)[:_ARGUMENT_BYTES_MAX]
        if request == IOCTL_NOTIFY and data is not None and len(data) >= 4:
            self.notify(struct.unpack("=I", data[:4])[0])
            return 0
        return self._shared.call(m.Ioctl(request=request, argument=data))

    def bind_virq(self, virq: int) -> int:
        """Mirror IOCTL_EVTCHN_BIND_VIRQ; give the port."""
        return self.ioctl(IOCTL_BIND_VIRQ, _u32(virq))

    def bind_interdomain(self, remote_domain: int, remote_port: int) -> int:
        """Mirror IOCTL_EVTCHN_BIND_INTERDOMAIN; give the local port, which is born pending."""
        return self.ioctl(IOCTL_BIND_INTERDOMAIN, _u32(remote_domain, remote_port))

    def bind_unbound_port(self, remote_domain: int) -> int:
        """Mirror IOCTL_EVTCHN_BIND_UNBOUND_PORT; give the port."""
        return self.ioctl(IOCTL_BIND_UNBOUND_PORT, _u32(remote_domain))

    def bind_static(self, port: int) -> None:
        """Mirror IOCTL_EVTCHN_BIND_STATIC."""
        self.ioctl(IOCTL_BIND_STATIC, _u32(port))

    def unbind(self, port: int) -> None:
        """Mirror IOCTL_EVTCHN_UNBIND: nothing of the port is queued after it."""
        self.ioctl(IOCTL_UNBIND, _u32(port))

    def reset(self) -> None:
        """Mirror IOCTL_EVTCHN_RESET: the ring is empty, the overflow gone; ports stay masked until written back."""
        self.ioctl(IOCTL_RESET)

    def restrict_domid(self, domid: int) -> None:
        """Mirror IOCTL_EVTCHN_RESTRICT_DOMID: one way."""
        self.ioctl(IOCTL_RESTRICT_DOMID, struct.pack("=H", domid & 0xFFFF))

    # ---- many ports: the driver has no call for them; ours saves the messages

    def bind_unbound_ports(self, remote_domain: int, count: int) -> list[int]:
        """Call `bind_unbound_port` `count` times, at the cost of a few; give the ports, in order.

        The first failure ends it: fewer ports than asked for are given, and only if there is none its error is raised.
        """
        return self._binds(IOCTL_BIND_UNBOUND_PORT, [_u32(remote_domain)] * count)

    def bind_interdomain_ports(self, remote_domain: int, remote_ports: Iterable[int]) -> list[int]:
        """Call `bind_interdomain` for each of the remote ports, at the cost of a few; give the local ports, in order.

        The first failure ends it: fewer ports than asked for are given, and only if there is none its error is raised.
        """
        return self._binds(IOCTL_BIND_INTERDOMAIN, [_u32(remote_domain, port) for port in remote_ports])

    def _binds(self, request: int, arguments: list[bytes]) -> list[int]:
        self._check_open()
        ports: list[int] = []
        for at in range(0, len(arguments), BINDS_A_MESSAGE):
            try:
                reply = self._shared.ask(m.Binds(request=request, arguments=arguments[at : at + BINDS_A_MESSAGE]))
            except OSError:
                if not ports:
                    raise
                break
            if not isinstance(reply, m.Values):
                raise OSError(errno.EPROTO, f"unexpected {type(reply).__name__}")
            ports += reply.values
            if reply.errno:
                if not ports:
                    raise OSError(reply.errno, reply.text or os.strerror(reply.errno))
                break
        return ports
    # ---- the file

    def fileno(self) -> int:
        """Give a descriptor that is readable while a read would not block: for select, poll, epoll, asyncio, O_ASYNC."""
        self._check_open()
        return self._fd

    def dup(self) -> EvtchnFile:
        """Mirror `dup`: a second reference to the same open file."""
        self._check_open()
        return self._reference(self._shared)

    def close(self) -> None:
        """Drop this reference. With the last one the file is released, and its ports are free when this returns.

        A reader that is blocked in another thread keeps the file open until its read returns.
        """
        with _life:
            if not self._mark_closed():
                return
            os.close(self._fd)
            self._shared.references -= 1
        self._shared.finish()

    def _check_open(self) -> None:
        if self.closed:
            raise OSError(errno.EBADF, os.strerror(errno.EBADF))

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def __del__(self) -> None:
        if hasattr(self, "_shared"):
            with contextlib.suppress(Exception):
                self.close()


def _u32(*values: int) -> bytes:
    return struct.pack(f"={len(values)}I", *(value & 0xFFFFFFFF for value in values))
