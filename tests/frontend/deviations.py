# SPDX-License-Identifier: Apache-2.0
"""What a program sees on the device file where a front end may differ from the driver; run inside of `pvbus run`.

    python -m pvbus.tests.frontend.deviations DRIVER.so

prints a JSON object of what was seen, by name.
"""

from __future__ import annotations

import contextlib
import ctypes
import errno
import fcntl
import functools
import json
import os
import select
import signal
import stat
import struct
import subprocess
import sys
import tempfile
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

from pvbus.tests.golden.session import wait_until_blocked
from pvbus.tests.golden.through_file import DeviceFile, Driver

DEVICE = b"/dev/xen/evtchn"
FIOASYNC, TCGETS, FICLONE, MAP_PRIVATE, MAP_DENYWRITE = 0x5452, 0x5401, 0x40049409, 2, 0x800
AT_EMPTY_PATH, AT_STATX_DONT_SYNC = 0x1000, 0x4000
REQUESTS = {
    "FIONREAD": 0x541B, "FIOQSIZE": 0x5460, "FIBMAP": 1, "FS_IOC_RESVSP": 0x40305828, "FIDEDUPERANGE": 0xC0189436,
    "FS_IOC_GETFLAGS": 0x80086601, "FIFREEZE": 0xC0045877, "FS_IOC_FIEMAP": 0xC020660B,
}  # fmt: skip
READ_CALL = {"x86_64": "0", "aarch64": "63"}.get(os.uname().machine, "")


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
    """Be interrupted by a restarting handler in a blocked read, and then get an event."""
    a, _, b, at_b = pair()
    signal.signal(signal.SIGUSR1, lambda _number, _frame: None)
    signal.siginterrupt(signal.SIGUSR1, False)
    me = threading.get_native_id()
    ended = threading.Event()

    def interrupt() -> None:
        if wait_until_blocked(me, ended.is_set):
            signal.pthread_kill(threading.main_thread().ident or 0, signal.SIGUSR1)
            wait_until_blocked(me, ended.is_set)  # again, unless it has ended the read
        b.notify(at_b)

    helper = threading.Thread(target=interrupt)
    helper.start()
    answer = name_of(lambda: len(a.read(4)))
    ended.set()
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


def mapping(fd: int, kind: int, size: int = 4096) -> str:
    """Map it, and look at it in a child: what that dies of."""
    library = ctypes.CDLL(None, use_errno=True)
    library.mmap.restype = ctypes.c_void_p
    at = library.mmap(None, ctypes.c_size_t(size), 1, kind, fd, ctypes.c_long(0))
    if at == ctypes.c_void_p(-1).value:
        return errno.errorcode[ctypes.get_errno()]
    child = os.fork()
    if child == 0:
        ctypes.string_at(at, 1)
        os._exit(0)
    return signal.Signals(os.WTERMSIG(os.waitpid(child, 0)[1])).name


def continued() -> str:
    """Be stopped and continued in a blocked read, as by a shell's Ctrl-Z and fg; no handler is there. Then get an event."""
    a, _, b, at_b = pair()
    said, say = os.pipe()
    child = os.fork()
    if child == 0:
        os.write(say, name_of(lambda: len(a.read(4))).encode())
        os._exit(0)
    state = Path(f"/proc/{child}/syscall")
    while state.read_text().split()[0] != READ_CALL:
        os.sched_yield()
    os.kill(child, signal.SIGSTOP)
    os.waitpid(child, os.WUNTRACED)
    os.kill(child, signal.SIGCONT)
    b.notify(at_b)
    answer = os.read(said, 16).decode()
    os.waitpid(child, 0)
    return answer


