# SPDX-License-Identifier: Apache-2.0
"""The guest's connection with its VMBus host: version, pages, posting, and leaving.

    DISCONNECTED --connect--> CONNECTING --accepted--> CONNECTED --unload--> DISCONNECTING
         ^-------refused by all, time-out, post failed---------'      answer, time-out --> DISCONNECTED

Owns the interrupt page and the two monitor pages of the domain's segment, and the header's word that says how channels are
signalled. Pure: waits are yielded (waits.py). Requests are registered before they are posted, and unlinked however they end.
"""

from __future__ import annotations

import enum
import errno
import os
from typing import TYPE_CHECKING

from pvbus.actors.runtime import vmbus_wire as wire
from pvbus.actors.runtime.vmbus_facts import (
    PAGE_BYTES,
    PAYLOAD_BYTES_MAX,
    SPOKEN,
    STATE_OK,
    VMBUS_SINT,
    Version,
    connection_id,
    has_unload_response,
    uses_interrupt_page,
    version_text,
)
from pvbus.actors.workqueue.waits import Post, Reply, Request, Requests, Sleep, Steps
from pvbus.shm.hyperv import Frame, Header

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from pvbus.shm.memory import Memory

REPLY_S = 5.0
"""How long the driver waits for any answer of the host."""

HV_SUCCESS = 0
HV_INSUFFICIENT_MEMORY = 11
HV_INVALID_CONNECTION_ID = 18
HV_INSUFFICIENT_BUFFERS = 19

POST_TRIES_2012, POST_PAUSE_2012_S = 3, 0.1
POST_TRIES, POST_PAUSE_FIRST_S, POST_PAUSE_MAX_S = 100, 1e-6, 0.1
"""Today's kernels begin with a microsecond and double it; the sum stays below ten seconds."""

PAGES = (Frame.INTERRUPT, Frame.MONITOR, Frame.MONITOR + 1)


class ConnectionState(enum.StrEnum):
    """Where the connection stands."""

    DISCONNECTED = "disconnected"
    CONNECTING = "connecting"
    CONNECTED = "connected"
    DISCONNECTING = "disconnecting"


class HostError(OSError):
    """The host, or the hypervisor, has answered with a status: `status`. The errno is what drivers are told."""

    def __init__(self, number: int, status: int, what: str) -> None:
        super().__init__(number, f"{what}: status {status:#x}")
        self.status = status


def post_errno(status: int) -> int:
    """Give the errno for a status of HvPostMessage, as today's kernels have it."""
    if status == HV_INVALID_CONNECTION_ID:
        return errno.EAGAIN
    return errno.ENOBUFS if status in (HV_INSUFFICIENT_MEMORY, HV_INSUFFICIENT_BUFFERS) else errno.EINVAL


def failed(number: int, text: str = "") -> OSError:
    """Make an OSError."""
    return OSError(number, text or os.strerror(number))


