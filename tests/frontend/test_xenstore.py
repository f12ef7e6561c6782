# SPDX-License-Identifier: Apache-2.0
"""Debian's xenstored and lsevtchn in a run: unmodified, over the machine's event channels."""

from __future__ import annotations

import re
import shlex
import subprocess
import sys
from pathlib import Path

import psutil
import pytest

from pvbus.tests.frontend.support import (
    COMMAND,
    RUN_S_MAX,
    command,
    driver,
    environment,
    need_namespaces,
    not_shown,
    run,
    started,
)
from pvbus.tests.frontend.test_run import in_private_mounts
from pvbus.tests.view.support import until
from pvbus.view.fuse.debugger import CAN_MEND
from pvbus.view.pytest_plugin import BootedMachine

PAIRS = 300
LSEVTCHN = "/usr/lib/xen-4.17/bin/lsevtchn"
XENSTORED = "/usr/lib/xen-4.17/bin/xenstored"
README = Path(__file__).resolve().parents[2] / "README.md"
README_LINES = [line for line in README.read_text(encoding="utf-8").splitlines() if "pvbus run --xenstore" in line]


def need(path: str, package: str) -> None:
    if not Path(path).exists():
        not_shown(f"what {path} makes of it", f"install Debian's package {package}")


@pytest.fixture
def machine_name(pvbus_shared_machine: BootedMachine) -> str:
    return pvbus_shared_machine.name


@pytest.fixture
def xenstore_tools() -> None:
    need(XENSTORED, "xen-utils-4.17")
    need("/usr/bin/xenstore-read", "xenstore-utils")


def _upcalls(booted: BootedMachine) -> int:
    return sum(int(cpu["upcalls"]) for cpu in booted.machine.status()["domains"][0]["vcpus"])


@pytest.mark.usefixtures("xenstore_tools")
@pytest.mark.parametrize("frontend", ["fuse", "seccomp"])
def test_xenstored_answers_over_the_event_channel(pvbus_shared_machine: BootedMachine, frontend: str) -> None:
    pairs = {"fuse": PAIRS, "seccomp": 30}[frontend]
    script = (
        f"i=0; while [ $i -lt {pairs} ]; do xenstore-write /pvbus/$i value-$i && xenstore-read /pvbus/$i; i=$((i+1)); done\n"
        "xenstore-rm /pvbus; xenstore-exists /pvbus || echo gone"
    )
    before = _upcalls(pvbus_shared_machine)

    done = run("sh", "-c", script, name=pvbus_shared_machine.name, options=["--xenstore", "--frontend", frontend])

    assert done.stdout.splitlines() == [f"value-{number}" for number in range(pairs)] + ["gone"], done.stderr
    assert _upcalls(pvbus_shared_machine) - before >= 4 * pairs  # a request and an answer, a write and a read
    assert pvbus_shared_machine.machine.ports(0) == []


@pytest.mark.usefixtures("xenstore_tools")
def test_a_signal_to_the_command_s_whole_group_leaves_xenstored_alone(machine_name: str) -> None:
    script = "trap : INT; kill -INT 0; xenstore-write /a b; xenstore-read /a"

    done = subprocess.run(
        command("sh", "-c", script, name=machine_name, options=["--xenstore"]), capture_output=True, text=True, check=False,
        timeout=RUN_S_MAX, env=environment(), stdin=subprocess.DEVNULL, start_new_session=True,
    )  # fmt: skip

    assert (done.returncode, done.stdout) == (0, "b\n"), done.stderr


@pytest.mark.usefixtures("xenstore_tools")
def test_a_machine_has_one_xenstored_also_for_a_run_within_a_run(machine_name: str) -> None:
    inner = [*COMMAND, "--xenstore", "--", "true"]

    done = run(*inner, name=machine_name, options=["--xenstore"])

    assert done.returncode == 3
    assert done.stderr.splitlines()[-1] == "pvbus run: xenstored did not start (exit code 1)"


