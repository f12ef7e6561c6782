# SPDX-License-Identifier: Apache-2.0
"""The bus: names, match, probe, remove, shutdown, uevents, and removals behind probes that wait for the host."""

import errno
import gc
import uuid
from collections.abc import Generator
from typing import Any

import pytest

from pvbus.actors.workqueue.bus import NULL_GUID, Device, Driver, get_id, is_null_guid
from pvbus.actors.workqueue.channel import ChannelState
from pvbus.actors.workqueue.waits import Probe, Remove, Until, Wait
from pvbus.tests.workqueue.rig import ECHO, KVP, Echo, Guest, RingMemory, driver

ECHO_MODALIAS = "MODALIAS=vmbus:" + ECHO.bytes_le.hex()


@pytest.mark.checklist("B7.6")
def test_devices_are_named_in_the_order_of_their_offers_and_no_name_is_used_again() -> None:
    guest = Guest().connected()
    first = guest.offer()
    guest.offer(KVP)
    guest.server.rescind(first)
    guest.deliver()

    guest.offer()

    assert list(guest.bus.devices) == ["vmbus_0_2", "vmbus_0_3"]
    assert guest.channel(first).serial == 3     # the relid is used again
    guest.check_at_rest()


@pytest.mark.checklist("B3.3")
def test_the_table_is_read_up_to_its_terminator_and_whole_guids_are_compared() -> None:
    echo, kvp = ECHO.bytes_le, KVP.bytes_le

    assert get_id(Driver("d", [kvp, echo, NULL_GUID]), echo) == echo
    assert get_id(Driver("d", [kvp, NULL_GUID, echo]), echo) is None
    assert get_id(Driver("d", [echo[:-1] + b"\xff", NULL_GUID]), echo) is None
    assert get_id(Driver("d", [NULL_GUID]), NULL_GUID) is None
    assert [is_null_guid(guid) for guid in (NULL_GUID, echo)] == [True, False]


@pytest.mark.checklist("B3.2")
@pytest.mark.parametrize("at", range(16))
def test_a_guid_with_any_byte_set_is_not_null(at: int) -> None:
    guid = bytes(at) + b"\x01" + bytes(15 - at)

    assert not is_null_guid(guid)
    assert get_id(Driver("d", [guid, NULL_GUID]), guid) == guid
    assert is_null_guid(bytes(16))


@pytest.mark.checklist("B7.5")
def test_a_fresh_device_has_its_channel_and_nothing_of_the_one_before() -> None:
    guest = Guest().connected()
    guest.run(guest.bus.register(driver("echo", ECHO)))
    relid, instance = guest.offer(), uuid.uuid4()
    guest.bus.override(guest.bus.devices["vmbus_0_1"], "echo")
    guest.driver = lambda _: errno.ENXIO
    guest.server.rescind(relid)
    guest.deliver()

    assert guest.offer(instance=instance) == relid

    device = guest.bus.devices["vmbus_0_2"]
    assert device.channel is guest.channel(relid)
    assert (device.channel.offer.class_id, device.channel.offer.instance_id) == (ECHO, instance)
    assert (device.driver, device.driver_override, device.removed, device.working) == (None, "", False, False)
    assert "child device vmbus_0_2 registered" in guest.log


def objects_of(instance: uuid.UUID) -> int:
    """Count the device objects of an instance that anybody still holds."""
    gc.collect()
    return sum(isinstance(one, Device) and one.channel.offer.instance_id == instance for one in gc.get_objects())


@pytest.mark.checklist("B3.8")
def test_the_object_of_a_device_is_freed_with_its_last_reference() -> None:
    guest, instance = Guest().connected(), uuid.uuid4()
    guest.run(guest.bus.register(driver("echo", ECHO)))
    relid = guest.offer(instance=instance)
    left: list[bool] = []

    def slow(wait: Wait) -> Any:
        def steps() -> Generator[Wait, Any, int]:
            yield Until(lambda: bool(left))
            return 0

        return steps() if isinstance(wait, Remove) else 0

    guest.driver = slow
    guest.server.rescind(relid)
    guest.deliver()
    guest.trace.clear()     # the test's own references
    assert objects_of(instance) == 1    # its driver is still in remove

    left.append(True)
    guest.tasks.pump()
    guest.trace.clear()

    assert objects_of(instance) == 0


