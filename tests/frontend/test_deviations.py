# SPDX-License-Identifier: Apache-2.0
"""Where the FUSE file differs from the driver, with the filter over it and without: docs/divergences.md."""

from __future__ import annotations

import json
import select
import sys
from typing import Any

import pytest

from pvbus.tests.frontend.support import driver, run
from pvbus.view.fuse.debugger import CAN_MEND
from pvbus.view.pytest_plugin import BootedMachine
from pvbus.view.sysfs.points import free_minors

ON_THE_DEVICE = {
    "an unknown ioctl": "ENOSYS",
    "an unknown ioctl with a size, and NULL": "ENOSYS",
    "an unknown ioctl of more than a page": "ENOSYS",
    "isatty": "ENOSYS",
    "read under SA_RESTART": "4",
    "read over SIGSTOP and SIGCONT": "4",
    "SIGIO": True,
    "FIOASYNC": "0",
    "O_ASYNC by fcntl": "shown",
    "fstat": f"crw------- 0 10:{free_minors()[0]}",
    "cp -a": "ends with 0",
    "a lease of who is alone": "EINVAL",
    "shared mapping": "ENODEV",
    "open with O_DIRECT": "EINVAL",
    "truncate": "EINVAL",
    "splice from it": "EINVAL",
    "splice from it to no pipe": "EINVAL",
    "sendfile from it": "EINVAL",
    "sendfile from it to no pipe": "EINVAL",
    "splice to it": "EINVAL",
    "pwritev2 with RWF_APPEND": "ENOTSUP",
    "read of an empty ring to NULL": "EAGAIN",
    "read of an overflowed ring": "EFBIG",
    "read of an overflowed ring to NULL": "EFBIG",
    "read of an overflowed ring to nowhere": "EFBIG",
    **{f"{kind} of 3 bytes {where}": "0" for kind in ("read", "write") for where in ("to NULL", "to nowhere")},
    **{f"{kind} of 3 bytes to the kernel": "EFAULT" for kind in ("read", "write")},
    "read of 3 bytes to nowhere through descriptor 0": "0",
    "statx with AT_STATX_DONT_SYNC": "crw-------",
    "poll of an overflowed ring": select.POLLERR,
    "the event": "4",  # nothing of all this has taken it
}
"""What the driver answers: recorded, or its checklist's."""
ON_A_DEVICE = {
    "copy_file_range": "EINVAL",
    "copy_file_range to it": "EINVAL",
    "copy_file_range with flags": "EINVAL",
    "sync_file_range": "ESPIPE",
    "sync_file_range of less than nothing": "EINVAL",
    "fallocate": "ENODEV",
    "fallocate of a hole": "ENODEV",
    "fallocate in a mode that there is not": "ENOTSUP",
    "fallocate of a file that is open for reading": "EBADF",
    "readahead": "EINVAL",
    "a lease": "EINVAL",
    "a lease that there is not": "EINVAL",
    "O_DIRECT by fcntl": "EINVAL",
    "FICLONE of itself": "EINVAL",
    "FICLONE of another": "EXDEV",
    "FIDEDUPERANGE": "EINVAL",
    "FIONREAD": "ENOSYS",
    "FIOQSIZE": "ENOTTY",
    "FIBMAP": "ENOSYS",
    "FS_IOC_RESVSP": "ENOSYS",
    "FS_IOC_GETFLAGS": "ENOSYS",
    "FIFREEZE": "ENOTSUP",
    "FS_IOC_FIEMAP": "ENOTSUP",
    "private mapping": "ENODEV",
    "FIONREAD by O_PATH": "EBADF",
    "private mapping of nothing": "EINVAL",
    "private mapping as of libraries": "ENODEV",
    "private mapping where it is open for writing": "EACCES",
    "the file system": "0x1021994",
}
"""What /dev/loop-control answers, a device without these calls whose driver knows ENOSYS; recorded on Linux 6.18."""
FUSE_SEES = {
    "private mapping as of libraries": "SIGBUS",
    "read of an overflowed ring to nowhere": "EFAULT",
    "read of 3 bytes to nowhere through descriptor 0": "EFAULT",
    "statx with AT_STATX_DONT_SYNC": "-rw-------",
}
"""Where it differs: docs/divergences.md."""
WITHOUT_A_DEBUGGER = {
    "an unknown ioctl": "ENOTTY",
    "isatty": "ENOTTY",
    "read under SA_RESTART": "EINTR",
    "read over SIGSTOP and SIGCONT": "EINTR",
    "fstat": "-rw------- 0 0:0",
    "cp -a": "waits for an event",
    "splice from it": "0",
    "sendfile from it": "0",
    "the file system": "0x65735546",
}
"""Where it differs besides on processors, and for programs, whose calls cannot be mended."""
if not CAN_MEND:
    FUSE_SEES |= WITHOUT_A_DEBUGGER
