# SPDX-License-Identifier: Apache-2.0
"""`pvbus run`: what it hands on to the command, who is who in it, and what ends with it although it has gone its own ways."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from pvbus.actors.runtime import rundir
from pvbus.tests.contract.support import wait_until
from pvbus.tests.frontend.support import COMMAND, RUN_S_MAX, command, environment, need_namespaces, not_shown, run, started
from pvbus.tests.frontend.test_run import PVBUS, alive, in_private_mounts, machines
from pvbus.view.pytest_plugin import BootedMachine

NO_VMBUS = """\
[[domain]]
id = 0
cpus = 1
platforms = ["hyperv"]
acpi_device = false
"""
NOBODY = "setpriv --reuid 65534 --regid 65534 --clear-groups"


def test_the_command_has_the_descriptors_that_the_run_was_given_and_no_others(pvbus_shared_machine: BootedMachine) -> None:
    need_namespaces()
    read_end, write_end = os.pipe()
    tell = f"import os; os.write({write_end}, ' '.join(os.listdir('/proc/self/fd')).encode())"
    words = command(sys.executable, "-c", tell, name=pvbus_shared_machine.name)

    done = subprocess.run(
        words, check=False, env=environment(), pass_fds=[write_end], timeout=RUN_S_MAX, stdin=subprocess.DEVNULL
    )

    os.close(write_end)
    seen = set(map(int, os.read(read_end, 4096).split()))
    os.close(read_end)
    assert done.returncode == 0
    assert len(seen) == 5  # the pipe, three streams, and the directory that is read
    assert {0, 1, 2, write_end} < seen


@pytest.mark.parametrize(("place", "path"), [("/dev", "xen/evtchn"), ("/sys/class", "misc/xen!evtchn"), ("/dev/shm", "/dev/xen")])
def test_who_begins_in_dev_or_sys_is_in_those_of_the_run(place: str, path: str) -> None:
    need_namespaces()
    words = command("sh", "-c", f"pwd -P; cd ..; cd -; ls -d {path}")

    done = subprocess.run(words, check=False, env=environment(), capture_output=True, text=True, timeout=RUN_S_MAX, cwd=place)

    assert (done.returncode, done.stdout) == (0, f"{place}\n{place}\n{path}\n"), done.stderr


@pytest.mark.parametrize("words", [["--", "echo", "-n", "--", "--domain", "77"], ["echo", "-n", "--", "--domain", "77"]])
def test_what_follows_the_command_is_its_own(pvbus_shared_machine: BootedMachine, words: list[str]) -> None:
    need_namespaces()
    given = [*COMMAND, "--name", pvbus_shared_machine.name, *words]

    done = subprocess.run(given, check=False, env=environment(), capture_output=True, text=True, timeout=RUN_S_MAX)

    assert (done.returncode, done.stdout, done.stderr) == (0, "-- --domain 77", "")


def test_mounts_and_devices_of_any_name_are_no_hindrance(pvbus_shared_machine: BootedMachine) -> None:
    script = """
        mount -t tmpfs none /mnt; name=$(printf '/mnt/a b\\377\\302\\205'); mkdir "$name"; mount -t tmpfs none "$name"
        mkdir /mnt/dev; mount --rbind /dev /mnt/dev; mount -t tmpfs none /dev
        for one in fuse null tty random urandom; do touch /dev/$one; mount --bind /mnt/dev/$one /dev/$one; done
        mkdir /dev/shm; mount --bind /mnt/dev/shm /dev/shm
        touch "$(printf '/dev/c d\\376')"; ln -s nowhere "$(printf '/dev/\\375')"; mkfifo /dev/fifo; exec "$@"
    """

    done = in_private_mounts(script, *command("sh", "-c", "ls /dev | wc -l", name=pvbus_shared_machine.name))

    assert (done.returncode, done.stderr) == (0, "")
    assert int(done.stdout) == 6 + 3 + 1  # and xen


def test_a_script_without_a_first_line_is_the_shells(pvbus_shared_machine: BootedMachine, tmp_path: Path) -> None:
    script = tmp_path / "script"
    script.write_text('echo "$# $1"; exit 4\n')
    script.chmod(0o755)

    done = run(str(script), "a b", name=pvbus_shared_machine.name)

    assert (done.returncode, done.stdout, done.stderr) == (4, "1 a b\n", "")


@pytest.mark.parametrize("frontend", ["fuse", "seccomp"])
def test_the_device_has_the_mode_that_it_shows(pvbus_shared_machine: BootedMachine, frontend: str) -> None:
    if os.geteuid():
        not_shown("another user than root", "only root can become one")
    tried = f"{NOBODY} sh -c 'exec 3<> /dev/xen/evtchn && echo opened'; stat -c %a,%g /dev/xen/evtchn"
    words = f"{tried}; chmod 660 /dev/xen/evtchn; chgrp 65534 /dev/xen/evtchn; {tried}"

    done = run("sh", "-c", words, name=pvbus_shared_machine.name, options=["--frontend", frontend])

    assert done.stdout.splitlines() == ["600,0", "opened", "660,65534"]
    assert done.stderr.count("Permission denied") == 1


@pytest.mark.parametrize("frontend", ["fuse", "seccomp"])
def test_flags_that_the_driver_never_sees_are_refused_as_by_the_kernel(
    pvbus_shared_machine: BootedMachine, frontend: str
) -> None:
    code = """