def of_regular_files(path: str) -> dict[str, str]:
    """Make calls that the kernel answers otherwise for a regular file than for a device whose driver has not got them."""
    library = ctypes.CDLL(None, use_errno=True)
    fd, read_only, write_only = (os.open(path, flags | os.O_NONBLOCK) for flags in (os.O_RDWR, os.O_RDONLY, os.O_WRONLY))
    regular = os.memfd_create("regular")
    os.write(regular, bytes(64))

    def call(name: str, *words: int) -> str:
        value = getattr(library, name)(fd, *map(ctypes.c_long, words))
        return errno.errorcode[ctypes.get_errno()] if value < 0 else str(value)

    def ioctl(request: int) -> str:
        return name_of(lambda: fcntl.ioctl(fd, request, bytearray(64)))

    answers = {
        "copy_file_range": name_of(lambda: os.copy_file_range(fd, regular, 4)),
        "copy_file_range to it": name_of(lambda: os.copy_file_range(regular, fd, 4, 0)),
        "copy_file_range with flags": call("copy_file_range", 0, regular, 0, 4, 1),
        "sync_file_range": call("sync_file_range", 0, 0, 0),
        "sync_file_range of less than nothing": call("sync_file_range", -1, 0, 0),
        "fallocate": call("fallocate", 0, 0, 8),
        "fallocate of a hole": call("fallocate", 3, 0, 8),
        "fallocate in a mode that there is not": call("fallocate", 2, 0, 8),
        "fallocate of a file that is open for reading": name_of(lambda: os.posix_fallocate(read_only, 0, 8)),
        "readahead": call("readahead", 0, 4096),
        "a lease": name_of(lambda: fcntl.fcntl(read_only, fcntl.F_SETLEASE, fcntl.F_RDLCK)),
        "a lease that there is not": name_of(lambda: fcntl.fcntl(read_only, fcntl.F_SETLEASE, 77)),
        "O_DIRECT by fcntl": name_of(lambda: fcntl.fcntl(fd, fcntl.F_SETFL, os.O_NONBLOCK | os.O_DIRECT)),
        "FICLONE of itself": name_of(lambda: fcntl.ioctl(fd, FICLONE, fd)),
        "FICLONE of another": name_of(lambda: fcntl.ioctl(fd, FICLONE, regular)),
        **{name: ioctl(request) for name, request in REQUESTS.items()},
        "private mapping": mapping(fd, MAP_PRIVATE),
        "FIONREAD by O_PATH": name_of(lambda: fcntl.ioctl(os.open(path, os.O_PATH), REQUESTS["FIONREAD"], bytearray(4))),
        "private mapping of nothing": mapping(fd, MAP_PRIVATE, 0),
        "private mapping as of libraries": mapping(fd, MAP_PRIVATE | MAP_DENYWRITE),
        "private mapping where it is open for writing": mapping(write_only, MAP_PRIVATE),
        "the file system": hex(ctypes.c_long.from_buffer(of_statfs(library, fd)).value),
    }
    for each in (fd, read_only, write_only, regular):
        os.close(each)
    return answers


def of_statfs(library: ctypes.CDLL, fd: int) -> ctypes.Array[ctypes.c_char]:
    """Ask for what kind of file system it lies in."""
    found = ctypes.create_string_buffer(256)
    library.fstatfs(fd, found)
    return found


def takes_nothing(a: DeviceFile, b: DeviceFile, at_b: int) -> dict[str, str]:
    """Make calls that move data by other ways than read and write; an event that lies there stays."""
    fcntl.fcntl(a.fd, fcntl.F_SETFL, os.O_NONBLOCK)
    b.notify(at_b)
    a.poll(select.POLLIN, 2000)
    pipe_out, pipe_in = os.pipe()
    os.write(pipe_in, bytes(8))
    of_regular_files(os.fsdecode(DEVICE))
    answers = {
        "splice from it": name_of(lambda: os.splice(a.fd, pipe_in, 4)),
        "splice from it to no pipe": name_of(lambda: os.splice(a.fd, b.fd, 4)),
        "sendfile from it": name_of(lambda: os.sendfile(pipe_in, a.fd, None, 4)),
        "sendfile from it to no pipe": name_of(lambda: os.sendfile(b.fd, a.fd, None, 4)),
        "splice to it": name_of(lambda: os.splice(pipe_out, a.fd, 4)),
        "pwritev2 with RWF_APPEND": name_of(lambda: os.pwritev(a.fd, [bytes(4)], -1, os.RWF_APPEND)),
    }
    return answers | {"the event": str(len(a.read(8)))}


def addresses() -> dict[str, ctypes.c_void_p]:
    """Give bad addresses: where nothing ever is; where nothing is; and where no program's memory is."""
    library = ctypes.CDLL(None, use_errno=True)
    library.mmap.restype = ctypes.c_void_p
    at = library.mmap(None, ctypes.c_size_t(4096), 0, 0x22, -1, ctypes.c_long(0))
    return {"to NULL": ctypes.c_void_p(), "to nowhere": ctypes.c_void_p(at), "to the kernel": ctypes.c_void_p(2**64 - 4096)}


def of_three_bytes(file: DeviceFile) -> dict[str, str]:
    """Read and write less than a port."""
    calls = {"read": file.read_at, "write": file.write_at}
    return {
        f"{kind} of 3 bytes {where}": name_of(functools.partial(call, at, 3))
        for where, at in addresses().items() for kind, call in calls.items()
    }  # fmt: skip


