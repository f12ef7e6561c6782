# SPDX-License-Identifier: Apache-2.0
"""The wheel alone carries a machine: built, installed into an empty environment, booted, one event, stopped.

pvbus comes only from the wheel: the build runs on a copy of the sources, the environment is a new one,
$PYTHONPATH is taken away, and the program in it says where it was loaded from. The *dependencies* are not
downloaded again: a path file (.pth) lets the new environment see the site directory of the one that runs the
tests. The path files of a directory added so stay unread: an editable install of pvbus that lies there
does not take effect.
"""

import importlib.metadata
import json
import os
import re
import select
import shutil
import subprocess
import sys
import sysconfig
import zipfile
from pathlib import Path

import pytest

from pvbus.view.conformance import as_dict, load

ROOT = Path(__file__).resolve().parent.parent
PARTS = ("pyproject.toml", "README.md", "LICENSE", "supervisor.py", "actors", "shm", "verify", "view")
BUILD_S_MAX = 90
BOOT_S_MAX = 20
CALL_S_MAX = 20

ONE_EVENT = """
import select, sys
from pvbus.actors.client import attach
import pvbus.shm._core as core
with attach(name="wheel") as machine:
    receiver, sender = machine.open_evtchn(domain=0), machine.open_evtchn(domain=0)
    port = receiver.bind_unbound_port(remote_domain=0)
    sender.notify(sender.bind_interdomain(0, port))
    assert receiver.poll(select.POLLIN, timeout_ms=5000) & select.POLLIN
    assert int.from_bytes(receiver.read(4), sys.byteorder) == port
print(core.__file__)
"""


def environment() -> dict[str, str]:
    """Return the environment of this test run without anything that leads to the checkout."""
    return {name: value for name, value in os.environ.items() if name not in {"PYTHONPATH", "PYTHONHOME"}}


def run(*command: str | Path, cwd: Path, time_s_max: float = CALL_S_MAX) -> str:
    """Run a command to its end and return what it printed; fail with everything it said."""
    done = subprocess.run(
        [str(word) for word in command], cwd=cwd, env=environment(), check=False, text=True,
        stdout=subprocess.PIPE, stderr=subprocess.STDOUT, timeout=time_s_max,
    )
    assert done.returncode == 0, done.stdout
    return done.stdout


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Build the wheel from a copy of the sources: no build file gets from or into the checkout."""
    copy = tmp_path_factory.mktemp("source")
    for part in PARTS:
        if (ROOT / part).is_dir():
            shutil.copytree(ROOT / part, copy / part, ignore=shutil.ignore_patterns("*.so", "__pycache__"))
        else:
            shutil.copy(ROOT / part, copy / part)
    # The dev extra brings setuptools; where an old one lies, pip fetches its own.
    major = int(re.split(r"\D", importlib.metadata.version("setuptools"))[0])
    isolation = ["--no-build-isolation"] if major >= 77 else []
    target = tmp_path_factory.mktemp("wheel")
    run(
        sys.executable, "-m", "pip", "wheel", "--quiet", "--disable-pip-version-check", "--no-deps",
        *isolation, "--wheel-dir", target, copy, cwd=copy, time_s_max=BUILD_S_MAX,
    )
    (built,) = target.glob("*.whl")
    return built


@pytest.fixture(scope="module")
def programs(wheel: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Install the wheel into a new environment and return the directory of its programs."""
    directory = tmp_path_factory.mktemp("environment")
    run(sys.executable, "-m", "venv", "--without-pip", directory, cwd=directory)
    python = directory / "bin" / "python"
    run(
        sys.executable, "-m", "pip", "--python", python, "install", "--quiet", "--disable-pip-version-check",
        "--no-deps", "--no-index", wheel, cwd=directory,
    )
    (site,) = directory.glob("lib/python*/site-packages")
    paths = {sysconfig.get_path("purelib"), sysconfig.get_path("platlib")}
    (site / "dependencies.pth").write_text("".join(f"{path}\n" for path in sorted(paths)))
    return python.parent


def test_the_wheel_fits_every_python_from_3_11_and_holds_only_the_package(wheel: Path) -> None:
    names = zipfile.ZipFile(wheel).namelist()

    assert re.fullmatch(r"pvbus-[\d.]+-cp311-abi3-linux_\w+\.whl", wheel.name)
    assert {name.split("/")[0].partition("-")[0] for name in names} == {"pvbus"}
    inside = {name.split("/")[1] for name in names if name.startswith("pvbus/")}
    assert inside == {"supervisor.py", "actors", "shm", "verify", "view"}
    shm = {name.removeprefix("pvbus/shm/") for name in names}
    assert {"_core.abi3.so", "_core_explored.abi3.so", "_core_gated.abi3.so", "py.typed"} <= shm


def test_the_conformance_report_comes_with_the_wheel(programs: Path, tmp_path: Path) -> None:
    done = subprocess.run(
        [programs / "pvbus", "conformance", "--json"], cwd=tmp_path, env=environment(), check=False, text=True,
        capture_output=True, timeout=CALL_S_MAX,
    )

    said = json.loads(done.stdout)
    assert said == {"schema": 1, **as_dict(load())}
    assert done.returncode == (1 if said["holes"] else 0)


def test_a_machine_boots_from_the_wheel_and_carries_an_event(programs: Path, tmp_path: Path) -> None:
    log = tmp_path / "log"
    with log.open("w") as errors, subprocess.Popen(
        [programs / "pvbus", "up", "--name", "wheel"], cwd=tmp_path, env=environment(), text=True,
        stdout=subprocess.PIPE, stderr=errors,
    ) as machine:
        try:
            assert machine.stdout is not None
            assert select.select([machine.stdout], [], [], BOOT_S_MAX)[0], f"not ready: {log.read_text()}"
            assert machine.stdout.readline() == "ready\n", log.read_text()

            loaded_from = run(programs / "python", "-c", ONE_EVENT, cwd=tmp_path).strip()
            run(programs / "pvbus", "down", "--name", "wheel", cwd=tmp_path)

            assert Path(loaded_from).is_relative_to(programs.parent)
            assert machine.wait(CALL_S_MAX) == 0
        finally:
            machine.kill()