import errno, os
open("/proc/self/comm", "wb").write(b"\\xff\\xc2\\x85 :x")
for name in ("O_DIRECT", "O_DIRECTORY", "O_TMPFILE"):
    try:
        print(name, os.open("/dev/xen/evtchn", os.O_RDWR | getattr(os, name)))
    except OSError as failed:
        print(name, errno.errorcode[failed.errno])
try:
    os.open("/dev/xen/evtchn", os.O_RDWR | os.O_CREAT | os.O_EXCL)
except FileExistsError:
    print("EEXIST")
os.close(os.open("/dev/xen/evtchn", os.O_RDWR | os.O_CREAT | os.O_TRUNC | os.O_APPEND))
"""

    done = run(sys.executable, "-c", code, name=pvbus_shared_machine.name, options=["--frontend", frontend])

    assert (done.returncode, done.stderr) == (0, "")
    assert done.stdout.splitlines() == ["O_DIRECT EINVAL", "O_DIRECTORY ENOTDIR", "O_TMPFILE ENOTDIR", "EEXIST"]


def test_what_has_left_the_namespaces_of_the_run_ends_with_it(pvbus_shared_machine: BootedMachine) -> None:
    mounts = "unshare -m sleep 1000 > /dev/null & echo $!"
    network = "unshare -n sleep 1000 > /dev/null & echo $!"
    everything = "unshare -Urmn sleep 1000 > /dev/null & echo $!"
    covered = "mount -t tmpfs none /proc"  # and nobody is found by his own /proc

    done = run("sh", "-c", f"{mounts}; {network}; {everything}; sleep 0.2; {covered}", name=pvbus_shared_machine.name)

    pids = [int(line) for line in done.stdout.split()]
    assert (done.returncode, len(pids)) == (0, 3), done.stderr
    assert not any(map(alive, pids))


def test_a_run_within_a_run_ends_with_it_and_so_do_their_machines(pvbus_shared_machine: BootedMachine) -> None:
    before = machines()
    inner = f"pvbus-inner-{os.getpid()}"[-32:].lstrip("-")
    words = f"{PVBUS} run --name {inner} -- sh -c '{PVBUS} up --detach --name {inner}-2; echo $$; sleep 1000'; true"
    with started("sh", "-c", words, name=pvbus_shared_machine.name) as process:
        assert process.stdout is not None
        assert process.stdout.readline() == "ready\n"
        pid = int(process.stdout.readline())
        assert machines() == before | {inner, f"{inner}-2"}
        run_ids = [(rundir.run_directory(name) / "run_id").read_text().strip() for name in (inner, f"{inner}-2")]
        process.kill()
        process.communicate(timeout=RUN_S_MAX)

    wait_until(lambda: not alive(pid), "the inner command is gone")
    wait_until(lambda: machines() == before, "the inner machines are gone")
    shared = Path("/dev/shm")
    wait_until(lambda: not any(list(shared.glob(f"pvbus-{run_id}-*")) for run_id in run_ids), "their segments are gone")


def test_a_domain_on_the_platform_without_a_vmbus_device_has_the_directories_and_nothing_in_them(pvbus_boot: Any) -> None:
    booted = pvbus_boot(NO_VMBUS)

    done = run("sh", "-c", "ls -d /sys/bus/vmbus; ls /sys/bus/vmbus/d*s; ls /sys/devices/VMBUS:00", name=booted.name)

    assert (done.returncode, done.stderr) == (0, "")
    assert done.stdout.split() == [
        "/sys/bus/vmbus", "/sys/bus/vmbus/devices:", "/sys/bus/vmbus/drivers:", "hid", "modalias", "subsystem", "uevent",
    ]  # fmt: skip