@pytest.mark.usefixtures("xenstore_tools")
def test_a_watch_sees_what_another_user_writes(machine_name: str) -> None:
    script = (
        "xenstore-watch -n 2 /seen > /dev/shm/pvbus-test-watch-$$ & w=$!\n"
        "while ! grep -q seen /dev/shm/pvbus-test-watch-$$; do :; done\n"
        "xenstore-write /seen/it now; wait $w; cat /dev/shm/pvbus-test-watch-$$; rm /dev/shm/pvbus-test-watch-$$"
    )

    done = run("timeout", "20", "sh", "-c", script, name=machine_name, options=["--xenstore"])

    assert done.stdout.split() == ["/seen", "/seen/it"], done.stderr


@pytest.mark.usefixtures("xenstore_tools")
def test_lsevtchn_prints_the_port_table(pvbus_shared_machine: BootedMachine) -> None:
    done = run(LSEVTCHN, name=pvbus_shared_machine.name, options=["--xenstore"])

    rows = [re.sub(r"\s+", " ", row).strip() for row in done.stdout.splitlines()]
    assert rows == [
        "1: VCPU 0: Interdomain (Connected) - Remote Domain 0, Port 3",
        "2: VCPU 0: Virtual IRQ 3",
        "3: VCPU 0: Interdomain (Connected) - Remote Domain 0, Port 1",
    ], done.stderr


def test_lsevtchn_sees_the_ports_of_a_python_client(pvbus_shared_machine: BootedMachine) -> None:
    need(LSEVTCHN, "xen-utils-4.17")
    with pvbus_shared_machine.machine.open_evtchn() as file:
        port = file.bind_unbound_port(0)

        done = run(LSEVTCHN, name=pvbus_shared_machine.name, options=[])

    assert done.stdout.split() == f"{port}: VCPU 0: Interdomain (Waiting connection) - Remote Domain 0".split()


@pytest.mark.usefixtures("xenstore_tools")
def test_when_xenstored_dies_who_waits_for_it_hears_an_error(machine_name: str) -> None:
    script = (
        "import os, select, struct, subprocess\n"
        "fd = os.open('/dev/xen/xenbus', os.O_RDWR)\n"
        "os.write(fd, struct.pack('=IIII', 4, 1, 0, 8) + b'/a\\0here\\0')\n"  # a watch: its answer, its first event
        "said = b''\n"
        "while b'here' not in said: said += os.read(fd, 4096)\n"
        "print('waiting', flush=True)\n"
        "try: os.read(fd, 4096)\n"
        "except OSError as error: print(error.errno, len(select.select([fd], [], [], 0)[0]), flush=True)\n"
        "print(subprocess.run(['xenstore-read', '/a'], stderr=subprocess.DEVNULL).returncode)\n"
    )
    with started(sys.executable, "-c", script, name=machine_name, options=["--xenstore"]) as process:
        assert process.stdout is not None
        assert process.stdout.readline() == "waiting\n"
        next(child for child in psutil.Process(process.pid).children() if child.name() == "xenstored").kill()

        said, complaints = process.communicate(timeout=20)

    assert said == "5 1\n1\n"
    assert "pvbus run: xenstored has died" in complaints


@pytest.mark.usefixtures("xenstore_tools")
def test_a_read_of_xenbus_that_a_signal_interrupts_goes_on_under_sa_restart(machine_name: str) -> None:
    script = (
        "import struct, sys, threading\n"
        "from pvbus.tests.frontend.restarts import *\n"
        "DeviceFile.driver = Driver(sys.argv[1])\n"
        "file = DeviceFile(os.open('/dev/xen/xenbus', os.O_RDWR))\n"
        "signal.signal(RESTARTING, lambda *_: None)\n"
        "signal.siginterrupt(RESTARTING, False)\n"
        "said = []\n"
        "reader = threading.Thread(target=lambda: said.append(name_of(lambda: len(file.read(64)))))\n"
        "reader.start()\n"
        "rests = lambda: not reader.is_alive() or is_in_read(reader.native_id)\n"
        "wait_for(rests, 'it reads')\n"
        "signal.pthread_kill(reader.ident, RESTARTING)\n"
        "wait_for(rests, 'it reads again')\n"
        "os.write(file.fd, struct.pack('=IIII', 1, 1, 0, 2) + b'/\\0')\n"  # XS_DIRECTORY of the root
        "reader.join()\n"
        "print(*said)\n"
    )
    done = run(sys.executable, "-c", script, str(driver()), name=machine_name, options=["--xenstore"])

    assert done.returncode == 0, done.stderr
    assert re.fullmatch(r"[1-9]\d*\n" if CAN_MEND else "EINTR\n", done.stdout), done.stdout


