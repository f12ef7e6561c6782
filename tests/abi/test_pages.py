# SPDX-License-Identifier: Apache-2.0
"""Everything but the channel messages: pages, registers, hypercall inputs, packets, integration messages.

Each vector of pages.json is held against C, and then against the code of the machine, which must write these bytes and read
them; so a page that C fills is read right by whoever reads it in the machine, and the other way round.
"""

import json
import struct
from pathlib import Path
from typing import Any

import pytest

from pvbus.actors.hypervisor import synic_msrs as msr
from pvbus.actors.hypervisor.synic import ConnectionKind, HvStatus
from pvbus.actors.hypervisor.vmbus import heartbeat, integration, shutdown
from pvbus.actors.hypervisor.vmbus.connection import Connection, Link
from pvbus.actors.hypervisor.vmbus.integration import IcMessage, IcVersion
from pvbus.actors.runtime.vmbus_facts import V0_13
from pvbus.actors.runtime.vmbus_wire import InitiateContact
from pvbus.actors.workqueue.work import WorkRing
from pvbus.shm import monitor
from pvbus.shm.channel_ring import ChannelControl
from pvbus.shm.hyperv import PAGE, SINT_VMBUS, Frame, Header, Sint, Slot, Vp
from pvbus.shm.memory import ChannelRing, Memory
from pvbus.shm.monitor import MonitorPage
from pvbus.tests.abi.program import Abi
from pvbus.tests.hypervisor.synic_rig import EVENTS, PORT, SynicRig
from pvbus.tests.workqueue.rig import anonymous
from pvbus.tests.workqueue.test_work import Cpus
from pvbus.verify.drivers.heartbeat import Heartbeat

VECTORS: list[dict[str, Any]] = json.loads(Path(__file__).with_name("pages.json").read_text())["vectors"]
RING = 8192


