# SPDX-License-Identifier: Apache-2.0
"""The pytest plugin, as a project that has pvbus installed would use it: in a pytest of its own."""

import importlib.metadata
import subprocess
import sys
from pathlib import Path

from pvbus.view.pytest_plugin import environment

RUN_TIMEOUT_S = 60

SUITE = """
def test_that_holds(pvbus_machine):
    with_port = pvbus_machine.machine.open_evtchn(domain=0, nonblock=True)
    with_port.bind_unbound_port(remote_domain=0)
    with_port.close()

def test_that_fails(pvbus_shared_machine, pvbus_boot):
    file = pvbus_shared_machine.machine.open_evtchn(domain=0, nonblock=True)
    file.bind_unbound_port(remote_domain=0)
    own = pvbus_boot("[[domain]]\\nid = 0\\ncpus = 1\\nplatforms = ['xen']\\n")
    assert own.name == pvbus_shared_machine.name

def test_that_boots_nonsense(pvbus_boot):
    pvbus_boot("[[domain]]\\nid = 'none'\\n")
"""


def run_pytest(directory: Path, suite: str) -> subprocess.CompletedProcess[str]:
    """Run a test file in an empty directory."""
    (directory / "test_suite.py").write_text(suite)
    installed = importlib.metadata.entry_points(group="pytest11", name="pvbus")
    plugin = [] if installed else ["-p", "pvbus.view.pytest_plugin"]
    options = ["-q", "-p", "no:cacheprovider", "--pvbus-artifacts", str(directory / "artifacts")]
    return subprocess.run(
        [sys.executable, "-m", "pytest", *plugin, *options, str(directory)],
        cwd=directory,
        env=environment(),
        capture_output=True,
        text=True,
        timeout=RUN_TIMEOUT_S,
        check=False,
    )


def test_a_failure_carries_the_state_of_every_machine_that_runs(tmp_path: Path) -> None:
    done = run_pytest(tmp_path, SUITE)

    assert "1 passed" in done.stdout, done.stdout + done.stderr
    assert "MachineError" in done.stdout
    section = done.stdout.partition("- pvbus -")[2]
    assert section.count("machine test-") >= 2
    assert '"run_id"' in section
    assert "explain 0:" in section
    artifact = next((tmp_path / "artifacts").glob("*test_that_fails*"))
    assert "explain 0:" in artifact.read_text()


def test_the_plugin_imports_nothing_else_of_pvbus() -> None:
    script = "import sys, pvbus.view.pytest_plugin as p; print(*[m for m in sys.modules if 'pvbus.' in m])"

    done = subprocess.run(
        [sys.executable, "-c", script],
        env=environment(),
        capture_output=True,
        text=True,
        timeout=RUN_TIMEOUT_S,
        check=True,
    )

    assert done.stdout.split() == ["pvbus.view", "pvbus.view.pytest_plugin"]