@pytest.mark.usefixtures("xenstore_tools")
def test_when_the_run_is_killed_xenstored_ends_with_it(pvbus_shared_machine: BootedMachine) -> None:
    name = pvbus_shared_machine.name
    with started("sh", "-c", "echo ready; exec sleep 60", name=name, options=["--xenstore"]) as process:
        assert process.stdout is not None
        assert process.stdout.readline() == "ready\n"
        daemon = next(child for child in psutil.Process(process.pid).children() if child.name() == "xenstored")
        process.kill()
        process.wait(10)

        until(lambda: not daemon.is_running() or daemon.status() == psutil.STATUS_ZOMBIE, "xenstored ends with its run")
        until(lambda: pvbus_shared_machine.machine.ports(0) == [], "its ports are free")


@pytest.mark.usefixtures("xenstore_tools")
@pytest.mark.parametrize(
    ("line", "said"), list(zip(README_LINES, ["", 'b\\n.*a = "b"\\n', r" +1: VCPU 0: Interdomain.*Virtual IRQ 3.*"], strict=True))
)
def test_the_commands_of_the_readme_do_what_it_says(line: str, said: str) -> None:
    words = shlex.split(line, comments=True)
    need_namespaces()

    done = subprocess.run(
        [*COMMAND, *words[2:]], env=environment(), capture_output=True, text=True, timeout=RUN_S_MAX, check=False
    )

    assert (done.returncode, done.stderr) == (0, "")
    assert re.fullmatch(said, done.stdout, re.DOTALL), done.stdout


@pytest.mark.usefixtures("xenstore_tools")
def test_without_xenstored_the_run_names_the_packages(machine_name: str) -> None:
    words = command("true", name=machine_name, options=["--xenstore"])

    done = in_private_mounts(f'mount -t tmpfs none {Path(XENSTORED).parents[1]}; PATH=/usr/bin:/bin exec "$@"', *words)

    assert done.returncode == 3
    assert re.fullmatch("pvbus run: there is no xenstored .*xen-utils.*xenstore-utils.*\n", done.stderr), done.stderr


@pytest.mark.usefixtures("xenstore_tools")
def test_xenstored_runs_in_domain_0_only(pvbus_boot: object) -> None:
    booted = pvbus_boot('[[domain]]\nid = 0\n\n[[domain]]\nid = 1\nplatforms = ["xen"]\n')  # type: ignore[operator]

    done = run("true", name=booted.name, options=["--xenstore", "--domain", "1"])

    assert (done.returncode, done.stderr) == (3, "pvbus run: xenstored runs in domain 0, not in domain 1\n")
    assert not Path("/dev/.xenstored").exists()


@pytest.mark.usefixtures("xenstore_tools")
def test_only_xenstored_has_a_proc_xen(machine_name: str) -> None:
    script = (
        "test -e /proc/xen || echo none\n"
        "for one in /proc/[0-9]*; do\n"
        '    [ "$(cat $one/comm)" = xenstored ] && [ $one/ns/net -ef /proc/self/ns/net ] && cd $one/root && ls proc{,/xen}\n'
        "done 2>/dev/null\n"
    )

    done = run("bash", "-c", script, name=machine_name, options=["--xenstore"])

    none, *there = done.stdout.splitlines()
    assert none == "none"
    assert there[1] == "xen"
    assert {"capabilities", "xsd_port", "xsd_kva"} <= set(there[2:])
