# SPDX-License-Identifier: Apache-2.0
"""`pvbus run`: whose machine, whose exit code, whose signals; and nothing is left behind."""

from __future__ import annotations

import contextlib
import os
import pty
import select
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from pvbus.actors.client import attach
from pvbus.actors.runtime import rundir
from pvbus.tests.contract.support import wait_until
from pvbus.tests.frontend.support import RUN_S_MAX, command, environment, need_namespaces, not_shown, run, started
from pvbus.view.pytest_plugin import BootedMachine

PVBUS = f"{sys.executable} -P -m pvbus.supervisor"
USER = 1234


def machines() -> set[str]:
    """Give the run directories that there are."""
    return {found.name for found in rundir.list_machines()}


def test_without_a_machine_one_is_booted_for_the_commands_life() -> None:
    before = machines()

    done = run("sh", "-c", f"ls /dev/xen/evtchn; {PVBUS} status | head -1; exit 7")

    assert done.returncode == 7
    device, status = done.stdout.splitlines()
    assert device == "/dev/xen/evtchn"
    assert " is ready, run " in status
    assert done.stderr == ""
    assert machines() == before


def test_the_device_has_its_place_in_sys_and_the_rest_is_the_hosts(pvbus_shared_machine: BootedMachine) -> None:
    words = (
        "cat '/sys/class/misc/xen!evtchn/uevent'; cat '/sys/class/misc/xen!evtchn/dev';"
        "readlink -f '/sys/class/misc/xen!evtchn/subsystem'; ls -d /sys/kernel /dev/null /dev/pts; echo x > /dev/null"
    )

    done = run("sh", "-c", words, name=pvbus_shared_machine.name)

    assert (done.returncode, done.stderr) == (0, "")
    assert done.stdout.splitlines() == [
        "MAJOR=10", "MINOR=127", "DEVNAME=xen/evtchn", "10:127", "/sys/class/misc", "/dev/null", "/dev/pts", "/sys/kernel",
    ]  # fmt: skip


def test_the_host_sees_nothing_of_it(pvbus_shared_machine: BootedMachine) -> None:
    def seen() -> tuple[str, list[str], bool]:
        devices = sorted(map(str, Path("/dev").iterdir()))
        return Path("/proc/self/mountinfo").read_text(), devices, Path("/sys/class/misc/xen!evtchn").exists()

    before = seen()
    with started("sh", "-c", "test -e /dev/xen/evtchn && echo there; read line", name=pvbus_shared_machine.name) as process:
        assert process.stdout is not None
        assert process.stdout.readline() == "there\n"
        during = seen()
        process.communicate("\n", timeout=RUN_S_MAX)

    assert during == before
    assert seen() == before


def test_a_machine_that_runs_is_used_and_reached_from_inside(pvbus_shared_machine: BootedMachine) -> None:
    words = f"echo $PVBUS_MACHINE; {PVBUS} ports --domain 1 --json"

    done = run("sh", "-c", words, name=pvbus_shared_machine.name, options=["--domain", "1"])

    assert done.returncode == 0
    assert done.stdout.splitlines()[0] == pvbus_shared_machine.name
    assert '"ports": []' in done.stdout


@pytest.mark.parametrize(
    ("words", "code", "said"),
    [
        (["sh", "-c", "kill -KILL $$"], 128 + signal.SIGKILL, ""),
        (["there-is-no-such-command"], 127, "there is no command 'there-is-no-such-command'"),
        (["/etc"], 126, "'/etc' cannot be executed"),
        ([""], 127, "there is no command ''"),
        ([sys.executable, "-c", "import os, sys; sys.exit(os.fsencode(sys.argv[1])[1])", "a\udcfe"], 0xFE, ""),
    ],
)
def test_the_exit_code_is_the_commands(pvbus_shared_machine: BootedMachine, words: list[str], code: int, said: str) -> None:
    done = run(*words, name=pvbus_shared_machine.name)

    assert done.returncode == code
    assert said in done.stderr


