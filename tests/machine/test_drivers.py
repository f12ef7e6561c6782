# SPDX-License-Identifier: Apache-2.0
"""The drivers that ship as examples, run as a user runs them: processes beside the machine, killed and started again."""

import errno
import select
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from typing import Any

import pytest

from pvbus.actors.runtime.vmbus_facts import DEVICE_CLASSES, HOST_DEVICES
from pvbus.tests.machine.vmbus_support import kill_and_wait_for_heir
from pvbus.verify.drivers.heartbeat import Heartbeat
from pvbus.verify.drivers.shutdown import E_FAIL, Shutdown
from pvbus.view.pytest_plugin import environment

BOUND_S = 20.0
LOOK_S = 0.005
PERIOD_S = 2
CONFIG = """\
[[domain]]
id = 0
cpus = 2
platforms = ["hyperv"]
devices = ["heartbeat", "shutdown"]
"""


class Driver:
    """One driver's process, and the lines that it prints."""

    def __init__(self, module: str, machine: str) -> None:
        self.process = subprocess.Popen(
            [sys.executable, "-u", "-m", f"pvbus.verify.drivers.{module}", "--name", machine],
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            bufsize=0,
            env=environment(),
        )

    def line(self) -> str:
        """Read a line, within the bound."""
        stream = self.process.stdout
        assert stream is not None
        line = b""
        while not line.endswith(b"\n"):
            assert select.select([stream], [], [], BOUND_S)[0], f"silent for {BOUND_S:.0f} s"
            byte = stream.read(1)
            assert byte, f"ended: {self.said()}"
            line += byte
        return line.decode().strip()

    def said(self) -> str:
        """Give what it said on standard error, once it has ended."""
        self.process.wait(BOUND_S)
        assert self.process.stderr is not None
        return self.process.stderr.read().decode()

    def close(self) -> None:
        """End it, however."""
        self.process.kill()
        self.process.wait(BOUND_S)
        for stream in (self.process.stdout, self.process.stderr):
            assert stream is not None
            stream.close()


@pytest.fixture(scope="module")
def pvbus_config() -> str:
    return CONFIG


@pytest.fixture
def machine(pvbus_boot: Any) -> Any:
    return pvbus_boot(CONFIG).machine


@pytest.fixture
def start(machine: Any) -> Iterator[Callable[[str], Driver]]:
    with ExitStack() as stack:

        def starter(module: str) -> Driver:
            driver = Driver(module, machine.name)
            stack.callback(driver.close)
            return driver

        yield starter


def until(condition: Callable[[], Any], what: str) -> None:
    deadline_s = time.monotonic() + BOUND_S
    while not condition():
        assert time.monotonic() < deadline_s, f"not within {BOUND_S:.0f} s: {what}"
        select.select([], [], [], LOOK_S)


def channel(machine: Any, name: str) -> dict[str, Any]:
    return next(row for row in machine.channels() if row["class"] == name)


def driver_of(machine: Any, name: str) -> str | None:
    found = (row["driver"] for row in machine.devices() if row["class_id"] == str(DEVICE_CLASSES[name]))
    return next(found, None)


def test_the_devices_of_the_configuration_are_offered_from_the_start_with_fixed_instances(machine: Any) -> None:
    until(lambda: len(machine.devices()) == 2, "both are on the bus")

    assert [row["name"] for row in machine.devices()] == ["vmbus_0_1", "vmbus_0_2"]
    assert {row["device_id"] for row in machine.devices()} == {str(HOST_DEVICES[n]) for n in ("heartbeat", "shutdown")}
    assert [(row["class"], row["relid"], row["state"]) for row in machine.channels()] == [
        ("heartbeat", 1, "closed"), ("shutdown", 2, "closed"),
    ]  # fmt: skip


def test_a_heartbeat_driver_answers_each_number_of_the_host(machine: Any, start: Callable[[str], Driver]) -> None:
    driver = start("heartbeat")

    beats = [driver.line()]
    for _ in range(3):
        machine.advance(PERIOD_S)
        beats.append(driver.line())

    assert beats == [f"vmbus_0_1 heartbeat {number}" for number in (1, 2, 3, 4)]
    assert channel(machine, "heartbeat")["state"] == "open"


