# SPDX-License-Identifier: Apache-2.0
"""The end of an inbox: what was not handled is answered, counted and reported, and nothing stays open."""

from __future__ import annotations

import errno
import socket
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from pvbus.actors.runtime import wire
from pvbus.actors.runtime.peer import Peer
from pvbus.actors.runtime.wire import Failure, Message

HERE = Path(__file__).parent
sys.path.insert(0, str(HERE))
from rig import InboxCall, Rig, receive, send  # type: ignore[import-not-found]  # noqa: E402


def close_of(action: Callable[[Rig, Peer, socket.socket], None]) -> tuple[Rig, Peer, socket.socket, int]:
    rig = Rig()
    peer, theirs = rig.connect()
    action(rig, peer, theirs)
    return rig, peer, theirs, rig.inbox.close()


def test_at_the_end_unread_and_unhandled_frames_are_counted_and_requests_answered(
    caplog: pytest.LogCaptureFixture,
) -> None:
    def action(rig: Rig, peer: Peer, theirs: socket.socket) -> None:
        for request in range(1, 21):
            send(theirs, InboxCall(), request)
        rig.inbox._turn(sleep=False)  # 16 of them are in the queue now, 4 in the socket

    _, peer, theirs, lost = close_of(action)
    assert (lost, peer.undelivered) == (20, 20)
    answers = [receive(theirs) for _ in range(20)]
    assert [a.request for a in answers] == list(range(1, 21))
    assert all(isinstance(a.message, Failure) and a.message.errno == errno.ESHUTDOWN for a in answers)
    assert wire.recv_frame(theirs)[0] == b""
    assert "rig stopped with 20 undelivered: " in caplog.text
    theirs.close()


def test_at_the_end_own_asks_fail_once_with_eshutdown() -> None:
    answers: list[Message] = []
    rig, _, theirs, lost = close_of(
        lambda _rig, peer, _theirs: (peer.ask(InboxCall(), lambda reply, _: answers.append(reply)), None)[1]
    )
    assert answers == [Failure(errno=errno.ESHUTDOWN)]
    assert lost == 0
    assert rig.inbox.close() == 0
    theirs.close()


def test_a_broken_actors_callers_see_a_hang_up_and_no_answer() -> None:
    rig = Rig()
    _, theirs = rig.connect()
    send(theirs, InboxCall(), 5)
    assert rig.inbox.close(answer=False) == 1
    assert wire.recv_frame(theirs)[0] == b""
    theirs.close()


def test_the_end_leaves_no_descriptor() -> None:
    before = sorted(path.name for path in Path("/proc/self/fd").iterdir())
    _, _, theirs, _ = close_of(
        lambda _rig, _peer, theirs: wire.send_frame(theirs, wire.encode(InboxCall()), [0])
    )
    theirs.close()
    assert sorted(path.name for path in Path("/proc/self/fd").iterdir()) == before
