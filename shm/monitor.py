# SPDX-License-Identifier: Apache-2.0
"""The monitor page of VMBus, drawn, and what either side does with a trigger: signals that cost their sender no hypercall.

    0      trigger state u32         bit g: group g is inspected
    8      groups [4]                {pending u32, armed u32}: a bit a trigger
    64     next check time s32 [4][32]
    576    latency u16 [4][32]       in 100 ns
    1088   parameters [4][32]        {connection u32, flag u16, reserved u16}: what the host signals on behalf of the guest

Trigger n is bit n % 32 of group n / 32. The guest sets a pending bit and clears its armed bit, both in one exchange. A host that
finds it so arms it; when it finds it armed after its latency, it takes both back and signals. A group in which nobody has
triggered for a while is not inspected any more: its enable bit says so, and the guest signals by hypercall. No clocks here.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Final

if TYPE_CHECKING:
    from pvbus.shm.memory import Memory

TRIES: Final = 64
"""Of an exchange whose word somebody else writes; then the guest makes a hypercall, and the host looks again later."""


class MonitorPage:
    """Offsets."""

    BYTES: Final = 4096
    TRIGGER_STATE: Final = 0
    GROUPS: Final = 8
    NEXT_CHECK: Final = 64
    LATENCY: Final = 576
    PARAMETERS: Final = 1088
    GROUP_BITS: Final = 32
    GROUPS_COUNT: Final = 4
    IDS: Final = 128

    @staticmethod
    def group(monitor_id: int) -> int:
        """Give the offset of the 64-bit word with a trigger's group: pending bits below, armed bits above."""
        return MonitorPage.GROUPS + 8 * (monitor_id // MonitorPage.GROUP_BITS)

    @staticmethod
    def bit(monitor_id: int) -> int:
        """Give a trigger's pending bit in that word; its armed bit is 32 bits higher."""
        return 1 << monitor_id % MonitorPage.GROUP_BITS


def trigger(memory: Memory, page: int, monitor_id: int) -> bool:
    """Trigger, as the guest: True when nobody inspects the group, and a hypercall must say it. Mirror vmbus_setevent."""
    at, bit = page + MonitorPage.group(monitor_id), MonitorPage.bit(monitor_id)
    # SYNC(mon_take): the packet, a full fence (the ring's own, vmr_signal), then the look at the trigger; the host takes the
    # trigger back, then looks at the ring. Behind a trigger that is still pending nothing is sent: the host will see the packet.
    for _ in range(TRIES):
        word = memory.load64(at, "mon.group")
        if word & bit or memory.compare_exchange64(at, word, (word | bit) & ~(bit << 32), "mon.trigger") == word:
            break
    else:
        return True
    # SYNC(mon_enable): triggered, then the look whether anybody inspects; the host disables the group, then looks for triggers.
    memory.smp_mb("mon_enable")
    enabled = memory.load64(page + MonitorPage.TRIGGER_STATE, "mon.enabled")
    return not enabled >> monitor_id // MonitorPage.GROUP_BITS & 1


def is_triggered(memory: Memory, page: int, monitor_id: int) -> bool:
    """Look at a pending bit, as the host."""
    return bool(memory.load64_acquire(page + MonitorPage.group(monitor_id), "mon.group") & MonitorPage.bit(monitor_id))


def arm(memory: Memory, page: int, monitor_id: int) -> bool:
    """Arm a pending trigger, as the host: False when it was armed already, and not triggered anew since."""
    at, bit = page + MonitorPage.group(monitor_id), MonitorPage.bit(monitor_id)
    for _ in range(TRIES):
        word = memory.load64(at, "mon.group")
        if not word & bit or word & bit << 32:
            return False
        if memory.compare_exchange64(at, word, word | bit << 32, "mon.arm") == word:
            break
    return True


def take(memory: Memory, page: int, monitor_id: int) -> bool:
    """Take a trigger back, as the host, which then signals; whether it was pending. What came before it is seen after it."""
    at, bit = page + MonitorPage.group(monitor_id), MonitorPage.bit(monitor_id)
    for _ in range(TRIES):
        word = memory.load64(at, "mon.group")
        if not word & bit:
            return False
        if memory.compare_exchange64(at, word, word & ~(bit | bit << 32), "mon.take") == word:
            # SYNC(mon_take): taken back before the ring is read. On arm64 an exchange does not hold back the loads behind it.
            memory.smp_mb("mon_take")
            return True
    return False


def enable(memory: Memory, page: int, monitor_id: int) -> None:
    """Say that the trigger's group is inspected."""
    memory.fetch_or64(page + MonitorPage.TRIGGER_STATE, 1 << monitor_id // MonitorPage.GROUP_BITS, "mon.enable")


def disable(memory: Memory, page: int, monitor_id: int) -> None:
    """Say that it is not. The caller looks for triggers once more: one that came before this was told to nobody."""
    memory.fetch_and64(page + MonitorPage.TRIGGER_STATE, ~(1 << monitor_id // MonitorPage.GROUP_BITS) % 2**64, "mon.disable")
    # SYNC(mon_enable): disabled before the last look; who triggers looks whether it is enabled after that.
    memory.smp_mb("mon_enable")


def describe(memory: Memory, page: int, monitor_id: int, latency_100ns: int, connection: int, flag: int = 0) -> None:
    """Write what the host does with a trigger; all 0: nothing, it belongs to nobody."""
    at = page + MonitorPage.LATENCY + 2 * (monitor_id & ~1)
    shift = 16 * (monitor_id % 2)
    pair = memory.load32(at, "mon.latency") & ~(0xFFFF << shift) | (latency_100ns & 0xFFFF) << shift
    memory.store32(at, pair, "mon.latency")
    memory.store64(page + MonitorPage.PARAMETERS + 8 * monitor_id, connection | (flag & 0xFFFF) << 32, "mon.parameter")


def latency_100ns(memory: Memory, page: int, monitor_id: int) -> int:
    """Read a latency."""
    pair = memory.load32(page + MonitorPage.LATENCY + 2 * (monitor_id & ~1), "mon.latency")
    return pair >> 16 * (monitor_id % 2) & 0xFFFF


def connection_of(memory: Memory, page: int, monitor_id: int) -> int:
    """Read the connection that is signalled."""
    return memory.load64(page + MonitorPage.PARAMETERS + 8 * monitor_id, "mon.parameter") & 0xFFFFFFFF
