# SPDX-License-Identifier: Apache-2.0
"""A mounted FUSE file system: takes requests from the kernel, hands them to nodes and handles, writes their answers.

One loop, one request at a time. `serve` handles what is there and returns, so that the loop that owns the descriptor stays the
caller's (an epoll set with other things in it, or `run`). A handler that cannot answer at once keeps its `Request`. What is not
understood is ENOSYS. Who dies with this descriptor leaves an error to each of its callers: the kernel aborts the connection.
"""

from __future__ import annotations

import errno
import os
import select
import stat
import time
from typing import TYPE_CHECKING

from pvbus.view.fuse import abi
from pvbus.view.fuse.follow import Follower
from pvbus.view.fuse.node import Handle, Node, error
from pvbus.view.fuse.request import Request
from pvbus.view.fuse.xattr import Like, Xattrs, chmod

if TYPE_CHECKING:
    from collections.abc import Callable

    from pvbus.view.fuse.disguise import Disguise

_HEAD, _HEAD_BYTES, _DATA = abi.IN_HEADER.unpack_from, abi.IN_HEADER_BYTES, abi.WRITE_IN.size
WRITE_BYTES_MAX = 65536  # more than any device of ours takes at once, so that the kernel does not cut a write in pieces
SERVED_ON_MAX = 8  # requests without a look at whom else there is
LATE = 4  # requests for which we give way at once, since the last was not there within its forerunner's answer
PAUSE = 16  # requests without a try to serve on: one that finds nothing costs a tenth of a request
GIVEN_WAY_S_MAX = 0.0005  # a caller that goes on and asks again takes a few microseconds: others take our turn,
PAUSE_CROWDED = 500  # and would each time
_REFUSED = {
    abi.CREATE: errno.EACCES,
    **dict.fromkeys(
        (abi.SYMLINK, abi.MKNOD, abi.MKDIR, abi.UNLINK, abi.RMDIR, abi.RENAME, abi.LINK, abi.RENAME2), errno.EPERM
    ),
}
"""What nobody may do in a tree of devices, and the answer of sysfs to it."""
_GONE = (errno.ENODEV, errno.ECONNABORTED)  # unmounted; aborted


