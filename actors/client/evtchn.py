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
from typing import TYPE_CHECKING, Any, Self

from pvbus.actors.runtime import messages as m
from pvbus.actors.runtime.process import ATTACH_REQUEST, PeerGone, ask_blocking, await_blocking
from pvbus.actors.runtime.wire import Done, Message, close_fds, encode, send_frame
from pvbus.shm.layout import MAGIC_FILE, MAGIC_PUBLIC, MAGIC_SUBMISSION, FilePage, PublicPage, SubmissionRing
from pvbus.shm.memory import Context, Memory, UserFile
from pvbus.shm.segment import check

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable

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


def _after_fork_in_child() -> None:
    for shared in _all_shared:
        shared._reset_locks()  # noqa: SLF001 - of this module


os.register_at_fork(after_in_child=_after_fork_in_child)


class _Shared:
    """What the references of this process share: mappings, doorbell, connection."""

    def __init__(self, fds: list[int], ports_max: int) -> None:
        page_fd, self.door, public_fd, connection = fds
        self.connection = socket.socket(fileno=connection)
        self.lock = threading.Lock()
        _all_shared.add(self)
        self.references = 0
        self.calls = 0  # under way: like a blocked read, they keep the file open
        self.kick = -1
        try:
            self.page = Memory(page_fd, FilePage.BYTES)
            self.public = Memory(public_fd, PublicPage.BYTES, False)
            os.close(page_fd)  # before the ring's two come: who is short of descriptors needs no more than these four
            os.close(public_fd)
            fds = [self.door]
            first = m.Attach(pid=os.getpid())
            self.ring, self.kick = self._ring_of(*await_blocking(self.connection, first, ATTACH_REQUEST, CALL_TIMEOUT_S))
        except BaseException:
            self.connection.close()
            close_fds(fds[:3])
            raise
        self.context = Context(self.page, self.ring, self.public, self.door, self.kick, 0, ports_max)
        self.context.set_hooks(self.finish, self.rejoin)

    def _ring_of(self, reply: Message, fds: list[int]) -> tuple[Memory, int]:
        if not isinstance(reply, m.Attached) or len(fds) != 2:
            raise OSError(errno.EPROTO, f"unexpected {type(reply).__name__}")
        ring = Memory(fds[0], SubmissionRing.BYTES)
        os.close(fds[0])
        check(ring, MAGIC_SUBMISSION, "the submission ring")
        check(self.page, MAGIC_FILE, "the file's page")  # its process has written it before it answered
        check(self.public, MAGIC_PUBLIC, "the public page")
        return ring, fds[1]

    def _reset_locks(self) -> None:
        """In a forked child: who held them in the parent is not here."""
        self.lock = threading.Lock()
        self.calls = 0

    def _adopted(self) -> socket.socket:
        """In a forked child: the connection is the parent's; hand the file's process the end of one of our own."""
        ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        with theirs:
            send_frame(self.connection, encode(m.Adopt()), (theirs.fileno(),))
        return ours

    def _has_hung_up(self) -> bool:
        poller = select.poll()
        poller.register(self.connection.fileno(), 0)
        return bool(poller.poll(0))

    def rejoin(self) -> None:
        """Give a forked child its own connection and submission ring; its threads may come here together."""
        with self.lock:
            if not self.context.stale:
                return
            ours = None
            try:
                ours = self._adopted()
                ring, kick = self._ring_of(*ask_blocking(ours, m.Attach(pid=os.getpid()), timeout_s=CALL_TIMEOUT_S))
            except OSError as error:
                if ours is not None:
                    ours.close()
                if not isinstance(error, ConnectionError):
                    raise
                if not self._has_hung_up():  # it lives, and had no room for our connection
                    raise OSError(errno.EMFILE, "the file's process has no descriptor left (ulimit -n)") from None
                raise OSError(errno.EIO, "the file's process has died") from None
            self.connection.close()
            self.connection, self.ring = ours, ring
            os.close(self.kick)
            self.kick = kick
            self.context.rebind(self.ring, kick, 0)

    def call(self, message: Message) -> int:
        """Call the file's process for a number."""
        reply = self.ask(message)
        if not isinstance(reply, Done):
            raise OSError(errno.EPROTO, f"unexpected {type(reply).__name__}")
        return reply.value

    def ask(self, message: Message) -> Message:
        """Call the file's process. OSError with the driver's errno; EIO when it has died."""
        self.calls += 1
        try:
            if self.context.stale:
                self.rejoin()
            with self.lock:
                reply, _ = ask_blocking(self.connection, message, timeout_s=CALL_TIMEOUT_S)
            if isinstance(message, m.Ioctl) and message.request == IOCTL_RESET:
                self.context.drain_door()
        except PeerGone:
            raise OSError(errno.EIO, "the file's process has died") from None
        finally:
            self.calls -= 1
            self.finish()
        return reply

    def finish(self) -> None:
        """Close, once no reference is left and no call is blocked: a blocked reader keeps the ports alive."""
        if self.references > 0 or self.calls > 0 or self.door < 0:
            return
        if self.context.inflight > 0:
            self.context.await_idle()
            return
        door, self.door = self.door, -1
        own = not self.context.stale
        if not own:
            with contextlib.suppress(OSError):  # else the parent's connection stays the parent's, and nobody waits for us
                ours = self._adopted()
                self.connection.close()
                self.connection = ours
                own = True
        os.close(door)
        if own:  # synchronous: after the last close the ports are free, as on the device
            with contextlib.suppress(OSError):
                ask_blocking(self.connection, m.Detach(), timeout_s=CALL_TIMEOUT_S)
        self.connection.close()
        os.close(self.kick)