def test_a_script_whose_interpreter_is_missing_is_there_and_cannot_be_executed(
    pvbus_shared_machine: BootedMachine, tmp_path: Path
) -> None:
    script = tmp_path / "script"
    script.write_text("#!/there/is/none\n")
    script.chmod(0o755)

    done = run(str(script), name=pvbus_shared_machine.name)

    assert done.returncode == 126
    assert f"'{script}' cannot be executed: it needs a file that is not there" in done.stderr


@pytest.mark.parametrize("closed", [(0,), (1,), (0, 1, 2)])
def test_streams_that_are_closed_are_closed_for_the_command_as_well(closed: tuple[int, ...], tmp_path: Path) -> None:
    need_namespaces()
    seen = tmp_path / "seen"
    look = "import os, sys; open(sys.argv[1], 'w').write(str([fd for fd in range(3) if os.path.exists(f'/proc/self/fd/{fd}')]))"
    words = command(sys.executable, "-c", look, str(seen))
    shell = 'exec "$@" ' + " ".join(f"{fd}>&-" for fd in closed)

    done = subprocess.run(["sh", "-c", shell, "sh", *words], env=environment(), timeout=RUN_S_MAX, check=False)

    assert done.returncode == 0
    # The file that is written takes the lowest number.
    assert seen.read_text() == str(sorted({0, 1, 2} - set(closed) | {min(closed)}))


@pytest.mark.parametrize(("key", "code"), [(b"\x03", 3), (b"\x1c", 4)])
def test_a_key_of_the_terminal_is_the_commands_signal_once(
    pvbus_shared_machine: BootedMachine, key: bytes, code: int
) -> None:
    need_namespaces()
    traps = "trap 'n=$((n+1)); c=3' INT; trap 'n=$((n+1)); c=4' QUIT"
    words = f"{traps}; echo ready; while [ ! $c ]; do sleep 0.02; done; sleep 0.1; echo $n; exit $c"
    pid, fd = pty.fork()
    if pid == 0:
        for number in (signal.SIGINT, signal.SIGQUIT):  # a background job's are ignored, and no shell may trap those
            signal.signal(number, signal.SIG_DFL)
        given = command("sh", "-c", words, name=pvbus_shared_machine.name)
        os.execvpe(given[0], given, environment())
    said = b""
    with contextlib.suppress(OSError):  # EIO: the last process with the terminal has ended
        while select.select([fd], [], [], RUN_S_MAX)[0] and (piece := os.read(fd, 1024)):
            if b"ready" in piece:
                os.write(fd, key)
            said += piece
    os.close(fd)  # hangs up, and so ends whatever is left

    assert os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) == code
    assert said.endswith(b"1\r\n")


@pytest.mark.parametrize("title", ["run", "evtchn", "sysfs"])
def test_whichever_process_of_a_run_is_killed_the_rest_ends_with_its_command(
    pvbus_shared_machine: BootedMachine, title: str
) -> None:
    words = "setsid sleep 1000 > /dev/null & echo $!; read line; exit 5"
    with started("sh", "-c", words, name=pvbus_shared_machine.name) as process:
        assert process.stdout is not None
        pids = [int(process.stdout.readline())]
        pids += map(int, Path(f"/proc/{process.pid}/task/{process.pid}/children").read_text().split())
        titled = f"pvbus: {title}/{pvbus_shared_machine.name}".encode()
        victims: list[int] = []

        def is_titled() -> bool:
            """Whether it has given itself its title: the command may be quicker."""
            victims[:] = [pid for pid in pids if Path(f"/proc/{pid}/cmdline").read_bytes().startswith(titled)]
            return bool(victims)

        wait_until(is_titled, f"{title} has its title")
        (victim,) = victims
        os.kill(victim, signal.SIGKILL)
        if title != "run":  # reaped, and said, before the command ends
            wait_until(lambda: not Path(f"/proc/{victim}").exists(), f"{title} is gone")
        _, errors = process.communicate("\n", timeout=RUN_S_MAX)

    assert process.returncode == 5
    assert title == "run" or f"the server of {title} has died" in errors
    wait_until(lambda: not any(alive(pid) for pid in pids), "its processes are gone")