def test_a_driver_that_is_killed_loses_its_device_to_the_next(machine: Any, start: Callable[[str], Driver]) -> None:
    first = start("heartbeat")
    assert first.line().endswith("heartbeat 1")

    first.process.kill()

    until(lambda: driver_of(machine, "heartbeat") is None, "the device has no driver")
    until(lambda: channel(machine, "heartbeat")["state"] == "closed", "its channel is closed")
    assert start("heartbeat").line() == "vmbus_0_1 heartbeat 1"  # the host begins anew with each open


def test_a_guest_that_is_asked_to_shut_down_agrees_and_goes(machine: Any, start: Callable[[str], Driver]) -> None:
    relid = channel(machine, "shutdown")["relid"]
    with pytest.raises(OSError) as nobody:
        machine.shut_down_guest(relid)
    driver = start("shutdown")
    until(lambda: can_ask(machine, relid), "they agree on a version")

    assert nobody.value.errno == errno.ENOTCONN
    assert driver.line() == "shutdown, in order: reason 0x0"
    assert driver.process.wait(BOUND_S) == 0
    until(lambda: driver_of(machine, "shutdown") is None, "the device has no driver")


def can_ask(machine: Any, relid: int) -> bool:
    """Ask; false while the driver has not answered the question for versions."""
    try:
        assert machine.shut_down_guest(relid) == 0
    except OSError as error:
        assert error.errno == errno.ENOTCONN
        return False
    return True


def test_a_guest_may_refuse_and_stays(machine: Any) -> None:
    class Busy(Shutdown):
        def orderly(self, reason: int, text: str, *, forced: bool) -> bool:
            return False

    machine.register_driver(Busy)
    relid, answers = channel(machine, "shutdown")["relid"], []

    def asked() -> bool:
        try:
            answers.append(machine.shut_down_guest(relid))
        except OSError as error:
            assert error.errno == errno.ENOTCONN
        return bool(answers)

    until(asked, "it answers")
    assert answers == [E_FAIL]
    assert driver_of(machine, "shutdown") == "shutdown"


def test_a_driver_that_is_unregistered_lets_its_device_go(machine: Any) -> None:
    driver = machine.register_driver(Heartbeat)
    until(lambda: channel(machine, "heartbeat")["state"] == "open", "its channel is open")

    machine.unregister_driver(driver)

    assert driver_of(machine, "heartbeat") is None
    until(lambda: channel(machine, "heartbeat")["state"] == "closed", "its channel is closed")


def test_a_driver_of_a_machine_that_stops_ends_and_says_why(pvbus_machine: Any) -> None:
    driver = Driver("heartbeat", pvbus_machine.name)
    try:
        assert driver.line() == "vmbus_0_1 heartbeat 1"
        pvbus_machine.machine.shutdown()

        assert driver.said() == "heartbeat: the bus has gone\n"
        assert driver.process.returncode == 1
        assert pvbus_machine.process.wait(BOUND_S) == 0
    finally:
        driver.close()


def test_a_driver_serves_the_heir_of_a_workqueue_without_being_started_again(
    machine: Any, start: Callable[[str], Driver]
) -> None:
    driver = start("heartbeat")
    assert driver.line().endswith("heartbeat 1")
    for _ in range(2):
        kill_and_wait_for_heir(machine, "workqueue/0")
        assert driver.line().endswith("heartbeat 1")    # the host begins anew with a channel that is opened anew

    machine.advance(PERIOD_S)
    assert driver.line().endswith("heartbeat 2")
    assert driver_of(machine, "heartbeat") == "heartbeat"


def test_a_driver_without_a_bus_says_so(pvbus_boot: Any) -> None:
    machine = pvbus_boot("[[domain]]\nid = 0\n").machine
    driver = Driver("heartbeat", machine.name)
    try:
        assert "domain 0 is not on the Hyper-V platform" in driver.said()
        assert driver.process.returncode == 3
    finally:
        driver.close()
