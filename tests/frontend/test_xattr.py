# SPDX-License-Identifier: Apache-2.0
"""Extended attributes of the device file, and of files in /sys: as a device node has them, and as sysfs does."""

from __future__ import annotations

import json
import sys
from typing import Any

from pvbus.tests.frontend.support import run
from pvbus.tests.frontend.xattrs import ONE_MORE
from pvbus.view.pytest_plugin import BootedMachine

KEPT = ["ENODATA", None, None, "EEXIST", "two", None, "ENODATA", "ENODATA"]
LISTED = ONE_MORE.decode("latin-1")
LISTED_0640 = LISTED.replace("\x10\0\6", "\x10\0\4")  # chmod sets the mask
DEVICE_SEES = {  # recorded on device nodes of devtmpfs and tmpfs, Linux 6.18: where none can be made to compare with
    "user.x": ["ENODATA", *["EPERM"] * 3, "ENODATA", *["EPERM"] * 3],
    "user.": ["ENODATA", *["EPERM"] * 3, "ENODATA", *["EPERM"] * 3],
    "security.x": KEPT,
    "security.": ["EINVAL"] * 8,
    "system.x": ["ENOTSUP"] * 8,
    "foo": ["ENOTSUP"] * 8,
    "system.posix_acl_default": ["ENODATA", "EINVAL", "EINVAL", "ENOTSUP", "ENODATA", None, None, None],
    "lists": [
        None, "0o640", [], "ENODATA", None, "0o660", ["system.posix_acl_access"], LISTED, None, LISTED_0640, "EACCES", None, None,
        "ENODATA", "0o640",
    ],
    "kept": [["security.a", "security.b"], 40000],
}  # fmt: skip
SYSFS_SEES = DEVICE_SEES | {
    "user.x": ["ENODATA", *["ENOTSUP"] * 3, "ENODATA", *["ENOTSUP"] * 3],
    "user.": ["EINVAL"] * 8,
    "system.posix_acl_default": ["ENOTSUP", "EINVAL", "EINVAL", "ENOTSUP", "ENOTSUP", None, None, None],
    "lists": [
        "ENOTSUP", "0o644", [], "ENOTSUP", "ENOTSUP", "0o644", [], "ENOTSUP", None, "ENOTSUP", "EACCES", "ENOTSUP", "ENOTSUP",
        "ENOTSUP", "0o640",
    ],
}  # fmt: skip
LIST = "system.posix_acl_access"
DEVICE_NAMES = [None, [LIST, "security.a", "trusted.a"], None, [LIST, "security.a"]]
SYSFS_NAMES = [None, ["security.a", "trusted.a"], None, ["security.a"]]
FILE = "/sys/devices/virtual/misc/xen!evtchn/uevent"


def test_extended_attributes_are_those_of_a_device_node_and_of_a_file_of_sysfs(pvbus_shared_machine: BootedMachine) -> None:
    done = run(
        sys.executable, "-m", "pvbus.tests.frontend.xattrs", "NODE", "/dev/xen/evtchn", FILE, name=pvbus_shared_machine.name
    )

    assert done.returncode == 0, done.stderr
    node, device, file = json.loads(done.stdout)
    of_root: Any = [found.pop("trusted.x") for found in (device, file)]
    names = [found.pop("names") for found in (device, file)]
    if node is None:  # we are in a user namespace, of one user
        assert of_root[0][1] == "EPERM"
        assert names == [["EPERM", listed, "EINVAL", listed] for listed in (DEVICE_NAMES[-1], SYSFS_NAMES[-1])]
    else:
        assert of_root == [KEPT, node.pop("trusted.x")]
        assert node.pop("names") == DEVICE_NAMES
        assert names == [DEVICE_NAMES, SYSFS_NAMES]
    assert device == (node or DEVICE_SEES)
    assert file == SYSFS_SEES