def test_signals_are_passed_on(pvbus_shared_machine: BootedMachine) -> None:
    words = "trap 'echo usr1' USR1; trap 'echo term; exit 9' TERM; echo ready; while :; do sleep 0.02; done"
    with started("sh", "-c", words, name=pvbus_shared_machine.name) as process:
        assert process.stdout is not None
        assert process.stdout.readline() == "ready\n"
        process.send_signal(signal.SIGUSR1)
        assert process.stdout.readline() == "usr1\n"
        process.send_signal(signal.SIGTERM)
        assert process.communicate(timeout=RUN_S_MAX)[0] == "term\n"

    assert process.returncode == 9


def alive(pid: int) -> bool:
    """Whether a process runs; a zombie does not."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] not in "XZ"
    except OSError:
        return False


def test_what_the_command_leaves_running_ends_with_it(pvbus_shared_machine: BootedMachine) -> None:
    done = run("sh", "-c", "setsid sleep 1000 > /dev/null & echo $!", name=pvbus_shared_machine.name)

    assert done.returncode == 0
    assert not alive(int(done.stdout))


@pytest.mark.parametrize("own_machine", [False, True])
def test_a_run_that_is_killed_leaves_nothing_behind(pvbus_shared_machine: BootedMachine, own_machine: bool) -> None:
    before = machines()
    words = "setsid sleep 1000 > /dev/null & echo $$ $!; read line"
    name = f"killed-{os.getpid()}" if own_machine else pvbus_shared_machine.name
    with started("sh", "-c", words, name=name) as process:
        assert process.stdout is not None
        pids = [int(word) for word in process.stdout.readline().split()]
        assert len(machines()) == len(before) + own_machine
        process.kill()
        process.communicate(timeout=RUN_S_MAX)

    wait_until(lambda: not any(alive(pid) for pid in pids), "the command's processes are gone")
    wait_until(lambda: machines() == before, "the machine is gone")


@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGTERM])
def test_a_machine_that_ends_under_a_run_is_said_in_one_sentence(number: signal.Signals) -> None:
    name = f"ends-{os.getpid()}"
    words = "ls /sys/bus/vmbus/devices > /dev/null && echo there; read line; exit 5"  # both of its servers are up
    with started("sh", "-c", words, name=name) as process:
        assert process.stdout is not None
        assert process.stderr is not None
        assert process.stdout.readline() == "there\n"
        with attach(name) as machine:
            (supervisor,) = [entry["pid"] for entry in machine.status()["processes"] if entry["name"] == "supervisor"]
        os.kill(supervisor, number)
        said = process.stderr.readline()
        _, more = process.communicate("\n", timeout=RUN_S_MAX)

    assert (process.returncode, said, more) == (
        5, f"pvbus run: machine {name!r} has stopped; its devices answer with errors\n", ""
    )  # fmt: skip
    assert name not in machines()


def test_the_servers_of_a_run_end_with_it(pvbus_shared_machine: BootedMachine) -> None:
    ends = {f"pvbus: {title}/{pvbus_shared_machine.name}".encode() for title in ("run", "evtchn")}

    def left() -> list[str]:
        found = []
        for entry in Path("/proc").iterdir():
            with contextlib.suppress(OSError):
                if entry.name.isdecimal() and (entry / "cmdline").read_bytes().rstrip(b"\0 ") in ends:
                    found.append(entry.name)
        return found

    run("true", name=pvbus_shared_machine.name)

    assert left() == []


def test_an_unknown_domain_is_a_usage_error_that_names_it(pvbus_shared_machine: BootedMachine) -> None:
    done = run("true", name=pvbus_shared_machine.name, options=["--domain", "77"])

    assert done.returncode == 2
    assert "--domain 77: machine" in done.stderr


def in_private_mounts(
    script: str, *words: str, environ: dict[str, str] | None = None
) -> subprocess.CompletedProcess[str]:
    """Run a shell script as root in a mount namespace of its own, and then the words that it ends with ("$@")."""
    need_namespaces()
    if os.geteuid():
        not_shown("a system that lacks something", "only root can take it away for a test")
    wrapped = ["unshare", "-m", "sh", "-ec", script, "sh", *words]
    return subprocess.run(
        wrapped, capture_output=True, text=True, check=False, timeout=RUN_S_MAX, env=environ or environment(),
        stdin=subprocess.DEVNULL,
    )  # fmt: skip


@pytest.mark.parametrize(
    ("script", "said"),
    [
        ('mount -t tmpfs none /dev && "$@"', "there is no /dev/fuse: load the kernel module fuse"),
        ('mount --bind /dev/null /dev/fuse && "$@"', "Invalid argument"),
    ],
)
def test_what_is_missing_is_said_in_one_sentence(pvbus_shared_machine: BootedMachine, script: str, said: str) -> None:
    done = in_private_mounts(script, *command("true", name=pvbus_shared_machine.name))

    assert done.returncode == 3
    assert done.stderr.startswith("pvbus run: ")
    assert said in done.stderr
    assert len(done.stderr.splitlines()) == 1


AS_USER = ["setpriv", "--reuid", str(USER), "--regid", str(USER), "--clear-groups", "--", "sh", "-ec", '"$@"', "sh"]


def users_python() -> str:
    """Give a Python that an ordinary user can execute: ours may lie in root's home."""
    if shutil.which("setpriv") is None:
        not_shown("an ordinary user", "install util-linux")
    looks = ("-c", "import pvbus.shm._core, msgspec, psutil")
    for python in (sys.executable, "/usr/bin/python3"):
        if subprocess.run([*AS_USER, python, *looks], env=with_packages(), capture_output=True, check=False).returncode == 0:
            return python
    return not_shown("an ordinary user", "no Python that such a one can execute has what pvbus needs")