def test_a_driver_gets_devices_from_before_and_after_its_registration() -> None:
    guest = Guest().connected()
    guest.offer()

    guest.run(guest.bus.register(driver("echo", ECHO)))
    guest.offer()
    guest.offer(KVP)

    assert guest.calls == [("probe", "echo", "vmbus_0_1"), ("probe", "echo", "vmbus_0_2")]
    assert guest.bus.devices["vmbus_0_3"].driver is None
    assert guest.log.count("registering driver echo") == 1


@pytest.mark.checklist("B3.5")
def test_the_first_probe_that_succeeds_wins_and_failures_are_logged_with_their_code() -> None:
    guest = Guest().connected()
    guest.driver = lambda wait: errno.ENXIO if isinstance(wait, Probe) and wait.driver.name == "picky" else 0
    for name in ("picky", "willing", "late"):
        guest.run(guest.bus.register(driver(name, ECHO)))

    guest.offer()

    assert [call[1] for call in guest.calls] == ["picky", "willing"]
    assert f"probe failed for device vmbus_0_1 ({errno.ENXIO})" in guest.log
    bound = guest.bus.devices["vmbus_0_1"].driver
    assert bound is not None
    assert bound.name == "willing"


@pytest.mark.checklist("B3.5", "B3.6")
def test_a_driver_without_probe_is_enodev_and_without_remove_is_only_logged() -> None:
    guest = Guest().connected()
    relid = guest.offer()
    guest.run(guest.bus.register(Driver("mute", [ECHO.bytes_le, NULL_GUID], has_probe=False)))
    assert guest.bus.devices["vmbus_0_1"].driver is None
    assert "driver not set for vmbus_0_1" in guest.log

    guest.run(guest.bus.register(Driver("careless", [ECHO.bytes_le, NULL_GUID], has_remove=False)))
    guest.server.rescind(relid)
    guest.deliver()

    assert [call[0] for call in guest.calls] == ["probe"]
    assert "remove not set for vmbus_0_1" in guest.log
    assert guest.bus.devices == {}


@pytest.mark.checklist("X20", "B7.3")
def test_a_name_that_is_taken_is_ebusy_and_offers_are_requested_all_the_same() -> None:
    guest = Guest().connected()
    guest.run(guest.bus.register(driver("echo", ECHO)))
    posts = len(guest.posts)

    with pytest.raises(OSError) as caught:
        guest.run(guest.bus.register(driver("echo", KVP)))

    assert caught.value.errno == errno.EBUSY
    assert [post.payload[:4] for post in guest.posts[posts:]] == [b"\x03\0\0\0"]
    assert guest.channels.counters.duplicates == 0


@pytest.mark.parametrize("table", [[], [ECHO.bytes_le], [b"short", NULL_GUID], [ECHO.bytes_le] * 257])
def test_a_table_without_a_terminator_is_refused(table: list[bytes]) -> None:
    guest = Guest().connected()

    with pytest.raises(OSError) as caught:
        guest.run(guest.bus.register(Driver("bad", table)))

    assert caught.value.errno == errno.EINVAL
    assert guest.bus.drivers == {}


@pytest.mark.checklist("B1.2", "B7.1", "B7.4")
def test_without_a_bus_registering_is_enodev_after_its_log_line() -> None:
    guest = Guest()
    guest.bus.exists = False

    with pytest.raises(OSError) as caught:
        guest.run(guest.bus.register(driver("echo", ECHO)))
    guest.run(guest.bus.unregister(driver("echo", ECHO)))

    assert caught.value.errno == errno.ENODEV
    assert guest.log == ["registering driver echo", "unregistering driver echo"]
    assert guest.posts == []


@pytest.mark.checklist("X20")
def test_unregistering_removes_the_driver_from_each_device_and_remove_s_answer_is_ignored() -> None:
    guest = Guest().connected()
    echo = driver("echo", ECHO)
    guest.run(guest.bus.register(echo))
    guest.offer()
    guest.offer()
    guest.driver = lambda _: errno.EIO

    guest.run(guest.bus.unregister(echo))

    assert [call[0] for call in guest.calls] == ["probe", "probe", "remove", "remove"]
    assert [device.driver for device in guest.bus.devices.values()] == [None, None]