class Connection:
    """One guest's. `versions` are tried in order; `stalls` brings the five seconds back that each request for offers took (H6).

    `epoch` counts connections: what belongs to an earlier one is over.
    """

    def __init__(
        self, memory: Memory, requests: Requests, log: Callable[[str], None], *,
        versions: Sequence[int] = SPOKEN, target_vp: int = 0, stalls: bool = False,
    ) -> None:  # fmt: skip
        self._memory, self._requests, self._log = memory, requests, log
        self._versions, self._target_vp, self._stalls = tuple(versions), target_vp, stalls
        self.state = ConnectionState.DISCONNECTED
        self.version = 0
        self.epoch = 0
        self.message_connection = 1

    # ---------------------------------------------------------------------------------------------- posting

    def post(self, message: wire.ChannelMessage) -> Steps[int]:
        """Mirror vmbus_post_msg (X17): post, and try again while the host has no buffer free. Gives the raw status."""
        leaving = self.state is ConnectionState.DISCONNECTING and not isinstance(message, wire.Unload)
        if leaving or self.state is ConnectionState.DISCONNECTED:
            raise failed(errno.ENOTCONN)
        payload = message.encode(self.version)
        if len(payload) > PAYLOAD_BYTES_MAX:
            raise failed(errno.EMSGSIZE)
        old = self.version < Version.WIN10
        tries, pause_s = (POST_TRIES_2012, POST_PAUSE_2012_S) if old else (POST_TRIES, POST_PAUSE_FIRST_S)
        status = yield Post(self.message_connection, payload)
        for _ in range(tries - 1):
            if status != HV_INSUFFICIENT_BUFFERS:
                break
            yield Sleep(pause_s)
            pause_s = pause_s if old else min(2 * pause_s, POST_PAUSE_MAX_S)
            status = yield Post(self.message_connection, payload)
        return int(status)

    def must_post(self, message: wire.ChannelMessage) -> Steps[None]:
        """Post, or raise HostError."""
        status = yield from self.post(message)
        if status != HV_SUCCESS:
            raise HostError(post_errno(status), status, f"posting {message.KIND.name}")

    def ask(self, request: Request, messages: Sequence[wire.ChannelMessage]) -> Steps[wire.ChannelMessage | None]:
        """Post the messages of a request and wait for its answer, which may come first. None: none came; see `gone`."""
        try:
            for message in messages:
                yield from self.must_post(message)
                if request.ended:   # taken away, or refused before it was all said
                    return request.answer
            answer: wire.ChannelMessage | None = yield Reply(request, REPLY_S)
            return answer
        finally:
            self._requests.unlink(request)

    # ------------------------------------------------------------------------------------------- connecting

    def connect(self) -> Steps[None]:
        """Mirror vmbus_connect (X11): from the highest version down. ECONNREFUSED, ETIMEDOUT, or HostError if it cannot post."""
        if self.state is not ConnectionState.DISCONNECTED:
            raise failed(errno.EISCONN)
        self.state = ConnectionState.CONNECTING
        try:
            for version in self._versions:
                if (yield from self._negotiate(version)):
                    self.state = ConnectionState.CONNECTED
                    self.epoch += 1
                    self._log(f"VMBus version {version_text(version)}")
                    return
            self._log("the host takes none of our versions")
            raise failed(errno.ECONNREFUSED)
        finally:
            if self.state is ConnectionState.CONNECTING:
                self.free()

    def free(self) -> None:
        """Give everything back that belongs to a connection."""
        self.state = ConnectionState.DISCONNECTED
        self.version, self.message_connection = 0, 1
        self._memory.store32(Header.FLAGS_ARE_RELIDS, 0, "hv.signalling")

    def _negotiate(self, version: int) -> Steps[bool]:
        self.version, self.message_connection = version, connection_id(version)
        for frame in PAGES:
            for at in range(frame * PAGE_BYTES, (frame + 1) * PAGE_BYTES, 8):
                self._memory.store64(at, 0, "hv.pages")
        # Before the contact: the first flag may be raised right behind the host's answer.
        self._memory.store32(Header.FLAGS_ARE_RELIDS, not uses_interrupt_page(version), "hv.signalling")
        contact = wire.InitiateContact(
            version=version, target_vp=self._target_vp if version >= Version.WIN8_1 else 0,
            interrupt_page=PAGES[0] * PAGE_BYTES, sint=VMBUS_SINT,
            monitor_host_to_guest=PAGES[1] * PAGE_BYTES, monitor_guest_to_host=PAGES[2] * PAGE_BYTES,
        )  # fmt: skip
        request = self._requests.enter(lambda message: isinstance(message, wire.VersionResponse))
        try:
            answer = yield from self.ask(request, [contact])
        except HostError as error:
            if error.status == HV_INVALID_CONNECTION_ID and self.message_connection != 1:
                return False    # a host that old does not know the connection: another version has another
            raise
        if not isinstance(answer, wire.VersionResponse):
            raise failed(errno.ETIMEDOUT, f"no answer to INITIATE_CONTACT of {version_text(version)}")
        if not answer.supported or answer.state != STATE_OK:
            self._log(f"the host refuses VMBus version {version_text(version)}")
            return False
        if version >= Version.WIN10_RS3_1:
            self.message_connection = answer.connection
        return True

    def request_offers(self) -> Steps[None]:
        """Mirror vmbus_request_offers (X12). Offers come as messages; nobody says here when they have all come.

        H6: the driver of 2012 then waits for a completion that nobody signals: ETIMEDOUT, always, after five seconds.
        """
        status = yield from self.post(wire.RequestOffers())
        if status != HV_SUCCESS:
            self._log(f"unable to request offers: status {status}")
            raise HostError(post_errno(status), status, "posting REQUESTOFFERS")
        if self._stalls:
            yield Sleep(REPLY_S)
            raise failed(errno.ETIMEDOUT)

    def unload(self) -> Steps[bool]:
        """Leave the host: it forgets us and all our channels. False: it did not say so within the time.

        0.13 has the message and no answer to it: what was posted before is worked off in order, so nobody has to wait.
        """
        if self.state is not ConnectionState.CONNECTED:
            return True
        self.state = ConnectionState.DISCONNECTING  # nothing may come behind UNLOAD: the host would not know of what it speaks
        try:
            if not has_unload_response(self.version):
                return (yield from self.post(wire.Unload())) == HV_SUCCESS
            request = self._requests.enter(lambda message: isinstance(message, wire.UnloadResponse))
            answer = yield from self.ask(request, [wire.Unload()])
        except HostError as error:
            self._log(str(error))
            return False
        else:
            return answer is not None
        finally:
            self._requests.end_all()
            self.free()
