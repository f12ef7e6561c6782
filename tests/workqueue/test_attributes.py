# SPDX-License-Identifier: Apache-2.0
"""The attribute files, byte for byte."""

import errno
import uuid

import pytest

from pvbus.actors.runtime.vmbus_facts import DEVICE_CLASSES
from pvbus.actors.workqueue import attributes
from pvbus.actors.workqueue.attributes import RingState
from pvbus.shm.hyperv import PAGE, Frame
from pvbus.tests.workqueue.rig import Echo, Guest, RingMemory

INSTANCE = uuid.UUID("01234567-89ab-cdef-0123-456789abcdef")
ORDER = [
    "id", "state", "class_id", "device_id", "monitor_id", "modalias",
    "server_monitor_pending", "server_monitor_latency", "server_monitor_conn_id",
    "client_monitor_pending", "client_monitor_latency", "client_monitor_conn_id",
    "out_intr_mask", "out_read_index", "out_write_index", "out_read_bytes_avail", "out_write_bytes_avail",
    "in_intr_mask", "in_read_index", "in_write_index", "in_read_bytes_avail", "in_write_bytes_avail",
]  # fmt: skip


class Rings:
    """Rings with something in them."""

    def states(self) -> tuple[RingState, RingState]:
        return RingState(1, 8, 0xFFFFFFFF, 4095, 61440), RingState(0, 16, 24, 8, 0x80000000)


def guest_with_kvp() -> tuple[Guest, int]:
    guest = Guest().connected()
    device = Echo()
    guest.devices.append(device)
    relid = guest.server.offer(DEVICE_CLASSES["kvp"], INSTANCE, device, monitor_id=37)
    guest.deliver()
    memory = guest.memory
    for frame, scale in ((Frame.MONITOR, 1), (Frame.MONITOR + 1, 2)):   # id 37: group 1, bit 5
        memory.store32(frame * PAGE + 16, 0x80000020 + scale)
        memory.store32(frame * PAGE + 576 + 2 * 36, (100 * scale) << 16 | 7)
        memory.store32(frame * PAGE + 1088 + 8 * 37, 0x12340 + scale)
    return guest, relid


@pytest.mark.checklist("B2.3")
def test_there_are_22_attributes_in_their_order() -> None:
    assert list(attributes.ATTRIBUTES) == ORDER
    assert len(ORDER) == 22


@pytest.mark.checklist("X15", "B2.1", "B2.4", "B2.5", "B2.8")
def test_an_open_channel_s_attributes_are_these_bytes() -> None:
    guest, relid = guest_with_kvp()
    channel = guest.channel(relid)
    guest.run(guest.channels.open(channel, RingMemory(guest, 20), target_vp=1))

    seen = attributes.snapshot(channel, guest.memory, Rings())

    assert "".join(f"{name}={attributes.show(name, seen)}" for name in ORDER) == f"""\
id={relid}
state=3
class_id={{a9a0f4e7-5a45-4d96-b827-8a841e8c03e6}}
device_id={{01234567-89ab-cdef-0123-456789abcdef}}
monitor_id=37
modalias=vmbus:e7f4a0a9455a964db8278a841e8c03e6
server_monitor_pending=-2147483615
server_monitor_latency=100
server_monitor_conn_id=74561
client_monitor_pending=-2147483614
client_monitor_latency=200
client_monitor_conn_id=74562
out_intr_mask=1
out_read_index=8
out_write_index=-1
out_read_bytes_avail=4095
out_write_bytes_avail=61440
in_intr_mask=0
in_read_index=16
in_write_index=24
in_read_bytes_avail=8
in_write_bytes_avail=-2147483648
"""


@pytest.mark.checklist("H7")
def test_the_rings_of_a_channel_that_is_not_open_are_zeros() -> None:
    guest, relid = guest_with_kvp()

    seen = attributes.snapshot(guest.channel(relid), guest.memory, Rings())

    assert {name: attributes.show(name, seen) for name in ORDER[12:]} == dict.fromkeys(ORDER[12:], "0\n")
    assert attributes.show("state", seen) == "2\n"


def test_the_rings_of_a_rescinded_channel_are_not_read() -> None:
    guest, relid = guest_with_kvp()
    channel = guest.channel(relid)
    guest.run(guest.channels.open(channel, RingMemory(guest, 20)))
    guest.server.rescind(relid)
    guest.deliver()

    assert attributes.snapshot(channel, guest.memory, Rings()).out == RingState()


