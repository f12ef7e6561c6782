# SPDX-License-Identifier: Apache-2.0
"""vmbus_onmessage, and what a driver asks of a channel: open, close, another target CPU.

Messages are handled in the order in which the host has sent them, each at once: no handler waits. An OFFER lists its channel, a
RESCIND takes it off the list and ends every wait for it, in the same context (H12, zoo 10); what takes time, probing and removing
devices, is the bus's and is queued behind that (zoo 11). So the last message about a relid decides.

A wait for the host that is given up leaves nothing behind that its late answer could hit (zoo 27): the request is unlinked, and
the pages stay lent, in limbo, until the host has said what became of them; then they are taken back.
"""

from __future__ import annotations

import errno
from typing import TYPE_CHECKING, Any, ClassVar, Protocol

from pvbus.actors.runtime import vmbus_wire as wire
from pvbus.actors.runtime.vmbus_facts import (
    HOST_TO_GUEST,
    PAGE_BYTES,
    STATUS_SUCCESS,
    USER_DATA_BYTES,
    V0_13,
    VP_NO_INTERRUPT,
    Kind,
    Version,
    WireError,
    has_modify_response,
)
from pvbus.actors.runtime.vmbus_gpadl import gpadl_messages
from pvbus.actors.workqueue.channel import Channel, ChannelState, Lent, Pages
from pvbus.actors.workqueue.connection import Connection, ConnectionState, HostError, failed
from pvbus.actors.workqueue.waits import Listen, Quiesce, Requests, Steps, Until

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

GPADL_FIRST = 0xE1E10
VERSION_RESPONSE_BYTES = 16
VP_MAX = 0xFFFFFFFF  # a field of a message


class Devices(Protocol):
    """What becomes of a channel: the bus. Neither call waits."""

    def offered(self, channel: Channel) -> None:
        """Make a device of a new channel, and have it probed."""

    def rescinded(self, channel: Channel) -> None:
        """Have its device removed, and then `Channels.release` it."""

    def after(self, channel: Channel, call: Callable[[], None]) -> None:
        """Call when nothing that its device has begun is left; at once if it has no device."""


class Counters:
    """What came from the host and was of no use."""

    def __init__(self) -> None:
        self.messages = self.bad = self.duplicates = self.strangers = self.late = 0


