# SPDX-License-Identifier: Apache-2.0
"""The registers of the synthetic interrupt controller and of the partition, as they lie in the Hyper-V segment.

Written by the hypervisor only, when the guest executes WRMSR; read by the guest's interrupt path, too. What a write causes
(a rescan of message queues) is the caller's business: no port and no message belongs here.

Bits that the specification wants preserved, or has reserved, keep their value whatever is written. A frame that the guest may
not use, a vector below 16 that is not masked, a read-only register written, an unknown register: HvFault, the guest's #GP.
Our choices: ICR is not there (CPUID does not announce it), the timers are stored and do not run, the pages are not zeroed
when they are enabled, and a hypercall page can be enabled only after the guest has said who it is.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Final

from pvbus.shm.hyperv import SINTS, Frame, Header, Sint, Vp

if TYPE_CHECKING:
    from pvbus.shm.memory import Memory

GUEST_OS_ID: Final = 0x40000000
HYPERCALL: Final = 0x40000001
VP_INDEX: Final = 0x40000002
TIME_REF_COUNT: Final = 0x40000020
EOI: Final = 0x40000070
ICR: Final = 0x40000071
TPR: Final = 0x40000072
SCONTROL: Final = 0x40000080
SVERSION: Final = 0x40000081
SIEFP: Final = 0x40000082
SIMP: Final = 0x40000083
EOM: Final = 0x40000084
SINT0: Final = 0x40000090
STIMER0_CONFIG: Final = 0x400000B0

ENABLE: Final = 1
VECTOR_MIN: Final = 16  # below are the processor's exceptions
_PAGE_BITS: Final = ENABLE | (2**64 - 1) << 12 & 2**64 - 1
_SINT_BITS: Final = Sint.VECTOR | Sint.MASKED | Sint.AUTO_EOI | Sint.POLLING
_STIMER_CONFIG_BITS: Final = 0xF | 0xFF << 4 | 1 << 12 | 0xF << 16
_STIMERS: Final = 4
_READ_ONLY: Final = frozenset({VP_INDEX, TIME_REF_COUNT, SVERSION})


class HvFault(Exception):
    """The guest's access raises an exception in the guest: #GP, or #UD for a hypercall without a hypercall page."""


class Registers:
    """All registers of a domain."""

    def __init__(self, memory: Memory, vcpus: int, clock: Callable[[], int]) -> None:
        self._memory = memory
        self.vcpus = vcpus
        self._clock = clock
        if memory.load64(Header.TIME_ORIGIN_NS) == 0:  # an heir goes on with its forerunner's
            memory.store64(Header.TIME_ORIGIN_NS, clock())

    # ---- what the interrupt controller asks

    def message_frame(self, vp: int) -> int | None:
        """Give the frame of a VP's message page; None while it cannot be a target of messages."""
        return self._frame(vp, Vp.SIMP)

    def flags_frame(self, vp: int) -> int | None:
        """Give the frame of a VP's event-flags page; None while it cannot be a target of events."""
        return self._frame(vp, Vp.SIEFP)

    def sint(self, vp: int, sint: int) -> int:
        """Give a SINT register."""
        return self._memory.load64(Vp.sint(vp, sint))

    @property
    def hypercalls_enabled(self) -> bool:
        """Whether the guest has a hypercall page."""
        return bool(self._memory.load64(Header.HYPERCALL) & ENABLE)

    def _frame(self, vp: int, register: int) -> int | None:
        memory = self._memory
        page = memory.load64(Vp.at(vp, register))
        return page >> 12 if page & memory.load64(Vp.at(vp, Vp.SCONTROL)) & ENABLE else None

    # ---- RDMSR, WRMSR

    def read(self, vp: int, number: int) -> int:
        """Execute RDMSR on a VP. Raises HvFault for a register that is not there or cannot be read."""
        self._check_vp(vp)
        if number == VP_INDEX:
            return vp
        if number == TIME_REF_COUNT:
            return (self._clock() - self._memory.load64(Header.TIME_ORIGIN_NS)) // 100
        if number == SVERSION:
            return 1
        if number == EOM:
            return 0
        at = self._at(vp, number)
        if at is None:
            raise HvFault(f"#GP: rdmsr {number:#x}")
        return self._memory.load64(at)

    def write(self, vp: int, number: int, value: int) -> None:
        """Execute WRMSR on a VP. Raises HvFault. EOM and EOI are accepted; what they cause is up to the caller."""
        self._check_vp(vp)
        if number in (EOM, EOI):
            return
        at = self._at(vp, number)
        if at is None or number in _READ_ONLY or not 0 <= value < 2**64:
            raise HvFault(f"#GP: wrmsr {number:#x}")
        old = self._memory.load64(at)
        self._memory.store64(at, self._accepted(number, old, value))
        if number == GUEST_OS_ID and value == 0:
            hypercall = self._memory.load64(Header.HYPERCALL)
            self._memory.store64(Header.HYPERCALL, hypercall & ~ENABLE)

    def reset(self, vp: int) -> None:
        """Give a VP's registers the values of a reset."""
        memory = self._memory
        for register in (Vp.SCONTROL, Vp.SIEFP, Vp.SIMP, Vp.TPR):
            memory.store64(Vp.at(vp, register), 0)
        for sint in range(SINTS):
            memory.store64(Vp.sint(vp, sint), Sint.MASKED)
        for timer in range(2 * _STIMERS):
            memory.store64(Vp.at(vp, Vp.STIMER + 8 * timer), 0)

    def _accepted(self, number: int, old: int, value: int) -> int:
        """Give what a register holds after a write."""
        if SINT0 <= number < SINT0 + SINTS:
            if value & Sint.VECTOR < VECTOR_MIN and not value & Sint.MASKED:
                raise HvFault(f"#GP: SINT{number - SINT0} with vector {value & Sint.VECTOR}")
            return _merged(old, value, _SINT_BITS)
        if number == SCONTROL:
            return _merged(old, value, ENABLE)
        if number in (SIMP, SIEFP, HYPERCALL):
            if value & ENABLE and not Frame.is_guest(value >> 12):
                raise HvFault(f"#GP: frame {value >> 12:#x} in {number:#x}")
            if number == HYPERCALL and not self._memory.load64(Header.GUEST_OS_ID):
                value &= ~ENABLE
            return _merged(old, value, _PAGE_BITS)
        if number == TPR and value > 0xFF:
            raise HvFault(f"#GP: TPR {value:#x}")
        if number >= STIMER0_CONFIG and (number - STIMER0_CONFIG) % 2 == 0:
            return _merged(old, value, _STIMER_CONFIG_BITS)
        return value

    def _at(self, vp: int, number: int) -> int | None:
        if SINT0 <= number < SINT0 + SINTS:
            return Vp.sint(vp, number - SINT0)
        if STIMER0_CONFIG <= number < STIMER0_CONFIG + 2 * _STIMERS:
            return Vp.at(vp, Vp.STIMER + 8 * (number - STIMER0_CONFIG))
        if number in (GUEST_OS_ID, HYPERCALL):
            return Header.GUEST_OS_ID if number == GUEST_OS_ID else Header.HYPERCALL
        field = {SCONTROL: Vp.SCONTROL, SIEFP: Vp.SIEFP, SIMP: Vp.SIMP, TPR: Vp.TPR}.get(number)
        return None if field is None else Vp.at(vp, field)

    def _check_vp(self, vp: int) -> None:
        if not 0 <= vp < self.vcpus:
            raise ValueError(f"the domain has no virtual processor {vp}")


def _merged(old: int, value: int, bits: int) -> int:
    return old & ~bits | value & bits
