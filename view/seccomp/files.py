# SPDX-License-Identifier: Apache-2.0
"""An open event-channel file whose user holds an injected socket.

The user reads ports from its end and writes ports into it without us; we carry both to and from the machine's file. What has
come is put into the socket at once, at most what one read of the device gives, until that is read. Where somebody listens for
edges (SIGIO, edge-triggered epoll), the socket is filled only when it is empty: it becomes readable as often as the device's
ring does.

Everything here is called by the front end's loop, and nothing waits.
"""

from __future__ import annotations

import contextlib
import errno
import fcntl
import os
import socket
import struct
from collections.abc import Generator

from pvbus.actors.client.frontend import FrontendFile
from pvbus.view.seccomp import abi, bpf

_SIOCOUTQ = 0x5411
_SEND_BUFFER_BYTES = 8 << 20  # of the user's end: ten thousand writes of one port before a write has to wait for us
_BATCH_BYTES_MAX = bpf.TRANSFER_BYTES_MAX
_SEGMENTS_MAX = 1024  # IOV_MAX
BACKLOG_BYTES_MAX = 4 * 131_072  # as many entries as the largest ring has; a user that lets more lie is hung up on

Result = int | None
"""What a transfer answers; None: let the kernel carry it out on the socket, where it waits."""


def inode_of(fd: int) -> int:
    """Give the number by which /proc/PID/fd names a socket."""
    return os.fstat(fd).st_ino


def whole(count: int) -> int:
    """Round a length down to whole ports, and to a page (A4.1, A4.2, A5.2)."""
    return min(count, bpf.TRANSFER_BYTES_MAX) & ~(bpf.PORT_BYTES - 1)