@pytest.mark.checklist("B2.1")
def test_a_device_without_a_channel_is_all_zeros() -> None:
    guest = Guest()

    seen = attributes.snapshot(None, guest.memory, None)

    assert attributes.show("class_id", seen) == "{00000000-0000-0000-0000-000000000000}\n"
    assert attributes.show("modalias", seen) == "vmbus:" + 32 * "0" + "\n"
    assert {attributes.show(name, seen) for name in ORDER if name not in ("class_id", "device_id", "modalias")} == {"0\n"}


@pytest.mark.checklist("B2.6")
def test_an_unknown_name_gives_nothing() -> None:
    assert attributes.show("no_such_file", attributes.Snapshot()) == ""


class Moving:
    """Rings that have moved on each time that somebody looks."""

    def __init__(self) -> None:
        self.looks = 0

    def states(self) -> tuple[RingState, RingState]:
        self.looks += 1
        return RingState(*[10 * self.looks] * 5), RingState(*[10 * self.looks + 1] * 5)


@pytest.mark.checklist("B2.7")
def test_a_snapshot_looks_at_the_rings_once_so_that_their_figures_belong_together() -> None:
    guest, relid = guest_with_kvp()
    device, rings = guest.bus.devices["vmbus_0_1"], Moving()
    guest.run(guest.channels.open(guest.channel(relid), RingMemory(guest, 20)))

    first = attributes.all_of(device, guest.memory, rings)
    second = attributes.all_of(device, guest.memory, rings)

    assert rings.looks == 2
    assert [first[name] for name in ORDER[12:]] == ["10\n"] * 5 + ["11\n"] * 5
    assert [second[name] for name in ORDER[12:]] == ["20\n"] * 5 + ["21\n"] * 5


class WithoutMemory:
    """Rings that cannot be looked at."""

    def states(self) -> tuple[RingState, RingState]:
        raise OSError(errno.ENOMEM, "no memory for a snapshot")


@pytest.mark.checklist("B2.2")
def test_a_snapshot_for_which_there_is_no_memory_is_an_error_and_no_empty_text() -> None:
    guest, relid = guest_with_kvp()
    guest.run(guest.channels.open(guest.channel(relid), RingMemory(guest, 20)))

    with pytest.raises(OSError, match="no memory") as caught:
        attributes.all_of(guest.bus.devices["vmbus_0_1"], guest.memory, WithoutMemory())

    assert caught.value.errno == errno.ENOMEM


def test_a_monitor_id_beyond_the_pages_reads_nothing() -> None:
    guest, relid = guest_with_kvp()
    channel = guest.channel(relid)
    channel.offer = type(channel.offer)(class_id=INSTANCE, instance_id=INSTANCE, relid=relid, monitor_id=200)

    assert attributes.snapshot(channel, guest.memory, None).server == attributes.Monitor()


def test_what_today_s_kernels_show_besides() -> None:
    guest, relid = guest_with_kvp()
    device = guest.bus.devices["vmbus_0_1"]
    guest.run(guest.channels.open(device.channel, RingMemory(guest, 20), target_vp=1))

    texts = attributes.all_of(device, guest.memory, Rings())

    assert list(texts)[:22] == ORDER
    assert {name: texts[name] for name in ("vendor", "numa_node", "channel_vp_mapping", "driver_override")} == {
        "vendor": "0x1414\n", "numa_node": "0\n", "channel_vp_mapping": f"{relid}:1\n", "driver_override": "(null)\n",
    }  # fmt: skip
    assert texts["device"].startswith("0x")
    below = {name.rpartition("/")[2]: text for name, text in texts.items() if name.startswith(f"channels/{relid}/")}
    assert below == {
        "cpu": "1\n", "state": "3\n", "in_mask": "0\n", "out_mask": "1\n", "read_avail": "8\n", "write_avail": "61440\n",
        "monitor_id": "37\n", "pending": "2147483682\n", "latency": "200\n", "subchannel_id": "0\n",
    }  # fmt: skip
    guest.bus.override(device, "echo\n")
    assert attributes.all_of(device, guest.memory, None)["driver_override"] == "echo\n"