FUSE_ALONE_SEES = {
    "O_ASYNC by fcntl": "not shown",
    "FIOASYNC": "ENOTTY",
    "SIGIO": False,
    "an unknown ioctl with a size, and NULL": "EFAULT",
    "an unknown ioctl of more than a page": "ENOMEM",
    "private mapping": "SIGBUS",
    "copy_file_range": "EXDEV",
    "copy_file_range to it": "EXDEV",
    "sync_file_range": "0",
    "fallocate": "ENOTSUP",
    "fallocate of a hole": "ENOTSUP",
    "readahead": "0",
    "a lease": "EAGAIN",
    "a lease of who is alone": "0",
    "O_DIRECT by fcntl": "0",
    "FICLONE of itself": "ENOTSUP",
    "FIDEDUPERANGE": "ENOTSUP",
    "FIONREAD": "0",
    "FIOQSIZE": "0",
    "FIBMAP": "0",
    "FS_IOC_RESVSP": "EINVAL",
    **({} if CAN_MEND else {"FS_IOC_GETFLAGS": "ENOTTY"}),
    "read of an empty ring to NULL": "EFAULT",
    "read of an overflowed ring to NULL": "EFAULT",
    **{f"{kind} of 3 bytes {where}": "EFAULT" for kind in ("read", "write") for where in ("to NULL", "to nowhere")},
}
"""Where it differs besides while there is no filter over it."""


def looked(machine: BootedMachine, *options: str) -> dict[str, Any]:
    words = [sys.executable, "-m", "pvbus.tests.frontend.deviations", str(driver())]
    done = run(*words, name=machine.name, options=options)
    assert done.returncode == 0, done.stderr
    found: dict[str, Any] = json.loads(done.stdout)
    assert found.pop("on a device", ON_A_DEVICE) == ON_A_DEVICE
    return found


@pytest.fixture(scope="module")
def seen(pvbus_shared_machine: BootedMachine) -> dict[str, Any]:
    return looked(pvbus_shared_machine)


@pytest.fixture(scope="module")
def seen_alone(pvbus_shared_machine: BootedMachine) -> dict[str, Any]:
    return looked(pvbus_shared_machine, "--no-filter")


@pytest.mark.parametrize("what", FUSE_SEES)
def test_the_fuse_file_differs_from_the_driver_in_what_is_listed(seen: dict[str, Any], what: str) -> None:
    assert seen[what] == FUSE_SEES[what]


def test_nothing_else_that_was_looked_at_differs(seen: dict[str, Any]) -> None:
    assert {**seen, **FUSE_SEES} == {**ON_THE_DEVICE, **ON_A_DEVICE, **FUSE_SEES}


@pytest.mark.parametrize("what", FUSE_ALONE_SEES)
def test_without_the_filter_the_fuse_file_differs_besides_in_what_is_listed(seen_alone: dict[str, Any], what: str) -> None:
    assert seen_alone[what] == FUSE_ALONE_SEES[what] or (what, seen_alone[what]) == ("FIBMAP", "EPERM")  # that is root's own


def test_without_the_filter_nothing_else_that_was_looked_at_differs(seen_alone: dict[str, Any]) -> None:
    listed = {**FUSE_SEES, **FUSE_ALONE_SEES}

    assert {**seen_alone, **listed} == {**ON_THE_DEVICE, **ON_A_DEVICE, **listed}
