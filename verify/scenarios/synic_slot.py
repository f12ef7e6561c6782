# SPDX-License-Identifier: Apache-2.0
"""Messages of the host through one slot: Synic.post in the hypervisor against consumers of the guest.

The guest here is the least that the ABI demands, in Python over Memory; the machine's own is C. `frees` says how a consumer
frees the slot: by `store` (the driver of 2012), by `cas` of the type (the driver since 2016), or by `claim`, which first moves
TAKEN to the message's number by compare-exchange: only that tells two messages of one type apart.
"""

from __future__ import annotations

from collections.abc import Iterable
from functools import partial
from typing import TYPE_CHECKING, Any, Final

from pvbus.actors.hypervisor import synic_msrs
from pvbus.actors.hypervisor.synic import HvStatus, Synic, request_interrupt
from pvbus.shm import hyperv
from pvbus.shm._core_explored import Memory
from pvbus.shm.hyperv import SINT_VMBUS, Frame, Slot, Vp
from pvbus.verify.explorer.scenario import Scenario, Start, claimed, within

if TYPE_CHECKING:
    from pvbus.verify.explorer.model import Model

PORT: Final = 1
VECTOR: Final = 0x37
_SLOT: Final = Slot.at(Frame.of_vp(0, Frame.MESSAGES), SINT_VMBUS, 0)
_OFFERED: Final = Vp.at(0, Vp.OFFERED + 4 * SINT_VMBUS)
_IRR: Final = Vp.at(0, Vp.IRR + VECTOR // 64 * 8)
_TAKEN: Final = Vp.at(0, Vp.TAKEN + 4 * SINT_VMBUS)


class SynicSlot(Scenario):
    """A host posts messages of the given types; `consumers` 2 adds one who looks into the slot once, uncalled (a crash)."""

    ranges = within(types=(1, 2**31 - 1), consumers=(1, 2))
    name = "synic-slot"
    claims = claimed("sc tso arm", {}, {"frees": "store"}, {"types": (1, 2), "consumers": 2})
    synic_type: type[Synic] = Synic

    def __init__(self, types: tuple[int, ...] = (1, 1), *, frees: str = "cas", consumers: int = 1) -> None:
        if frees not in ("store", "cas", "claim"):
            raise ValueError(f"a slot is not freed by {frees!r}")
        if not types:
            raise ValueError("types: there is no message")
        self.types = types
        self.frees = frees
        self.consumers = consumers

    def prepare(self, model: Model, variants: int) -> None:
        """Make the segment, with the message page on and SINT2 unmasked."""
        self.memory: Any = Memory(model, hyperv.BYTES)
        model.name(self.memory, "hv")
        self.irq, self.eom = model.bell("irq"), model.bell("eom")
        host = self._host(model)
        host.write_msr(0, synic_msrs.SIMP, Frame.of_vp(0, Frame.MESSAGES) << 12 | synic_msrs.ENABLE)
        host.write_msr(0, synic_msrs.SINT0 + SINT_VMBUS, VECTOR)
        host.write_msr(0, synic_msrs.SCONTROL, synic_msrs.ENABLE)

    def start(self, model: Model) -> Iterable[Start]:
        """Give the host, the consumer that interrupts call, and perhaps one more."""
        self.received: list[int] = []
        host = self._host(model)
        host.create_message_port(PORT, SINT_VMBUS, 0)
        yield "host", partial(self._post, model, host), True
        yield "guest", partial(self._serve, model), True
        if self.consumers > 1:
            yield "poller", partial(self._consume, model), False

    def broken(self, model: Model, stuck: list[str]) -> str | None:
        """Each message comes out once; in order, if one consumer takes them all."""
        posted = list(range(1, len(self.types) + 1))
        if missing := sorted(set(posted) - set(self.received)):
            return f"messages {missing} were posted and never came out"
        if self.frees == "store" and self.consumers > 1:
            return None  # who only copies cannot know that another does, too
        received = self.received if self.consumers == 1 else sorted(self.received)
        return None if received == posted else f"received {self.received}, but posted {posted}"

    def _host(self, model: Model) -> Synic:
        def interrupt(vp: int, vector: int) -> None:
            request_interrupt(self.memory, vp, vector)
            model.ring(self.irq, "irq")

        return self.synic_type(self.memory, 1, interrupt, clock=lambda: 1)

    def _post(self, model: Model, host: Synic) -> None:
        for number, message_type in enumerate(self.types, 1):
            status = host.post(PORT, message_type, number.to_bytes(8, "little"))
            if status != HvStatus.SUCCESS:
                raise AssertionError(status)
        while True:
            model.wait(self.eom, "wait for EOM")
            model.take(self.eom, "eom")
            host.write_msr(0, synic_msrs.EOM, 0)

    def _serve(self, model: Model) -> None:
        while True:
            model.wait(self.irq, "wait for an interrupt")
            model.take(self.irq, "irq")
            # SYNC(syn_irr): the request is taken before we look at the slot; the host fills the slot before it requests.
            self.memory.exchange64(_IRR, 0, "syn_irr")
            while self._consume(model):
                pass

    def _consume(self, model: Model) -> bool:
        """Take the message in the slot, if there is one; give whether it was ours."""
        memory, claims = self.memory, self.frees == "claim"
        seq = memory.load32_acquire(_OFFERED, "guest.offered") if claims else 0
        # SYNC(syn_publish): the type before the rest of the message; the host writes it last.
        message_type = memory.load32_acquire(_SLOT + Slot.TYPE, "syn_publish")
        # OFFERED changes only while the slot is free: what it was before and is behind the type is this message's number.
        if not message_type or (claims and memory.load32_acquire(_OFFERED, "guest.offered") != seq):
            return False
        taken = memory.load32(_TAKEN, "guest.taken") if claims else 0
        number = memory.load64(_SLOT + Slot.PAYLOAD, "guest.copy")
        if claims and (taken == seq or memory.compare_exchange32(_TAKEN, taken, seq, "guest.claim") != taken):
            return False
        # SYNC(syn_taken): TAKEN before the slot is freed; an heir of the host looks at the slot first.
        if self.frees == "store":
            memory.store32(_SLOT + Slot.TYPE, 0, "guest.free")
        elif memory.compare_exchange32(_SLOT + Slot.TYPE, message_type, 0, "guest.free") != message_type:
            return False
        self.received.append(number)
        # SYNC(syn_slot): the slot is free before we look at msg_pending; the host sets that before it looks at the slot again.
        memory.smp_mb("syn_slot")
        if memory.load32(_SLOT + Slot.META, "guest.pending") & Slot.META_PENDING:
            model.ring(self.eom, "EOM")
        return True


class LatePending(Synic):
    """A host that finds the slot busy, sets msg_pending, and believes what it saw before."""

    def _is_busy(self, slot: int) -> bool:
        memory = self._memory
        if not memory.load32_acquire(slot + Slot.TYPE, "syn.type"):
            return False
        memory.store32(slot + Slot.META, memory.load32(slot + Slot.META) | Slot.META_PENDING, "syn.pending")
        return True


class SynicSlotLatePending(SynicSlot):
    """The same against a host with the defect of the hypervisor of 2015."""

    synic_type = LatePending
