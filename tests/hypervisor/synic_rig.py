# SPDX-License-Identifier: Apache-2.0
"""A Hyper-V segment, a Synic over it, and the least of a guest: enables, consumes, answers with EOM. Each test owns its own."""

from typing import Any

from pvbus.actors.hypervisor import synic_msrs as msr
from pvbus.actors.hypervisor.synic import ConnectionKind, Synic, request_interrupt
from pvbus.shm import _core_explored, hyperv
from pvbus.shm.hyperv import SINT_VMBUS, Frame, Header, Sint, Slot, Vp, flag_word
from pvbus.shm.memory import Memory
from pvbus.shm.pages import format_hyperv
from pvbus.tests.shm.rig import Model, World

PORT, EVENTS, ANY = 1, 2, 5
VECTOR = 0x37


class SynicRig:
    """`vcpus` virtual processors; those in `on` have their pages on and SINT2 unmasked."""

    def __init__(self, vcpus: int = 2, on: tuple[int, ...] = (0,), memory: Memory | None = None) -> None:
        self.world = World()
        explored: Any = _core_explored.Memory(Model(self.world, hyperv.BYTES), hyperv.BYTES)
        self.memory: Any = explored if memory is None else memory
        self.vcpus = vcpus
        self.interrupts: list[tuple[int, int]] = []
        self.host: list[tuple[int, int]] = []  # (connection, flag) as the handlers were called
        self.clock = 5_000
        format_hyperv(self.memory, 1, vcpus)
        self.reborn()
        for vp in on:
            self.enable(vp)

    def reborn(self) -> None:
        """Let an heir take over: ports and connections are made again, in another order."""

        def interrupt(vp: int, vector: int) -> None:
            request_interrupt(self.memory, vp, vector)
            self.interrupts.append((vp, vector))

        self.synic = Synic(self.memory, self.vcpus, interrupt, clock=lambda: self.clock)
        again = bool(self.memory.load32(Header.MESSAGE_SEQ))
        for port, vp in ((ANY, None), (PORT, 0)) if again else ((PORT, 0), (ANY, None)):
            self.synic.create_message_port(port, SINT_VMBUS, vp)
        self.synic.create_event_port(EVENTS, SINT_VMBUS, 0)
        self.synic.connect(1, ConnectionKind.MESSAGE, lambda connection: self.host.append((connection, -1)))
        self.synic.connect(2, ConnectionKind.EVENT, lambda flag: self.host.append((2, flag)), flags=4)

    def enable(self, vp: int, *, sint: int = VECTOR) -> None:
        write = self.synic.write_msr
        write(vp, msr.SIMP, Frame.of_vp(vp, Frame.MESSAGES) << 12 | 1)
        write(vp, msr.SIEFP, Frame.of_vp(vp, Frame.EVENT_FLAGS) << 12 | 1)
        write(vp, msr.SINT0 + SINT_VMBUS, sint)
        write(vp, msr.SCONTROL, 1)

    def slot(self, vp: int = 0, field: int = 0) -> int:
        return Slot.at(Frame.of_vp(vp, Frame.MESSAGES), SINT_VMBUS, field)

    def type_in_slot(self, vp: int = 0) -> int:
        return int(self.memory.load32(self.slot(vp)))

    def pending(self, vp: int = 0) -> bool:
        return bool(self.memory.load32(self.slot(vp, Slot.META)) & Slot.META_PENDING)

    def payload(self, vp: int = 0, size: int | None = None) -> bytes:
        if size is None:
            size = self.memory.load32(self.slot(vp, Slot.META)) & Slot.META_SIZE
        return bytes(self.memory.load8(self.slot(vp, Slot.PAYLOAD) + i) for i in range(size))

    def consume(self, vp: int = 0, *, eom: bool = True) -> bytes | None:
        """Take the message in the slot: copy, note, free, look at msg_pending."""
        message_type = self.type_in_slot(vp)
        if not message_type:
            return None
        payload = self.payload(vp)
        offered = self.memory.load32(Vp.at(vp, Vp.OFFERED + 4 * SINT_VMBUS))
        self.memory.store32(Vp.at(vp, Vp.TAKEN + 4 * SINT_VMBUS), offered)
        assert self.memory.compare_exchange32(self.slot(vp), message_type, 0) == message_type
        if self.pending(vp) and eom:
            self.synic.write_msr(vp, msr.EOM, 0)
        return payload

    def consume_all(self, vp: int = 0) -> list[bytes]:
        found = []
        while (payload := self.consume(vp)) is not None:
            found.append(payload)
        return found

    def flag(self, flag: int, vp: int = 0) -> bool:
        word = flag_word(Frame.of_vp(vp, Frame.EVENT_FLAGS), SINT_VMBUS, flag)
        return bool(self.memory.load64(word) >> flag % 64 & 1)

    def count(self, field: int) -> int:
        return int(self.memory.load64(field))

    def mask(self, vp: int = 0, bits: int = Sint.MASKED) -> None:
        self.synic.write_msr(vp, msr.SINT0 + SINT_VMBUS, VECTOR | bits)
