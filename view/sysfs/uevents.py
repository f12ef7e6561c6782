# SPDX-License-Identifier: Apache-2.0
"""Uevents as the kernel sends them: through its own netlink multicast, in the network namespace that the socket was made in.

A message to port 0 of one who rules over the namespace is rebroadcast by the kernel, with a SEQNUM, to all who listen to group 1.
It looks as one of the kernel's own; udev's rules run on it as on any other.
"""

from __future__ import annotations

import errno
import os
import select
import socket
import struct
import threading
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Mapping

NETLINK_KOBJECT_UEVENT = 15
HEADER = struct.Struct("=IHHII")    # length, type, flags, sequence number, port
TYPE_MIN = 0x10     # below lie netlink's own
REQUEST, ACKNOWLEDGE = 1, 4
ERROR_AT = HEADER.size
ANSWER_MS_MAX = 2000    # the kernel has answered when the send returns


def encode(variables: Mapping[str, str]) -> bytes:
    """Give a uevent's text: `ACTION@DEVPATH`, then the variables in their order. EINVAL for what would be read as two."""
    texts = [f"{variables['ACTION']}@{variables['DEVPATH']}", *(f"{key}={value}" for key, value in variables.items())]
    if any("\0" in text for text in texts):
        raise OSError(errno.EINVAL, "a NUL in a uevent")
    return b"".join(text.encode() + b"\0" for text in texts)


class UeventSender:
    """A socket in the network namespace of who makes it; it stays there, whoever sends."""

    def __init__(self) -> None:
        self._socket = socket.socket(socket.AF_NETLINK, socket.SOCK_RAW | socket.SOCK_CLOEXEC, NETLINK_KOBJECT_UEVENT)
        self._socket.bind((0, 0))
        self._number = 0
        self._lock = threading.Lock()   # an answer is that to the message before it

    def send(self, variables: Mapping[str, str]) -> None:
        """Send one, from any thread. EPERM when the namespace is not ours, EINVAL; ETIMEDOUT when the kernel does not answer."""
        body = encode(variables)
        with self._lock:
            self._number += 1
            header = HEADER.pack(HEADER.size + len(body), TYPE_MIN, REQUEST | ACKNOWLEDGE, self._number, 0)
            self._socket.sendto(header + body, (0, 0))
            if not select.select([self._socket], [], [], ANSWER_MS_MAX / 1000)[0]:
                raise OSError(errno.ETIMEDOUT, "no answer from netlink")
            (failed,) = struct.unpack_from("=i", self._socket.recv(4096), ERROR_AT)
        if failed:
            raise OSError(-failed, os.strerror(-failed))

    def close(self) -> None:
        """Close the socket."""
        self._socket.close()
