# SPDX-License-Identifier: Apache-2.0
"""Reads of the device file that signals interrupt: of threads, in a storm, under a debugger, at their process's end.

    python -m pvbus.tests.frontend.restarts DRIVER.so

Run inside of `pvbus run`; prints a JSON object of what was seen, by name.
"""

from __future__ import annotations

import ctypes
import json
import os
import select
import signal
import struct
import sys
import tempfile
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from pvbus.tests.frontend.deviations import READ_CALL, name_of, of_fstat, of_statfs, pair
from pvbus.tests.golden.through_file import DeviceFile, Driver
from pvbus.view.fuse import mount
from pvbus.view.fuse.node import Directory
from pvbus.view.fuse.session import Session

REST_S_MAX = 20.0
RESTARTING, ENDING = signal.SIGUSR1, signal.SIGUSR2
STORM_SIGNALS, SIGNALS_AN_EVENT = 500, 4
ROUNDS = 5
UNKNOWN = 0x4599
SEIZE, CONT, WALL = 0x4206, 7, 0x40000000
OTHER_CALLS = {"x86_64": ("19", "327"), "aarch64": ("65", "286")}.get(os.uname().machine, ())


def wait_for(condition: Callable[[], bool], what: str) -> None:
    """Wait until it holds."""
    until_s = time.monotonic() + REST_S_MAX
    while not condition():
        if time.monotonic() > until_s:
            raise TimeoutError(what)
        os.sched_yield()


def is_in_read(thread: int) -> bool:
    """Whether a thread sleeps in a read, and no signal of its own is left."""
    try:
        number = Path(f"/proc/{thread}/syscall").read_text().split()[0]
        status = Path(f"/proc/{thread}/status").read_text()
    except (FileNotFoundError, ProcessLookupError):
        return False
    fields = dict(line.split(":", 1) for line in status.splitlines())
    signals = int(fields["SigPnd"], 16) | int(fields["ShdPnd"], 16)
    return number in (READ_CALL, *OTHER_CALLS) and fields["State"].split()[0] == "S" and not signals


def readers_of(process: int) -> int:
    """Count the threads of a process that sleep in a read."""
    return sum(is_in_read(int(task)) for task in os.listdir(f"/proc/{process}/task"))  # noqa: PTH208


class Reading(threading.Thread):
    """A thread in a read of its own pair."""

    def __init__(self, call: Callable[[DeviceFile], int] = lambda file: len(file.read(4))) -> None:
        super().__init__()
        self.file, self.port, self.other, self.notifies = pair()
        self.answer = ""
        self._call = call
        self.start()

    def run(self) -> None:
        self.answer = name_of(lambda: self._call(self.file))

    @property
    def thread(self) -> int:
        return self.native_id or 0

    def settle(self) -> None:
        """Wait until it sleeps in its read, or has returned from it."""
        wait_for(lambda: not self.is_alive() or is_in_read(self.thread), "a reader sleeps")

    def signal(self, number: signal.Signals) -> None:
        signal.pthread_kill(self.ident or 0, number)

    def ended(self) -> str:
        """Send an event, and give what the read has answered."""
        self.other.notify(self.notifies)
        self.join()
        return self.answer


def of_a_thread(number: signal.Signals) -> list[str]:
    """Signal one of three threads, each in a read."""
    readers = [Reading() for _ in range(3)]
    for reader in readers:
        reader.settle()
    readers[1].signal(number)
    for reader in readers:
        reader.settle()
    wait_for(lambda: number is RESTARTING or not readers[1].is_alive(), "a read without SA_RESTART ends")
    return [reader.ended() for reader in readers]


def after_an_end() -> str:
    """Read what came while a read was ended."""
    reader = Reading()
    reader.settle()
    reader.signal(ENDING)
    answer = reader.ended()
    return str(len(reader.file.read(4))) if answer == "EINTR" else answer


def preadv2(file: DeviceFile) -> int:
    """Read by preadv2."""
    library = ctypes.CDLL(None, use_errno=True)
    buffer = ctypes.create_string_buffer(4)
    segment = struct.pack("=QQ", ctypes.addressof(buffer), 4)
    value = library.preadv2(file.fd, segment, 1, ctypes.c_long(-1), 0)
    if value < 0:
        raise OSError(ctypes.get_errno(), "preadv2")
    return int(value)


def readv(file: DeviceFile) -> int:
    """Read two entries by readv."""
    return DeviceFile.driver.call("readv", file.fd, ctypes.create_string_buffer(64), ctypes.c_ulong(4), ctypes.c_ulong(4))


def by(call: Callable[[DeviceFile], int], events: int) -> str:
    """Be interrupted in another call that reads."""
    reader = Reading(call)
    reader.settle()
    reader.signal(RESTARTING)
    reader.settle()
    for _ in range(events - 1):
        second = reader.file.bind_unbound_port(0)
        reader.other.notify(reader.other.bind_interdomain(0, second))
    return reader.ended()


