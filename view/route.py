# SPDX-License-Identifier: Apache-2.0
"""The way of an interrupt, hop by hop, as `explain` lists it: what each holds, from the sender to the write-
back.

Only puts evidence into words; whether something is wrong is explain.py's to say.
"""

from __future__ import annotations

from typing import Any

from pvbus.shm.layout import Irq, Port
from pvbus.view.evidence import Evidence, OpenFile

_NS_PER_S = 1_000_000_000


def duration(span_ns: int) -> str:
    """Say a span of time in two or three figures."""
    seconds = max(0, span_ns) / _NS_PER_S
    if seconds < 0.001:
        return f"{seconds * 1e6:.0f} µs"
    if seconds < 1:
        return f"{seconds * 1e3:.0f} ms"
    if seconds < 120:
        return f"{seconds:.1f} s"
    return f"{seconds / 60:.0f} min" if seconds < 7200 else f"{seconds / 3600:.0f} h"


def since(now_ns: int, at_ns: int) -> str:
    """Say when something was, seen from now; 0 is never."""
    return f"{duration(now_ns - at_ns)} ago" if at_ns else "never"


def hops(evidence: Evidence) -> list[dict[str, Any]]:
    """List the hops: `where`, whether an event of this port is there now (`holds`), and `detail`."""
    steps = [_hop("binding", False, _binding(evidence))]
    if evidence.sender is not None:
        count = evidence.sender.notifies(
            evidence.port if evidence.state == Port.IPI else evidence.remote_port
        )
        waits = f"{count} of this port's, {evidence.sender.entries.total()} in all"
        steps.append(_hop(f"submission ring of {evidence.sender_name}", bool(count), waits))
    steps.append(_hop("hypervisor", False, evidence.hypervisor.said))
    mask = "masked" if evidence.masked else "not masked"
    when = since(evidence.now_ns, evidence.pending_since_ns)
    pending = f"set {when}, {mask}" if evidence.pending else f"clear, {mask}; last set {when}"
    steps.append(_hop("pending bit", evidence.pending, pending + _reasons(evidence)))
    if evidence.fifo:
        linked = "its event word is linked in it" if evidence.linked else "its event word is not linked"
        steps.append(_hop(evidence.queue_name, evidence.linked and evidence.pending, linked))
    served = f"served {evidence.irq >> 32} times, last {since(evidence.now_ns, evidence.served_at_ns)}"
    steps += [
        _hop(
            cpu.name,
            evidence.server == cpu,
            f"{cpu.said}; {'asleep' if evidence.cpu_asleep else 'awake'}; {served}",
        )
        for cpu in evidence.cpus
    ]
    if evidence.file is not None:
        steps += _hops_in_file(evidence, evidence.file)
    return steps


def _hops_in_file(evidence: Evidence, file: OpenFile) -> list[dict[str, Any]]:
    ring, steps = file.ring, []
    marks = "".join(
        f", {said}" for flag, said in ((file.overflowed, "overflowed"), (file.poisoned, "poisoned")) if flag
    )
    if ring is None:
        steps.append(_hop("event ring", False, f"cannot be read just now{marks}"))
    else:
        at = f"; this port at {', '.join(map(str, ring.positions))}" if ring.positions else ""
        detail = f"{ring.unread} unread of {ring.size}{at}{marks}"
        steps.append(_hop("event ring", bool(ring.positions), detail))
        steps.append(_hop("doorbell", False, "raised" if ring.door else "not raised"))
    written_back = not evidence.active or evidence.put_off_ns
    held = not written_back and evidence.server is None and ring is not None and not ring.positions
    users = "; ".join(f"{user} is {user.condition}" for user in file.users)
    back = file.waiting.write_backs(evidence.port) if file.waiting is not None else 0
    steps.append(
        _hop(
            f"user of {file.name}",
            held,
            f"{users}; {'has' if written_back else 'has not'} written it back",
        )
    )
    if evidence.put_off_ns:
        steps.append(_hop("late EOI", True, f"put off for {duration(evidence.put_off_ns)} more"))
    if file.waiting is not None:
        steps.append(_hop(f"submission ring of {file.name}", False, f"{back} write-backs of this port wait"))
    return steps


def _binding(evidence: Evidence) -> str:
    to = f" of {evidence.file}" if evidence.file is not None else ""
    peer = f"{evidence.remote_domain}:{evidence.remote_port}"
    static = "static " if evidence.static else ""
    if evidence.irq & Irq.LOST:
        to += ", lost"
    elif evidence.irq & Irq.KERNEL:
        to = " of the domain's own kernel"
    return {
        Port.FREE: "not bound",
        Port.RESERVED: "reserved",
        Port.UNBOUND: f"{static}unbound port{to}, for domain {evidence.remote_domain}",
        Port.INTERDOMAIN: f"{static}interdomain port{to}, its peer is {peer}",
        Port.PIRQ: f"PIRQ{to}",
        Port.VIRQ: f"VIRQ {evidence.remote_port}{to}",
        Port.IPI: f"IPI{to}",
    }.get(evidence.state, f"in no known state ({evidence.state})")


def _reasons(evidence: Evidence) -> str:
    names = ((Irq.EXPLICIT, "disabled"), (Irq.TEMPORARY, "temporary"), (Irq.EOI_PENDING, "not written back"))
    found = [name for bit, name in names if evidence.irq & bit]
    return f" ({', '.join(found)})" if found else ""


def _hop(where: str, holds: bool, detail: str) -> dict[str, Any]:
    return {"where": where, "holds": holds, "detail": detail}
