# SPDX-License-Identifier: Apache-2.0
"""The peers: multiprocessing.Pipe and pyzmq PUSH/PULL over ipc, moving four-byte ids between two processes.

Each as its documentation would have it used, blocking, nothing lost: `send_bytes` and `recv_bytes`, `send`
and `recv`, no socket option changed. The batch forms put 256 ids into a message; as with the machine's own
batch form, the sender starts from a list of ids and the receiver ends with one.
"""

from __future__ import annotations

from array import array
from collections.abc import Callable, Sequence
from itertools import repeat
from multiprocessing.connection import Connection
from time import perf_counter_ns

from pvbus.benchmarks.page import DONE, RECEIVED, STOP, STRIDE, Feed, Page

Send = Callable[[bytes], object]
Receive = Callable[[], bytes]
BATCH = 256
END = b""
IDS = [number.to_bytes(4, "little") for number in range(1, STRIDE + 1)]


def send_single(page: Page, send: Send, payloads: Sequence[bytes] = IDS) -> None:
    """Send ids, or other payloads, one by one until the row is over."""
    words = page.words
    while not words[STOP]:
        for payload in payloads:
            send(payload)
    for _ in Feed(page):
        send(payloads[0])
    send(END)


def receive_single(page: Page, receive: Receive) -> None:
    """Receive ids one by one."""
    words = page.words
    count = 0
    while not words[STOP]:
        for _ in repeat(None, STRIDE):
            receive()
        count += STRIDE
        words[RECEIVED] = count
    words[DONE] = 1
    while receive() != END:
        continue


def send_batch(page: Page, send: Send) -> None:
    """Send lists of 256 ids."""
    words = page.words
    ports = list(range(1, BATCH + 1))
    while not words[STOP]:
        send(array("I", ports).tobytes())
    for _ in Feed(page):
        send(array("I", ports).tobytes())
    send(END)


def receive_batch(page: Page, receive: Receive) -> None:
    """Receive lists of ids."""
    words = page.words
    count = 0
    while not words[STOP]:
        count += len(array("I", receive()).tolist())
        words[RECEIVED] = count
    words[DONE] = 1
    while receive() != END:
        continue


def trip(page: Page, send: Send, receive: Receive) -> list[int]:
    """Send an id and wait for it, again and again; return the times in nanoseconds."""
    words = page.words
    port = IDS[0]
    times = []
    while not words[STOP]:
        begin = perf_counter_ns()
        send(port)
        receive()
        times.append(perf_counter_ns() - begin)
    send(END)
    return times


def echo(page: Page, send: Send, receive: Receive) -> None:
    """Send back what comes."""
    while (data := receive()) != END:
        send(data)


class PipeEnds:
    """One process's ends of two pipes."""

    def __init__(self, to_peer: Connection, from_peer: Connection) -> None:
        self.send: Send = to_peer.send_bytes
        self.receive: Receive = from_peer.recv_bytes

    def close(self) -> None:
        """Close nothing: the ends go with the process."""


class ZmqEnds:
    """One process's PUSH and PULL sockets."""

    def __init__(self, to_peer: str, from_peer: str) -> None:
        import zmq

        self._context = zmq.Context()
        push, pull = self._context.socket(zmq.PUSH), self._context.socket(zmq.PULL)
        pull.bind(from_peer)
        push.connect(to_peer)
        self.send: Send = push.send
        self.receive: Receive = pull.recv

    def close(self) -> None:
        """Close the sockets, unsent messages dropped."""
        self._context.destroy(linger=0)
