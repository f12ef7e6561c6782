# SPDX-License-Identifier: Apache-2.0
"""The synthetic interrupt controller, seen from the hypervisor: ports, delivery, the hypercalls of the guest.

Pure logic over the Hyper-V segment; effects leave through `interrupt` (request a vector on a VP and ring its doorbell) and
through the handlers of connections. What an heir needs lies in the segment: it makes a Synic, makes ports and connections
again, and calls `recover`. No protocol belongs here.

Where real hypervisors differ we follow the specification (TLFS):

* A SINT that is masked: message written or flag set, its interrupt lost and counted. (OpenVMM posts nothing until it is
  unmasked, and sets no flag.) Polling: the same without an interrupt, and nothing is lost.
* A slot that is busy: the message waits in one of 16 buffers; the queue is looked at again when another message is queued,
  at EOI and at EOM, when the VP's process is born again, and at nothing else. (QEMU has one message, and tells its sender to
  try again after EOM.)
* A flag number equal to the port's count is refused. (QEMU accepts 2048.)
* A VP whose SynIC or page is off is no target: a port that is bound to it answers INVALID_SYNIC_STATE, a port bound to any
  VP answers INVALID_VP_INDEX when there is no other. What was queued before it was turned off stays queued.

Order of checks: may the caller do this, is what it says possible, does it lead somewhere, is there a target, is there room.
"""

from __future__ import annotations

import struct
from collections.abc import Callable
from dataclasses import dataclass
from enum import IntEnum
from typing import TYPE_CHECKING, Final

from pvbus.actors.hypervisor import synic_msrs
from pvbus.actors.hypervisor.synic_buffers import Buffers, Queued
from pvbus.actors.hypervisor.synic_msrs import HvFault, Registers
from pvbus.shm.hyperv import FLAGS, SINTS, VP_HOST, Header, Sint, Slot, Vp, flag_word
from pvbus.shm.memory import now_ns

if TYPE_CHECKING:
    from pvbus.shm.memory import Memory

__all__ = ["ConnectionKind", "HostMessage", "HvFault", "HvStatus", "Privilege", "Synic", "request_interrupt"]

HV_POST_MESSAGE: Final = 0x5C
HV_SIGNAL_EVENT: Final = 0x5D
CONTROL_FAST: Final = 1 << 16
HYPERVISOR_TYPES: Final = 1 << 31  # message types of the hypervisor's own: no guest may post one
_POST_HEAD: Final = struct.Struct("<IIII")  # connection, reserved, type, size
_POST_BYTES: Final = _POST_HEAD.size + Slot.PAYLOAD_BYTES
_SIGNAL: Final = struct.Struct("<II")  # connection; flag u16, reserved u16
_PAGE: Final = 4096


class HvStatus(IntEnum):
    """HV_STATUS, what a hypercall answers."""

    SUCCESS = 0
    INVALID_HYPERCALL_CODE = 2
    INVALID_HYPERCALL_INPUT = 3
    INVALID_ALIGNMENT = 4
    INVALID_PARAMETER = 5
    ACCESS_DENIED = 6
    INSUFFICIENT_MEMORY = 11
    INVALID_VP_INDEX = 14
    INVALID_PORT_ID = 17
    INVALID_CONNECTION_ID = 18
    INSUFFICIENT_BUFFERS = 19
    INVALID_SYNIC_STATE = 24
    OBJECT_IN_USE = 25


class ConnectionKind(IntEnum):
    """Types of ports and of the connections to them."""

    MESSAGE = 1
    EVENT = 2


class Privilege(IntEnum):
    """What a domain may call: the bits of CPUID 0x40000003.EBX."""

    POST_MESSAGES = 1 << 4
    SIGNAL_EVENTS = 1 << 5


@dataclass(frozen=True)
class HostMessage:
    """A message of the guest's, taken by the host; its buffer is in use until `Synic.done`."""

    connection_id: int
    type: int
    payload: bytes
    queued: Queued


@dataclass(frozen=True)
class _Port:
    """A port of the guest's: messages or events of the host come out at a SINT."""

    kind: ConnectionKind
    sint: int
    vp: int | None  # None: any
    base_flag: int
    flags: int


@dataclass
class _Connection:
    """A connection of the guest's, to host code; the code may have gone (no handler)."""

    kind: ConnectionKind
    handler: Callable[[int], None] | None
    flags: int