def test_a_device_with_an_override_takes_that_driver_only_whatever_its_table_says() -> None:
    guest = Guest().connected()
    guest.offer()
    device = guest.bus.devices["vmbus_0_1"]
    guest.bus.override(device, "kvp\n")

    guest.run(guest.bus.register(driver("echo", ECHO)))
    guest.run(guest.bus.register(driver("kvp", KVP)))

    assert guest.calls == [("probe", "kvp", "vmbus_0_1")]


@pytest.mark.checklist("B3.1", "B3.9")
def test_uevents_tell_add_bind_unbind_and_remove_with_modalias_and_driver() -> None:
    guest = Guest().connected()
    guest.run(guest.bus.register(driver("echo", ECHO)))
    relid = guest.offer()
    guest.server.rescind(relid)
    guest.deliver()

    head = ["DEVPATH=/devices/VMBUS:00/vmbus_0_1", "SUBSYSTEM=vmbus"]
    assert guest.uevents == [
        ["ACTION=add", "DEVPATH=/bus/vmbus/drivers/echo", "SUBSYSTEM=drivers"],
        ["ACTION=add", *head, ECHO_MODALIAS],
        ["ACTION=bind", *head, "DRIVER=echo", ECHO_MODALIAS],
        ["ACTION=unbind", *head, "DRIVER=echo", ECHO_MODALIAS],
        ["ACTION=remove", *head, ECHO_MODALIAS],
    ]


@pytest.mark.checklist("B3.1")
def test_a_uevent_with_no_room_is_enomem_and_hurts_nothing_else() -> None:
    guest = Guest().connected()
    guest.run(guest.bus.register(driver("x" * 3000, ECHO)))

    guest.offer()

    assert [event[0] for event in guest.uevents] == ["ACTION=add"]
    assert guest.bus.devices["vmbus_0_1"].driver is not None
    assert "no uevent bind" in guest.log[-1]


@pytest.mark.checklist("B3.7", "B3.9")
def test_shutdown_reaches_bound_devices_whose_driver_has_one() -> None:
    guest = Guest().connected()
    guest.run(guest.bus.register(driver("echo", ECHO)))
    guest.run(guest.bus.register(Driver("kvp", [KVP.bytes_le, NULL_GUID], has_shutdown=False)))
    guest.offer()
    guest.offer(KVP)
    guest.offer(uuid.uuid4())
    guest.calls.clear()

    guest.run(guest.bus.shutdown())

    assert guest.calls == [("shutdown", "echo", "vmbus_0_1")]


def opening(guest: Guest) -> None:
    """Have probe open the channel, and remove leave it open."""

    def call(wait: Wait) -> Any:
        return probe(wait) if isinstance(wait, Probe) else 0

    def probe(wait: Probe) -> Generator[Wait, Any, int]:
        try:
            yield from guest.channels.open(wait.device.channel, RingMemory(guest, 60))
        except OSError as error:
            return error.errno or errno.EIO
        return 0

    guest.driver = call


@pytest.mark.checklist("H12")
def test_a_rescind_while_probe_waits_for_its_open_ends_both_and_the_device_goes() -> None:
    guest = Guest().connected()
    opening(guest)
    guest.run(guest.bus.register(driver("echo", ECHO)))
    relid = guest.offer(device=Echo(None))
    assert guest.bus.devices["vmbus_0_1"].working
    other = guest.offer(device=Echo())
    assert guest.channel(other).state is ChannelState.OPENED        # a probe that waits holds up nobody else

    guest.server.rescind(relid)
    guest.deliver()

    assert list(guest.bus.devices) == ["vmbus_0_2"]
    assert f"probe failed for device vmbus_0_1 ({errno.ENODEV})" in guest.log
    assert guest.server.offers.get(relid) is None
    assert guest.clock.now_ns() == 0
    guest.check_at_rest()