class EvtchnFile(UserFile):
    """One reference to an open /dev/xen/evtchn. Made by `Machine.open_evtchn` and `dup`.

    `read`, `readinto`, `read_ports`, `write`, `enable`, `notify`, `notify_many` and `poll` are native. Every call raises OSError
    with the driver's errno. Usable as a context manager, and wherever a descriptor is asked for (`fileno`).
    """

    _shared: _Shared
    _fd: int
    _mode: tuple[bool, bool]

    @classmethod
    def _open(cls, fds: list[int], ports_max: int, flags: int) -> Self:
        shared = _Shared(fds, ports_max)
        os.set_blocking(shared.door, not flags & os.O_NONBLOCK)
        mode = flags & os.O_ACCMODE
        try:
            return cls._reference(shared, readable=mode in (os.O_RDONLY, os.O_RDWR), writable=mode in (os.O_WRONLY, os.O_RDWR))
        except OSError:  # no descriptor for the reference: the file is closed again
            shared.finish()
            raise

    @classmethod
    def _reference(cls, shared: _Shared, *, readable: bool, writable: bool) -> Self:
        fd = os.dup(shared.door)
        self = cls(shared.context, readable, writable)
        self._shared = shared
        self._mode = (readable, writable)
        self._fd = fd
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

    # ---- several buffers: the driver has no call for them, so the kernel makes one a segment (A12.3)

    def readv(self, buffers: Iterable[Buffer]) -> int:
        """Mirror `readv`: one read a buffer, up to the first that is not filled; give the bytes read.

        An error of a later read is dropped: what came before it counts, as of one call. So a blocking file may sleep in a
        later read, though something has been read.
        """
        return self._a_call_a_segment(self.readinto, buffers)

    def writev(self, buffers: Iterable[Buffer | None]) -> int:
        """Mirror `writev`: one write a buffer, up to the first that is not taken whole; give the bytes taken."""
        return self._a_call_a_segment(self.write, buffers)

    def _a_call_a_segment(self, call: Callable[[Any], int], segments: Iterable[Any]) -> int:
        done = 0
        for segment in segments:
            length = 0 if segment is None else memoryview(segment).nbytes
            try:
                taken = call(segment)
            except OSError:
                if done == 0:
                    raise
                break
            done += taken
            if taken != length:
                break
        return done

    # ---- the file

    def fileno(self) -> int:
        """Give a descriptor that is readable while a read would not block: for select, poll, epoll, asyncio, O_ASYNC."""
        self._check_open()
        return self._fd

    def dup(self) -> EvtchnFile:
        """Mirror `dup`: a second reference to the same open file."""
        self._check_open()
        readable, writable = self._mode
        return self._reference(self._shared, readable=readable, writable=writable)

    def close(self) -> None:
        """Drop this reference. With the last one the file is released, and its ports are free when this returns.

        A reader that is blocked in another thread keeps the file open until its read returns.
        """
        if self.closed:
            return
        self._mark_closed()
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
