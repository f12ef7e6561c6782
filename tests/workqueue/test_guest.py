# SPDX-License-Identifier: Apache-2.0
"""The way of a message through the segment: slot, ISR, message tasklet, work ring, handler; with the real server behind it."""

import struct

import pytest

from pvbus.actors.runtime.vmbus_facts import SPOKEN, STATUS_SUCCESS
from pvbus.actors.workqueue.channel import ChannelState
from pvbus.actors.workqueue.guest import ITEMS_A_TURN
from pvbus.shm.hyperv import MESSAGE_VMBUS, SINT_VMBUS, Frame, Slot, Vp
from pvbus.shm.layout import Domain, Machine
from pvbus.shm.memory import EventPath
from pvbus.tests.workqueue.rig import ECHO, Guest, RingMemory, anonymous, driver


class ThroughTheSegment(Guest):
    """The host fills the slot of a CPU, in turn; each CPU's tasklet queues, and the workqueue takes."""

    def __init__(self, versions: tuple[int, ...] = SPOKEN) -> None:
        super().__init__(versions=versions)
        self.path = EventPath(anonymous(Machine.BYTES), {0: anonymous(Domain.BYTES)})
        self.path.set_hyperv(0, self.memory, -1)
        self.posted = 0
        for vp in range(2):
            self.memory.store64(Vp.at(vp, Vp.SIMP), Frame.of_vp(vp, Frame.MESSAGES) << 12 | 1)
            self.memory.store32(Vp.at(vp, Vp.VECTOR), 0x37)

    def _from_host(self, payload: bytes) -> int:
        self.posted += 1
        vp, memory = self.posted % 2, self.memory
        frame = Frame.of_vp(vp, Frame.MESSAGES)
        assert memory.load32(Slot.at(frame, SINT_VMBUS, Slot.TYPE)) == 0
        for at, (word,) in enumerate(struct.iter_unpack("<Q", payload.ljust(240, b"\xee"))):
            memory.store64(Slot.at(frame, SINT_VMBUS, Slot.PAYLOAD + 8 * at), word)
        memory.store32(Slot.at(frame, SINT_VMBUS, Slot.META), len(payload))
        memory.store32(Vp.at(vp, Vp.OFFERED) + 4 * SINT_VMBUS, self.posted)
        memory.store32(Slot.at(frame, SINT_VMBUS, Slot.TYPE), MESSAGE_VMBUS)
        memory.fetch_or64(Vp.at(vp, Vp.IRR), 1 << 0x37)
        self.path.hv_run(0, vp)
        return STATUS_SUCCESS

    def deliver(self, count: int = 1_000_000) -> None:
        del count
        while self.guest.take_work():
            pass


@pytest.mark.parametrize("version", SPOKEN)
def test_a_device_is_offered_probed_opened_closed_and_rescinded_through_the_segment(version: int) -> None:
    guest = ThroughTheSegment((version,)).connected()
    guest.run(guest.bus.register(driver("echo", ECHO)))
    relid = guest.offer()

    guest.run(guest.channels.open(guest.channel(relid), RingMemory(guest, 100), target_vp=1))
    assert guest.channel(relid).state is ChannelState.OPENED
    guest.run(guest.channels.close(guest.channel(relid)))
    guest.server.rescind(relid)
    guest.deliver()

    assert [call[0] for call in guest.calls] == ["probe", "remove"]
    assert guest.server.offers.get(relid) is None
    assert guest.channels.counters.bad == 0
    guest.check_at_rest()


@pytest.mark.checklist("B4.9")
def test_more_messages_than_a_turn_takes_are_left_for_the_next_in_order() -> None:
    guest = ThroughTheSegment().connected()
    for _ in range(ITEMS_A_TURN + 1):
        guest.delivers = False
        guest.offer()

    assert guest.guest.take_work()
    assert len(guest.bus.devices) == ITEMS_A_TURN
    assert not guest.guest.take_work()
    assert [device.channel.relid for device in guest.bus.devices.values()] == list(range(1, ITEMS_A_TURN + 2))


def test_an_heir_takes_over_the_ring_connects_anew_and_gets_every_offer_again() -> None:
    guest = ThroughTheSegment().connected()
    first, second = guest.offer(), guest.offer()
    guest.delivers = False
    guest.offer()
    guest.guest.ring.take()                 # and dies with it
    heir = ThroughTheSegment()
    heir.memory, heir.path, heir.posted = guest.memory, guest.path, guest.posted
    heir.guest.ring = type(guest.guest.ring)(guest.memory)
    heir.server, heir.devices = guest.server, guest.devices
    heir.server._post = heir._from_host
    heir.connection._memory = guest.memory

    heir.deliver()      # the forerunner's items: nobody's, without a connection
    assert heir.channels.counters.strangers == 1
    heir.connected()

    assert sorted(channel.relid for channel in heir.channels) == [first, second, 3]
    heir.check_at_rest()