class SocketFile:
    """The machine's file, our end of the socket pair, and what has been read from the one and not yet put into the other."""

    def __init__(self, file: FrontendFile, mode: int, *, nonblock: bool) -> None:
        self.file = file
        self.readable = mode in (os.O_RDONLY, os.O_RDWR)
        self.writable = mode in (os.O_WRONLY, os.O_RDWR)
        self.backlog = bytearray()
        self.paused = False  # while a RESET is under way
        self.hung_up = False  # the machine's file has gone; the user's end lives on
        self.one_by_one = False  # somebody waits for a length that is no whole number of ports
        self.edges = False  # somebody listens for edges
        self._filled = 0  # bytes put into the socket since it was empty
        self.ours, self.theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_STREAM)
        self.ours.setblocking(False)
        self.theirs.setblocking(not nonblock)
        for option in (socket.SO_SNDBUF, getattr(socket, "SO_SNDBUFFORCE", 32)):
            with contextlib.suppress(PermissionError):  # without the privilege it is what the host allows
                self.theirs.setsockopt(socket.SOL_SOCKET, option, _SEND_BUFFER_BYTES)
        self.inode = inode_of(self.theirs.fileno())

    def handed_over(self) -> None:
        """Let go of the user's end: from now on its last close is a hang-up here."""
        self.theirs.close()

    # ---- what comes from the user

    def take_writes(self) -> bool:
        """Write back what the user has written into its socket; False when its last descriptor has been closed."""
        while True:
            try:
                data = self.ours.recv(1 << 16)
            except BlockingIOError:
                return True
            except ConnectionResetError:  # closed with ports unread
                return False
            if not data:
                return False
            if self.writable:
                self._write(data)

    def _write(self, data: bytes) -> None:
        """Hand ports to the machine, a page at a time. A file that has died takes nothing, and its user hears of it."""
        try:
            for at in range(0, len(data), _BATCH_BYTES_MAX):
                self.file.write(data[at : at + _BATCH_BYTES_MAX])
        except OSError:
            self.hang_up()

    # ---- what goes to the user

    def pump(self) -> None:
        """Take from the machine's ring what lies there, and fill the user's socket if it is empty."""
        while not self.paused and not self.hung_up and self.file.ready():
            try:
                self.backlog += self.file.read(_BATCH_BYTES_MAX)
            except BlockingIOError:
                continue
            except OSError:  # EIO, it has died; EFBIG, a ring that we did not empty in time
                self.hang_up()
            if len(self.backlog) > BACKLOG_BYTES_MAX:
                self.hang_up()
        self.fill()

    def fill(self) -> None:
        """Put what has come into the user's socket, as far as one read of the device would give it."""
        if not self.backlog or self.paused or self.hung_up:
            return
        if not self.unread():
            self._filled = 0
        elif self.edges or self.one_by_one:
            return
        size = bpf.PORT_BYTES if self.one_by_one else _BATCH_BYTES_MAX - self._filled
        if size <= 0:
            return
        with contextlib.suppress(BlockingIOError, BrokenPipeError):  # an empty socket has room; a closed one wants nothing
            sent = self.ours.send(self.backlog[:size])
            del self.backlog[:sent]
            self._filled += sent

    def unread(self) -> bool:
        """Whether something lies in the user's socket."""
        return any(fcntl.ioctl(self.ours.fileno(), _SIOCOUTQ, b"\0\0\0\0"))

    def hang_up(self) -> None:
        """Show the user the end: reads give what lies there and then nothing, ioctls EIO. Its writes go nowhere."""
        self.hung_up = True
        with contextlib.suppress(OSError):
            self.ours.shutdown(socket.SHUT_WR)

    # ---- the calls that are handed to us

    def was_reset(self, tid: int, fd: int) -> None:
        """After a RESET: nothing that was unread is left, here or in the user's socket."""
        self.backlog.clear()
        with self._user_end(tid, fd) as theirs:
            while self.unread() and self._receive(theirs, _BATCH_BYTES_MAX):
                pass
        self.paused = False

    def read(self, tid: int, fd: int, segments: list[tuple[int, int]]) -> Result:
        """Mirror evtchn_read into segments of the user's memory, one call a segment, up to the first short one (A12.3)."""
        if not self.readable:
            raise OSError(errno.EBADF, os.strerror(errno.EBADF))
        done = 0
        with self._user_end(tid, fd) as theirs:
            for address, count in segments:
                size = whole(count)
                if size == 0:
                    break
                self.pump()
                data = self._receive(theirs, size)
                if data is None and not done:
                    return self._wait(theirs)
                if data and not abi.write_memory(tid, address, data):
                    self._put_back(data)
                    if done:
                        break
                    raise OSError(errno.EFAULT, os.strerror(errno.EFAULT))
                done += len(data or b"")
                if len(data or b"") != count:
                    break
        self.fill()
        return done

    def _wait(self, theirs: socket.socket) -> Result:
        """Nothing there: EAGAIN, or the kernel waits on the socket. From now on a batch is one port, so none is cut in two."""
        if self.hung_up:
            return 0
        if not os.get_blocking(theirs.fileno()):
            raise BlockingIOError(errno.EAGAIN, os.strerror(errno.EAGAIN))
        self.one_by_one = True
        return None

    def _put_back(self, data: bytes) -> None:
        self.backlog[:0] = data

    def write(self, tid: int, segments: list[tuple[int, int]]) -> Result:
        """Mirror evtchn_write from segments of the user's memory."""
        if not self.writable:
            raise OSError(errno.EBADF, os.strerror(errno.EBADF))
        done = 0
        for address, count in segments:
            size = whole(count)
            data = abi.read_memory(tid, address, size) if size else b""
            if data is None:
                if done:
                    break
                raise OSError(errno.EFAULT, os.strerror(errno.EFAULT))
            if data:
                self._write(data)
            done += size
            if size != count:
                break
        return done

    @contextlib.contextmanager
    def _user_end(self, tid: int, fd: int) -> Generator[socket.socket, None, None]:
        """The user's own end, for as long as a call of its thread keeps it open anyway."""
        with socket.socket(fileno=abi.descriptor_of(tid, fd)) as theirs:
            yield theirs

    @staticmethod
    def _receive(theirs: socket.socket, size: int) -> bytes | None:
        """Take what lies in the user's socket; None when there is nothing."""
        try:
            return theirs.recv(size, socket.MSG_DONTWAIT)
        except BlockingIOError:
            return None



def segments_of(tid: int, address: int, count: int) -> list[tuple[int, int]]:
    """Copy the vector of a readv or writev. OSError EINVAL, EFAULT."""
    if count > _SEGMENTS_MAX:
        raise OSError(errno.EINVAL, f"{count} segments")
    raw = abi.read_memory(tid, address, 16 * count) if count else b""
    if raw is None:
        raise OSError(errno.EFAULT, os.strerror(errno.EFAULT))
    return [(int(at), int(size)) for at, size in struct.iter_unpack("=QQ", raw)]
