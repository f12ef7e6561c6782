# SPDX-License-Identifier: Apache-2.0
"""What a CI calls: the packages of real programs are tried for, in one line, and a failure fails nothing."""

from __future__ import annotations

import os
import shutil
import subprocess
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
PACKAGES = [line.partition("#")[0].strip() for line in (ROOT / ".ci/packages").read_text().splitlines() if line[:1] != "#"]
DPKG = """#!/bin/sh
grep -qx "$3" "$INSTALLED" && printf installed
"""
APT = """#!/bin/sh
echo "$@" >> "$INSTALLED.calls"
case "$*" in *install*) [ -z "$BROKEN" ] || { echo "E: no network"; exit 100; }
    for word; do case "$word" in -*|install) ;; *) echo "$word" >> "$INSTALLED";; esac; done;; esac
"""


@pytest.fixture
def system(tmp_path: Path) -> dict[str, str]:
    """A Debian whose apt-get only writes down what it was asked for."""
    if shutil.which("bash") is None:
        pytest.skip("there is no bash")
    for name, text in (("dpkg-query", DPKG), ("apt-get", APT), ("apt-cache", "#!/bin/sh\n")):
        (tmp_path / name).write_text(text)
        (tmp_path / name).chmod(0o755)
    (tmp_path / "installed").write_text("udev\n")
    environment = {"PATH": f"{tmp_path}{os.pathsep}{os.environ['PATH']}", "INSTALLED": str(tmp_path / "installed")}
    return {**os.environ, **environment, "POLICY_RC_D": str(tmp_path / "policy"), "BROKEN": ""}


def install(environ: dict[str, str]) -> str:
    done = subprocess.run([ROOT / ".ci/install"], check=False, capture_output=True, text=True, env=environ, timeout=30)
    assert (done.returncode, done.stderr) == (0, "")
    assert not Path(environ["POLICY_RC_D"]).exists()
    return done.stdout


def test_what_is_missing_is_installed_once(system: dict[str, str]) -> None:
    assert install(system) == "packages: installed\n"
    assert set(PACKAGES) <= set(Path(system["INSTALLED"]).read_text().split())
    assert install(system) == "packages: all of them are there\n"
    assert Path(system["INSTALLED"] + ".calls").read_text().count(" install ") == 1


def test_a_package_that_cannot_be_had_fails_nothing(system: dict[str, str]) -> None:
    said = install(system | {"BROKEN": "yes"})

    assert said.startswith(f"packages: without {PACKAGES[0]} ")
    assert said.endswith("what needs them is NOT TESTED (E: no network)\n")
    assert " udev " not in said


@pytest.mark.parametrize("package", PACKAGES)
def test_every_package_is_one_that_a_test_or_the_readme_asks_for(package: str) -> None:
    places = [ROOT / "README.md", *(ROOT / "tests").rglob("*.py"), *(ROOT / "view/run").glob("*.py")]

    assert any(package in path.read_text() for path in places if path != Path(__file__))
