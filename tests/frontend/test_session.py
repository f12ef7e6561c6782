# SPDX-License-Identifier: Apache-2.0
"""A FUSE session by its own protocol, without a mount: what the kernel asks is written into one end of a socket pair."""

from __future__ import annotations

import errno
import os
import socket
import stat
from collections.abc import Iterator
from typing import Any

import pytest

from pvbus.tests.view.sysfs.test_tree import Source, at_once
from pvbus.view.fuse import abi
from pvbus.view.fuse.node import Text
from pvbus.view.fuse.session import Session
from pvbus.view.fuse.xattr import Like
from pvbus.view.sysfs.tree import Tree

ROOT = 1


class Kernel:
    """Asks a session, and looks at its answers."""

    def __init__(self) -> None:
        source = Source()
        source.add("vmbus_0_1")
        self.end, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        self.session = Session(theirs.detach(), Tree(source, at_once).parent, like=Like.SYSFS)

    def ask(self, opcode: int, node: int, body: bytes, *, answered: bool = True, number: int = 0) -> bytes:
        """Make a request; check the errno of its answer, and give the rest."""
        head = abi.IN_HEADER.pack(abi.IN_HEADER_BYTES + len(body), opcode, 7, node, 0, 0, os.getpid(), 0, 0)
        self.end.send(head + body)
        self.session.serve()
        if not answered:
            return b""
        answer = self.end.recv(65536)
        assert abi.OUT_HEADER.unpack_from(answer)[1] == -number
        return answer[abi.OUT_HEADER_BYTES :]

    def look_up(self, node: int, name: str) -> tuple[int, int, int]:
        """Give the number of a name, and the number and the mode that stat shows."""
        answer = self.ask(abi.LOOKUP, node, name.encode() + b"\0")
        shown: tuple[Any, ...] = abi.ATTR.unpack_from(answer, abi.ENTRY_OUT_HEAD.size)
        return abi.ENTRY_OUT_HEAD.unpack_from(answer)[0], shown[0], stat.S_IMODE(shown[9])

    def chmod(self, node: int, mode: int) -> None:
        fields = [abi.SETATTR_MODE, *[0] * 10, mode, *[0] * 4]
        self.ask(abi.SETATTR, node, abi.SETATTR_IN.pack(*fields))

    def forget(self, *nodes: int) -> None:
        for node in nodes:
            self.ask(abi.FORGET, node, abi.FORGET_IN.pack(1), answered=False)


@pytest.fixture
def kernel() -> Iterator[Kernel]:
    made = Kernel()
    yield made
    made.session.close()
    made.end.close()


def test_a_number_and_what_was_changed_stay_until_the_kernel_forgets_the_name(kernel: Kernel) -> None:
    device, _, _ = kernel.look_up(ROOT, "vmbus_0_1")
    file, number, mode = kernel.look_up(device, "id")
    kernel.chmod(file, 0o400)
    again = kernel.look_up(device, "id")
    kernel.forget(file, file)
    other = kernel.look_up(device, "id")

    assert mode == 0o444
    assert again == (file, number, 0o400)
    assert other[1] != number
    assert other[2] == 0o444


def test_a_node_keeps_so_much_of_attributes_and_no_more(kernel: Kernel) -> None:
    node = Text(lambda: "")
    node.xattrs = {b"trusted.a": bytes(16 << 20)}
    kernel.session.root.children["full"] = node  # type: ignore[attr-defined]
    full, _, _ = kernel.look_up(ROOT, "full")

    kernel.ask(abi.SETXATTR, full, abi.SETXATTR_IN.pack(1, 0) + b"trusted.b\0x", number=errno.ENOSPC)
    kernel.ask(abi.SETXATTR, full, abi.SETXATTR_IN.pack(1, 0) + b"trusted.a\0x")
