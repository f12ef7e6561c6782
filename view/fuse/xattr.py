# SPDX-License-Identifier: Apache-2.0
"""Extended attributes of a tree, kept in memory, and access control lists among them: as devtmpfs and sysfs have them.

The kernel looks at who asks and, for lists, at what they say. A list that says no more than the mode does is the mode.
"""

from __future__ import annotations

import enum
import errno
import os
import stat
import struct
from typing import TYPE_CHECKING

from pvbus.view.fuse import abi
from pvbus.view.fuse.caller import has_capability
from pvbus.view.fuse.node import Node, error

if TYPE_CHECKING:
    from collections.abc import Callable

    from pvbus.view.fuse.request import Request

NODE_BYTES_MAX = 16 << 20  # of all names and values that a node keeps: ENOSPC
LIST = b"system.posix_acl_access"
LISTS = (LIST, b"system.posix_acl_default")
TRUSTED = b"trusted."
KEPT = (TRUSTED, b"security.")
CAP_SYS_ADMIN = 1 << 21  # who sees what is trusted
OF_USERS = b"user."
_CREATE, _REPLACE = os.XATTR_CREATE, os.XATTR_REPLACE
_VERSION_BYTES, _ENTRY = 4, struct.Struct("<HHI")
_OWNER, _GROUP, _MASK, _OTHER = 1, 4, 16, 32
_BARE = {_OWNER, _GROUP, _OTHER}


class Like(enum.Enum):
    """Whose attributes a tree has."""

    DEVTMPFS = enum.auto()
    SYSFS = enum.auto()


class Xattrs:
    """The calls for extended attributes of a session. `node_of` gives the node of a number, ESTALE."""

    def __init__(self, node_of: Callable[[int], Node], like: Like) -> None:
        self._node_of = node_of
        self._like = like
        self.operations: dict[int, Callable[[Request, memoryview], None]] = {
            abi.GETXATTR: self._get, abi.SETXATTR: self._set, abi.LISTXATTR: self._list, abi.REMOVEXATTR: self._remove,
        }  # fmt: skip

    def _check(self, node: Node, name: bytes, *, changes: bool) -> None:
        """Refuse a name that the file system does not know, or has not for such a node."""
        if name in LISTS:
            if self._like is Like.SYSFS:
                raise error(errno.EOPNOTSUPP)
        elif name in (*KEPT, OF_USERS) and not (name == OF_USERS and self._like is Like.DEVTMPFS):
            raise error(errno.EINVAL)
        elif name.startswith(OF_USERS):
            if self._like is Like.SYSFS:
                raise error(errno.EOPNOTSUPP if changes else errno.ENODATA)
            if not stat.S_ISDIR(node.attributes().mode):  # a device has none, and FUSE shows a regular file, which has
                raise error(errno.EPERM if changes else errno.ENODATA)
        elif not name.startswith(KEPT):
            raise error(errno.EOPNOTSUPP)

    def _get(self, request: Request, body: memoryview) -> None:
        node = self._node_of(request.nodeid)
        size, _ = abi.GETXATTR_IN.unpack_from(body)
        name = abi.text_at(body, abi.GETXATTR_IN.size)
        self._check(node, name, changes=False)
        if name not in node.xattrs:
            raise error(errno.ENODATA)
        _reply(request, size, node.xattrs[name])

    def _list(self, request: Request, body: memoryview) -> None:
        """Give the names: lists' first, as a device node does, and what is trusted to who may look at it."""
        size, _ = abi.GETXATTR_IN.unpack_from(body)
        names = sorted(self._node_of(request.nodeid).xattrs, key=lambda name: name not in LISTS)
        if any(name.startswith(TRUSTED) for name in names) and not _is_trusted(request.pid):
            names = [name for name in names if not name.startswith(TRUSTED)]
        _reply(request, size, b"".join(name + b"\0" for name in names))

    def _set(self, request: Request, body: memoryview) -> None:
        node = self._node_of(request.nodeid)
        size, flags = abi.SETXATTR_IN.unpack_from(body)
        name = abi.text_at(body, abi.SETXATTR_IN.size)
        begin = abi.SETXATTR_IN.size + len(name) + 1
        value = bytes(body[begin : begin + size])
        self._check(node, name, changes=True)
        if name not in LISTS:
            if flags & _CREATE and name in node.xattrs:
                raise error(errno.EEXIST)
            if flags & _REPLACE and name not in node.xattrs:
                raise error(errno.ENODATA)
        kept = {**node.xattrs, name: value}
        if sum(map(len, (*kept, *kept.values()))) > NODE_BYTES_MAX:
            raise error(errno.ENOSPC)
        if name == LIST:
            rights = {tag: permissions for tag, permissions, _ in _entries(value)}
            if rights.keys() <= _BARE:
                del kept[name]
            mode = rights[_OWNER] << 6 | rights.get(_MASK, rights[_GROUP]) << 3 | rights[_OTHER]
            special = node.changed.get("mode", node.attributes().mode) & ~0o777
            node.changed = {**node.changed, "mode": special | mode}
        node.xattrs = kept
        request.reply()

    def _remove(self, request: Request, body: memoryview) -> None:
        node = self._node_of(request.nodeid)
        name = abi.text_at(body, 0)
        self._check(node, name, changes=True)
        if name not in node.xattrs and name not in LISTS:
            raise error(errno.ENODATA)
        node.xattrs = {known: value for known, value in node.xattrs.items() if known != name}
        request.reply()


def chmod(node: Node, mode: int) -> None:
    """Have a node's access control list say what its new mode says."""
    listed = node.xattrs.get(LIST)
    if listed is None:
        return
    entries = _entries(listed)
    group = _MASK if any(tag == _MASK for tag, _, _ in entries) else _GROUP
    new = {_OWNER: mode >> 6 & 7, group: mode >> 3 & 7, _OTHER: mode & 7}
    made = b"".join(_ENTRY.pack(tag, new.get(tag, permissions), who) for tag, permissions, who in entries)
    node.xattrs = {**node.xattrs, LIST: listed[:_VERSION_BYTES] + made}


def _entries(value: bytes) -> list[tuple[int, int, int]]:
    """Give tag, permissions and id of each entry of a list that the kernel has found to be one."""
    return list(_ENTRY.iter_unpack(value[_VERSION_BYTES:]))


def _is_trusted(thread: int) -> bool:
    """Whether a thread may see what is trusted; one that cannot be looked at may not."""
    try:
        return has_capability(thread, CAP_SYS_ADMIN)
    except OSError:
        return False


def _reply(request: Request, size: int, data: bytes) -> None:
    """Give data into a buffer of `size` bytes, or, for 0, how much there is."""
    if not size:
        request.reply(abi.GETXATTR_OUT.pack(len(data), 0))
    elif len(data) > size:
        request.fail(errno.ERANGE)
    else:
        request.reply(data)
