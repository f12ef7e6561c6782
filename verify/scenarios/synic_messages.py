# SPDX-License-Identifier: Apache-2.0
"""Messages of the host on their way through SynIC's slots into the guest's work ring (E6, and on two CPUs E7).

Contexts: the host (a server: Synic posts through its ports, then answers every EOM) and one a virtual CPU (a server: vmbus_isr
and its tasklets, hv_interrupt.c, whenever it is interrupted). With `poller` a CPU that has crashed looks into CPU 0's slot
once, as nobody has called it. What the guest has taken is read from the work ring, which no workqueue empties here.
"""

from __future__ import annotations

from collections.abc import Iterable
from functools import partial
from typing import TYPE_CHECKING, Any, Final

from pvbus.actors.hypervisor import synic_msrs
from pvbus.actors.hypervisor.synic import HvStatus, Synic, request_interrupt
from pvbus.shm import hyperv
from pvbus.shm._core_explored import EventPath, Memory
from pvbus.shm.hyperv import MESSAGE_VMBUS, SINT_VMBUS, Frame, Header, Slot, Vp, Work
from pvbus.shm.layout import Domain, Machine
from pvbus.verify.explorer.scenario import Scenario, Start, claimed, within
from pvbus.verify.scenarios import loops

if TYPE_CHECKING:
    from pvbus.verify.explorer.model import Model

VECTOR: Final = 0x37
PORTS_MAX: Final = 16  # of messages, in a domain
SLOT: Final = Slot.at(Frame.of_vp(0, Frame.MESSAGES), SINT_VMBUS, 0)


