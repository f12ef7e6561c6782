# SPDX-License-Identifier: Apache-2.0
"""The inbox and its peers: asks, deadlines, fairness, foreign frames, full sockets and sleeping."""

from __future__ import annotations

import errno
import os
import select
import socket
import sys
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from pykka._envelope import Envelope

from pvbus.actors.runtime import wire
from pvbus.actors.runtime.clock import MonotonicClock
from pvbus.actors.runtime.inbox import FOREIGN_FRAMES_MAX, FRAMES_A_TURN_MAX, Inbox
from pvbus.actors.runtime.peer import PENDING_FRAMES_MAX, Peer, PeerGone
from pvbus.actors.runtime.wire import Done, Failure, Message

HERE = Path(__file__).parent
sys.path.insert(0, str(HERE))
from rig import InboxCall, InboxPlain, Rig, receive, send  # type: ignore[import-not-found]  # noqa: E402


@pytest.fixture
def rig() -> Iterator[Rig]:
    made = Rig()
    yield made
    made.inbox.close()
    for sock in made.sockets:
        sock.close()


def test_a_tell_a_request_and_its_reply(rig: Rig) -> None:
    peer, theirs = rig.connect()
    send(theirs, InboxCall(value=1))
    send(theirs, InboxCall(value=2), 9)
    assert [(r.request, r.message) for r in rig.pump()] == [(0, InboxCall(value=1)), (9, InboxCall(value=2))]
    peer.reply(9, Done(value=3))
    peer.tell(InboxCall(value=4))
    assert receive(theirs) == wire.Frame(1, "Done", 9, True, Done(value=3))
    assert receive(theirs).message == InboxCall(value=4)
    assert (peer.pid, peer.uid) == (os.getpid(), os.geteuid())


def test_an_ask_gets_its_reply_once_and_a_second_one_is_counted(rig: Rig) -> None:
    peer, theirs = rig.connect()
    answers: list[Message] = []
    request = peer.ask(InboxCall(), lambda reply, _: answers.append(reply))
    assert receive(theirs).request == request
    send(theirs, Done(value=5), request, reply=True)
    send(theirs, Done(value=6), request, reply=True)
    assert rig.pump() == []
    assert answers == [Done(value=5)]
    assert peer.late_replies == 1


def test_at_the_deadline_an_ask_fails_and_its_late_reply_is_dropped(rig: Rig) -> None:
    peer, theirs = rig.connect()
    answers: list[Message] = []
    request = peer.ask(InboxCall(), lambda reply, _: answers.append(reply), deadline_s=5.0)
    rig.clock.advance(4.999)
    rig.pump()
    assert answers == []
    rig.clock.advance(0.001)
    rig.pump()
    assert answers == [Failure(errno=errno.ETIMEDOUT)]
    send(theirs, Done(), request, reply=True)
    rig.pump()
    assert len(answers) == 1
    assert peer.late_replies == 1


def test_a_sleeping_inbox_notices_that_its_clock_has_jumped(rig: Rig) -> None:
    peer, _ = rig.connect()
    peer.ask(InboxCall(), lambda reply, _: rig.inbox.put(Envelope(reply)), deadline_s=3600)
    threading.Timer(0.0, lambda: rig.clock.advance(3600)).start()
    assert rig.inbox.get().message == Failure(errno=errno.ETIMEDOUT)


def test_a_hang_up_fails_the_asks_first_and_comes_after_the_last_frame(rig: Rig) -> None:
    peer, theirs = rig.connect()
    order: list[Any] = []
    rig.inbox.on_hangup = order.append
    peer.ask(InboxCall(), lambda reply, _: order.append(reply))
    for value in range(40):
        send(theirs, InboxCall(value=value))
    theirs.close()
    got = []
    while not order:
        rig.inbox.call_soon(lambda: rig.inbox.put(Envelope(None)))
        envelope = rig.inbox.get()
        if envelope.message is not None:
            assert order == []
            got.append(envelope.message.message.value)
    assert got == list(range(40))
    assert order == [Failure(errno=errno.EPIPE), peer]
    assert peer.closed
    assert peer.resets == 1
    with pytest.raises(PeerGone) as caught:
        peer.tell(InboxCall())
    assert caught.value.errno == errno.EPIPE


def test_an_ask_of_a_peer_that_is_gone_fails_from_the_loop(rig: Rig) -> None:
    peer, theirs = rig.connect()
    theirs.close()
    answers: list[Message] = []
    peer.ask(InboxCall(), lambda reply, _: answers.append(reply))
    assert answers == []
    rig.pump()
    peer.ask(InboxCall(), lambda reply, _: answers.append(reply))
    assert len(answers) == 1
    rig.pump()
    assert answers == [Failure(errno=errno.EPIPE)] * 2


def test_closing_a_peer_fails_its_asks_and_drops_what_was_not_handled(rig: Rig) -> None:
    peer, theirs = rig.connect()
    answers: list[Message] = []
    peer.ask(InboxCall(), lambda reply, _: answers.append(reply))
    send(theirs, InboxCall())
    rig.inbox._turn(sleep=False)
    peer.close()
    assert rig.pump() == []
    assert answers == [Failure(errno=errno.EPIPE)]
    assert peer.undelivered == 1
    assert rig.hangups == []


