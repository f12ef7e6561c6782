# SPDX-License-Identifier: Apache-2.0
"""Pages of the wrong kind in the hands of the native types: an exception, never a crash of the process.

Each try runs in a process of its own, since what it shows is that the process lives on.
"""

import subprocess
import sys

import pytest

PROGRAM = """
import os, faulthandler
from pvbus.shm._core import Context, EventPath, Memory
from pvbus.shm.layout import Domain, FilePage, Machine, PublicPage, SubmissionRing
def memory(size, writable=True, closed=False):
    fd = os.memfd_create("pvbus-test")
    os.ftruncate(fd, size)
    made = Memory(fd, size, writable)
    if closed:
        made.close()
    return made
def tried(*arguments):
    machine = memory(Machine.BYTES)
    path = EventPath(machine, {0: memory(Domain.BYTES)})
    page, ring, public = memory(FilePage.BYTES), memory(SubmissionRing.BYTES), memory(PublicPage.BYTES)
    bad = dict(writable=WRITABLE, closed=CLOSED)
    TRY
try:
    tried()
except (ValueError, TypeError) as error:
    print("refused")
"""

TRIES = {
    "a file's page": "path.attach_file(0, memory(FilePage.BYTES, **bad)); path.grow(0)",
    "a submission ring": "path.attach_submission(0, memory(SubmissionRing.BYTES, **bad)); path.drain(1)",
    "the machine": "EventPath(memory(Machine.BYTES, **bad), {}).drain(1); EventPath(memory(Machine.BYTES, **bad), "
                   "{0: memory(Domain.BYTES)}).cpu_recover(0, 0); raise ValueError",
    "a domain": "EventPath(machine, {0: memory(Domain.BYTES, **bad)}).set_pending(0, 1)",
    "the public page": "path.hypervisor_may_sleep(memory(PublicPage.BYTES, **bad))",
}


@pytest.mark.parametrize("what", TRIES)
@pytest.mark.parametrize(("writable", "closed"), [(True, True), (False, False)], ids=["closed", "read-only"])
def test_a_page_that_cannot_be_written_is_refused(what: str, writable: bool, closed: bool) -> None:
    program = PROGRAM.replace("WRITABLE", str(writable)).replace("CLOSED", str(closed)).replace("TRY", TRIES[what])

    ended = subprocess.run(
        [sys.executable, "-c", program], check=False, capture_output=True, text=True, timeout=30,
    )

    assert (ended.returncode, ended.stdout.strip()) == (0, "refused"), ended.stderr