def child_of(main: Callable[[], int]) -> int:
    """Fork a child that is `main`."""
    child = os.fork()
    if child == 0:
        code = 99
        try:
            code = main()
        finally:
            os._exit(code)
    return child


def storm() -> dict[str, Any]:
    """Signal a reader again and again, by one process, while another one sends it events; each of a port of its own."""
    a, b = (DeviceFile(DeviceFile.driver.call("open", b"/dev/xen/evtchn", os.O_RDWR)) for _ in range(2))
    ports = [a.bind_unbound_port(0) for _ in range(STORM_SIGNALS // SIGNALS_AN_EVENT)]
    others = [b.bind_interdomain(0, port) for port in ports]
    (said, say), (paced, pace) = os.pipe(), os.pipe()

    def read() -> int:
        got: list[int] = []
        interrupted = 0
        while len(got) < len(ports):
            try:
                data = a.read(64)
                got += struct.unpack(f"={len(data) // 4}I", data)
            except InterruptedError:
                interrupted += 1
        os.write(say, json.dumps([got, interrupted]).encode())
        return 0

    reader = child_of(read)

    def signal_it() -> int:
        for count in range(1, STORM_SIGNALS + 1):
            wait_for(lambda: is_in_read(reader), "it reads")
            os.kill(reader, RESTARTING)
            if count % SIGNALS_AN_EVENT == 0:
                os.write(pace, b"x")
        return 0

    killer = child_of(signal_it)
    for other in others:
        os.read(paced, 1)
        b.notify(other)
    got, interrupted = json.loads(os.read(said, 65536))
    ended = [os.waitpid(child, 0)[1] for child in (killer, reader)]
    return {"each once": sorted(got) == sorted(ports), "interrupted": interrupted > 0, "ended": ended}


def killed() -> list[int]:
    """Kill readers while they sleep, and while a signal of theirs is under way; of one thread, and of two."""
    a, _, _, _ = pair()

    def reads() -> int:
        return len(a.read(4))

    def beside() -> int:
        Reading().join()
        return 0

    seen = []
    for main in (reads, beside):
        for round_ in range(2 * ROUNDS):
            child = child_of(main)
            wait_for(lambda pid=child: readers_of(pid) == 1, "it reads")  # type: ignore[misc]
            if round_ % 2:
                os.kill(child, RESTARTING)
            os.kill(child, signal.SIGKILL)
            seen.append(os.waitpid(child, 0)[1])
    return sorted(set(seen))


def traced() -> list[Any]:
    """Be a reader's debugger when a signal comes for it: give what it reads, and what the debugger has seen."""
    a, _, b, at_b = pair()
    ptrace = ctypes.CDLL(None, use_errno=True).ptrace
    ptrace.argtypes = (ctypes.c_long, ctypes.c_long, ctypes.c_void_p, ctypes.c_void_p)
    said, say = os.pipe()
    child = child_of(lambda: os.write(say, name_of(lambda: len(a.read(4))).encode()) and 0)
    wait_for(lambda: is_in_read(child), "it reads")
    if ptrace(SEIZE, child, None, None):
        raise OSError(ctypes.get_errno(), "PTRACE_SEIZE")
    os.kill(child, RESTARTING)
    _, stop = os.waitpid(child, WALL)
    ptrace(CONT, child, None, RESTARTING)
    b.notify(at_b)
    return [os.read(said, 16).decode(), hex(stop), os.waitpid(child, WALL)[1]]


def looked_under_a_debugger() -> list[str]:
    """Have a program look at the device under a debugger: what it sees."""

    def look() -> int:
        os.read(go, 1)
        kind = hex(ctypes.c_long.from_buffer(of_statfs(ctypes.CDLL(None), a.fd)).value)
        os.write(say, json.dumps([name_of(lambda: a.ioctl(UNKNOWN, None)), of_fstat(a.fd), kind]).encode())
        return 0

    a, _, _, _ = pair()
    ptrace = ctypes.CDLL(None, use_errno=True).ptrace
    ptrace.argtypes = (ctypes.c_long, ctypes.c_long, ctypes.c_void_p, ctypes.c_void_p)
    (said, say), (go, let_go) = os.pipe(), os.pipe()
    child = child_of(look)
    if ptrace(SEIZE, child, None, None):
        raise OSError(ctypes.get_errno(), "PTRACE_SEIZE")
    os.write(let_go, b".")
    seen: list[str] = json.loads(os.read(said, 256))
    os.waitpid(child, WALL)
    return seen


def stopped(readers: int) -> str:
    """Stop and continue a process whose threads read, as a shell does: give all that its parent is told."""

    def read() -> int:
        reading = [Reading() for _ in range(readers)]
        os.read(go, 1)
        return sum(reader.ended() != "4" for reader in reading)

    go, let_go = os.pipe()
    child = child_of(read)
    wait_for(lambda: readers_of(child) == readers + 1, "all read")  # the pipe, too
    told = ""
    for _ in range(ROUNDS):
        os.kill(child, signal.SIGSTOP)
        _, status = os.waitpid(child, os.WUNTRACED | os.WCONTINUED)
        told += f"{status:x} "
        os.kill(child, signal.SIGCONT)
        _, status = os.waitpid(child, os.WUNTRACED | os.WCONTINUED)
        told += f"{status:x} "
        wait_for(lambda: readers_of(child) in (readers + 1, 1), "all read again, or none does any more")
    os.write(let_go, b"x")
    _, status = os.waitpid(child, os.WUNTRACED | os.WCONTINUED)
    return told + f"{status:x}"


def replaced() -> list[int]:
    """Have a process exec while another thread of it reads, and a signal of that is under way: the reader goes."""

    def beside(*, leader_reads: bool) -> int:
        leader = threading.main_thread()
        reader = None if leader_reads else Reading()
        file = pair()[0]

        def execute() -> None:
            thread = reader.thread if reader else os.getpid()
            wait_for(lambda: is_in_read(thread), "it reads")
            signal.pthread_kill((reader or leader).ident or 0, RESTARTING)
            os.execv("/bin/true", ["true"])

        if reader:
            execute()
        threading.Thread(target=execute).start()
        return len(file.read(4))

    seen = []
    for round_ in range(2 * ROUNDS):
        child = child_of(lambda odd=bool(round_ % 2): beside(leader_reads=odd))  # type: ignore[misc]
        seen.append(os.waitpid(child, 0)[1])
    return sorted(set(seen))


def beside_an_exec() -> list[Any]:
    """Signal a reader whose process is in an exec that hangs, and cannot be traced: nobody answers for its interpreter."""
    said, say = os.pipe()

    def read(program: str) -> int:
        reader = Reading()
        signal.pthread_sigmask(signal.SIG_BLOCK, [RESTARTING])  # so that it is the reader's
        os.write(say, struct.pack("=i", reader.thread))
        execute = ctypes.CDLL(None).execv  # os.execv would keep the interpreter's lock
        words = (ctypes.c_char_p * 2)(os.fsencode(program))
        threading.Thread(target=execute, args=(words[0], words), daemon=True).start()
        reader.join()
        os.write(say, reader.answer.encode())
        signal.pause()
        return 0

    seen: list[Any] = []
    with tempfile.TemporaryDirectory() as place, tempfile.TemporaryDirectory() as other:
        hanging = Session(mount.mount_fuse(place), Directory())
        asked = select.poll()
        asked.register(hanging.fd, select.POLLIN)
        asked.poll(REST_S_MAX * 1000)
        hanging.serve()  # it is mounted; what is asked from here on finds nobody
        script = Path(other, "script")
        script.write_text(f"#!{place}/interpreter\n")
        script.chmod(0o700)
        for number in (RESTARTING, signal.SIGKILL):
            child = child_of(lambda: read(str(script)))
            (reader,) = struct.unpack("=i", os.read(said, 4))
            wait_for(lambda thread=reader: is_in_read(thread), "it reads")  # type: ignore[misc]
            asked.poll(REST_S_MAX * 1000)  # another thread is in exec
            os.kill(child, number)
            if number is RESTARTING:
                seen.append(os.read(said, 16).decode())
            os.kill(child, signal.SIGKILL)
            seen.append(os.waitpid(child, 0)[1])
        hanging.close()
        mount.unmount(place)
    return seen


LOOKS: dict[str, Callable[[], Any]] = {
    "a thread's own signal": lambda: of_a_thread(RESTARTING),
    "a thread's own signal without SA_RESTART": lambda: of_a_thread(ENDING),
    "an event behind such a signal": after_an_end,
    "readv": lambda: by(readv, 2),
    "preadv2": lambda: by(preadv2, 1),
    "a storm": storm,
    "SIGKILL": killed,
    "a debugger's reader": traced,
    "a debugger's program": looked_under_a_debugger,
    "SIGSTOP of one thread": lambda: stopped(1),
    "SIGSTOP of three threads": lambda: stopped(3),
    "exec of another thread": replaced,
    "an exec that hangs": beside_an_exec,
}


def main(library: str) -> None:
    """Look, and print."""
    DeviceFile.driver = Driver(library)
    for number in (RESTARTING, ENDING):
        signal.signal(number, lambda _number, _frame: None)
        signal.siginterrupt(number, number is ENDING)
    seen = {}
    for what, look in LOOKS.items():
        print(what, file=sys.stderr, flush=True)  # what it was about, should it not come to its end
        seen[what] = look()
    print(json.dumps(seen))


if __name__ == "__main__":
    main(sys.argv[1])
