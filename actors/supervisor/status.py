# SPDX-License-Identifier: Apache-2.0
"""What the supervisor says of a machine: its processes and domains, as plain data. Reads, and asks nobody."""

from __future__ import annotations

import errno
import os
from typing import TYPE_CHECKING, Any

from pvbus.actors.runtime import messages as m

DEVICE = "/dev/xen/evtchn"  # what a domain with Xen has, by the driver's name (A10.6)

if TYPE_CHECKING:
    from pvbus.actors.runtime.process import Received
    from pvbus.actors.supervisor.process import Supervisor


def status_of(supervisor: Supervisor) -> dict[str, Any]:
    """Return what `pvbus status` shows of the supervisor's part."""
    processes = [{"name": "supervisor", "pid": os.getpid(), "restarts": 0, "state": "up"}]
    processes.append({"name": "forkserver", "pid": supervisor.forkserver.pid, "restarts": 0, "state": "up"})
    processes += [
        {"name": child.spec.name, "pid": child.pid, "restarts": child.restarts, "state": child.state.value}
        for child in supervisor.table
    ]
    return {
        "schema": 1,
        "name": supervisor.config.name,
        "run_id": supervisor.run_id,
        "state": "stopping" if supervisor.stopping else "ready",
        "profile": supervisor.config.profile,
        "variants": list(supervisor.config.effective_variants()),
        "inject": supervisor.config.inject.as_dict(),
        "undelivered": supervisor.inbox.undelivered,
        "foreign_frames": supervisor.inbox.foreign_frames,
        "processes": processes,
        "domains": [
            {
                "id": d.id, "cpus": d.cpus, "platforms": list(d.platforms), "abi": d.abi, "affinity": d.affinity,
                "devices": [DEVICE] if "xen" in d.platforms else [],
            }
            for d in supervisor.config.domain
        ],
    }


def inspect(supervisor: Supervisor, received: Received) -> None:
    """Hand out every segment, to be looked at while everything runs."""
    fds = supervisor.pages.fds()
    report = m.Report(data={"name": supervisor.config.name, "run_id": supervisor.run_id}, segments=list(fds))
    received.peer.reply(received.request, report, tuple(fds.values()))


def inspect_file(supervisor: Supervisor, message: m.InspectFile, received: Received) -> None:
    """Hand out the page of an open file. ENOENT without it."""
    file = next((file for file in supervisor.files.values() if file.slot == message.slot), None)
    if file is None:
        raise OSError(errno.ENOENT, f"no open file in slot {message.slot}")
    received.peer.reply(received.request, m.Report(data={}, segments=["page"]), (file.page_fd,))