def test_a_reply_to_a_peer_that_is_gone_is_counted_and_harms_nobody(rig: Rig) -> None:
    peer, theirs = rig.connect()
    theirs.close()
    peer.reply(4, Done())
    assert peer.undelivered == 1


def test_a_reply_too_long_for_a_frame_is_told_as_emsgsize(rig: Rig) -> None:
    peer, theirs = rig.connect()
    peer.reply(4, InboxCall(data=bytes(70_000)))
    frame = receive(theirs)
    assert isinstance(frame.message, Failure)
    assert (frame.request, frame.message.errno) == (4, errno.EMSGSIZE)


def test_a_flooding_peer_takes_its_turn_like_the_others(rig: Rig) -> None:
    _, flood = rig.connect("flood")
    _, quiet = rig.connect("quiet")
    for value in range(100):
        send(flood, InboxCall(value=value))
    send(quiet, InboxCall(value=1000))
    names = []
    while "quiet" not in names:
        names.append(rig.inbox.get().message.peer.name)
    assert len(names) <= FRAMES_A_TURN_MAX + 1
    while len(names) < 101:
        names.append(rig.inbox.get().message.peer.name)
    assert names.count("flood") == 100


def test_a_foreign_frame_is_answered_counted_and_the_connection_kept(rig: Rig) -> None:
    peer, theirs = rig.connect()
    theirs.send(b"\xc1 nonsense")
    theirs.send(wire.encode(InboxCall(), 8).replace(b"InboxCall", b"InboxNone"))
    send(theirs, InboxCall(value=3), 9)
    assert [r.message for r in rig.pump()] == [InboxCall(value=3)]
    answers = [receive(theirs) for _ in range(2)]
    assert [(a.request, a.reply) for a in answers] == [(0, False), (8, True)]
    assert all(isinstance(a.message, Failure) and a.message.errno == errno.EBADMSG for a in answers)
    assert peer.foreign_frames == 2
    assert not peer.closed


def test_a_peer_that_keeps_sending_foreign_frames_is_closed_and_others_do_not_notice(rig: Rig) -> None:
    hostile, theirs = rig.connect("hostile")
    _, good = rig.connect("good")
    for _ in range(FOREIGN_FRAMES_MAX):
        theirs.send(b"\xc1")
    send(good, InboxCall(value=1))
    assert [r.peer.name for r in rig.pump()] == ["good"]
    assert hostile.closed
    assert rig.hangups == [hostile]


def test_a_foreign_reply_fails_the_ask_that_waits_for_it(rig: Rig) -> None:
    peer, theirs = rig.connect()
    answers: list[Message] = []
    request = peer.ask(InboxCall(), lambda reply, _: answers.append(reply))
    theirs.send(wire.encode(Done(), request, reply=True).replace(b"Done", b"Dune"))
    rig.pump()
    assert isinstance(answers[0], Failure)
    assert answers[0].errno == errno.EBADMSG
    receive(theirs)
    with pytest.raises(BlockingIOError):
        wire.recv_frame(theirs, socket.MSG_DONTWAIT)


def test_a_complaint_is_counted_and_never_answered(rig: Rig) -> None:
    peer, theirs = rig.connect()
    send(theirs, Failure(errno=errno.EBADMSG))
    assert rig.pump() == []
    assert peer.complaints == 1
    with pytest.raises(BlockingIOError):
        wire.recv_frame(theirs, socket.MSG_DONTWAIT)


def test_descriptors_that_a_message_may_not_have_are_closed(rig: Rig) -> None:
    peer, theirs = rig.connect()
    before = len(list(Path("/proc/self/fd").iterdir()))
    wire.send_frame(theirs, wire.encode(InboxPlain()), [0, 1, 2])
    assert rig.pump() == []
    assert len(list(Path("/proc/self/fd").iterdir())) == before
    assert peer.foreign_frames == 1
    with pytest.raises(wire.WireError):
        peer.tell(InboxPlain(), [0])


def test_a_full_socket_is_waited_for_with_order_and_descriptors_kept(rig: Rig) -> None:
    peer, theirs = rig.connect()
    reading, writing = os.pipe()
    for value in range(1000):
        peer.tell(InboxCall(value=value, data=bytes(1000)), [writing] if value == 900 else [])
    os.close(writing)
    got: list[int] = []
    while len(got) < 1000:
        rig.inbox._turn(sleep=False)
        try:
            data, fds = wire.recv_frame(theirs, socket.MSG_DONTWAIT)
        except BlockingIOError:
            continue
        message = wire.decode(data).message
        assert isinstance(message, InboxCall)
        got.append(message.value)
        if fds:
            assert message.value == 900
            os.write(fds[0], b"kept")
            wire.close_fds(fds)
    assert got == list(range(1000))
    assert os.read(reading, 10) == b"kept"
    os.close(reading)