class SynicMessages(Scenario):
    """`messages` in turn to `cpus` virtual CPUs, through `posters` ports of each; the first `ahead` of them before anybody runs.

    With `poller` each message has a type of its own: of two messages of one type even a compare-exchange cannot tell which is
    which (SynicSlot shows it), and on real machines the crash has stopped the other CPUs before somebody polls.
    """

    ranges = within(messages=(1, 12), cpus=(1, 8), posters=(1, 16), ahead=(0, 12))
    name = "synic-messages"
    claims = (
        *claimed("sc tso arm", {"messages": 1, "cpus": 2, "posters": 1}, {"messages": 2}),
        *claimed("sc tso arm", {"messages": 2, "posters": 1, "ahead": 2, "poller": True}),
        *claimed("sc tso", {"ahead": 1}, {"cpus": 2, "posters": 1, "ahead": 2}),
        *claimed("arm", {"messages": 2, "posters": 1, "ahead": 2}),
    )
    synic_type: type[Synic] = Synic

    def __init__(self, *, messages: int = 3, cpus: int = 1, posters: int = 2, poller: bool = False, ahead: int = 0) -> None:
        if ahead > messages:
            raise ValueError(f"ahead={ahead}: there are {messages} messages")
        if cpus * posters > PORTS_MAX:
            raise ValueError(f"cpus={cpus} posters={posters}: a domain has {PORTS_MAX} message ports")
        self.messages = messages
        self.ahead = ahead
        self.cpus = cpus
        self.posters = posters
        self.poller = poller

    def prepare(self, model: Model, variants: int) -> None:
        """Make the pages, with every message page on and SINT2 unmasked, as the guest leaves them at bring-up."""
        self.runs = False
        self.irqs = [model.bell(f"irq{vp}") for vp in range(self.cpus)]
        self.exits, self.wrmsr = model.bell("exits"), model.bell("wrmsr")
        self.machine, self.domain = (Memory(model, size) for size in (Machine.BYTES, Domain.BYTES))
        self.hv: Any = Memory(model, hyperv.BYTES)  # as the room takes it for a mapped one
        for name in ("machine", "domain", "hv"):
            model.name(getattr(self, name), name)
        self.machine.store32(Machine.VARIANTS, variants)
        self.path = EventPath(self.machine, {0: self.domain})
        self.path.set_hyperv(0, self.hv, -1)
        host = self._host(model)
        for vp in range(self.cpus):
            self.hv.store32(Vp.at(vp, Vp.VECTOR), VECTOR)
            host.write_msr(vp, synic_msrs.SIMP, Frame.of_vp(vp, Frame.MESSAGES) << 12 | synic_msrs.ENABLE)
            host.write_msr(vp, synic_msrs.SINT0 + SINT_VMBUS, VECTOR)
            host.write_msr(vp, synic_msrs.SCONTROL, synic_msrs.ENABLE)
        self._make_ports(host)
        self._post(host, range(1, self.ahead + 1))
        self.runs = True

    def start(self, model: Model) -> Iterable[Start]:
        """Give the host, the CPUs, and perhaps the poller."""
        self.polled: list[int] = []
        host = self._host(model)
        self._make_ports(host)
        if self.poller:
            yield "poller", partial(self.poll, model), False
        yield "host", partial(self._serve, model, host), True
        for vp in range(self.cpus):
            yield f"cpu{vp}", partial(self._cpu, model, vp), True

    def _cpu(self, model: Model, vp: int) -> None:
        loops.hyperv_cpu(model, self.path, self.hv, vp, self.irqs[vp], exits=self.exits)

    def _host(self, model: Model) -> Synic:
        def interrupt(vp: int, vector: int) -> None:
            request_interrupt(self.hv, vp, vector)
            if self.runs:    # before anybody runs nobody has to be woken
                loops.ring_eventfd(model, self.hv, self.irqs[vp], "irq")

        return self.synic_type(self.hv, self.cpus, interrupt, clock=lambda: 1)

    def _make_ports(self, host: Synic) -> None:
        for vp in range(self.cpus):
            for poster in range(self.posters):
                host.create_message_port(1 + vp * self.posters + poster, SINT_VMBUS, vp)

    def _post(self, host: Synic, numbers: Iterable[int]) -> None:
        for number in numbers:
            vp = number % self.cpus
            port = 1 + vp * self.posters + number // self.cpus % self.posters
            kind = MESSAGE_VMBUS + number if self.poller else MESSAGE_VMBUS
            status = host.post(port, kind, number.to_bytes(8, "little"))
            if status != HvStatus.SUCCESS:
                raise AssertionError(status)

    def _serve(self, model: Model, host: Synic) -> None:
        self._post(host, range(self.ahead + 1, self.messages + 1))
        while True:
            loops.await_eventfd(model, self.hv, self.exits, "exits")
            self.attend(model, host)

    def attend(self, model: Model, host: Synic) -> None:
        """Answer the EOMs of CPUs; the poller's is a write to the register."""
        host.attend_eoms()
        if self.poller and model.take(self.wrmsr, "wrmsr"):
            host.write_msr(0, synic_msrs.EOM, 0)

    def poll(self, model: Model) -> None:
        """Look at the slot of CPU 0 as the crash path does: copy, free, pay the EOM that is owed. The tasklet does it in C."""
        memory = self.hv
        kind = memory.load32_acquire(SLOT + Slot.TYPE, "syn_publish")
        if not kind:
            return
        number = memory.load64(SLOT + Slot.PAYLOAD, "poll.copy")
        if self.frees(memory, kind):
            self.polled.append(number)
        memory.smp_mb("syn_slot")
        if memory.load32(SLOT + Slot.META, "poll.pending") & Slot.META_PENDING:
            model.ring(self.wrmsr, "WRMSR")
            loops.ring_eventfd(model, memory, self.exits, "EOM")

    def frees(self, memory: Any, kind: int) -> bool:
        """Free the slot; give whether it was this message's still."""
        return bool(memory.compare_exchange32(SLOT + Slot.TYPE, kind, 0, "poll.free") == kind)

    def taken(self) -> list[list[int]]:
        """Give what lies in the work ring, by CPU, in order."""
        came: list[list[int]] = [[] for _ in range(self.cpus)]
        for index in range(self.hv.load32(Header.WORK_TAIL)):
            if self.hv.load32(Work.at(index, Work.STATE)) == Work.FILLED:
                number = self.hv.load64(Work.at(index, Work.MESSAGE + Slot.PAYLOAD))
                came[self.hv.load32(Work.at(index, Work.VP))].append(number)
        return came

    def broken(self, model: Model, stuck: list[str]) -> str | None:
        """Each CPU has taken what was posted to it, in order and once, and no more EOMs were written than were owed."""
        came = self.taken()
        for vp in range(self.cpus):
            posted = [number for number in range(1, self.messages + 1) if number % self.cpus == vp]
            got = came[vp] if vp or not self.poller else sorted({*came[vp], *self.polled})
            if missing := sorted(set(posted) - set(got)):
                kind = self.hv.load32(Slot.at(Frame.of_vp(vp, Frame.MESSAGES), SINT_VMBUS, Slot.TYPE))
                return f"CPU {vp} never took {missing}; " + ("its slot is full" if kind else "its slot is empty")
            if got != posted:
                return f"CPU {vp} took {got}, but {posted} were posted to it"
            owed, eoms = max(0, len(posted) - 1), self.hv.load64(Vp.at(vp, Vp.EOM))
            if eoms > owed:
                return f"CPU {vp} wrote EOM {eoms} times; {owed} messages can have waited for the slot"
        return None
