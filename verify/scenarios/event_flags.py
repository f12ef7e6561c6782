# SPDX-License-Identifier: Apache-2.0
"""The host signals channels while the event tasklet scans their flags: is a signal ever left lying (E8)?

Contexts: the host (Server.signal_guest through Synic's event flags) and one a virtual CPU (a server: vmbus_isr and the event
tasklet of hv_interrupt.c). Before each signal the host writes a number into the channel's ring; the callback, which the tasklet
would call, reads it. So a signal that comes too early, or a flag that is lost, shows as a number that was never seen.
"""

from __future__ import annotations

import uuid
from collections.abc import Iterable
from functools import partial
from typing import TYPE_CHECKING, Any, Final

from pvbus.actors.hypervisor import synic_msrs
from pvbus.actors.hypervisor.synic import Synic, request_interrupt
from pvbus.actors.hypervisor.vmbus.channel import Channel, State
from pvbus.actors.hypervisor.vmbus.connection import ConnectionState
from pvbus.actors.hypervisor.vmbus.server import Server
from pvbus.actors.runtime.vmbus_facts import V0_13, V5_3
from pvbus.actors.runtime.vmbus_wire import InitiateContact, OpenChannel
from pvbus.shm import hyperv
from pvbus.shm._core_explored import EventPath, Memory
from pvbus.shm.hyperv import PAGE, SINT_VMBUS, Frame, Header, Vp, flag_word
from pvbus.shm.layout import Domain, Machine
from pvbus.verify.explorer.scenario import Scenario, Start, claimed, within
from pvbus.verify.scenarios import loops

if TYPE_CHECKING:
    import pvbus.shm.memory
    from pvbus.verify.explorer.model import Model

VECTOR: Final = 0x37
EVENT_PORT: Final = 2
GUIDS: Final = uuid.UUID(int=1)


