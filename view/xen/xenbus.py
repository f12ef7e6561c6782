# SPDX-License-Identifier: Apache-2.0
"""Many users of /dev/xen/xenbus, one connection to xenstored: who asked, whose transaction, whose watch.

xenstored sees one client, the domain's kernel. So requests get numbers of ours on their way there, and watch tokens the number
of their user; both are taken off again on the way back. What a user leaves behind when it closes, transactions and watches, is
ended in its name. Pure: bytes in, bytes out, no I/O.
"""

from __future__ import annotations

import errno
import struct
from dataclasses import dataclass, field

HEADER = struct.Struct("=IIII")  # type, request, transaction, length
PAYLOAD_BYTES_MAX = 4096
REQUESTS_MAX = 16  # of a user's that are under way: a library has one
(WATCH, UNWATCH, TRANSACTION_START, TRANSACTION_END) = (4, 5, 6, 7)
(WATCH_EVENT, ERROR, RESET_WATCHES) = (15, 16, 21)


@dataclass
class User:
    """An open file: what it has written of a message, what it has to read, and what it has left with xenstored."""

    number: int
    partial: bytearray = field(default_factory=bytearray)
    replies: bytearray = field(default_factory=bytearray)
    under_way: int = 0
    transactions: set[int] = field(default_factory=set)
    watches: set[tuple[bytes, bytes]] = field(default_factory=set)
    closed: bool = False


@dataclass(frozen=True)
class _Asked:
    user: User
    type: int
    request: int
    transaction: int
    payload: bytes


class ProtocolError(Exception):
    """xenstored has sent what the protocol does not know."""


class Xenbus:
    """The multiplexer. `outgoing` is what is to be put into the ring, in order."""

    def __init__(self) -> None:
        self.outgoing = bytearray()
        self._incoming = bytearray()
        self._users: dict[int, User] = {}
        self._asked: dict[int, _Asked] = {}
        self._next_user = 1
        self._next_request = 1

    def open(self) -> User:
        """Add a user."""
        user = User(self._next_user)
        self._next_user += 1
        self._users[user.number] = user
        return user

    def write(self, user: User, data: bytes) -> None:
        """Take what a user writes: messages, in any pieces. OSError EINVAL for one too long, EAGAIN for one too many."""
        user.partial += data
        while len(user.partial) >= HEADER.size:
            kind, request, transaction, length = HEADER.unpack_from(user.partial)
            if length > PAYLOAD_BYTES_MAX:
                user.partial.clear()
                raise OSError(errno.EINVAL, f"a payload of {length} bytes, {PAYLOAD_BYTES_MAX} at most")
            if len(user.partial) < HEADER.size + length:
                return
            if user.under_way >= REQUESTS_MAX:
                user.partial.clear()
                raise OSError(errno.EAGAIN, f"{REQUESTS_MAX} requests under way")
            payload = bytes(user.partial[HEADER.size : HEADER.size + length])
            del user.partial[: HEADER.size + length]
            self._request(_Asked(user, kind, request, transaction, payload))

    def _request(self, asked: _Asked) -> None:
        user = asked.user
        if asked.transaction and asked.transaction not in user.transactions:
            self._refuse(asked, b"ENOENT")  # what xenstored says of a transaction that is none of its client's
        elif asked.type == RESET_WATCHES:  # it would reset the other users' as well
            self._refuse(asked, b"ENOSYS")
        else:
            payload = asked.payload
            if asked.type in (WATCH, UNWATCH):
                path, separator, token = payload.partition(b"\0")
                payload = path + separator + b"%d:" % user.number + token
            if len(payload) > PAYLOAD_BYTES_MAX:  # with our number it would be too long, and xenstored would hang up on everybody
                self._refuse(asked, b"EINVAL")
                return
            user.under_way += 1
            self._send(asked, payload)

    def _send(self, asked: _Asked, payload: bytes) -> None:
        number, self._next_request = self._next_request, self._next_request % 0xFFFFFFFF + 1
        self._asked[number] = asked
        self.outgoing += HEADER.pack(asked.type, number, asked.transaction, len(payload)) + payload

    @staticmethod
    def _refuse(asked: _Asked, name: bytes) -> None:
        payload = name + b"\0"
        asked.user.replies += HEADER.pack(ERROR, asked.request, asked.transaction, len(payload)) + payload

    def receive(self, data: bytes) -> set[int]:
        """Take what xenstored has sent; give the numbers of the users who have something to read now."""
        self._incoming += data
        ready: set[int] = set()
        while len(self._incoming) >= HEADER.size:
            kind, request, transaction, length = HEADER.unpack_from(self._incoming)
            if length > PAYLOAD_BYTES_MAX:
                raise ProtocolError(f"a message of {length} bytes")
            if len(self._incoming) < HEADER.size + length:
                break
            payload = bytes(self._incoming[HEADER.size : HEADER.size + length])
            del self._incoming[: HEADER.size + length]
            user = self._event(payload) if kind == WATCH_EVENT else self._reply(kind, request, transaction, payload)
            if user is not None:
                ready.add(user.number)
        return ready

    def _event(self, payload: bytes) -> User | None:
        path, _, token = payload.partition(b"\0")
        number, _, own = token.partition(b":")
        user = self._users.get(int(number)) if number.isdigit() else None
        if user is None:  # a watch of one who has closed meanwhile
            return None
        payload = path + b"\0" + own
        user.replies += HEADER.pack(WATCH_EVENT, 0, 0, len(payload)) + payload
        return user

    def _reply(self, kind: int, request: int, transaction: int, payload: bytes) -> User | None:
        asked = self._asked.pop(request, None)
        if asked is None:
            raise ProtocolError(f"an answer to request {request}, which nobody made")
        user = asked.user
        if kind != ERROR:
            self._keep_account(asked, payload)
        if user.closed:
            return None
        user.under_way -= 1
        user.replies += HEADER.pack(kind, asked.request, transaction, len(payload)) + payload
        return user

    def _keep_account(self, asked: _Asked, payload: bytes) -> None:
        user = asked.user
        path, _, token = asked.payload.partition(b"\0")
        if asked.type == TRANSACTION_START:
            user.transactions.add(int(payload.rstrip(b"\0")))
        elif asked.type == TRANSACTION_END:
            user.transactions.discard(asked.transaction)
        elif asked.type == WATCH:
            user.watches.add((path, token))
        elif asked.type == UNWATCH:
            user.watches.discard((path, token))
        if user.closed and asked.type in (TRANSACTION_START, WATCH):  # it came too late for `close`
            self._end_all(user)

    def close(self, user: User) -> None:
        """Remove a user, and end what it has left."""
        user.closed = True
        del self._users[user.number]
        self._end_all(user)

    def _end_all(self, user: User) -> None:
        for transaction in user.transactions:
            self._send(_Asked(user, TRANSACTION_END, 0, transaction, b""), b"F\0")
        for path, token in user.watches:
            self._send(_Asked(user, UNWATCH, 0, 0, b""), path + b"\0" + b"%d:" % user.number + token)
        user.transactions.clear()
        user.watches.clear()
