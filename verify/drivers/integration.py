# SPDX-License-Identifier: Apache-2.0
"""What a guest's integration drivers share: the header of their messages, the talk about versions, a thread a device.

    0      4      8            12     14             18     20       24            25      26         28
    | pipe | size | frame 2xu16 | type | version 2xu16 | size | status | transaction | flags | reserved | body

The host asks for versions first, then for what the class is about; an answer is the request with another status and body.
"""

from __future__ import annotations

import argparse
import errno
import os
import select
import signal
import struct
import sys
import threading
from typing import TYPE_CHECKING, ClassVar

from pvbus.actors.client import VmbusDriver, attach

if TYPE_CHECKING:
    import uuid

    from pvbus.actors.client import VmbusDevice

HEADER = struct.Struct("<IIHHHHHHIBBH")
PIPE_BYTES = 8
COUNTS = struct.Struct("<HHI")  # of frame versions, of message versions; what follows is a pair of u16 each
VERSION = struct.Struct("<HH")
RING_BYTES = 16 * 1024
NEGOTIATE = 0
TRANSACTION, RESPONSE = 1, 4
S_OK = 0
GONE_ERRNOS = frozenset({errno.EIO, errno.ENOTCONN})  # the bus has gone, and the channel with it; `run` says so
GONE, REFUSED = 1, 3  # exit codes
Version = tuple[int, int]
FRAMES: tuple[Version, ...] = ((3, 0), (1, 0))  # newest first


class IntegrationDriver(VmbusDriver):
    """Answers what its devices are asked, each in a thread that runs from probe to remove."""

    message_type: ClassVar[int]
    versions: ClassVar[tuple[Version, ...]]  # newest first

    def __init__(self) -> None:
        self._served: dict[str, tuple[threading.Thread, int]] = {}

    def probe(self, device: VmbusDevice, matched_id: uuid.UUID) -> None:
        """Open the channel, and begin to serve."""
        device.channel.open(ring_bytes=RING_BYTES)
        stop = os.eventfd(0)
        thread = threading.Thread(target=self._serve, args=(device, stop), name=device.name, daemon=True)
        self._served[device.name] = (thread, stop)
        thread.start()

    def remove(self, device: VmbusDevice) -> None:
        """Stop serving; the channel is closed behind us."""
        thread, stop = self._served.pop(device.name)
        os.eventfd_write(stop, 1)
        thread.join()
        os.close(stop)

    def request(self, device: VmbusDevice, body: bytes) -> tuple[int, bytes]:
        """Do what the host asks; give a status and the body of the answer. ValueError for a body that is none."""
        raise NotImplementedError

    def after(self, device: VmbusDevice) -> None:
        """An answer to `request` lies in the ring."""

    def _serve(self, device: VmbusDevice, stop: int) -> None:
        channel, waiting = device.channel, select.poll()
        waiting.register(channel.fileno(), select.POLLIN)
        waiting.register(stop, select.POLLIN)
        try:
            while stop not in (fd for fd, _ in waiting.poll()):
                while packets := channel.recv_many():
                    for _, transaction, payload, _ in packets:
                        self._take(device, transaction, payload)
        except OSError as error:
            if error.errno not in GONE_ERRNOS:
                raise

    def _take(self, device: VmbusDevice, transaction: int, payload: bytes) -> None:
        try:
            answer, asked = self._answer(device, payload)
        except (ValueError, struct.error) as error:
            print(f"{device.name}: not understood: {error}", file=sys.stderr, flush=True)
            return
        device.channel.send(answer, transaction)
        if asked:
            self.after(device)

    def _answer(self, device: VmbusDevice, payload: bytes) -> tuple[bytes, bool]:
        pipe, _, *frame, kind, major, minor, size, _, transaction, _, _ = HEADER.unpack_from(payload)
        body = payload[HEADER.size : HEADER.size + size]
        status = S_OK
        if kind == NEGOTIATE:
            body = self._choose(body)
        elif kind == self.message_type:
            status, body = self.request(device, body)
        else:
            raise ValueError(f"a message of type {kind}")
        lengths = (HEADER.size - PIPE_BYTES + len(body), len(body))
        head = HEADER.pack(
            pipe, lengths[0], *frame, kind, major, minor, lengths[1], status, transaction, TRANSACTION | RESPONSE, 0
        )
        return head + body, kind != NEGOTIATE

    def _choose(self, offered: bytes) -> bytes:
        """Take the newest that both speak, of frame and message: one of each, or counts of 0."""
        frames, messages, _ = COUNTS.unpack_from(offered)
        versions = [VERSION.unpack_from(offered, COUNTS.size + VERSION.size * at) for at in range(frames + messages)]
        frame = next((ours for ours in FRAMES if ours in versions[:frames]), None)
        message = next((ours for ours in self.versions if ours in versions[frames:]), None)
        if frame is None or message is None:
            return COUNTS.pack(0, 0, 0)
        return COUNTS.pack(1, 1, 0) + VERSION.pack(*frame) + VERSION.pack(*message)


def run(driver: IntegrationDriver, what: str) -> int:
    """Be the process of one driver until SIGTERM, SIGINT or `end`, or until the bus has gone; give its exit code."""
    parser = argparse.ArgumentParser(description=what)
    parser.add_argument("--name", help="the machine (default: $PVBUS_MACHINE, or the one that runs)")
    parser.add_argument("--domain", type=int, default=0)
    arguments = parser.parse_args()
    signal.signal(signal.SIGTERM, signal.default_int_handler)
    try:
        with attach(arguments.name) as machine:
            machine.register_driver(driver, arguments.domain)
            machine.bus(arguments.domain).wait_gone()
        print(f"{driver.name}: the bus has gone", file=sys.stderr)
        return GONE
    except KeyboardInterrupt:
        return 0
    except (OSError, ValueError) as error:
        print(f"{driver.name}: {error}", file=sys.stderr)
        return REFUSED


def end() -> None:
    """End the process in order, from a driver's thread: its main thread waits in `run`."""
    signal.pthread_kill(threading.main_thread().ident or 0, signal.SIGTERM)
