# SPDX-License-Identifier: Apache-2.0
"""What a tree is made of: nodes that are looked up, and what opening one gives.

A session (session.py) calls these methods from its loop, one at a time; none may wait. A method answers by what it returns or
by the OSError that it raises; one that gives None where a value is due keeps the request, and answers it later. Ready-made
directories, links and texts are here; devices are their own modules' business.
"""

from __future__ import annotations

import errno
import os
import stat
from types import MappingProxyType
from typing import TYPE_CHECKING

from pvbus.view.fuse.abi import FOPEN_DIRECT_IO, Attributes
from pvbus.view.fuse.debugger import CAN_MEND

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Mapping

    from pvbus.view.fuse.request import Request

SEEN_BYTES = 4096  # of a device, for the kernel alone
TEXT_BYTES_MAX = 4096  # a page: what sysfs reads and writes at once


def error(number: int) -> OSError:
    """Make the OSError of an errno."""
    return OSError(number, os.strerror(number))


class Handle:
    """An open file. Raise OSError for what it cannot do; EINVAL as a driver without the call answers."""

    open_flags = FOPEN_DIRECT_IO
    """FOPEN_*: what OPEN answers."""

    def read(self, request: Request, offset: int, size: int, flags: int) -> bytes | int | None:
        """Give at most `size` bytes, or an errno; `flags` are those of the open file now (O_NONBLOCK). Later: `request.reply`."""
        raise error(errno.EINVAL)

    def write(self, request: Request, offset: int, data: bytes, flags: int) -> int | None:
        """Take bytes, give how many. Later: `request.written(n)`."""
        raise error(errno.EINVAL)

    def ioctl(self, request: Request, command: int, argument: int) -> int | None:
        """Give the value of an ioctl; `argument` is what the caller passed, a pointer perhaps. Later: `request.result(value)`."""
        raise error(errno.ENOTTY)

    def poll(self, request: Request, kh: int, events: int) -> int | None:
        """Give what is ready; with a `kh`, `session.wake_pollers(kh)` is due whenever that changes. Later: `request.revents`."""
        return events & 0x145  # as a file without a poll method: IN, OUT, RDNORM, WRNORM

    def truncate(self, request: Request, size: int) -> None:
        """Change the size, as ftruncate does."""
        raise error(errno.EINVAL)

    def fsync(self, request: Request) -> None:
        """Do what fsync does."""
        raise error(errno.EINVAL)

    def interrupt(self, request: Request) -> None:
        """A signal has come for who waits for this request: answer it soon, EINTR as a rule."""

    def release(self, request: Request) -> bool:
        """The last reference is closed. True if `request.reply()` follows; nobody waits for it."""
        return False


class Node:
    """A name's thing. `inode` is what stat shows, and the session's own number where it is 0."""

    inode = 0
    rdev = 0
    """The number of the device that stat shows it to be; 0 for what is none."""
    changed: Mapping[str, int] = MappingProxyType({})
    """Fields of the attributes that chmod, chown or utimes has changed since."""

    xattrs: Mapping[bytes, bytes] = MappingProxyType({})
    """Extended attributes by their names (xattr.py)."""

    def attributes(self) -> Attributes:
        """Give what stat shows, afresh each time."""
        raise NotImplementedError

    def lookup(self, name: str) -> Node:
        """Give the entry of a name; the same node while it is the same thing. ENOENT."""
        raise error(errno.ENOTDIR)

    def entries(self) -> Iterable[tuple[str, Node]]:
        """Give all entries of a directory."""
        raise error(errno.ENOTDIR)

    def readlink(self) -> str:
        """Give where a link points."""
        raise error(errno.EINVAL)

    def open(self, request: Request, flags: int) -> Handle | None:
        """Open it with the caller's `flags`. Later: `request.opened(handle)`."""
        raise error(errno.ENXIO)

    def truncate(self, request: Request, size: int) -> None:
        """Change the size, as truncate and O_TRUNC do: nothing changes where the size is not a file's own."""


class DeviceNode(Node):
    """A node of root's own, as of a device; FUSE shows a regular file."""

    def attributes(self) -> Attributes:
        """Give what FUSE can show of a device. It has a size, which is not shown (disguise.py): an io_uring reads no regular file
        behind its end.
        """
        return Attributes(stat.S_IFREG | 0o600, size=SEEN_BYTES if self.rdev and CAN_MEND else 0, rdev=self.rdev)

    def truncate(self, request: Request, size: int) -> None:
        """Refuse: it has no size."""
        raise error(errno.EINVAL)


class Directory(Node):
    """A directory of what is put in; subclasses make theirs up in `lookup` and `entries`."""

    def __init__(self, entries: Mapping[str, Node] | None = None, *, mode: int = 0o755) -> None:
        self.children: dict[str, Node] = dict(entries or {})
        self.mode = mode

    def attributes(self) -> Attributes:
        """Give a directory's."""
        return Attributes(stat.S_IFDIR | self.mode, nlink=2)

    def lookup(self, name: str) -> Node:
        """Give the child of that name."""
        try:
            return self.children[name]
        except KeyError:
            raise error(errno.ENOENT) from None

    def entries(self) -> Iterable[tuple[str, Node]]:
        """Give all children."""
        return list(self.children.items())


class Symlink(Node):
    """A link."""

    def __init__(self, target: str) -> None:
        self.target = target

    def attributes(self) -> Attributes:
        """Give a link's."""
        return Attributes(stat.S_IFLNK | 0o777, size=len(os.fsencode(self.target)))

    def readlink(self) -> str:
        """Give where it points."""
        return self.target


class Text(Node):
    """A small file whose content is made when it is read from its beginning, or from where no read has ended, as sysfs does.

    What is written goes to `store`.
    """

    def __init__(
        self, show: Callable[[], str | bytes] | None, store: Callable[[bytes], None] | None = None, *, mode: int | None = None
    ) -> None:
        self.show = show
        self.store = store
        self.mode = mode if mode is not None else (0o444 if show else 0) | (0o200 if store else 0)

    def attributes(self) -> Attributes:
        """Give a text's: a page, whatever lies in it, as in sysfs."""
        return Attributes(stat.S_IFREG | self.mode, size=TEXT_BYTES_MAX)

    def open(self, request: Request, flags: int) -> Handle:
        """Open it; EACCES for what it cannot do, as sysfs answers, and EINVAL for O_DIRECT."""
        access = flags & os.O_ACCMODE
        if flags & os.O_DIRECT:
            raise error(errno.EINVAL)
        if (access != os.O_WRONLY and self.show is None) or (access != os.O_RDONLY and self.store is None):
            raise error(errno.EACCES)
        return _TextHandle(self)


class _TextHandle(Handle):
    def __init__(self, text: Text) -> None:
        self.text = text
        self.content = b""
        self.next = 0  # where who reads on goes on; who looks elsewhere looks anew

    def read(self, request: Request, offset: int, size: int, flags: int) -> bytes:
        if (offset == 0 or offset != self.next) and self.text.show is not None:
            made = self.text.show()
            self.content = made.encode() if isinstance(made, str) else made
        data = self.content[offset : offset + size]
        self.next = offset + len(data)
        return data

    def write(self, request: Request, offset: int, data: bytes, flags: int) -> int:
        if self.text.store is not None:
            self.text.store(data)
        return len(data)

    def truncate(self, request: Request, size: int) -> None:
        pass
