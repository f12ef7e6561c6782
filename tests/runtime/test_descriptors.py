# SPDX-License-Identifier: Apache-2.0
"""An inbox in a process that has no descriptor left: the call in question fails with EMFILE, every other frame is handled."""

from __future__ import annotations

import errno
import os
import socket
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from pvbus.actors.runtime import wire
from pvbus.actors.runtime.asking import ask_blocking
from pvbus.actors.runtime.wire import Done, Failure, Message

sys.path.insert(0, str(Path(__file__).parent))
from rig import InboxCall, Rig, descriptors_left, receive, send  # type: ignore[import-not-found]

FULL = 400
"""Frames of a thousand bytes: more than a socket takes, fewer than a peer may have waiting."""


@pytest.fixture
def rig() -> Iterator[Rig]:
    made = Rig()
    yield made
    made.inbox.close()
    for sock in made.sockets:
        sock.close()


def open_fds() -> int:
    return len(list(Path("/proc/self/fd").iterdir()))


def test_a_request_whose_descriptors_find_no_room_is_answered_with_emfile(rig: Rig) -> None:
    peer, theirs = rig.connect()
    before = open_fds()
    for request in range(1, 41):  # more than a peer may send foreign frames
        wire.send_frame(theirs, wire.encode(InboxCall(value=request), request), [0, 1])
        send(theirs, InboxCall(value=-request), 100 + request)
        with descriptors_left(1):
            got = rig.pump()
        assert [received.message for received in got] == [InboxCall(value=-request)]
        answer = receive(theirs)
        assert (answer.request, answer.reply) == (request, True)
        assert isinstance(answer.message, Failure)
        assert answer.message.errno == errno.EMFILE
        assert "InboxCall: no descriptor is left" in answer.message.text
    assert (peer.foreign_frames, peer.closed, open_fds()) == (0, False, before)


def test_a_tell_whose_descriptors_find_no_room_is_not_complained_about(rig: Rig) -> None:
    peer, theirs = rig.connect()
    wire.send_frame(theirs, wire.encode(InboxCall()), [0])
    send(theirs, InboxCall(value=2), 2)
    with descriptors_left(0):
        assert [received.request for received in rig.pump()] == [2]
    peer.reply(2, Done())
    assert receive(theirs).request == 2


def test_a_reply_whose_descriptors_find_no_room_fails_its_ask(rig: Rig) -> None:
    peer, theirs = rig.connect()
    replies: list[Message] = []
    request = peer.ask(InboxCall(), lambda reply, _fds: replies.append(reply))
    wire.send_frame(theirs, wire.encode(Done(), request, reply=True), [0])
    with descriptors_left(0):
        rig.pump()
    assert [getattr(reply, "errno", 0) for reply in replies] == [errno.EMFILE]


def fill(peer: object, theirs: socket.socket) -> None:
    for value in range(FULL):
        peer.tell(InboxCall(value=value, data=bytes(1000)))  # type: ignore[attr-defined]


def test_an_ask_that_cannot_keep_its_descriptors_fails_and_nothing_else_does(rig: Rig) -> None:
    peer, theirs = rig.connect()
    fill(peer, theirs)
    replies: list[Message] = []
    with descriptors_left(1):
        peer.ask(InboxCall(), lambda reply, _fds: replies.append(reply), fds=[0, 1])
        peer.reply(5, InboxCall(), [0, 1])
        rig.pump()
    assert [getattr(reply, "errno", 0) for reply in replies] == [errno.EMFILE]

    frames: list[wire.Frame] = []
    theirs.setblocking(False)
    while len(frames) < FULL + 1:
        rig.inbox._turn(sleep=False)
        try:
            frames.append(receive(theirs))
        except BlockingIOError:
            continue

    assert [frame.message.value for frame in frames[:-1] if isinstance(frame.message, InboxCall)] == list(range(FULL))
    assert (frames[-1].request, frames[-1].reply) == (5, True)
    assert isinstance(frames[-1].message, Failure)
    assert frames[-1].message.errno == errno.EMFILE


def test_frames_that_wait_with_descriptors_that_cannot_go_fail_alone(rig: Rig, monkeypatch: pytest.MonkeyPatch) -> None:
    peer, theirs = rig.connect()
    fill(peer, theirs)
    replies: list[Message] = []
    peer.ask(InboxCall(), lambda reply, _fds: replies.append(reply), fds=[0])
    peer.reply(5, InboxCall(), [0])
    before = open_fds()
    original = wire.send_frame

    def too_many_under_way(sock: socket.socket, data: bytes, fds: list[int], flags: int = 0) -> None:
        """What the kernel says of a user whose descriptors in flight are at the limit; root never hears it."""
        if fds:
            raise OSError(errno.EMFILE, "too many descriptors are under way in sockets")
        original(sock, data, fds, flags)

    monkeypatch.setattr(wire, "send_frame", too_many_under_way)
    frames: list[wire.Frame] = []
    theirs.setblocking(False)
    while len(frames) < FULL + 1:
        rig.inbox._turn(sleep=False)
        rig.inbox._run_soon()
        try:
            frames.append(receive(theirs))
        except BlockingIOError:
            continue

    assert [getattr(reply, "errno", 0) for reply in replies] == [errno.EMFILE]
    assert (frames[-1].request, getattr(frames[-1].message, "errno", 0)) == (5, errno.EMFILE)
    assert open_fds() == before - 2


def test_a_client_without_descriptors_gets_emfile_and_its_next_call_works() -> None:
    ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    child = os.fork()
    if child == 0:
        try:
            for _ in range(2):
                request = receive(theirs).request
                wire.send_frame(theirs, wire.encode(Done(value=3), request, reply=True), [0])
        finally:
            os._exit(0)
    before = open_fds()
    with descriptors_left(0), pytest.raises(OSError, match="no descriptor is left") as refused:
        ask_blocking(ours, InboxCall())
    assert refused.value.errno == errno.EMFILE
    assert open_fds() == before

    reply, fds = ask_blocking(ours, InboxCall())

    assert (reply, len(fds)) == (Done(value=3), 1)
    wire.close_fds(fds)
    os.waitpid(child, 0)
    ours.close()
    theirs.close()