def by_standard_input(file: DeviceFile) -> str:
    """Read less than a port to a bad address, through descriptor 0."""
    kept = os.dup(0)
    os.dup2(file.fd, 0)
    try:
        return name_of(lambda: DeviceFile(0).read_at(addresses()["to nowhere"], 3))
    finally:
        os.dup2(kept, 0)
        os.close(kept)


def of_statx(fd: int) -> str:
    """Say what it is by what the kernel has of it, without asking its file system."""
    found = ctypes.create_string_buffer(256)
    ctypes.CDLL(None).statx(fd, b"", AT_EMPTY_PATH | AT_STATX_DONT_SYNC, 0x7FF, found)
    return stat.filemode(ctypes.c_uint16.from_buffer(found, 28).value)


def set_async(fd: int) -> str:
    """Ask for SIGIO, and say whether that is shown."""
    flags = fcntl.fcntl(fd, fcntl.F_GETFL)
    fcntl.fcntl(fd, fcntl.F_SETFL, flags | os.O_ASYNC)
    return "shown" if fcntl.fcntl(fd, fcntl.F_GETFL) & os.O_ASYNC else "not shown"


def of_fstat(fd: int) -> str:
    """Say what it is, of which size, and which device."""
    found = os.fstat(fd)
    major, minor = os.major(found.st_rdev), os.minor(found.st_rdev)
    return f"{stat.filemode(found.st_mode)} {found.st_size} {major}:{minor}"


def copied() -> str:
    """Have a program copy what lies in the directory, devices as devices."""
    device = os.fsdecode(DEVICE)
    with tempfile.TemporaryDirectory() as place, subprocess.Popen(["cp", "-a", device, place], stderr=subprocess.DEVNULL) as copy:
        while copy.poll() is None:
            words = Path(f"/proc/{copy.pid}/syscall").read_text().split()
            with contextlib.suppress(OSError):  # not a descriptor, or gone
                if words[0] == READ_CALL and str(Path(f"/proc/{copy.pid}/fd/{int(words[1], 16)}").readlink()) == device:
                    copy.kill()
                    return "waits for an event"
    return f"ends with {copy.returncode}"


def main(library: str) -> None:
    """Look, and print."""
    DeviceFile.driver = Driver(library)
    alone = opened(os.O_RDONLY)
    lease = name_of(lambda: fcntl.fcntl(alone.fd, fcntl.F_SETLEASE, fcntl.F_RDLCK))
    alone.close()
    file = opened(os.O_RDWR | os.O_NONBLOCK)
    full = overflowed()
    a, _, b, at_b = pair()
    seen = {
        "an unknown ioctl": name_of(lambda: file.ioctl(0x4599, None)),
        "an unknown ioctl with a size, and NULL": name_of(lambda: file.ioctl(0x40044599, None)),
        "an unknown ioctl of more than a page": name_of(lambda: file.ioctl(0x5F404599, None)),
        "isatty": name_of(lambda: file.ioctl(TCGETS, bytearray(64))),
        "read under SA_RESTART": restarted(),
        "SIGIO": sigio(),
        "FIOASYNC": name_of(lambda: file.ioctl(FIOASYNC, bytearray(b"\1\0\0\0"))),
        "O_ASYNC by fcntl": set_async(file.fd),
        "fstat": of_fstat(file.fd),
        "a lease of who is alone": lease,
        "cp -a": copied(),
        "read of an empty ring to NULL": name_of(lambda: file.read_at(None, 4)),
        "read of an overflowed ring": name_of(lambda: full.read(4)),
        "poll of an overflowed ring": full.poll(0xFFFF),
        "read of an overflowed ring to NULL": name_of(lambda: full.read_at(None, 4)),
        **of_three_bytes(file),
        "read of 3 bytes to nowhere through descriptor 0": by_standard_input(file),
        "statx with AT_STATX_DONT_SYNC": of_statx(file.fd),
        "read of an overflowed ring to nowhere": name_of(lambda: full.read_at(addresses()["to nowhere"], 4)),
        "shared mapping": mapping(file.fd, 1),
        "read over SIGSTOP and SIGCONT": continued(),
        "open with O_DIRECT": name_of(lambda: opened(os.O_RDWR | os.O_DIRECT)),
        "truncate": name_of(lambda: os.truncate(DEVICE, 0)),
        **takes_nothing(a, b, at_b),
        **of_regular_files(os.fsdecode(DEVICE)),
    }
    with contextlib.suppress(OSError):  # a device whose driver answers ENOSYS for an unknown ioctl, as ours does
        seen["on a device"] = of_regular_files("/dev/loop-control")
    print(json.dumps(seen))


if __name__ == "__main__":
    main(sys.argv[1])