def golden(name: str) -> bytes:
    """Give the bytes of a vector."""
    vector = next(vector for vector in VECTORS if vector["name"] == name)
    page = bytearray(vector["size"])
    for offset, data, _ in vector["rows"]:
        page[offset : offset + len(data) // 2] = bytes.fromhex(data)
    return bytes(page)


def read(memory: Any, at: int, size: int) -> bytes:
    """Give bytes of shared memory."""
    return bytes(memory.load8(at + i) for i in range(size))


def write(memory: Any, at: int, data: bytes) -> None:
    """Put bytes into shared memory."""
    for i, byte in enumerate(data):
        memory.store8(at + i, byte)


@pytest.mark.parametrize("vector", VECTORS, ids=lambda vector: vector["name"])
def test_c_reads_and_writes_these_bytes(abi: Abi, vector: dict[str, Any]) -> None:
    fields = {name: value for _, _, row in vector["rows"] for name, value in row.items()}
    page = golden(vector["name"])

    assert abi.decode(vector["struct"], page) == fields
    assert abi.encode(vector["struct"], fields)[: len(page)] == page


# ---- message slots and event flags


def test_the_host_fills_a_slot_so_and_the_guest_takes_it_out_of_one() -> None:
    rig = SynicRig()
    rig.synic.post(PORT, 1, b"hello")
    rig.synic.post(PORT, 1, b"later")
    assert read(rig.memory, rig.slot(), Slot.BYTES) == golden("a message in its slot, another one waiting")

    cpus, slot = Cpus(), Slot.at(Frame.of_vp(0, Frame.MESSAGES), SINT_VMBUS, 0)
    write(cpus.memory, slot, golden("a message in its slot, another one waiting"))
    cpus.memory.store32(Vp.at(0, Vp.OFFERED) + 4 * SINT_VMBUS, 1)
    cpus.run(0)
    assert WorkRing(cpus.memory).take() == b"hello"
    assert cpus.memory.load64(Vp.at(0, Vp.EOM)) == 1


def test_the_host_raises_flags_so_and_the_guest_finds_their_channels() -> None:
    page = golden("event flags 1, 37 and 2047 of SINT 2")
    rig = SynicRig()
    for flag in (1, 37, 2047):
        rig.synic.signal(EVENTS, flag)
    assert read(rig.memory, Frame.of_vp(0, Frame.EVENT_FLAGS) * PAGE, PAGE) == page

    cpus = Cpus()
    cpus.memory.store64(Vp.at(0, Vp.SIEFP), Frame.of_vp(0, Frame.EVENT_FLAGS) << 12 | 1)
    cpus.memory.store32(Header.FLAGS_ARE_RELIDS, 1)
    write(cpus.memory, Frame.of_vp(0, Frame.EVENT_FLAGS) * PAGE, page)
    cpus.memory.fetch_or64(Vp.at(0, Vp.IRR), 1 << 0x37)
    assert sorted(cpus.path.hv_run(0, 0)[1]) == [1, 37, 2047]


class OnePage:
    """Guest memory of one page, frame 1."""

    def __init__(self) -> None:
        self.memory = anonymous(PAGE)

    def find(self, frame: int) -> tuple[Memory, int] | None:
        """Find the page."""
        return (self.memory, 0) if frame == 1 else None


def test_below_2_4_the_interrupt_page_is_written_and_read_so() -> None:
    page = golden("signals of relids 1, 33 and 255, both ways")
    link = Link(version=V0_13, contact=InitiateContact(version=V0_13, interrupt_page=PAGE))
    guest = OnePage()
    connection = Connection(guest)
    for relid in (1, 33, 255):
        connection.set_signal(link, relid)
        connection.set_guest_signal(link, relid)
    assert read(guest.memory, 0, PAGE) == page

    assert list(connection.take_signals(link)) == [1, 33, 255]
    cpus = Cpus()
    cpus.memory.store64(Vp.at(0, Vp.SIEFP), Frame.of_vp(0, Frame.EVENT_FLAGS) << 12 | 1)
    write(cpus.memory, Frame.of_vp(0, Frame.EVENT_FLAGS) * PAGE + SINT_VMBUS * 256, b"\1")
    write(cpus.memory, Frame.INTERRUPT * PAGE, page)
    cpus.memory.fetch_or64(Vp.at(0, Vp.IRR), 1 << 0x37)
    assert sorted(cpus.path.hv_run(0, 0)[1]) == [1, 33, 255]


@pytest.mark.checklist("B2.8")
def test_both_sides_leave_these_bytes_in_a_monitor_page_and_find_them_there() -> None:
    page, memory = golden("triggers 0, 37 and 127; 37 and 127 are armed"), anonymous(PAGE)
    for number, latency, connection, flag in ((0, 1000, 0x2001, 0), (37, 10_000, 0x2025, 0), (127, 65_535, 2, 3)):
        monitor.describe(memory, 0, number, latency, connection, flag)
        monitor.enable(memory, 0, number)
        assert monitor.trigger(memory, 0, number) is False
        assert number == 0 or monitor.arm(memory, 0, number)
    assert read(memory, 0, PAGE) == page

    again = anonymous(PAGE)
    write(again, 0, page)
    assert [number for number in range(MonitorPage.IDS) if monitor.is_triggered(again, 0, number)] == [0, 37, 127]
    assert [monitor.latency_100ns(again, 0, number) for number in (0, 36, 37, 127)] == [1000, 0, 10_000, 65_535]
    assert [monitor.connection_of(again, 0, number) for number in (0, 37, 127)] == [0x2001, 0x2025, 2]
    assert [monitor.take(again, 0, number) for number in (0, 37, 127)] == [True] * 3
    assert read(again, 8, 32) == bytes(32)


# ---- registers and hypercalls


def test_registers_have_their_fields_there(abi: Abi) -> None:
    rig = SynicRig()
    (unmasked,) = struct.unpack("<Q", golden("SINT 2, unmasked on vector 0x37"))
    (masked,) = struct.unpack("<Q", golden("SINT at reset: masked"))
    (all_on,) = struct.unpack("<Q", golden("a SINT with everything on"))
    simp = abi.encode("page_register", {"enable": 1, "frame": Frame.of_vp(1, Frame.MESSAGES)})

    assert rig.synic.read_msr(0, msr.SINT0 + SINT_VMBUS) == unmasked
    assert rig.synic.read_msr(1, msr.SINT0 + SINT_VMBUS) == masked == Sint.MASKED
    assert all_on == 0xFF | Sint.MASKED | Sint.AUTO_EOI | Sint.POLLING | 1 << 20
    rig.enable(1)
    assert rig.synic.read_msr(1, msr.SIMP).to_bytes(8, "little") == simp


def test_hypercalls_read_their_input_there() -> None:
    rig = SynicRig()
    rig.synic.write_msr(0, msr.GUEST_OS_ID, 1)
    rig.synic.write_msr(0, msr.HYPERCALL, Frame.SPARE << 12 | 1)
    rig.synic.connect(4, ConnectionKind.MESSAGE, lambda connection: rig.host.append((connection, -1)))

    assert rig.synic.hypercall(0x5C, golden("HvPostMessage on connection 4")) == HvStatus.SUCCESS
    assert rig.synic.hypercall(0x5D, golden("HvSignalEvent on connection 2, flag 3")) == HvStatus.SUCCESS
    assert rig.host == [(4, -1), (2, 3)]
    message = rig.synic.take(4)
    assert message is not None
    assert (message.type, message.payload) == (1, b"abc")


# ---- rings


def rings(at: int = 64) -> tuple[Memory, ChannelRing, ChannelRing]:
    """Give both rings of a channel, through which `at` bytes have gone, and both views of them."""
    memory = anonymous(2 * RING)
    for ring in (0, RING):
        memory.store32(ring + ChannelControl.WRITE_INDEX, at)
        memory.store32(ring + ChannelControl.READ_INDEX, at)
    return memory, ChannelRing(memory, 0, RING, RING), ChannelRing(memory, RING, 0, RING)


def test_a_ring_writes_packets_and_its_control_page_so() -> None:
    memory, guest, host = rings()
    guest.send(b"hello", 0x1122334455667788, completion=True)
    host.begin_read()
    head = golden("an in-band packet of five bytes that wants a completion")
    tail = golden("the trailer of a packet that began at 64")

    assert read(memory, PAGE + 64, 32) == head + b"hello\0\0\0" + tail
    big = memory.load32(ChannelControl.WRITE_INDEX)
    with pytest.raises(BlockingIOError):
        guest.send(bytes(4080 - 24))     # with header and trailer 4080, and 8 more must be free
    assert memory.load32(ChannelControl.WRITE_INDEX) == big
    assert read(memory, 0, PAGE) == golden("the control page of a ring")

    host.complete(7, b"")
    assert read(memory, RING + PAGE + 64, 16) == golden("a completion without payload")


def test_a_ring_reads_what_c_has_written(abi: Abi) -> None:
    memory, guest, host = rings()
    packet = abi.encode("packet", {"type": 9, "offset8": 4, "length8": 6, "completion": 1, "transaction": 2**64 - 1})
    trailer = abi.encode("trailer", {"write_index": 64})
    write(memory, PAGE + 64, packet + bytes(16) + b"0123456789abcdef" + trailer)    # 16 bytes more of a header, for its type
    write(memory, 0, abi.encode("ring_control", {"write_index": 64 + 56, "read_index": 64, "features": 1})[:128])

    assert host.recv() == (9, 2**64 - 1, b"0123456789abcdef", True)
    assert abi.decode("ring_control", read(memory, 0, PAGE)) == {"write_index": 120, "read_index": 120, "features": 1}
    assert guest.recv() is None


# ---- integration components


def test_integration_messages_are_written_and_read_so(abi: Abi) -> None:
    beat = IcMessage(
        type=integration.HEARTBEAT, body=heartbeat.body(0x0102030405060708), frame=IcVersion(3, 0), version=IcVersion(1, 0),
        transaction=254,
    )  # fmt: skip
    refusal = IcMessage(
        type=integration.SHUTDOWN, version=IcVersion(3, 2), status=0x80004005, transaction=9,
        flags=integration.TRANSACTION | integration.RESPONSE,
    )  # fmt: skip

    assert beat.encode() == golden("the header of a heartbeat request") + golden("the body of a heartbeat")
    assert integration.decode(beat.encode()) == beat
    assert heartbeat.sequence_of(golden("the body of a heartbeat")) == 0x0102030405060708
    assert refusal.encode() == golden("the header of a refused shutdown")
    assert integration.decode(golden("the header of a refused shutdown")) == refusal
    assert abi.decode("ic", beat.encode()[:28])["size"] == 40


def test_bodies_of_negotiations_and_shutdowns_are_written_and_read_so() -> None:
    frames, versions = (IcVersion(1, 0), IcVersion(3, 0)), (IcVersion(3, 1), IcVersion(3, 2))
    talk = golden("the body of a negotiation: frames 1.0 and 3.0, messages 3.1 and 3.2")

    assert integration.versions_body(frames, versions) == talk
    assert integration.versions_of(talk) == (frames, versions)
    assert shutdown.body(2, 60, shutdown.FORCE, "bye") == golden("the body of a shutdown")
    assert shutdown.body_of(golden("the body of a shutdown")) == (2, 60, shutdown.FORCE, "bye")


def test_the_heartbeat_driver_answers_with_the_next_number(abi: Abi, capsys: pytest.CaptureFixture[str]) -> None:
    asked = golden("the header of a heartbeat request") + golden("the body of a heartbeat")

    class Device:
        """Only its name is asked for."""

        name = "vmbus_0_1"

    answer, _ = Heartbeat()._answer(Device(), asked)  # type: ignore[arg-type]

    asked_for = abi.decode("ic", asked[:28])
    del asked_for["request_flag"]
    assert abi.decode("ic", answer[:28]) == asked_for | {"response_flag": 1}
    assert abi.decode("ic_heartbeat", answer[28:]) == {"sequence": 0x0102030405060709}
    assert "heartbeat" in capsys.readouterr().out


def test_every_shared_structure_of_the_declarations_has_a_vector() -> None:
    text = Path(__file__).with_name("hyperv_abi.h").read_text().partition("/* ---- pages and registers */")[2]
    declared = {line.split()[1] for line in text.splitlines() if line.startswith("struct ")}

    assert declared - {vector["struct"] for vector in VECTORS} == set()
