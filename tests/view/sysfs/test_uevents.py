# SPDX-License-Identifier: Apache-2.0
"""Uevents through the kernel: what is sent is what every listener of a network namespace gets, and nobody outside."""

import errno
import socket
import subprocess
import sys

import pytest

from pvbus.tests.view.sysfs.lacking import not_tested
from pvbus.view.pytest_plugin import environment
from pvbus.view.sysfs.uevents import NETLINK_KOBJECT_UEVENT, encode

ADD = {"ACTION": "add", "DEVPATH": "/devices/VMBUS:00/vmbus_0_1", "SUBSYSTEM": "vmbus", "MODALIAS": "vmbus:00"}
TEXT = b"add@/devices/VMBUS:00/vmbus_0_1\0ACTION=add\0DEVPATH=/devices/VMBUS:00/vmbus_0_1\0SUBSYSTEM=vmbus\0MODALIAS=vmbus:00\0"
IN_A_NAMESPACE = f"""
import socket, sys
from pvbus.view.fuse import mount
from pvbus.view.sysfs.uevents import UeventSender

try:
    mount.isolate()
except OSError as error:
    sys.exit(f"cannot: {{error}}")
listeners = [socket.socket(socket.AF_NETLINK, socket.SOCK_RAW, {NETLINK_KOBJECT_UEVENT}) for _ in range(3)]
for listener in listeners:
    listener.bind((0, 1))
sender = UeventSender()
for number in range(3):
    sender.send({ADD!r} | {{"NUMBER": str(number)}})
for listener in listeners:
    for number in range(3):
        while True:     # the real kernel may have something to say, too
            data, (port, group) = listener.recvfrom(8192)
            if b"VMBUS" in data:
                break
        assert (port, group) == (0, 1), (port, group)   # as from the kernel itself
        texts = data.split(b"\\0")
        head = {TEXT!r} + b"NUMBER=%d\\0SEQNUM=" % number
        assert data.startswith(head) and texts[-1] == b"", data
    listener.setblocking(False)
    try:
        while True:
            assert b"VMBUS" not in listener.recv(8192)
    except BlockingIOError:
        pass
print("held")
"""


def test_a_uevent_is_its_headline_and_its_variables_in_their_order() -> None:
    assert encode(ADD) == TEXT


def test_a_nul_cannot_make_one_variable_two() -> None:
    with pytest.raises(OSError) as refused:
        encode(ADD | {"DRIVER": "x\0ACTION=remove"})

    assert refused.value.errno == errno.EINVAL


def test_every_listener_of_the_namespace_hears_it_from_the_kernel_and_nobody_outside() -> None:
    with socket.socket(socket.AF_NETLINK, socket.SOCK_RAW, NETLINK_KOBJECT_UEVENT) as outside:
        outside.bind((0, 1))
        outside.setblocking(False)
        done = subprocess.run(
            [sys.executable, "-c", IN_A_NAMESPACE], check=False, capture_output=True, text=True, env=environment(), timeout=30
        )
        if "cannot: " in done.stderr:
            not_tested(f"uevents need namespaces: {done.stderr.strip()}")

        assert (done.stdout, done.stderr) == ("held\n", "")
        heard = []
        try:
            while True:
                heard.append(outside.recv(8192))
        except BlockingIOError:
            pass
        assert [data for data in heard if b"VMBUS" in data] == []