class Channels:
    """All channels of a guest. `spawn` starts a waiting function that nobody waits for."""

    def __init__(
        self, connection: Connection, requests: Requests, spawn: Callable[[Steps[Any]], None], log: Callable[[str], None], *,
        rescind_queued: bool = False,
    ) -> None:  # fmt: skip
        self._rescind_queued = rescind_queued   # variant rescind-queue: H12
        self.connection, self._requests, self._spawn, self._log = connection, requests, spawn, log
        self.devices: Devices | None = None
        self.counters = Counters()
        self._listed: dict[int, Channel] = {}
        self._leaving: dict[int, Channel] = {}      # rescinded, relid not released
        self._gpadl, self._open_id, self._serial = GPADL_FIRST - 1, 0, 0
        self.unreleased = 0     # channels that have been offered and not released

    def __iter__(self) -> Iterator[Channel]:
        return iter(list(self._listed.values()))

    def find(self, relid: int) -> Channel | None:
        """Look up a channel that has been offered and not rescinded."""
        return self._listed.get(relid)

    # -------------------------------------------------------------------------------------------- onmessage

    def onmessage(self, payload: bytes) -> None:
        """Mirror vmbus_onmessage (X13). What is wrong with a message is logged and counted, with its bytes."""
        self.counters.messages += 1
        version = self.connection.version or V0_13
        try:
            kind = wire.kind_of(payload, version)
            if kind not in HOST_TO_GUEST:
                raise WireError(f"no handler for {kind.name}")
            if kind is Kind.VERSION_RESPONSE and len(payload) < VERSION_RESPONSE_BYTES:
                version = V0_13     # a host from before 1.1 says one byte
            message = wire.decode(payload, version)
        except WireError as error:
            self.counters.bad += 1
            self._log(f"VMBus message: {error}: {payload[:64].hex(' ')}")
            return
        self._HANDLERS[kind](self, message)

    def _on_offer(self, offer: wire.OfferChannel) -> None:
        same = [c for c in self if (c.offer.class_id, c.offer.instance_id) == (offer.class_id, offer.instance_id)]
        if same:
            self.counters.duplicates += 1
        elif self.connection.state is not ConnectionState.CONNECTED or not offer.relid:
            self.counters.strangers += 1
        elif offer.relid in self._listed or offer.relid in self._leaving:
            self.counters.bad += 1
            self._log(f"relid {offer.relid} is offered, and has not been released")
        else:
            self._serial += 1
            channel = Channel(offer, self.connection.epoch, self._serial)
            self._listed[offer.relid] = channel
            self.unreleased += 1
            channel.state = ChannelState.OPEN
            if self.devices is not None:
                self.devices.offered(channel)

    def _on_rescind(self, message: wire.Rescind) -> None:
        channel = self._listed.pop(message.relid, None)
        if channel is None:
            self.counters.strangers += 1    # unknown, or the second one (zoo 14)
            return
        self._leaving[message.relid] = channel
        if self._rescind_queued and self.devices is not None:
            self.devices.after(channel, lambda: self._take_away(channel))   # behind a wait that only this would end
        else:
            self._take_away(channel)

    def _take_away(self, channel: Channel) -> None:
        channel.gone = True
        self._requests.end_channel(channel.relid)
        if self.devices is not None:
            self.devices.rescinded(channel)

    def _on_all_offers(self, _: wire.AllOffersDelivered) -> None:
        """Nothing: every offer has been handled when it came."""

    def _on_reply(self, message: wire.ChannelMessage) -> None:
        if not self._requests.deliver(message):
            self._late(message)

    def _on_version(self, message: wire.VersionResponse) -> None:
        if not self._requests.deliver(message, every=True):
            self.counters.late += 1

    def _late(self, message: wire.ChannelMessage) -> None:
        """An answer that nobody waits for: take back what had been left to it."""
        self.counters.late += 1
        if isinstance(message, wire.OpenResult):
            channel = self.find(message.relid)
            if channel is not None and channel.late_open_id == message.open_id:
                channel.late_open_id = 0
                self._spawn(self._undo_open(channel, opened=message.status == STATUS_SUCCESS))
        elif isinstance(message, wire.GpadlCreated):
            channel = self.find(message.relid)
            lent = channel.lent.get(message.gpadl) if channel is not None else None
            if channel is not None and lent is not None and lent.limbo:
                lent.limbo = False
                if message.status == STATUS_SUCCESS:
                    self._spawn(self._teardown(channel, lent))
                else:
                    self._take_back(channel, lent)
        elif isinstance(message, wire.GpadlTorndown):
            for channel in self:
                lent = channel.lent.get(message.gpadl)
                if lent is not None and lent.limbo:
                    self._take_back(channel, lent)

    _HANDLERS: ClassVar[dict[Kind, Callable[[Channels, Any], None]]] = {
        Kind.OFFERCHANNEL: _on_offer, Kind.RESCIND: _on_rescind, Kind.ALLOFFERS_DELIVERED: _on_all_offers,
        Kind.OPEN_RESULT: _on_reply, Kind.GPADL_CREATED: _on_reply, Kind.GPADL_TORNDOWN: _on_reply,
        Kind.UNLOAD_RESPONSE: _on_reply, Kind.MODIFYCHANNEL_RESPONSE: _on_reply, Kind.VERSION_RESPONSE: _on_version,
    }  # fmt: skip

    # ------------------------------------------------------------------------------------------------ GPADLs

    def _establish(self, channel: Channel, pages: Pages) -> Steps[Lent]:
        """Mirror vmbus_establish_gpadl: header and bodies, then GPADL_CREATED. The pages are lent from the first message on."""
        self._gpadl = self._gpadl + 1 & 0xFFFFFFFF or 1     # relid 0 and handle 0 are nobody's
        lent = Lent(self._gpadl, pages)
        frames = tuple(pages.frames)
        try:
            messages = gpadl_messages(channel.relid, lent.gpadl, len(frames) * PAGE_BYTES, frames)
        except WireError as error:
            pages.free()
            raise failed(errno.EINVAL, str(error)) from None
        request = self._requests.enter(
            lambda m: isinstance(m, wire.GpadlCreated) and (m.relid, m.gpadl) == (channel.relid, lent.gpadl), channel.relid
        )
        channel.lent[lent.gpadl] = lent
        try:
            answer = yield from self.connection.ask(request, messages)
        except HostError:
            if not channel.gone:
                yield from self._teardown(channel, lent)    # the host may have had the header
            raise
        if not isinstance(answer, wire.GpadlCreated):
            self._still_there(channel)
            lent.limbo = True
            raise failed(errno.ETIMEDOUT, f"no answer to GPADL {lent.gpadl:#x}")
        if answer.status != STATUS_SUCCESS:
            self._take_back(channel, lent)
            raise HostError(errno.EDQUOT, answer.status, f"GPADL {lent.gpadl:#x} of {len(frames)} pages")
        self._still_there(channel)
        return lent

    def _teardown(self, channel: Channel, lent: Lent) -> Steps[bool]:
        """Mirror vmbus_teardown_gpadl. False: the host has not let go in time; the pages are taken back when it does."""
        channel.busy += 1
        request = self._requests.enter(
            lambda m: isinstance(m, wire.GpadlTorndown) and m.gpadl == lent.gpadl, channel.relid
        )
        try:
            answer = yield from self.connection.ask(request, [wire.GpadlTeardown(channel.relid, lent.gpadl)])
        except OSError as error:
            self._log(f"GPADL {lent.gpadl:#x} stays lent: {error}")
            answer = None
        finally:
            channel.busy -= 1
        if answer is None:
            lent.limbo = True
        elif not channel.gone:
            self._take_back(channel, lent)
        return answer is not None

    @staticmethod
    def _take_back(channel: Channel, lent: Lent) -> None:
        if channel.lent.pop(lent.gpadl, None) is not None:
            lent.pages.free()

    @staticmethod
    def _still_there(channel: Channel) -> None:
        if channel.gone:
            raise failed(errno.ENODEV)

    # ------------------------------------------------------------------------------------------ open, close

    def open(self, channel: Channel, pages: Pages, *, target_vp: int = 0, user_data: bytes = b"") -> Steps[None]:
        """Mirror vmbus_open. Takes the pages over: they are freed when the host does not know them any more, whatever comes.

        ENODEV: rescinded, even in the middle. EBUSY: open, or one that was given up is undecided. EINVAL. ETIMEDOUT. HostError.
        """
        wrong = len(user_data) > USER_DATA_BYTES or not 0 <= target_vp <= VP_MAX
        if channel.gone or channel.state is not ChannelState.OPEN or channel.late_open_id or wrong:
            pages.free()
            raise failed(errno.ENODEV if channel.gone else errno.EINVAL if wrong else errno.EBUSY)
        channel.state = ChannelState.OPENING
        channel.busy += 1
        lent = None
        try:
            lent = yield from self._establish(channel, pages)
            yield Listen(channel.relid)     # the first interrupt may come before OPEN_RESULT
            try:
                yield from self._open(channel, lent, target_vp, user_data)
            except OSError:
                yield Quiesce(channel.relid)
                raise
            channel.ring, channel.target_vp, channel.state = lent, target_vp, ChannelState.OPENED
        except HostError:
            if lent is not None and not channel.gone:
                yield from self._teardown(channel, lent)
            raise
        finally:
            channel.busy -= 1
            if channel.state is ChannelState.OPENING:
                channel.state = ChannelState.OPEN

    def _open(self, channel: Channel, lent: Lent, target_vp: int, user_data: bytes) -> Steps[None]:
        self._still_there(channel)
        self._open_id = open_id = self._open_id + 1 & 0xFFFFFFFF or 1
        channel.open_id = open_id
        message = wire.OpenChannel(
            relid=channel.relid, open_id=open_id, ring_gpadl=lent.gpadl, downstream_page=lent.pages.downstream_page,
            target_vp=target_vp if self.connection.version >= Version.WIN8 else 0, user_data=user_data,
        )  # fmt: skip
        request = self._requests.enter(
            lambda m: isinstance(m, wire.OpenResult) and (m.relid, m.open_id) == (channel.relid, open_id), channel.relid
        )
        answer = yield from self.connection.ask(request, [message])
        self._still_there(channel)
        if not isinstance(answer, wire.OpenResult):
            channel.late_open_id, lent.limbo = open_id, True
            raise failed(errno.ETIMEDOUT, f"no answer to OPENCHANNEL of relid {channel.relid}")
        if answer.status != STATUS_SUCCESS:
            raise HostError(errno.EAGAIN, answer.status, f"OPENCHANNEL of relid {channel.relid}")

    def _undo_open(self, channel: Channel, *, opened: bool) -> Steps[None]:
        """The host has decided about an open that was given up. Of a channel that is gone meanwhile nothing more is said."""
        channel.busy += 1
        try:
            for lent in [lent for lent in channel.lent.values() if lent.limbo]:
                lent.limbo = False
                if opened and not channel.gone:
                    opened = False
                    yield from self._post_quietly(wire.CloseChannel(channel.relid))
                if not channel.gone:
                    yield from self._teardown(channel, lent)
        finally:
            channel.busy -= 1

    def close(self, channel: Channel) -> Steps[None]:
        """Mirror vmbus_close: quiet first (zoo 25), CLOSECHANNEL, which has no answer, then the GPADL. EINVAL: not open."""
        if channel.state is not ChannelState.OPENED or channel.ring is None:
            raise failed(errno.EINVAL)
        lent, channel.ring, channel.state = channel.ring, None, ChannelState.CLOSING
        channel.busy += 1
        try:
            yield Quiesce(channel.relid)
            if not channel.gone:
                yield from self._post_quietly(wire.CloseChannel(channel.relid))
            if not channel.gone:
                yield from self._teardown(channel, lent)
        finally:
            channel.busy -= 1
            channel.state = ChannelState.OPEN

    def modify(self, channel: Channel, target_vp: int) -> Steps[None]:
        """Mirror vmbus_send_modifychannel: interrupts to another CPU. EOPNOTSUPP below 4.1; from 5.3 the host answers."""
        if self.connection.version < Version.WIN10_RS3_0:
            raise failed(errno.EOPNOTSUPP)
        if channel.gone or channel.state is not ChannelState.OPENED or not 0 <= target_vp < VP_NO_INTERRUPT:
            raise failed(errno.ENODEV if channel.gone else errno.EINVAL)
        message = wire.ModifyChannel(channel.relid, target_vp)
        if not has_modify_response(self.connection.version):
            yield from self.connection.must_post(message)
            channel.target_vp = target_vp
            return
        request = self._requests.enter(
            lambda m: isinstance(m, wire.ModifyChannelResponse) and m.relid == channel.relid, channel.relid
        )
        answer = yield from self.connection.ask(request, [message])
        self._still_there(channel)
        if not isinstance(answer, wire.ModifyChannelResponse):
            raise failed(errno.ETIMEDOUT)
        if answer.status != STATUS_SUCCESS:
            raise HostError(errno.EINVAL, answer.status, f"MODIFYCHANNEL of relid {channel.relid} to VP {target_vp}")
        channel.target_vp = target_vp

    def _post_quietly(self, message: wire.ChannelMessage) -> Steps[None]:
        try:
            yield from self.connection.must_post(message)
        except OSError as error:
            self._log(str(error))

    # ------------------------------------------------------------------------------------------------ the end

    def release(self, channel: Channel) -> Steps[None]:
        """Give the relid of a rescinded channel back, when its device is gone and nobody waits with it any more.

        The host let go of the rings before it rescinded, so its pages are free now; nothing of it is touched after that.
        """
        yield Until(lambda: channel.busy == 0)
        for lent in list(channel.lent.values()):
            self._take_back(channel, lent)
        channel.ring = None
        self.unreleased -= 1
        if self._leaving.get(channel.relid) is channel:
            del self._leaving[channel.relid]
            if channel.epoch == self.connection.epoch and self.connection.state is ConnectionState.CONNECTED:
                yield from self._post_quietly(wire.RelidReleased(channel.relid))

    def reset(self) -> None:
        """The connection has ended, and with it every channel: their devices are removed, nothing is said to the host."""
        channels, self._listed = list(self._listed.values()), {}
        self._leaving.clear()
        for channel in channels:
            self._take_away(channel)