def with_packages() -> dict[str, str]:
    """Give an environment in which another Python finds our packages."""
    given = environment()
    places = [given.get("PYTHONPATH", ""), *(place for place in sys.path if place.endswith("-packages"))]
    return given | {"PYTHONPATH": os.pathsep.join(filter(None, places))}


def test_an_ordinary_user_runs_in_a_user_namespace() -> None:
    python = users_python()
    # /dev/fuse is crw-rw-rw- on a usual system; where it is not, such a one stands for it.
    script = f"""
        mount -t tmpfs none /mnt && mknod -m 666 /mnt/fuse c 10 229 && mount --bind /mnt/fuse /dev/fuse
        export HOME=/mnt/home XDG_RUNTIME_DIR=/mnt/run; mkdir -m 700 /mnt/home /mnt/run; chown {USER} /mnt/home /mnt/run
        exec "$@"
    """
    pvbus = f"{python} -P -m pvbus.supervisor"
    status = f"{pvbus} status | head -1 | cut -d' ' -f2-3"
    words = f"id -u; ls /dev/xen/evtchn; {status}; {pvbus} virq 3; exec 3<> /dev/xen/evtchn; exit 6"

    done = in_private_mounts(script, *AS_USER, *pvbus.split(), "run", "--", "sh", "-c", words, environ=with_packages())

    assert done.returncode == 6, done.stderr
    assert done.stdout.splitlines() == ["0", "/dev/xen/evtchn", "is ready,"]
    assert "nobody can hear it" in done.stderr


def test_what_cannot_be_shown_here_is_a_warning_and_no_silent_skip() -> None:
    with pytest.warns(UserWarning, match="not shown here: a thing; install it"), pytest.raises(pytest.skip.Exception):
        not_shown("a thing", "install it")