class EventFlags(Scenario):
    """`signals` to `channels` in turn, whose interrupts go to `cpus` virtual CPUs in turn.

    `page`: a guest from before 2.4, to which flag 0 says that the interrupt page names the channels; all goes to CPU 0 then.
    The first `ahead` signals come before anybody runs.
    """

    ranges = within(channels=(1, 63), signals=(1, 64), cpus=(1, 8), ahead=(0, 64))
    name = "event-flags"
    claims = claimed("sc tso arm", {}, {"page": True}, {"cpus": 2, "signals": 2})
    server_type: type[Server] = Server

    def __init__(self, *, channels: int = 2, signals: int = 3, cpus: int = 1, page: bool = False, ahead: int = 0) -> None:
        if ahead > signals:
            raise ValueError(f"ahead={ahead}: there are {signals} signals")
        self.channels = channels
        self.signals = signals
        self.cpus = 1 if page else cpus
        self.page = page
        self.ahead = ahead

    def prepare(self, model: Model, variants: int) -> None:
        """Make the pages, with every flags page on, SINT2 unmasked, and the channels open."""
        self.runs = False
        self.irqs = [model.bell(f"irq{vp}") for vp in range(self.cpus)]
        self.exits = model.bell("exits")
        self.machine, self.domain, self.rings = (Memory(model, size) for size in (Machine.BYTES, Domain.BYTES, PAGE))
        self.hv: Any = Memory(model, hyperv.BYTES)  # as the room takes it for a mapped one
        for name in ("machine", "domain", "hv", "rings"):
            model.name(getattr(self, name), name)
        self.machine.store32(Machine.VARIANTS, variants)
        self.hv.store32(Header.FLAGS_ARE_RELIDS, not self.page)
        self.path = EventPath(self.machine, {0: self.domain})
        self.path.set_hyperv(0, self.hv, -1)
        synic = self._synic(model)
        for vp in range(self.cpus):
            self.hv.store32(Vp.at(vp, Vp.VECTOR), VECTOR)
            synic.write_msr(vp, synic_msrs.SIEFP, Frame.of_vp(vp, Frame.EVENT_FLAGS) << 12 | synic_msrs.ENABLE)
            synic.write_msr(vp, synic_msrs.SINT0 + SINT_VMBUS, VECTOR)
            synic.write_msr(vp, synic_msrs.SCONTROL, synic_msrs.ENABLE)
        self._signal(self._server(synic), range(1, self.ahead + 1))
        self.runs = True

    def start(self, model: Model) -> Iterable[Start]:
        """Give the host and the CPUs."""
        self.seen = [0] * (self.channels + 1)
        host = self._server(self._synic(model))
        yield "host", partial(self._signal, host, range(self.ahead + 1, self.signals + 1)), False
        for vp in range(self.cpus):
            yield f"cpu{vp}", partial(self._cpu, model, vp), True

    def _synic(self, model: Model) -> Synic:
        def interrupt(vp: int, vector: int) -> None:
            request_interrupt(self.hv, vp, vector)
            if self.runs:    # before anybody runs nobody has to be woken
                loops.ring_eventfd(model, self.hv, self.irqs[vp], "irq")

        synic = Synic(self.hv, self.cpus, interrupt, clock=lambda: 1)
        synic.create_event_port(EVENT_PORT, SINT_VMBUS)
        return synic

    def _server(self, synic: Synic) -> Server:
        server = self.server_type(
            lambda _payload: 0, self, lambda flag, vp: self._raise_flag(synic, flag, vp), self.cpus
        )
        server.link.version, server.link.state = V0_13 if self.page else V5_3, ConnectionState.CONNECTED
        server.link.contact = InitiateContact(version=server.link.version, interrupt_page=Frame.INTERRUPT * PAGE)
        for relid in range(1, self.channels + 1):
            opened = OpenChannel(relid=relid, open_id=relid, ring_gpadl=relid, target_vp=relid % self.cpus)
            server.offers.load(
                [*server.offers, Channel(
                    relid=relid, generation=relid, class_id=GUIDS, instance_id=uuid.UUID(int=relid), state=State.OPEN,
                    opened=opened,
                )],
                relid,
            )  # fmt: skip
        return server

    @staticmethod
    def _raise_flag(synic: Synic, flag: int, vp: int) -> None:
        synic.signal(EVENT_PORT, flag, vp)

    def find(self, frame: int) -> tuple[pvbus.shm.memory.Memory, int] | None:
        """Give the host a page of the guest."""
        return self.hv, frame * PAGE

    def relid_of(self, number: int) -> int:
        """Say which channel the number-th signal is for."""
        return 1 + number % self.channels

    def _signal(self, server: Server, numbers: Iterable[int]) -> None:
        for number in numbers:
            relid = self.relid_of(number)
            self.rings.store64(8 * relid, number, "ring.write")
            channel = server.offers.get(relid)
            assert channel is not None
            server.signal_guest(channel)

    def _cpu(self, model: Model, vp: int) -> None:
        def callback(relid: int) -> None:
            if relid <= self.channels:
                self.seen[relid] = self.rings.load64(8 * relid, "ring.read")

        loops.hyperv_cpu(model, self.path, self.hv, vp, self.irqs[vp], exits=self.exits, ring=callback)

    def broken(self, model: Model, stuck: list[str]) -> str | None:
        """No flag is set, and each callback has seen what was written last."""
        left = self._left()
        for relid in range(1, self.channels + 1):
            last = max((n for n in range(1, self.signals + 1) if self.relid_of(n) == relid), default=0)
            if self.seen[relid] != last:
                return f"channel {relid}: {last} was written and signalled, its callback saw {self.seen[relid]}; {left}"
        return f"{left}; every CPU sleeps" if left else None

    def _left(self) -> str:
        words = [flag_word(Frame.of_vp(vp, Frame.EVENT_FLAGS), SINT_VMBUS, 0) for vp in range(self.cpus)]
        flags, page = [self.hv.load64(word) for word in words], self.hv.load64(Frame.INTERRUPT * PAGE)
        return f"flags {flags} are set, and {page:#x} in the interrupt page" if any(flags) or page else ""