def test_a_peer_that_never_reads_is_closed_at_the_bound(rig: Rig) -> None:
    peer, _ = rig.connect()
    told = 0
    with pytest.raises(PeerGone):
        while told < 10 * PENDING_FRAMES_MAX:
            peer.tell(InboxCall(data=bytes(1000)))
            told += 1
    assert PENDING_FRAMES_MAX <= told < 2 * PENDING_FRAMES_MAX
    assert peer.undelivered == PENDING_FRAMES_MAX + 1
    rig.pump()
    assert rig.hangups == [peer]
    assert peer.closed


def test_idle_work_and_sockets_do_not_starve_each_other(rig: Rig) -> None:
    _, theirs = rig.connect()
    rounds = 0

    class Busy:
        def work(self) -> bool:
            nonlocal rounds
            rounds += 1
            return True

        def may_sleep(self) -> bool:
            raise AssertionError("slept with work to do")

        def awake(self) -> None: ...

    rig.inbox.idle = Busy()
    for value in range(20):
        send(theirs, InboxCall(value=value))
    for value in range(20):
        assert rig.inbox.get().message.message.value == value
    assert rounds >= 20


def test_work_that_appears_at_the_announcement_of_sleep_is_not_slept_over(rig: Rig) -> None:
    log: list[str] = []
    done = threading.Event()

    class Late:
        """Work appears behind the first look: only the look behind the announcement sees it."""

        tries = 0

        def work(self) -> bool:
            log.append("work")
            if "refused" in log and not done.is_set():
                done.set()
                rig.inbox.put(Envelope("done"))
                return True
            return False

        def may_sleep(self) -> bool:
            self.tries += 1
            log.append("refused" if self.tries == 1 else "sleep")
            return self.tries > 1

        def awake(self) -> None:
            log.append("awake")

    rig.inbox.idle = Late()
    assert rig.inbox.get().message == "done"
    assert log == ["work", "refused", "work"]
    rig.inbox.call_soon(lambda: None)
    waker = threading.Timer(0.01, lambda: rig.inbox.put(Envelope("wake")))
    waker.start()
    assert rig.inbox.get().message == "wake"
    assert log.count("sleep") == log.count("awake") == 1
    waker.join()


def test_a_doorbell_wakes_the_loop_and_a_removed_one_does_not(rig: Rig) -> None:
    fd = os.eventfd(0, os.EFD_NONBLOCK)

    def rung(events: int) -> None:
        assert events & select.EPOLLIN
        os.eventfd_read(fd)
        rig.inbox.put(Envelope("rung"))

    rig.inbox.add_fd(fd, select.EPOLLIN, rung)
    threading.Timer(0.0, lambda: os.eventfd_write(fd, 1)).start()
    assert rig.inbox.get().message == "rung"
    rig.inbox.remove_fd(fd)
    os.eventfd_write(fd, 1)
    assert rig.pump() == []
    os.close(fd)


def test_a_listener_hands_over_its_connections(rig: Rig) -> None:
    listener = socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    listener.bind("")
    listener.listen()
    rig.inbox.add_listener(listener, lambda sock: rig.inbox.put(Envelope(rig.inbox.add_peer(sock, "guest"))))
    client = socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    client.connect(listener.getsockname())
    guest = rig.inbox.get().message
    assert isinstance(guest, Peer)
    send(client, InboxCall(value=1))
    assert rig.inbox.get().message.message == InboxCall(value=1)
    rig.inbox.remove_fd(listener.fileno())
    listener.close()
    client.close()


def test_without_descriptors_a_listener_rests_and_then_goes_on(rig: Rig) -> None:
    class Exhausted:
        tries = 0

        def __init__(self, sock: socket.socket) -> None:
            self.sock = sock

        def __getattr__(self, name: str) -> Any:
            return getattr(self.sock, name)

        def accept(self) -> Any:
            self.tries += 1
            if self.tries == 1:
                raise OSError(errno.EMFILE, "none left")
            return self.sock.accept()

    listener = socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    listener.bind("")
    listener.listen()
    accepted: list[socket.socket] = []
    scarce = Exhausted(listener)
    rig.inbox.add_listener(scarce, accepted.append)
    client = socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    client.connect(listener.getsockname())
    rig.pump()
    assert (accepted, scarce.tries) == ([], 1)
    rig.clock.advance(0.1)
    rig.pump()
    assert len(accepted) == 1
    for sock in (*accepted, client, listener):
        sock.close()


def test_a_time_out_costs_real_clocks_their_time_and_no_more() -> None:
    inbox = Inbox(MonotonicClock())
    called: list[str] = []
    inbox.call_at(inbox.clock.now_ns() + 1_000_000, lambda: called.append("second"))
    inbox.call_at(inbox.clock.now_ns() + 2_000_000, lambda: inbox.put(Envelope("third")))
    inbox.call_soon(lambda: called.append("first"))
    assert inbox.get().message == "third"
    assert called == ["first", "second"]
    assert inbox.close() == 0
