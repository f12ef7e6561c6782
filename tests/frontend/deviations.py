# SPDX-License-Identifier: Apache-2.0
"""What a program sees on the device file where a front end may differ from the driver; run inside of `pvbus run`.

    python -m pvbus.tests.frontend.deviations DRIVER.so

prints a JSON object of what was seen, by name.
"""

from __future__ import annotations

import ctypes
import errno
import fcntl
import json
import os
import select
import signal
import stat
import struct
import sys
import threading
from collections.abc import Callable
from typing import Any

from pvbus.tests.golden.session import wait_until_blocked
from pvbus.tests.golden.through_file import DeviceFile, Driver

DEVICE = b"/dev/xen/evtchn"


def opened(flags: int = os.O_RDWR) -> DeviceFile:
    """Open the device."""
    return DeviceFile(DeviceFile.driver.call("open", DEVICE, flags))


def pair() -> tuple[DeviceFile, int, DeviceFile, int]:
    """Bind two files to each other; the second one's first event is taken."""
    a, b = opened(), opened()
    at_a = a.bind_unbound_port(0)
    at_b = b.bind_interdomain(0, at_a)
    b.write(b.read(4))
    return a, at_a, b, at_b


def name_of(call: Callable[[], Any]) -> str:
    """Give the errno's name, or the value."""
    try:
        return str(call())
    except OSError as error:
        return errno.errorcode[error.errno or 0]


def restarted() -> str:
    """Be interrupted by a restarting handler in a blocked read."""
    a, _, _, _ = pair()
    signal.signal(signal.SIGUSR1, lambda _number, _frame: None)
    signal.siginterrupt(signal.SIGUSR1, False)
    me = threading.get_native_id()

    def interrupt() -> None:
        if wait_until_blocked(me, lambda: False):
            signal.pthread_kill(threading.main_thread().ident or 0, signal.SIGUSR1)

    helper = threading.Thread(target=interrupt)
    helper.start()
    answer = name_of(lambda: a.read(4))
    helper.join()
    return answer


def sigio() -> bool:
    """Whether an event sends SIGIO to who has asked for it."""
    a, _, b, at_b = pair()
    signal.pthread_sigmask(signal.SIG_BLOCK, [signal.SIGIO])
    fcntl.fcntl(a.fd, fcntl.F_SETOWN, os.getpid())
    fcntl.fcntl(a.fd, fcntl.F_SETFL, fcntl.fcntl(a.fd, fcntl.F_GETFL) | os.O_ASYNC)
    b.notify(at_b)
    a.poll(select.POLLIN, 2000)  # it is there now
    return signal.sigtimedwait([signal.SIGIO], 0) is not None


def overflowed() -> DeviceFile:
    """Fill a ring to its last slot and beyond: a port is written back before it is read, again and again."""
    a, at_a, b, at_b = pair()
    watch = select.poll()
    watch.register(a.fd, 0)
    while not watch.poll(0):
        b.notify(at_b)
        a.write(struct.pack("=I", at_a))
    return a


def mapping(fd: int, kind: int) -> str:
    """Map it, and look at it in a child: what that dies of."""
    library = ctypes.CDLL(None, use_errno=True)
    library.mmap.restype = ctypes.c_void_p
    at = library.mmap(None, ctypes.c_size_t(4096), 1, kind, fd, ctypes.c_long(0))
    if at == ctypes.c_void_p(-1).value:
        return errno.errorcode[ctypes.get_errno()]
    child = os.fork()
    if child == 0:
        ctypes.string_at(at, 1)
        os._exit(0)
    return signal.Signals(os.WTERMSIG(os.waitpid(child, 0)[1])).name


def main(library: str) -> None:
    """Look, and print."""
    DeviceFile.driver = Driver(library)
    file = opened(os.O_RDWR | os.O_NONBLOCK)
    full = overflowed()
    seen = {
        "unknown ioctl": name_of(lambda: file.ioctl(0x4599, None)),
        "read under SA_RESTART": restarted(),
        "SIGIO": sigio(),
        "a regular file": stat.S_ISREG(os.fstat(file.fd).st_mode),
        "read of an empty ring to NULL": name_of(lambda: file.read_at(None, 4)),
        "read of an overflowed ring": name_of(lambda: full.read(4)),
        "poll of an overflowed ring": full.poll(0xFFFF),
        "read of an overflowed ring to NULL": name_of(lambda: full.read_at(None, 4)),
        "read of 3 bytes to NULL": name_of(lambda: file.read_at(None, 3)),
        "write of 3 bytes from NULL": name_of(lambda: file.write_at(None, 3)),
        "private mapping": mapping(file.fd, 2),
        "shared mapping": mapping(file.fd, 1),
    }
    print(json.dumps(seen))


if __name__ == "__main__":
    main(sys.argv[1])
