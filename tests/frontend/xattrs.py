# SPDX-License-Identifier: Apache-2.0
"""What a program sees of the extended attributes of files; run inside of `pvbus run`.

    python -m pvbus.tests.frontend.xattrs PATH…

prints, for each path, a JSON object of what was seen. "NODE" stands for a device node of this system's own, made and removed
here; null where it cannot be made.
"""

from __future__ import annotations

import errno
import functools
import json
import os
import stat
import struct
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

ANYBODY = 0xFFFFFFFF
OTHER_USER = 1234
NODE = Path("/dev/a-node")  # the run's own /dev is a tmpfs, as devtmpfs is


def access_list(*entries: tuple[int, int, int]) -> bytes:
    """Make a list as acl(5) has it."""
    return struct.pack("<I", 2) + b"".join(struct.pack("<HHI", *entry) for entry in entries)


BARE = access_list((1, 6, ANYBODY), (4, 4, ANYBODY), (32, 0, ANYBODY))
ONE_MORE = access_list((1, 6, ANYBODY), (2, 6, 0), (4, 0, ANYBODY), (16, 6, ANYBODY), (32, 0, ANYBODY))


def named(call: Callable[[], Any]) -> Any:
    """Give the value, or the errno's name."""
    try:
        value = call()
    except OSError as error:
        return errno.errorcode[error.errno or 0]
    return value.decode("latin-1") if isinstance(value, bytes) else value


def of_name(path: Path, name: str) -> list[Any]:
    """Go through all that can be done with an attribute."""
    return [
        named(lambda: os.getxattr(path, name)), named(lambda: os.setxattr(path, name, b"one")),
        named(lambda: os.setxattr(path, name, b"two", os.XATTR_REPLACE)),
        named(lambda: os.setxattr(path, name, b"three", os.XATTR_CREATE)), named(lambda: os.getxattr(path, name)),
        named(lambda: os.removexattr(path, name)), named(lambda: os.removexattr(path, name)),
        named(lambda: os.setxattr(path, name, b"", os.XATTR_REPLACE)),
    ]  # fmt: skip


def of_lists(path: Path) -> list[Any]:
    """Set lists, look at the mode, set the mode, look at the list."""
    name, seen = "system.posix_acl_access", []
    for set_list in (BARE, ONE_MORE):
        seen.append(named(functools.partial(os.setxattr, path, name, set_list)))
        seen += [oct(stat.S_IMODE(path.stat().st_mode)), os.listxattr(path), named(lambda: os.getxattr(path, name))]
    seen += [named(lambda: path.chmod(0o640)), named(lambda: os.getxattr(path, name))]
    seen.append(named(lambda: os.setxattr(path, "system.posix_acl_default", ONE_MORE)))
    seen += [named(lambda: os.removexattr(path, name)), named(lambda: os.removexattr(path, name))]
    return [*seen, named(lambda: os.getxattr(path, name)), oct(stat.S_IMODE(path.stat().st_mode))]


def of_names(path: Path) -> list[Any]:
    """List names, as who may administer the system and as who may not."""
    named(lambda: os.setxattr(path, "security.a", b"x"))
    kept = named(lambda: os.setxattr(path, "trusted.a", b"x"))
    named(lambda: os.setxattr(path, "system.posix_acl_access", ONE_MORE))
    seen = [kept, _listed(path)]
    user = named(lambda: os.seteuid(OTHER_USER))  # the capabilities of root are root's
    seen += [user, _listed(path)]
    os.seteuid(0)
    for name in ("security.a", "trusted.a", "system.posix_acl_access"):
        named(functools.partial(os.removexattr, path, name))
    return seen


def _listed(path: Path) -> list[str]:
    """Give the names of a file; in what order they are behind the first differs from kernel to kernel."""
    first, *others = os.listxattr(path)
    return [first, *sorted(others)]


def look(path: Path) -> dict[str, Any]:
    """Look at a file; it is left as it was."""
    mode = path.stat().st_mode
    seen: dict[str, Any] = {
        name: of_name(path, name)
        for name in ("user.x", "user.", "security.x", "security.", "system.x", "foo", "system.posix_acl_default", "trusted.x")
    }
    seen["lists"] = of_lists(path)
    path.chmod(stat.S_IMODE(mode))
    seen["names"] = of_names(path)
    path.chmod(stat.S_IMODE(mode))
    for name in ("security.a", "security.b"):
        os.setxattr(path, name, bytes(40000))
    seen["kept"] = [sorted(os.listxattr(path)), len(os.getxattr(path, "security.a"))]
    for name in ("security.a", "security.b"):
        os.removexattr(path, name)
    return seen


def main(*names: str) -> None:
    """Look, and print."""
    found: list[Any] = []
    for name in names:
        path = Path(name)
        if name == "NODE":
            path = NODE
            try:
                os.mknod(path, stat.S_IFCHR | 0o600, os.makedev(1, 3))
            except PermissionError:  # in a user namespace
                found.append(None)
                continue
        found.append(look(path))
    NODE.unlink(missing_ok=True)
    print(json.dumps(found))


if __name__ == "__main__":
    main(*sys.argv[1:])