@pytest.mark.checklist("H12")
def test_behind_a_probe_that_waits_for_its_open_a_queued_rescind_waits_for_the_time_out() -> None:
    guest = Guest(rescind_queued=True).connected()
    opening(guest)
    guest.run(guest.bus.register(driver("echo", ECHO)))
    relid = guest.offer(device=Echo(None))
    guest.server.rescind(relid)
    guest.deliver()
    assert guest.bus.devices["vmbus_0_1"].working       # for an answer that the host will never give

    assert guest.pass_time()
    guest.deliver()
    assert guest.clock.now_ns() == 5_000_000_000
    assert f"probe failed for device vmbus_0_1 ({errno.ETIMEDOUT})" in guest.log
    assert guest.bus.devices == {}
    assert guest.server.offers.get(relid) is None
    guest.check_at_rest()


@pytest.mark.checklist("H12")
@pytest.mark.parametrize("queued", [False, True])
def test_where_nothing_waits_a_queued_rescind_is_as_good_as_another(queued: bool) -> None:
    guest = Guest(rescind_queued=queued).connected()
    opening(guest)
    guest.run(guest.bus.register(driver("echo", ECHO)))
    for _ in range(3):
        relid = guest.offer(device=Echo())
        guest.server.rescind(relid)
        guest.deliver()

    assert (guest.bus.devices, guest.clock.now_ns()) == ({}, 0)
    guest.check_at_rest()


def test_a_channel_that_its_driver_leaves_open_is_closed_and_can_be_offered_and_opened_again() -> None:
    guest = Guest().connected()
    opening(guest)
    echo = driver("echo", ECHO)
    guest.run(guest.bus.register(echo))
    relid = guest.offer()
    channel = guest.channel(relid)

    guest.run(guest.bus.unregister(echo))
    assert channel.state is ChannelState.OPEN
    assert guest.listening == set()
    guest.run(guest.bus.register(driver("echo", ECHO)))

    assert channel.state.name == "OPENED"
    guest.server.rescind(relid)
    guest.deliver()
    assert guest.channel(guest.offer()).state is ChannelState.OPENED
    guest.check_at_rest()


@pytest.mark.checklist("H12")
@pytest.mark.parametrize("order", ["offer rescind", "offer rescind offer", "offer rescind offer rescind"])
@pytest.mark.parametrize("together", [True, False])
def test_offers_and_rescinds_that_come_together_leave_what_the_last_one_says(order: str, together: bool) -> None:
    guest = Guest().connected()
    guest.run(guest.bus.register(driver("echo", ECHO)))
    guest.delivers = not together
    instance = uuid.uuid4()
    relid = 0
    for step in order.split():
        if step == "offer":
            relid = guest.offer(instance=instance)
        else:
            guest.server.rescind(relid)
            if not together:
                guest.deliver()
    guest.delivers = True
    guest.deliver()

    assert len(guest.bus.devices) == order.endswith("offer")
    removed = [call for call in guest.calls if call[0] == "remove"]
    assert len(removed) == len(set(removed))
    guest.check_at_rest()


@pytest.mark.checklist("X16", "H8")
def test_at_the_end_each_device_is_removed_once() -> None:
    guest = Guest().connected()
    opening(guest)
    guest.run(guest.bus.register(driver("echo", ECHO)))
    guest.offer()
    going = guest.offer()
    guest.offer()
    guest.delivers = False
    guest.server.rescind(going)

    guest.delivers = True
    guest.run(guest.connection.unload())
    guest.run(guest.bus.remove_all())

    removes = [call for call in guest.calls if call[0] == "remove"]
    assert sorted(removes) == [("remove", "echo", f"vmbus_0_{n}") for n in (1, 2, 3)]
    assert (guest.bus.devices, guest.channels.unreleased) == ({}, 0)
    guest.check_at_rest()


def test_a_remove_that_waits_holds_up_the_release_of_the_relid() -> None:
    guest = Guest().connected()
    guest.run(guest.bus.register(driver("echo", ECHO)))
    relid = guest.offer()
    leave: list[bool] = []

    def slow(wait: Wait) -> Any:
        def steps() -> Generator[Wait, Any, int]:
            yield Until(lambda: bool(leave))
            return 0

        return steps() if isinstance(wait, Remove) else 0

    guest.driver = slow
    guest.server.rescind(relid)
    guest.deliver()
    assert guest.server.offers.get(relid) is not None

    leave.append(True)
    guest.tasks.pump()

    assert guest.server.offers.get(relid) is None
    guest.check_at_rest()
