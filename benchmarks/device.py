# SPDX-License-Identifier: Apache-2.0
"""Measure what unmodified programs pay: /dev/xen/evtchn of `pvbus run` beside a FUSE file that does nothing.

    benchmarks/device.py [--rounds N] [--calls N] [--trips N] [--frontend F] [--json]

Both files are served in this run, by a Python process each, and asked by one C program in turn, round by round; a figure is the
median of its rounds, a ratio the median of the ratios within each round. The file that does nothing is a loop of two system
calls a request, without any of our classes. Bound: the program is bound to a processor, and so is that file's server, to the same
one, where a call costs least; the device's is not. Free: everybody runs where the scheduler puts it.
"""

from __future__ import annotations

import argparse
import json
import os
import shlex
import shutil
import signal
import statistics
import struct
import subprocess
import sys
import tempfile
from pathlib import Path

if __name__ == "__main__":  # started as a script: the checkout is the package pvbus
    sys.path.append(str(Path(__file__).resolve().parent.parent / ".dev"))

from pvbus.view.fuse import abi, mount

RATIO_MAX = 2.0  # to the file that does nothing
TRIP_US_MAX = 200.0  # on an idle machine
CALLS = ("notify", "write", "read", "poll")
PLACES = ("bound", "free")
CLIENT = Path(__file__).with_name("device_client.c")


def serve_nothing(fd: int) -> None:
    """Answer every call on the one file of a FUSE mount as shortly as can be."""
    buffer = bytearray(70000)
    attributes = abi.ATTR_OUT_HEAD.pack(0, 0, 0) + abi.Attributes(0o100600).pack(1)
    init = abi.INIT_OUT.pack(7, abi.VERSION_MINOR, 65536, abi.INIT_BIG_WRITES, 0, 0, 65536, 1, 0, 0, 0)
    answers = {
        abi.INIT: init, abi.GETATTR: attributes, abi.SETATTR: attributes, abi.OPEN: abi.OPEN_OUT.pack(1, 1 | 4 | 16, 0),
        abi.READ: b"", abi.WRITE: struct.pack("=II", 4, 0), abi.IOCTL: bytes(16), abi.POLL: bytes(8), abi.RELEASE: b"",
    }  # fmt: skip
    while True:
        try:
            os.readv(fd, [buffer])
        except OSError:
            return
        _, opcode, unique, _, _, _, _, _, _ = abi.IN_HEADER.unpack_from(buffer)
        answer = answers.get(opcode)
        if answer is None:
            os.write(fd, abi.OUT_HEADER.pack(abi.OUT_HEADER_BYTES, -38, unique))
        else:
            os.write(fd, abi.OUT_HEADER.pack(abi.OUT_HEADER_BYTES + len(answer), 0, unique) + answer)


def inside(client: str, rounds: str, calls: str, trips: str) -> None:
    """Mount the file that does nothing, and become the client. In the namespaces of `pvbus run`."""
    bare = str(Path(client).with_name("bare"))
    fd = mount.mount_fuse(bare, directory=False)
    server = os.fork()
    if server == 0:
        mount.die_with_parent(signal.SIGKILL)
        serve_nothing(fd)
        os._exit(0)
    os.close(fd)
    os.execv(client, [client, bare, str(server), "/dev/xen/evtchn", rounds, calls, trips])  # noqa: S606 -- there is no shell to want


def measure(frontend: str, rounds: int, calls: int, trips: int) -> dict[tuple[str, str], list[tuple[float, float]]]:
    """Run the client in a machine of its own; give its figures by bound or free, and their names."""
    compiler = shutil.which(os.environ.get("CC", "cc")) or "gcc"
    with tempfile.TemporaryDirectory(prefix="pvbus-bench-") as directory:
        client = Path(directory, "client")
        subprocess.run([compiler, "-O2", "-o", str(client), str(CLIENT)], check=True)
        Path(directory, "bare").touch()
        command = [sys.executable, "-P", "-m", "pvbus.supervisor", "run", "--name", f"bench-{os.getpid()}"]
        command += ["--frontend", frontend, "--", sys.executable, str(Path(__file__).resolve())]
        command += ["--inside", str(client), str(rounds), str(calls), str(trips)]
        environment = os.environ | {"PYTHONPATH": os.pathsep.join(entry for entry in sys.path if entry)}
        environment.pop("PVBUS_MACHINE", None)
        said = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True, env=environment).stdout
    found: dict[tuple[str, str], list[tuple[float, float]]] = {}
    for line in said.splitlines():
        how, name, first, second = line.split()
        found.setdefault((how, name), []).append((float(first), float(second)))
    return found


def figures_of(rounds: list[tuple[float, float]]) -> dict[str, float]:
    """Give the medians of what one call took, in µs, and of the ratios."""
    return {
        "bare_us": statistics.median(bare for bare, _ in rounds),
        "device_us": statistics.median(ours for _, ours in rounds),
        "ratio": statistics.median(ours / bare for bare, ours in rounds),
    }


def main() -> int:
    """Measure and print."""
    parser = argparse.ArgumentParser(description="Measure /dev/xen/evtchn beside a FUSE file that does nothing.")
    parser.add_argument("--rounds", type=int, default=41)
    parser.add_argument("--calls", type=int, default=500, help="of each kind a round")
    parser.add_argument("--trips", type=int, default=3000)
    parser.add_argument("--frontend", default="fuse")
    parser.add_argument("--json", action="store_true")
    options = parser.parse_args()
    load = os.getloadavg()[0]
    found = measure(options.frontend, options.rounds, options.calls, options.trips)
    p50, p99 = found["free", "trip"][0]
    calls = {how: {name: figures_of(found[how, name]) for name in CALLS} for how in PLACES}
    if options.json:
        about = {"schema": 2, "frontend": options.frontend, "load": load, "cores": os.cpu_count()}
        print(json.dumps({**about, **calls, "trip_p50_us": p50, "trip_p99_us": p99}, indent=2))
        return 0
    print(f"{options.rounds} interleaved rounds of {options.calls} calls, medians: {shlex.join(['python', *sys.argv])}")
    print(f"{os.cpu_count()} cores, load {load:.1f} before\n")
    print(f"{options.frontend:<10}" + "".join(f"{how + ': nothing, device µs':>28}{'ratio':>9}" for how in PLACES))
    for name in CALLS:
        print(f"{name:<10}", end="")
        for how in PLACES:
            figures = calls[how][name]
            print(f"{figures['bare_us']:18.1f}{figures['device_us']:10.1f}{figures['ratio']:7.2f} ×", end="")
        print()
    print(f"\nround trip between two files: p50 {p50:.0f} µs, p99 {p99:.0f} µs")
    over = [f"{name} {how}" for how in PLACES for name in CALLS if calls[how][name]["ratio"] > RATIO_MAX]
    print(f"expected: at most {RATIO_MAX:g} × nothing: {'NOT ' + ', '.join(over) if over else 'yes'}; "
          f"p50 at most {TRIP_US_MAX:.0f} µs on an idle machine: {'yes' if p50 <= TRIP_US_MAX else 'NO'}")  # fmt: skip
    return 0


if __name__ == "__main__":
    if sys.argv[1:2] == ["--inside"]:
        inside(*sys.argv[2:])
    sys.exit(main())
