# SPDX-License-Identifier: Apache-2.0
"""Heartbeat and shutdown: drivers of the two integration devices, as small as they can be, on a running machine."""

from __future__ import annotations

import errno
import select
import threading
from typing import Any

import msgspec
import pytest

from pvbus.actors.client import VmbusDriver
from pvbus.actors.hypervisor.vmbus import heartbeat, shutdown
from pvbus.actors.hypervisor.vmbus import integration as ic
from pvbus.tests.machine.vmbus_support import BOUND_S, HEARTBEAT, SHUTDOWN, config, kill_and_wait_for_heir, wait_until

PERIOD_S = 2.0
BUSY = 0x800700AA


class Integration(VmbusDriver):
    """Negotiates, and answers each request with what `answer` makes of it."""

    versions: tuple[ic.IcVersion, ...] = ()

    def __init__(self) -> None:
        self.requests: list[ic.IcMessage] = []
        self.agreed: tuple[ic.IcVersion, ic.IcVersion] | None = None
        self.error: OSError | None = None
        self.thread: threading.Thread | None = None

    def probe(self, device: Any, _matched: Any) -> None:
        device.channel.open(ring_bytes=16 * 1024)
        self.thread = threading.Thread(target=self.serve, args=(device.channel,))
        self.thread.start()

    def serve(self, channel: Any) -> None:
        poll = select.poll()
        try:
            poll.register(channel.fileno(), select.POLLIN)
            while True:
                for _type, transaction, payload, _completion in channel.recv_many():
                    message = ic.decode(payload)
                    reply = self.negotiate(message) if message.type == ic.NEGOTIATE else self.answer(message)
                    channel.send(msgspec.structs.replace(reply, flags=ic.TRANSACTION | ic.RESPONSE).encode(), transaction)
                poll.poll(BOUND_S * 1000)
        except OSError as error:
            self.error = error

    def negotiate(self, message: ic.IcMessage) -> ic.IcMessage:
        frames, versions = ic.versions_of(message.body)
        self.agreed = frames[-1], versions[-1]
        return msgspec.structs.replace(message, body=ic.versions_body(frames[-1:], versions[-1:]))

    def answer(self, message: ic.IcMessage) -> ic.IcMessage:
        raise NotImplementedError

    def remove(self, _device: Any) -> None:
        """The channel is closed behind this, and the thread ends."""


class HeartbeatDriver(Integration):
    name, id_table = "heartbeat", (HEARTBEAT,)

    def answer(self, message: ic.IcMessage) -> ic.IcMessage:
        self.requests.append(message)
        return msgspec.structs.replace(message, body=heartbeat.body(heartbeat.sequence_of(message.body) + 1))


class ShutdownDriver(Integration):
    name, id_table = "shutdown", (SHUTDOWN,)
    status = ic.S_OK

    def answer(self, message: ic.IcMessage) -> ic.IcMessage:
        self.requests.append(message)
        return msgspec.structs.replace(message, status=self.status)


@pytest.fixture
def machine(pvbus_boot: Any) -> Any:
    return pvbus_boot(config()).machine


def ended(driver: Integration) -> None:
    assert driver.thread is not None
    driver.thread.join(BOUND_S)
    assert not driver.thread.is_alive()
    assert driver.error is not None
    assert driver.error.errno in (errno.ENOTCONN, errno.EIO)


def test_the_heartbeat_beats_with_the_machines_clock(machine: Any) -> None:
    relid = machine.offer("heartbeat")
    driver = machine.register_driver(HeartbeatDriver())
    machine.settle()
    wait_until("the first beat", lambda: len(driver.requests) == 1)
    assert driver.agreed == (ic.FRAME_VERSIONS[-1], heartbeat.VERSIONS[-1])
    for beat in range(2, 6):
        machine.advance(PERIOD_S)
        wait_until(f"beat {beat}", lambda: len(driver.requests) == beat)  # noqa: B023 -- at once

    assert [heartbeat.sequence_of(one.body) for one in driver.requests] == [1, 2, 3, 4, 5]
    machine.rescind(relid)
    machine.settle()
    ended(driver)


def test_the_heartbeat_goes_on_behind_a_killed_hypervisor_without_another_negotiation(machine: Any) -> None:
    machine.offer("heartbeat")
    driver = machine.register_driver(HeartbeatDriver())
    wait_until("the first beat", lambda: len(driver.requests) == 1)
    machine.settle()
    driver.agreed = None

    kill_and_wait_for_heir(machine, "hypervisor")
    machine.settle()
    machine.advance(PERIOD_S)

    wait_until("another beat", lambda: len(driver.requests) > 1)
    assert driver.agreed is None
    assert [heartbeat.sequence_of(one.body) for one in driver.requests][:2] == [1, 2]
    machine.unregister_driver(driver)
    ended(driver)


@pytest.mark.parametrize("status", [ic.S_OK, BUSY])
def test_a_guest_that_is_asked_to_shut_down_answers_whether_it_will(machine: Any, status: int) -> None:
    relid = machine.offer("shutdown")
    with pytest.raises(OSError) as unopened:
        machine.shut_down_guest(relid)
    assert unopened.value.errno == errno.ENOTCONN
    driver = ShutdownDriver()
    driver.status = status
    machine.register_driver(driver)
    machine.settle()
    wait_until("it has negotiated", lambda: driver.agreed is not None)
    wait_until("the host knows that", lambda: not _refuses(machine, relid))

    assert machine.shut_down_guest(relid) == status

    (*_, request) = driver.requests
    assert shutdown.body_of(request.body)[2] == 0  # not forced
    machine.unregister_driver(driver)
    ended(driver)


def _refuses(machine: Any, relid: int) -> bool:
    try:
        machine.shut_down_guest(relid)
    except OSError as error:
        assert error.errno == errno.ENOTCONN
        return True
    return False


def test_only_a_shutdown_device_shuts_down(machine: Any) -> None:
    relid = machine.offer("heartbeat")
    driver = machine.register_driver(HeartbeatDriver())
    machine.settle()
    with pytest.raises(OSError) as refused:
        machine.shut_down_guest(relid)
    assert refused.value.errno == errno.EINVAL
    with pytest.raises(OSError) as unknown:
        machine.shut_down_guest(relid + 1)
    assert unknown.value.errno == errno.ENOENT
    machine.unregister_driver(driver)
    ended(driver)
