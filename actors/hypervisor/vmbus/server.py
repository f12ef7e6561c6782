# SPDX-License-Identifier: Apache-2.0
"""The VMBus host of one domain: what the guest's channel messages do, and what the host says of itself.

    Disconnected ──INITIATE──► Connecting ──devices closed──► VERSION_RESPONSE ──► Connected (or Disconnected: refused)
         ▲                                                                            │ INITIATE: from the beginning
         └───────── UNLOAD_RESPONSE ◄──devices closed── Disconnecting ◄────UNLOAD─────┘

Pure: messages leave through `post`, interrupts through `raise_flag`, guest memory is found by `memory`. Messages that find no
buffer wait in a queue, in order, until `flush`. What a guest must not do is counted and changes nothing (`Counters`); it is
answered where a guest could wait for an answer. Where real hosts differ:

* a second REQUESTOFFERS is answered by the terminator alone; the 2012 driver asks again with every driver that registers;
* an OPEN of a channel that is open, or with rings that are none, is answered with STATUS_UNSUCCESSFUL; the same OPEN again,
  while its first answer is under way, is not;
* after a RESCIND no OPEN is answered; GPADL messages are, a GPADL_HEADER by a failure;
* a TEARDOWN of the rings of an open channel is a violation, and answered when the channel has closed.

Nothing that blocks, and nothing that knows of SynIC, processes or rings may be added here.
"""

from __future__ import annotations

from collections import deque
from typing import TYPE_CHECKING, Any, ClassVar

import msgspec

from pvbus.actors.hypervisor.vmbus.channel import GONE_FOR_GUEST, UNKNOWN_TO_GUEST, Channel, Device, State
from pvbus.actors.hypervisor.vmbus.connection import Connection, ConnectionState, Link, contact_problem, version_response
from pvbus.actors.hypervisor.vmbus.gpadl import Gpadl, GpadlState, GpadlTable, GuestMemory
from pvbus.actors.hypervisor.vmbus.handle import ChannelHandle
from pvbus.actors.hypervisor.vmbus.offers import Offers, offer_message
from pvbus.actors.hypervisor.vmbus.snapshot import Counters
from pvbus.actors.runtime import vmbus_wire as wire
from pvbus.actors.runtime.vmbus_facts import (
    HOST_TO_GUEST,
    STATUS_SUCCESS,
    STATUS_UNSUCCESSFUL,
    V5_3,
    VP_NO_INTERRUPT,
    Kind,
    WireError,
    has_modify_response,
    has_unload_response,
    uses_interrupt_page,
)

if TYPE_CHECKING:
    import uuid
    from collections.abc import Callable

REPLIES_MAX = 256
"""With so many messages unsent no further one of the guest is taken, so the queue is bounded: one message answers with 256 at
most (offers), and the host adds an offer and a rescind a channel."""