class Synic:
    """The interrupt controller of one domain; one instance, in the hypervisor process."""

    def __init__(
        self, memory: Memory, vcpus: int, interrupt: Callable[[int, int], None], *,
        privileges: int = Privilege.POST_MESSAGES | Privilege.SIGNAL_EVENTS, clock: Callable[[], int] = now_ns,
    ) -> None:  # fmt: skip
        self._memory = memory
        self._interrupt = interrupt
        self._privileges = privileges
        self.registers = Registers(memory, vcpus, clock)
        self._vps = range(vcpus)
        self._buffers = Buffers(memory)
        self._ports: dict[int, _Port] = {}
        self._connections: dict[int, _Connection] = {}

    # ---- registers

    def read_msr(self, vp: int, number: int) -> int:
        """Execute RDMSR on a VP. Raises HvFault."""
        return self.registers.read(vp, number)

    def write_msr(self, vp: int, number: int, value: int) -> None:
        """Execute WRMSR on a VP; EOM and EOI look at the message queues again. Raises HvFault."""
        self.registers.write(vp, number, value)
        if number == synic_msrs.EOM:
            self._count(Header.EOMS)
            self._rescan(vp)
        elif number == synic_msrs.EOI:
            self._rescan(vp, skip=Sint.AUTO_EOI)  # these ended when they were delivered

    def attend_eoms(self) -> None:
        """Answer the EOMs that CPU processes have counted in their VP's state since the last call."""
        memory = self._memory
        for vp in self._vps:
            written = memory.load64_acquire(Vp.at(vp, Vp.EOM))
            new = written - memory.load64(Vp.at(vp, Vp.EOM_SEEN)) & 2**64 - 1
            if new:
                self._count(Header.EOMS, new)
                self._rescan(vp)
                memory.store64(Vp.at(vp, Vp.EOM_SEEN), written)  # last: an heir looks once more

    def cpu_reborn(self, vp: int) -> None:
        """Begin with a VP's new process: the last one may have died between freeing a slot and writing the EOM that it owed."""
        self.attend_eoms()
        self._rescan(vp)

    # ---- ports: host to guest

    def create_message_port(self, port_id: int, sint: int, vp: int | None = None) -> None:
        """Make a message port with 16 buffers, bound to a VP or to any. An heir's port finds its queued messages again.

        Raises ValueError if it exists, LookupError when the domain has 16 already.
        """
        self._new_port(port_id, _Port(ConnectionKind.MESSAGE, sint, vp, 0, 0))
        try:
            self._buffers.reserve(port_id, host=False)
        except LookupError:
            del self._ports[port_id]
            raise

    def create_event_port(
        self, port_id: int, sint: int, vp: int | None = None, *, base_flag: int = 0, flags: int = FLAGS
    ) -> None:
        """Make an event port: flag n of it is bit `base_flag` + n of the SINT's area. Raises ValueError if it exists."""
        if not 0 <= base_flag <= base_flag + flags <= FLAGS:
            raise ValueError(f"{flags} flags from {base_flag} on")
        self._new_port(port_id, _Port(ConnectionKind.EVENT, sint, vp, base_flag, flags))

    def delete_port(self, port_id: int) -> None:
        """Delete a port; what is queued there is discarded. Raises KeyError if there is none."""
        if self._ports.pop(port_id).kind == ConnectionKind.MESSAGE:
            self._buffers.drop(port_id, host=False)

    def post(self, port_id: int, message_type: int, payload: bytes, vp: int | None = None) -> HvStatus:
        """Post a message of the host's; `vp` chooses the target if the port is bound to any. Delivered now, or queued."""
        if not 0 < message_type < 2**32 or len(payload) > Slot.PAYLOAD_BYTES:
            return HvStatus.INVALID_PARAMETER
        port = self._ports.get(port_id)
        if port is None or port.kind != ConnectionKind.MESSAGE:
            return HvStatus.INVALID_PORT_ID
        target = self._target(port, vp, self.registers.message_frame, lambda one: self._buffers.count(one, port.sint))
        if isinstance(target, HvStatus):
            return target
        if self._buffers.is_full(port_id, host=False):
            return HvStatus.INSUFFICIENT_BUFFERS
        self._buffers.put(port_id, target, port.sint, message_type, payload)
        self._count(Header.POSTED)
        self._deliver(target, port.sint)
        return HvStatus.SUCCESS

    def signal(self, port_id: int, flag: int, vp: int | None = None) -> HvStatus:
        """Set an event flag of the guest's; only a flag that was clear interrupts it."""
        port = self._ports.get(port_id)
        if port is None or port.kind != ConnectionKind.EVENT:
            return HvStatus.INVALID_PORT_ID
        if not 0 <= flag < port.flags:
            return HvStatus.INVALID_PARAMETER
        target = self._target(port, vp, self.registers.flags_frame, lambda one: 0)
        if isinstance(target, HvStatus):
            return target
        frame, number = self.registers.flags_frame(target), port.base_flag + flag
        assert frame is not None  # else it were no target
        self._count(Header.SIGNALS)
        if not self._memory.test_and_set_bit(flag_word(frame, port.sint, number), number % 64, "syn.flag"):
            self._raise(target, port.sint)
        return HvStatus.SUCCESS

    def _new_port(self, port_id: int, port: _Port) -> None:
        if port_id in self._ports:
            raise ValueError(f"port {port_id} exists")
        if not 0 <= port.sint < SINTS:
            raise ValueError(f"no SINT{port.sint}")
        self._ports[port_id] = port

    def _target(
        self, port: _Port, vp: int | None, frame: Callable[[int], int | None], load: Callable[[int], int]
    ) -> int | HvStatus:
        """Give the VP that a port leads to; of any, the first of those with the least queued."""
        bound = vp if port.vp is None else port.vp
        if bound is not None:
            if bound not in self._vps:
                return HvStatus.INVALID_VP_INDEX
            return HvStatus.INVALID_SYNIC_STATE if frame(bound) is None else bound
        targets = [one for one in self._vps if frame(one) is not None]
        return min(targets, key=load) if targets else HvStatus.INVALID_VP_INDEX

    # ---- delivery

    def _rescan(self, vp: int, skip: int = 0) -> None:
        for sint in range(SINTS):
            if not self.registers.sint(vp, sint) & skip:
                self._deliver(vp, sint)

    def _deliver(self, vp: int, sint: int) -> None:
        """Fill the slot from the queue, until it is busy or nothing is left; bounded by the buffers there are."""
        frame = self.registers.message_frame(vp)
        if frame is None:
            return
        while (message := self._buffers.first(vp, sint)) is not None:
            slot = Slot.at(frame, sint, 0)
            if not self._came_out(message, slot):
                if self._is_busy(slot):
                    return
                self._fill(slot, message)
            # Interrupt before the buffer is freed: an heir that finds the buffer interrupts once more.
            self._raise(vp, sint)
            self._buffers.free(message)
            self._count(Header.DELIVERED)

    def _came_out(self, message: Queued, slot: int) -> bool:
        """Whether a forerunner had filled the slot with this message before it died."""
        memory, sint = self._memory, 4 * message.sint
        if memory.load32(Vp.at(message.vp, Vp.OFFERED + sint)) != message.seq:
            return False
        # SYNC(syn_taken): the slot is looked at before TAKEN; the guest writes TAKEN before it frees the slot.
        return bool(memory.load32_acquire(slot + Slot.TYPE, "syn_taken")) or (
            memory.load32(Vp.at(message.vp, Vp.TAKEN + sint)) == message.seq
        )

    def _is_busy(self, slot: int) -> bool:
        """Whether the slot holds a message that the guest has not freed; if so, it owes an EOM."""
        memory = self._memory
        if not memory.load32_acquire(slot + Slot.TYPE, "syn.type"):
            return False  # free, and nobody else fills slots
        memory.store32(slot + Slot.META, memory.load32(slot + Slot.META) | Slot.META_PENDING, "syn.pending")
        # SYNC(syn_slot): msg_pending is set before we look again; the guest frees the slot before it looks at msg_pending.
        memory.smp_mb("syn_slot")
        return bool(memory.load32_acquire(slot + Slot.TYPE, "syn.type.again"))

    def _fill(self, slot: int, message: Queued) -> None:
        """Copy a message into a free slot: payload bytes only, what lies behind them stays. The type comes last."""
        memory, source = self._memory, self._buffers.base(message)
        size = memory.load32(source + Slot.META) & Slot.META_SIZE
        for at in range(Slot.PAYLOAD, Slot.PAYLOAD + size, 8):
            word = memory.load64(source + at)
            rest = Slot.PAYLOAD + size - at
            if rest < 8:  # the slot is ours while it is free: nobody writes the bytes that are put back
                keep = -1 << 8 * rest & 2**64 - 1
                word = word & ~keep | memory.load64(slot + at) & keep
            memory.store64(slot + at, word, "syn.payload")
        memory.store64(slot + Slot.SENDER, message.port, "syn.sender")
        memory.store32(Vp.at(message.vp, Vp.OFFERED + 4 * message.sint), message.seq, "syn.offered")
        memory.store32(slot + Slot.META, size, "syn.meta")  # msg_pending is clear: the slot has been claimed
        # SYNC(syn_publish): everything before the type; the guest reads the type first, and then the rest.
        memory.store32_release(slot + Slot.TYPE, memory.load32(source + Slot.TYPE), "syn_publish")

    def _raise(self, vp: int, sint: int) -> None:
        register = self.registers.sint(vp, sint)
        if register & Sint.POLLING:
            return
        if register & Sint.MASKED:
            self._count(Header.INTERRUPTS_LOST)
            return
        self._count(Header.INTERRUPTS)
        self._interrupt(vp, register & Sint.VECTOR)

    # ---- connections: guest to host

    def connect(self, connection_id: int, kind: ConnectionKind, handler: Callable[[int], None], *, flags: int = FLAGS) -> None:
        """Connect the guest to host code, in the place of what was there. Raises ValueError if that was of another kind.

        Messages: `handler(connection_id)` says that one waits for `take`; an heir calls `take` at once, too. Events:
        `handler(flag)`, flag < `flags`. Raises LookupError when the domain's 16 message ports exist.
        """
        old = self._connections.get(connection_id)
        if old is not None and old.kind != kind:
            raise ValueError(f"connection {connection_id} is one for {old.kind.name.lower()}s")
        if kind == ConnectionKind.MESSAGE:
            self._buffers.reserve(connection_id, host=True)
        self._connections[connection_id] = _Connection(kind, handler, flags)

    def retire(self, connection_id: int) -> None:
        """Delete the port behind a connection: the guest keeps an id that leads nowhere. Raises KeyError if there is none."""
        connection = self._connections[connection_id]
        if connection.kind == ConnectionKind.MESSAGE and connection.handler is not None:
            self._buffers.drop(connection_id, host=True)
        connection.handler = None

    def disconnect(self, connection_id: int) -> None:
        """Delete a connection and what is queued there. Raises KeyError if there is none."""
        self.retire(connection_id)
        del self._connections[connection_id]

    def take(self, connection_id: int) -> HostMessage | None:
        """Give the oldest message of the guest's that was not taken. Its buffer stays in use, and an heir gets it again."""
        message = self._buffers.first(VP_HOST, connection_id)
        if message is None:
            return None
        self._buffers.take(message)
        message_type, payload = self._buffers.read(message)
        return HostMessage(connection_id, message_type, payload, message)

    def done(self, message: HostMessage) -> None:
        """Be done with a message that was taken: its buffer is free."""
        self._buffers.free(message.queued)

    def hv_post_message(self, connection_id: int, message_type: int, payload: bytes, serial: int = 0) -> HvStatus:
        """Mirror HvPostMessage: put a message of the guest's into one of the 16 buffers of its connection.

        A guest that does not know whether a dead hypervisor has made its call makes it again, soon, and under the same serial.
        """
        if serial and self._buffers.is_done(serial):
            return HvStatus.SUCCESS
        if not self._privileges & Privilege.POST_MESSAGES:
            return HvStatus.ACCESS_DENIED
        if not 0 < message_type < HYPERVISOR_TYPES or len(payload) > Slot.PAYLOAD_BYTES:
            return HvStatus.INVALID_PARAMETER
        connection = self._connections.get(connection_id)
        if connection is None:
            return HvStatus.INVALID_CONNECTION_ID
        if connection.kind != ConnectionKind.MESSAGE or connection.handler is None:
            return HvStatus.INVALID_PORT_ID
        if self._buffers.is_full(connection_id, host=True):
            return HvStatus.INSUFFICIENT_BUFFERS
        self._buffers.put(connection_id, VP_HOST, 0, message_type, payload, serial)
        connection.handler(connection_id)
        return HvStatus.SUCCESS

    def hv_signal_event(self, connection_id: int, flag: int) -> HvStatus:
        """Mirror HvSignalEvent: hand a flag to the host code behind a connection."""
        if not self._privileges & Privilege.SIGNAL_EVENTS:
            return HvStatus.ACCESS_DENIED
        connection = self._connections.get(connection_id)
        if connection is None:
            return HvStatus.INVALID_CONNECTION_ID
        if connection.kind != ConnectionKind.EVENT or connection.handler is None:
            return HvStatus.INVALID_PORT_ID
        if not 0 <= flag < connection.flags:
            return HvStatus.INVALID_PARAMETER
        connection.handler(flag)
        return HvStatus.SUCCESS

    def hypercall(self, control: int, data: bytes, *, fast: bool = False, address: int = 0) -> HvStatus:
        """Execute a hypercall: its input control word, and the input, whether it came in registers (`fast`) or lies at `address`.

        `control` may carry the fast bit itself; other bits beside the code are of no use to these calls and refused. Raises
        HvFault (#UD) while the guest has no hypercall page.
        """
        if not self.registers.hypercalls_enabled:
            raise HvFault("#UD: no hypercall page")
        fast = fast or bool(control & CONTROL_FAST)
        code = control & 0xFFFF
        if code not in (HV_POST_MESSAGE, HV_SIGNAL_EVENT) or (code == HV_POST_MESSAGE and fast):
            return HvStatus.INVALID_HYPERCALL_CODE
        size = _POST_BYTES if code == HV_POST_MESSAGE else _SIGNAL.size
        if control & ~(0xFFFF | CONTROL_FAST) or len(data) != size:
            return HvStatus.INVALID_HYPERCALL_INPUT
        if not fast and (address % 8 or address % _PAGE + size > _PAGE):
            return HvStatus.INVALID_ALIGNMENT
        if code == HV_SIGNAL_EVENT:
            return self.hv_signal_event(*_SIGNAL.unpack(data))  # with reserved bits it is no flag that exists
        connection_id, _, message_type, length = _POST_HEAD.unpack_from(data)
        payload = data[_POST_HEAD.size:][:length].ljust(length if length <= Slot.PAYLOAD_BYTES else _POST_BYTES, b"\0")
        return self.hv_post_message(connection_id, message_type, payload)

    # ---- after a death, and after a reset

    def recover(self) -> None:
        """Go on where a forerunner died; called by an heir once its ports are there. An interrupt may come once too often."""
        for vp, sint in self._buffers.waiting():
            self._deliver(vp, sint)
        for vp, sint in sorted({
            (vp, port.sint) for port in self._ports.values() if port.kind == ConnectionKind.EVENT
            for vp in (self._vps if port.vp is None else [port.vp]) if vp in self._vps
        }):  # fmt: skip
            frame = self.registers.flags_frame(vp)
            if frame is not None and any(
                self._memory.load64(flag_word(frame, sint, flag)) for flag in range(0, FLAGS, 64)
            ):
                self._raise(vp, sint)

    def forget_calls(self) -> None:
        """Who made the hypercalls of before is dead, too: none of them comes again."""
        self._buffers.forget_calls()

    def reset(self) -> None:
        """Reset the controller of every VP, and discard what is queued for the guest: it boots anew."""
        for vp, sint in self._buffers.waiting():
            while (message := self._buffers.first(vp, sint)) is not None:
                self._buffers.free(message)
        for vp in self._vps:
            self.registers.reset(vp)
        self._memory.store64(Header.HYPERCALL, 0)
        self._memory.store64(Header.GUEST_OS_ID, 0)

    def _count(self, field: int, by: int = 1) -> None:
        self._memory.store64(field, self._memory.load64(field) + by)


def request_interrupt(memory: Memory, vp: int, vector: int) -> bool:
    """Request a vector on a VP: set its bit in IRR; give whether it was clear. The caller rings the VP's doorbell in any case."""
    # SYNC(syn_irr): slots and flags before the request; the CPU takes the request before it looks at them. A locked instruction.
    return not memory.test_and_set_bit(Vp.at(vp, Vp.IRR + vector // 64 * 8), vector % 64, "syn_irr")