class Session:
    """A tree that is mounted through `fd`, an open /dev/fuse, which the session owns; `like` says whose attributes it has."""

    def __init__(
        self, fd: int, root: Node, *, pages_max: int = 0, like: Like = Like.DEVTMPFS, disguise: Disguise | None = None
    ) -> None:
        self.fd = fd
        self.root = root
        self.disguise = disguise
        self.pages_max = pages_max  # of a buffer in one READ or WRITE; 0 leaves it to the kernel
        self._init_flags = abi.INIT_ATOMIC_O_TRUNC | abi.INIT_BIG_WRITES | abi.INIT_PARALLEL_DIROPS
        self._init_flags |= (abi.INIT_MAX_PAGES if pages_max else 0) | (abi.INIT_POSIX_ACL if like is Like.DEVTMPFS else 0)
        self.minor = 0  # what INIT has agreed on; 0 before it
        self.closed = False
        self.kept = 0
        """How many requests were not answered at once, or interrupted: something else is under way then, to be watched for."""
        self._pause = self._late = 0
        os.set_blocking(fd, False)
        self._caller = self._left = 0
        self._follower = Follower()
        self._buffer = bytearray(WRITE_BYTES_MAX + abi.BLOCK_BYTES)
        self._buffers = [self._buffer]
        self._view = memoryview(self._buffer)[_HEAD_BYTES:]
        self._nodes: dict[int, Node] = {1: root}
        self._ids: dict[Node, int] = {root: 1}
        self._lookups: dict[int, int] = {1: 1}
        self._next_id = 2
        self._handles: dict[int, Handle] = {}
        self._listings: dict[int, list[tuple[str, Node]]] = {}
        self._next_handle = 1
        self._born_s = int(time.time())
        self._waiting: dict[int, tuple[Request, Handle | None]] = {}
        self._operations: dict[int, Callable[[Request, memoryview], None]] = {
            abi.LOOKUP: self._lookup, abi.FORGET: self._forget, abi.BATCH_FORGET: self._batch_forget,
            abi.GETATTR: self._getattr, abi.SETATTR: self._setattr, abi.READLINK: self._readlink,
            abi.OPEN: self._open, abi.READ: self._read, abi.WRITE: self._write, abi.RELEASE: self._release,
            abi.FSYNC: self._fsync, abi.IOCTL: self._ioctl, abi.POLL: self._poll, abi.INTERRUPT: self._interrupt,
            abi.OPENDIR: self._opendir, abi.READDIR: self._readdir, abi.RELEASEDIR: self._releasedir,
            abi.STATFS: self._statfs, abi.INIT: self._init, abi.DESTROY: self._destroy,
            **Xattrs(self._node, like).operations,
        }  # fmt: skip

    # ---- the loop

    def fileno(self) -> int:
        """Give the descriptor to wait on."""
        return self.fd

    def run(self) -> None:
        """Serve until the file system is unmounted."""
        poller = select.poll()
        poller.register(self.fd, select.POLLIN)
        while not self.closed:
            poller.poll()
            self.serve()

    def serve(self, _events: int = 0) -> bool:
        """Handle one request, and give whether one was there; `closed` is True after it once the file system is unmounted.

        A handler gets the buffer from behind the header: as much as its opcode has, and rubbish behind that.
        """
        try:
            os.readv(self.fd, self._buffers)
        except BlockingIOError:
            return False
        except OSError as failed:
            if failed.errno in (errno.ENOENT, errno.EINTR):  # the one that we were to get was interrupted
                return True
            if failed.errno not in _GONE:
                raise
            self.closed = True
            return True
        _, opcode, unique, nodeid, _, _, pid, _, _ = _HEAD(self._buffer)
        operation = self._operations.get(opcode)
        if operation is None:
            self.answer(unique, _REFUSED.get(opcode, errno.ENOSYS))
            return True
        if pid != self._caller:
            self._caller, self._left = pid, self._follower.starts()
        self._left -= 1
        if not self._left:
            self._left = self._follower.counted(pid)
        try:
            operation(Request(self, unique, nodeid, pid), self._view)
        except OSError as failed:
            self.answer(unique, failed.errno or errno.EIO)
        return True

    def slept(self) -> None:
        """Say that nobody has asked for a while."""
        self._left = self._follower.slept()

    def serve_on(self) -> None:
        """Handle a request that is there, and those that its caller makes as soon as it goes on: no look at others between them.

        A caller on our own processor goes on within our answer, or when we give way to it; which of both lasts for a while. Where
        neither has paid, it is not tried for a while.
        """
        kept = self.kept
        if not self.serve():
            return
        for _ in range(SERVED_ON_MAX - 1):
            if self._pause:
                self._pause -= 1
                return
            if self.kept != kept or self.closed:
                return
            if not self._late:
                if self.serve():
                    continue
                self._late = LATE
            self._late -= 1
            begin_s = time.monotonic()
            os.sched_yield()
            if time.monotonic() - begin_s > GIVEN_WAY_S_MAX:
                self._pause = PAUSE_CROWDED
                return
            if not self.serve():
                self._pause = PAUSE
                return

    # ---- answers

    def answer(self, unique: int, number: int, payload: bytes = b"") -> None:
        """Write an answer: an errno, or a payload."""
        self.put(unique, abi.OUT_HEADER.pack(abi.OUT_HEADER_BYTES + len(payload), -number, unique) + payload)

    def wake_pollers(self, kh: int) -> None:
        """Have those ask again who wait in poll, select or epoll for the handle that came with `kh`."""
        head = abi.OUT_HEADER.pack(abi.OUT_HEADER_BYTES + abi.POLL_WAKEUP.size, abi.NOTIFY_POLL, 0)
        self.put(0, head + abi.POLL_WAKEUP.pack(kh))

    def put(self, unique: int, message: bytes) -> None:
        """Write an answer with its header. (For `Request`.)"""
        if self.closed:
            return
        if self._waiting:
            self._waiting.pop(unique, None)
        try:
            os.write(self.fd, message)
        except OSError as failed:
            if failed.errno == errno.ENOENT:  # its caller was killed meanwhile
                return
            if failed.errno not in _GONE:
                raise
            self.closed = True

    def _keep(self, request: Request, handle: Handle | None) -> None:
        """Remember a request that is answered later: an INTERRUPT may come for it."""
        self.kept += 1
        self._waiting[request.unique] = request, handle

    # ---- INIT

    def _init(self, request: Request, body: memoryview) -> None:
        major, minor, readahead, flags = abi.INIT_IN.unpack_from(body)
        if major != abi.VERSION_MAJOR or minor < abi.VERSION_MINOR_MIN:
            raise OSError(errno.EPROTO, f"the kernel speaks FUSE {major}.{minor}")
        self.minor = min(minor, abi.VERSION_MINOR)
        request.reply(
            abi.INIT_OUT.pack(
                abi.VERSION_MAJOR, self.minor, readahead, flags & self._init_flags,
                0, 0, WRITE_BYTES_MAX, 1, self.pages_max, 0, 0,
            )
        )  # fmt: skip

    def _destroy(self, request: Request, _body: memoryview) -> None:
        request.reply()

    # ---- nodes

    def _id_of(self, node: Node) -> int:
        nodeid = self._ids.get(node)
        if nodeid is None:
            nodeid = self._ids[node] = self._next_id
            self._next_id += 1
            self._nodes[nodeid] = node
        return nodeid

    def _node(self, nodeid: int) -> Node:
        node = self._nodes.get(nodeid)
        if node is None:
            raise error(errno.ESTALE)
        return node

    def _lookup(self, request: Request, body: memoryview) -> None:
        name = os.fsdecode(abi.text_at(body, 0))
        node = self._node(request.nodeid).lookup(name)
        nodeid = self._id_of(node)
        self._lookups[nodeid] = self._lookups.get(nodeid, 0) + 1
        head = abi.ENTRY_OUT_HEAD.pack(nodeid, 0, 0, 0, 0, 0)  # nothing is cached: what it is may change
        request.reply(head + self._packed(node, nodeid))

    def _forget(self, request: Request, body: memoryview) -> None:
        self._forget_one(request.nodeid, abi.FORGET_IN.unpack_from(body)[0])

    def _batch_forget(self, _request: Request, body: memoryview) -> None:
        (count, _) = abi.BATCH_FORGET_IN.unpack_from(body)
        for at in range(count):
            nodeid, lookups = abi.FORGET_ONE.unpack_from(body, abi.BATCH_FORGET_IN.size + at * abi.FORGET_ONE.size)
            self._forget_one(nodeid, lookups)

    def _forget_one(self, nodeid: int, lookups: int) -> None:
        left = self._lookups.get(nodeid, 0) - lookups
        self._lookups[nodeid] = left
        if left <= 0 and nodeid != 1:
            del self._lookups[nodeid]
            node = self._nodes.pop(nodeid, None)
            if node is not None:
                del self._ids[node]

    def _attributes(self, request: Request) -> bytes:
        node = self._node(request.nodeid)
        return abi.ATTR_OUT_HEAD.pack(0, 0, 0) + self._packed(node, request.nodeid)

    def _packed(self, node: Node, nodeid: int) -> bytes:
        """Give what stat shows; what has no time of its own is as old as we are."""
        attributes = node.attributes()
        if node.changed:
            mode = node.changed.get("mode", attributes.mode)
            attributes = attributes._replace(**{**node.changed, "mode": stat.S_IFMT(attributes.mode) | stat.S_IMODE(mode)})
        if not attributes.time_s:
            attributes = attributes._replace(time_s=self._born_s)
        return attributes.pack(node.inode or nodeid)

    def _getattr(self, request: Request, _body: memoryview) -> None:
        rdev, shown = self._node(request.nodeid).rdev, self._attributes(request)
        if rdev and self.disguise is not None and self.disguise.shows_stat(request, rdev, lambda: request.reply(shown)):
            self._keep(request, None)
        else:
            request.reply(shown)

    def _setattr(self, request: Request, body: memoryview) -> None:
        valid, _, fh, size = abi.SETATTR_IN.unpack_from(body)[:4]
        node, changed = self._node(request.nodeid), abi.changed_attributes(body)
        if valid & abi.SETATTR_SIZE:
            handle = self._handles.get(fh)
            if handle is not None:
                handle.truncate(request, size)
            else:
                node.truncate(request, size)
        if changed:
            node.changed = {**node.changed, **changed}
        if "mode" in changed:
            chmod(node, changed["mode"])
        request.reply(self._attributes(request))

    def _readlink(self, request: Request, _body: memoryview) -> None:
        request.reply(os.fsencode(self._node(request.nodeid).readlink()))

    def _statfs(self, request: Request, _body: memoryview) -> None:
        shown = abi.STATFS_OUT.pack(0, 0, 0, 0, 0, abi.BLOCK_BYTES, abi.NAME_BYTES_MAX, abi.BLOCK_BYTES, 0)
        if self.disguise is not None and self.disguise.shows_statfs(request, lambda: request.reply(shown)):
            self._keep(request, None)
        else:
            request.reply(shown)

    # ---- directories

    def _opendir(self, request: Request, _body: memoryview) -> None:
        fh = self._next_handle
        self._next_handle += 1
        self._listings[fh] = list(self._node(request.nodeid).entries())
        request.reply(abi.OPEN_OUT.pack(fh, 0, 0))

    def _readdir(self, request: Request, body: memoryview) -> None:
        fh, offset, size = abi.READ_IN.unpack_from(body)[:3]
        if offset == 0:  # rewinddir looks anew
            self._listings[fh] = list(self._node(request.nodeid).entries())
        here: list[tuple[str, int, int]] = [(".", request.nodeid, stat.S_IFDIR), ("..", request.nodeid, stat.S_IFDIR)]
        here += [
            (name, node.inode or self._ids.get(node, 0xFFFFFFFF), stat.S_IFCHR if node.rdev else node.attributes().mode)
            for name, node in self._listings[fh]
        ]
        answer = b""
        for at, (name, inode, mode) in enumerate(here[offset:], offset + 1):
            entry = abi.dirent(inode, at, mode, os.fsencode(name))
            if len(answer) + len(entry) > size:
                break
            answer += entry
        request.reply(answer)

    def _releasedir(self, request: Request, body: memoryview) -> None:
        self._listings.pop(abi.RELEASE_IN.unpack_from(body)[0], None)
        request.reply()

    # ---- open files

    def _open(self, request: Request, body: memoryview) -> None:
        flags, _ = abi.OPEN_IN.unpack_from(body)
        handle = self._node(request.nodeid).open(request, flags)
        if handle is None:
            self._keep(request, None)
        else:
            self.answer_open(request, handle)

    def answer_open(self, request: Request, handle: Handle) -> None:
        """Answer OPEN with a number for the handle. (For `Request.opened`.)"""
        fh = self._next_handle
        self._next_handle += 1
        self._handles[fh] = handle
        request.reply(abi.OPEN_OUT.pack(fh, handle.open_flags, 0))

    def _handle_of(self, fh: int) -> Handle:
        handle = self._handles.get(fh)
        if handle is None:
            raise error(errno.EBADF)
        return handle

    def _read(self, request: Request, body: memoryview) -> None:
        fh, offset, size, read_flags, _, flags, _ = abi.READ_IN.unpack_from(body)
        handle = self._handle_of(fh)
        if not read_flags & abi.READ_LOCKOWNER and handle.open_flags & abi.FOPEN_STREAM:
            raise error(errno.EINVAL)  # splice and readahead: pages of a stream would be lost to its readers
        data = handle.read(request, offset, size, flags)
        if data is None:
            self._keep(request, handle)
        elif isinstance(data, int):
            request.fail(data)
        else:
            request.reply(data)

    def _write(self, request: Request, body: memoryview) -> None:
        fh, offset, size, _, _, flags, _ = abi.WRITE_IN.unpack_from(body)
        handle = self._handle_of(fh)
        count = handle.write(request, offset, body[_DATA : _DATA + size].tobytes(), flags)
        if count is None:
            self._keep(request, handle)
        else:
            request.written(count)

    def _ioctl(self, request: Request, body: memoryview) -> None:
        fh, _, command, argument, _, _ = abi.IOCTL_IN.unpack_from(body)
        handle = self._handle_of(fh)
        value = handle.ioctl(request, command, argument)
        if value is None:
            self._keep(request, handle)
        else:
            request.result(value)

    def _poll(self, request: Request, body: memoryview) -> None:
        fh, kh, flags, events = abi.POLL_IN.unpack_from(body)
        handle = self._handle_of(fh)
        mask = handle.poll(request, kh if flags & abi.POLL_SCHEDULE_NOTIFY else 0, events)
        if mask is None:
            self._keep(request, handle)
        else:
            request.revents(mask)

    def _fsync(self, request: Request, body: memoryview) -> None:
        self._handle_of(abi.FSYNC_IN.unpack_from(body)[0]).fsync(request)
        request.reply()

    def _release(self, request: Request, body: memoryview) -> None:
        handle = self._handles.pop(abi.RELEASE_IN.unpack_from(body)[0], None)
        if handle is None or not handle.release(request):
            request.reply()
        else:
            self.kept += 1

    def _interrupt(self, _request: Request, body: memoryview) -> None:
        """Pass it on; INTERRUPT itself has no answer, and one that comes too late finds nobody."""
        request, handle = self._waiting.get(abi.INTERRUPT_IN.unpack_from(body)[0], (None, None))
        if request is not None and handle is not None:
            self.kept += 1
            handle.interrupt(request)

    def close(self) -> None:
        """Give the descriptor up: the kernel ends every call with ECONNABORTED, and new ones with ENOTCONN."""
        self.closed = True
        self._view.release()
        self._follower.leave()
        os.close(self.fd)