class Server:
    """Serve one domain.

    `post(payload)` gives a hypercall status; not 0 = later, by `flush`. `raise_flag(flag, vp)` raises an event flag of the VMBus
    SINT on a virtual CPU. What an heir needs is in snapshot.py.
    """

    def __init__(
        self, post: Callable[[bytes], int], memory: GuestMemory, raise_flag: Callable[[int, int], None], vcpus: int = 1
    ) -> None:
        self._post, self._memory, self._raise_flag, self._vcpus = post, memory, raise_flag, vcpus
        self.link = Link()
        self.offers = Offers()
        self.gpadls = GpadlTable(memory)
        self.devices: dict[int, Device] = {}
        self.outgoing: deque[bytes] = deque()
        self.counters = Counters()
        self.last_violation = ""
        self._connection = Connection(memory)

    # ------------------------------------------------------------------------------------------------ messages

    def on_message(self, payload: bytes) -> bool:
        """Take a message of the guest. False: not taken, there is no room for the answer (INSUFFICIENT_BUFFERS)."""
        version = self.link.version or V5_3
        try:
            kind = wire.kind_of(payload, version)
            if kind in HOST_TO_GUEST:
                raise WireError(f"{kind.name} from a guest")
            if kind is not Kind.INITIATE_CONTACT and len(self.outgoing) >= REPLIES_MAX:
                self.counters.refused += 1
                return False
            if kind is not Kind.INITIATE_CONTACT and self.link.state is not ConnectionState.CONNECTED:
                raise WireError(f"{kind.name} while {self.link.state}")
            message = wire.decode(payload, version)
            self.counters.messages += 1
            self._HANDLERS[kind](self, message)
        except WireError as error:
            self._violation(str(error))
            self._refuse_gpadl(payload)
        return True

    def _violation(self, text: str) -> None:
        self.counters.violations += 1
        self.last_violation = text

    def _refuse_gpadl(self, payload: bytes) -> None:
        """Answer a GPADL_HEADER of which at least the names can be read: its sender waits."""
        fixed = wire.GpadlHeader.WORDS_AT
        if self.link.state is ConnectionState.CONNECTED and len(payload) >= fixed and payload[:4] == b"\x08\0\0\0":
            relid, gpadl = (int.from_bytes(payload[at : at + 4], "little") for at in (8, 12))
            self._send(wire.GpadlCreated(relid, gpadl, STATUS_UNSUCCESSFUL))

    def _send(self, message: wire.ChannelMessage) -> None:
        self.outgoing.append(message.encode(self.link.version))
        self.flush()

    def flush(self) -> bool:
        """Post what waits, in order; False: something still waits."""
        while self.outgoing:
            if self._post(self.outgoing[0]) != STATUS_SUCCESS:
                return False
            self.outgoing.popleft()
        return True

    # ---------------------------------------------------------------------------------------------- connection

    def _initiate(self, contact: wire.InitiateContact) -> None:
        """Mirror INITIATE_CONTACT: forget everything the guest had, then answer. The last of several is answered."""
        self.outgoing.clear()
        self.link.contact, self.link.state = contact, ConnectionState.CONNECTING
        self._reset()

    def _unload(self, _: wire.Unload) -> None:
        self.outgoing.clear()
        self.link.state = ConnectionState.DISCONNECTING
        self._reset()

    def _reset(self) -> None:
        """Take every channel from the guest; goes on in `_progress` when all devices have closed."""
        self.gpadls.clear()
        self.link.offers_requested = False
        for channel in self.offers:
            state, channel.reopen = channel.state, None
            if state is State.REVOKED:
                self._forget(channel)
            elif state is State.OPENING:
                channel.state = State.OPENING_CLIENT_RELEASE
            elif state in (State.CLOSING, State.CLOSING_REOPEN):
                channel.state = State.CLOSING_CLIENT_RELEASE
            elif state is State.OPEN:
                channel.state = State.CLOSING_CLIENT_RELEASE
                self._close_device(channel)
            elif state in (State.CLOSED, State.REOFFERED):
                channel.state = State.CLIENT_RELEASED
        self._progress()

    def _progress(self) -> None:
        """End a reset that no device holds up any more."""
        if any(channel.state is not State.CLIENT_RELEASED for channel in self.offers):
            return
        if self.link.state is ConnectionState.DISCONNECTING:
            if has_unload_response(self.link.version):
                self._send(wire.UnloadResponse())
            self.link = Link()
        elif self.link.state is ConnectionState.CONNECTING and self.link.contact is not None:
            contact = self.link.contact
            problem = contact_problem(contact, self._memory, self._vcpus)
            if problem:
                self._violation(problem)
            answer = version_response(contact, problem)
            self.link = Link(version=contact.version)
            accepted = answer.supported and not answer.state
            if accepted:
                self.link = Link(
                    state=ConnectionState.CONNECTED, version=contact.version, contact=contact, target_vp=contact.target_vp
                )
            self._send(answer)
            if not accepted:
                self.link = Link()

    def _request_offers(self, _: wire.RequestOffers) -> None:
        self.link.offers_requested = True
        for channel in self.offers:
            if channel.state is State.CLIENT_RELEASED:
                self._offer(channel)
        self._send(wire.AllOffersDelivered())

    def _offer(self, channel: Channel) -> None:
        channel.state = State.CLOSED
        self._send(offer_message(channel))

    # ------------------------------------------------------------------------------------------------ channels

    def _known(self, relid: int) -> Channel:
        channel = self.offers.get(relid)
        if channel is None or channel.state in UNKNOWN_TO_GUEST:
            raise WireError(f"relid {relid} is not offered")
        return channel

    def _open_channel(self, request: wire.OpenChannel) -> None:
        channel = self._known(request.relid)
        if channel.state in GONE_FOR_GUEST:
            self.counters.overtaken += 1
        elif channel.state is State.CLOSED:
            self._open(channel, request)
        elif channel.state is State.CLOSING:
            channel.state, channel.reopen = State.CLOSING_REOPEN, request
        else:
            self._violation(f"OPENCHANNEL of relid {request.relid}, which is {channel.state}")
            under_way = channel.opened if channel.state is State.OPENING else channel.reopen
            if under_way is None or under_way.open_id != request.open_id:
                self._send(wire.OpenResult(request.relid, request.open_id, STATUS_UNSUCCESSFUL))

    def _open(self, channel: Channel, request: wire.OpenChannel) -> None:
        channel.state, channel.opened = State.OPENING, request
        status = self._ask_device(channel, request)
        if status is not None:
            self.device_opened(channel, status)

    def _ask_device(self, channel: Channel, request: wire.OpenChannel, *, resumed: bool = False) -> int | None:
        pages = self.gpadls.ring_pages(request.ring_gpadl, request.relid, request.downstream_page, resumed=resumed)
        by_page = uses_interrupt_page(self.link.version)
        if pages is None or not (by_page or request.target_vp < self._vcpus or request.target_vp == VP_NO_INTERRUPT):
            rings = f"GPADL {request.ring_gpadl:#x} at page {request.downstream_page}"
            self._violation(f"OPENCHANNEL of relid {request.relid}: {rings}, VP {request.target_vp}")
            return STATUS_UNSUCCESSFUL
        return self.devices[channel.relid].on_open(ChannelHandle(self, channel), pages)

    def device_opened(self, channel: Channel, status: int) -> None:
        """End an open: tell the guest, or nobody if it has left meanwhile."""
        if channel.state is State.OPENING_CLIENT_RELEASE:
            channel.state = State.CLOSING_CLIENT_RELEASE
            if status != STATUS_SUCCESS:
                self.device_closed(channel)
            else:
                self._close_device(channel)
                self._progress()
        elif channel.state is State.OPENING and channel.opened is not None:
            request = channel.opened
            if status == STATUS_SUCCESS:
                channel.state = State.OPEN
            else:
                channel.state, channel.opened = State.CLOSED, None
            self._send(wire.OpenResult(channel.relid, request.open_id, status))
            if status == STATUS_SUCCESS:
                self.devices[channel.relid].on_opened()
            else:
                self._torn_down(channel)

    def _close_channel(self, request: wire.CloseChannel) -> None:
        channel = self._known(request.relid)
        if channel.state in GONE_FOR_GUEST:
            self.counters.overtaken += 1
        elif channel.state is State.OPEN:
            channel.state = State.CLOSING
            self._close_device(channel)
        else:
            self._violation(f"CLOSECHANNEL of relid {request.relid}, which is {channel.state}")

    def _close_device(self, channel: Channel) -> None:
        if self.devices[channel.relid].on_close():
            self._closed(channel)

    def device_closed(self, channel: Channel) -> None:
        """End a close that the device had left open."""
        self._closed(channel)
        self._progress()

    def _closed(self, channel: Channel) -> None:
        if channel.state is State.CLOSING_CLIENT_RELEASE:
            channel.state, channel.opened = State.CLIENT_RELEASED, None
        elif channel.state in (State.CLOSING, State.CLOSING_REOPEN):
            channel.state, channel.opened = State.CLOSED, None
            request, channel.reopen = channel.reopen, None
            self._torn_down(channel)
            if request is not None:
                self._open(channel, request)

    def _released(self, message: wire.RelidReleased) -> None:
        channel = self._known(message.relid)
        if channel.state not in GONE_FOR_GUEST:
            raise WireError(f"RELID_RELEASED of relid {message.relid}, which is {channel.state}")
        for gpadl in self.gpadls.of(channel.relid):
            self.gpadls.remove(gpadl.gpadl)
        if channel.state is State.REVOKED:
            self._forget(channel)
        elif self.link.offers_requested:
            self._offer(channel)
        else:
            channel.state = State.CLIENT_RELEASED

    def _modify(self, message: wire.ModifyChannel) -> None:
        channel = self._known(message.relid)
        fits = message.target_vp < self._vcpus and channel.state is State.OPEN and channel.opened is not None
        if fits and channel.opened is not None:
            channel.opened = msgspec.structs.replace(channel.opened, target_vp=message.target_vp)
        elif channel.state in GONE_FOR_GUEST:
            self.counters.overtaken += 1
        else:
            self._violation(f"MODIFYCHANNEL of relid {message.relid}, which is {channel.state}, to VP {message.target_vp:#x}")
        if has_modify_response(self.link.version):
            self._send(wire.ModifyChannelResponse(message.relid, STATUS_SUCCESS if fits else STATUS_UNSUCCESSFUL))

    def _forget(self, channel: Channel) -> None:
        self.offers.remove(channel)
        self.devices.pop(channel.relid, None)

    def resume(self, channel: Channel) -> None:
        """Go on where the server before this one ended (snapshot.py): its devices are dead, and what they closed is closed."""
        state, data, channel.device_state = channel.state, channel.device_state, b""
        if state is State.OPENING and channel.opened is not None:
            self._open(channel, channel.opened)
        elif state in (State.CLOSING, State.CLOSING_REOPEN, State.CLOSING_CLIENT_RELEASE):
            self.device_closed(channel)
        elif state is State.OPENING_CLIENT_RELEASE:
            self.device_opened(channel, STATUS_UNSUCCESSFUL)
        elif state is State.OPEN and channel.opened is not None:
            status = self._ask_device(channel, channel.opened, resumed=True)
            if status == STATUS_SUCCESS:
                self.devices[channel.relid].restore(data)
            else:
                channel.state = State.CLOSED if status is not None else state   # a device that has refused has nothing to let go
                self.rescind(channel.relid)

    # -------------------------------------------------------------------------------------------------- GPADLs

    def _gpadl_header(self, header: wire.GpadlHeader) -> None:
        channel = self._known(header.relid)
        if channel.state in GONE_FOR_GUEST:
            self.counters.overtaken += 1
            self._send(wire.GpadlCreated(header.relid, header.gpadl, STATUS_UNSUCCESSFUL))
            return
        self._gpadl_grown(self.gpadls.begin(header))

    def _gpadl_body(self, body: wire.GpadlBody) -> None:
        self._gpadl_grown(self.gpadls.extend(body))

    def _gpadl_grown(self, gpadl: Gpadl) -> None:
        if not gpadl.missing_words:
            accepted = self.gpadls.complete(gpadl)
            self._send(wire.GpadlCreated(gpadl.relid, gpadl.gpadl, STATUS_SUCCESS if accepted else STATUS_UNSUCCESSFUL))

    def _gpadl_teardown(self, message: wire.GpadlTeardown) -> None:
        gpadl = self.gpadls.get(message.gpadl)
        if gpadl is None or gpadl.relid != message.relid or gpadl.state is GpadlState.TEARING_DOWN:
            raise WireError(f"GPADL_TEARDOWN of {message.gpadl:#x}, which relid {message.relid} does not have")
        channel = self.offers.get(gpadl.relid)
        if channel is not None and self._mapped(channel, gpadl):
            gpadl.state = GpadlState.TEARING_DOWN
            if channel.state is not State.CLOSING:
                self._violation(f"GPADL_TEARDOWN of {message.gpadl:#x}, relid {message.relid}'s rings, which is {channel.state}")
            return
        self.gpadls.remove(gpadl.gpadl)
        self._send(wire.GpadlTorndown(gpadl.gpadl))

    @staticmethod
    def _mapped(channel: Channel, gpadl: Gpadl) -> bool:
        return channel.opened is not None and channel.opened.ring_gpadl == gpadl.gpadl

    def _torn_down(self, channel: Channel) -> None:
        """Give back what the guest wanted back while the channel was open."""
        for gpadl in self.gpadls.of(channel.relid):
            if gpadl.state is GpadlState.TEARING_DOWN:
                self.gpadls.remove(gpadl.gpadl)
                self._send(wire.GpadlTorndown(gpadl.gpadl))

    _HANDLERS: ClassVar[dict[Kind, Callable[[Server, Any], None]]] = {
        Kind.INITIATE_CONTACT: _initiate, Kind.UNLOAD: _unload, Kind.REQUESTOFFERS: _request_offers,
        Kind.OPENCHANNEL: _open_channel, Kind.CLOSECHANNEL: _close_channel, Kind.RELID_RELEASED: _released,
        Kind.MODIFYCHANNEL: _modify, Kind.GPADL_HEADER: _gpadl_header, Kind.GPADL_BODY: _gpadl_body,
        Kind.GPADL_TEARDOWN: _gpadl_teardown,
    }  # fmt: skip

    # -------------------------------------------------------------------------------------------------- the host

    def offer(
        self, class_id: uuid.UUID, instance_id: uuid.UUID, device: Device, *, flags: int = 0, user_data: bytes = b"",
        monitor_id: int | None = None, latency_100ns: int = 0,
    ) -> int:  # fmt: skip
        """Offer a device; give its relid. EEXIST: that instance is offered; ENOSPC: too many channels.

        A guest that has asked for offers hears of it at once; one that has not released the instance's last offer, after that.
        """
        wire.OfferChannel(class_id=class_id, instance_id=instance_id, relid=0, flags=flags, user_data=user_data).encode(V5_3)
        channel = self.offers.add(class_id, instance_id)
        channel.flags, channel.user_data, channel.monitor_id, channel.latency_100ns = flags, user_data, monitor_id, latency_100ns
        self.devices[channel.relid] = device
        if channel.state is State.CLIENT_RELEASED and self.link.offers_requested:
            self._offer(channel)
        return channel.relid

    def rescind(self, relid: int, generation: int | None = None) -> bool:
        """Take a channel from the guest; False: there is none, or it is another generation's (zoo 15), or it is gone already.

        A device that is open, or about to be, has let the rings go before the guest hears of it.
        """
        channel = self.offers.get(relid)
        if channel is None or generation not in (None, channel.generation) or channel.state is State.REVOKED:
            return False
        state, channel.opened, channel.reopen = channel.state, None, None
        channel.state = State.REVOKED
        if state in (State.OPEN, State.OPENING, State.OPENING_CLIENT_RELEASE):
            self.devices[relid].on_close()
        self.devices.pop(relid)
        if state in UNKNOWN_TO_GUEST:
            self._forget(channel)
            self._progress()
        elif state is not State.REOFFERED:
            self._torn_down(channel)
            self._send(wire.Rescind(relid))
        return True

    def on_signal(self, relid: int) -> None:
        """The guest has signalled a channel's event connection (from 2.4)."""
        channel = self.offers.get(relid)
        if channel is None or channel.state is not State.OPEN:
            self.counters.stray_signals += 1
            return
        self.devices[relid].on_signal()

    def on_event(self) -> None:
        """The guest has signalled connection 2 (below 2.4): look at its half of the interrupt page."""
        for relid in self._connection.take_signals(self.link):
            self.on_signal(relid)

    def set_guest_signal(self, relid: int, *, wrong_word: bool = False) -> None:
        """The guest sets a channel's bit in the interrupt page, before it signals connection 2."""
        self._connection.set_guest_signal(self.link, relid, wrong_word=wrong_word)

    def signal_guest(self, channel: Channel) -> None:
        """Interrupt the guest for a channel, in the way of its version."""
        vp = channel.opened.target_vp if channel.opened is not None else VP_NO_INTERRUPT
        if uses_interrupt_page(self.link.version):
            self._connection.set_signal(self.link, channel.relid)
            self._raise_flag(0, 0)
        elif vp != VP_NO_INTERRUPT:
            self._raise_flag(channel.relid, vp)

    def due_ns(self) -> int | None:
        """When `tick` is wanted; None: never."""
        due = [self.devices[c.relid].due_ns() for c in self.offers if c.state is State.OPEN]
        return min((when for when in due if when is not None), default=None)

    def tick(self, now_ns: int) -> None:
        """Post what waits, and let devices do what is due."""
        self.flush()
        for channel in self.offers:
            if channel.state is State.OPEN:
                self.devices[channel.relid].tick(now_ns)
