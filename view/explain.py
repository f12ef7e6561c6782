# SPDX-License-Identifier: Apache-2.0
"""Say where one interrupt stands, and what would move it on: "why did my interrupt not arrive?"

`explain` walks a port's way in shared memory (evidence.py) while everything runs, and judges here: the
questions of `_QUESTIONS` are asked in order, from what stops everything down to "nothing has happened", and
the first that has an answer gives it. A new state is a new question, in its place. It changes nothing in the
machine, and asks only the supervisor, so it answers while any other process is stopped.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import asdict, dataclass, field
from typing import Any, NamedTuple

from pvbus.actors.client import Machine
from pvbus.shm.layout import Domain, Irq, Port
from pvbus.view import processes
from pvbus.view.evidence import Evidence, collect
from pvbus.view.route import duration, hops

_KINDS = {Port.INTERDOMAIN: "interdomain", Port.PIRQ: "a PIRQ", Port.VIRQ: "a VIRQ", Port.IPI: "an IPI"}


class _Answer(NamedTuple):
    """What a question found: a slug, a sentence, and what would move the interrupt on."""

    state: str
    text: str
    next: str


@dataclass(frozen=True)
class Explanation:
    """Where a port stands: a slug, a sentence or two, what would move it on, and its way hop by hop.

    `found` is False when there is no such domain or port.
    """

    domain: int
    port: int
    state: str
    text: str
    next: str
    steps: list[dict[str, Any]] = field(default_factory=list)
    found: bool = True

    def as_dict(self) -> dict[str, Any]:
        """Give it as plain data."""
        return asdict(self)


def explain(machine: Machine, domain: int, port: int) -> Explanation:
    """Say where port `port` of domain `domain` stands. OSError when the machine does not answer."""
    known = sorted(machine.inspector().domain_pages)
    if domain not in known:
        listed = ", ".join(str(domid) for domid in known)
        text = f"There is no domain {domain}: the machine has {listed}."
        return Explanation(domain, port, "no-domain", text, "name one of these domains", found=False)
    ports_max = machine.inspector().domain_pages[domain].load32(Domain.PORTS_MAX)
    if not 0 <= port < ports_max:
        text = f"There is no port {port}: domain {domain} has ports 1 to {ports_max - 1}."
        return Explanation(domain, port, "out-of-range", text, "name one of these ports", found=False)
    evidence = collect(machine, domain, port)
    answer = judge(evidence)
    return Explanation(domain, port, answer.state, answer.text, answer.next, hops(evidence))


def judge(evidence: Evidence) -> _Answer:
    """Ask the questions in order; the last one always has an answer."""
    for question in _QUESTIONS:
        answer = question(evidence)
        if answer is not None:
            return answer
    return _idle(evidence)


# ---- is there anything to deliver to?


def _not_bound(e: Evidence) -> _Answer | None:
    if e.state == Port.RESERVED:
        return _Answer(
            "reserved", f"Port {e.name} is reserved and never carries an event.", "use another port"
        )
    if e.state != Port.FREE:
        return None
    if e.file is None:
        return _Answer("free", f"Port {e.name} is free: it is not bound.", "somebody binds it")
    text = (
        f"Port {e.name} has a handler in {e.file}, bound as static, but the hypervisor has no "
        "channel behind it."
    )
    return _Answer(
        "no-channel", text, "the channel is made (bind_static wants one that exists), or the port is unbound"
    )


def _lost(e: Evidence) -> _Answer | None:
    if not e.irq & Irq.LOST:
        return None
    until = "nothing: it stays bound until the machine stops"
    if e.file is not None:
        text = (
            f"Port {e.name} has a handler in {e.file}, whose record of it is gone (H1, variant duplicate-drops-ports): "
            "its user can neither write it back nor unbind it."
        )
    elif e.irq & Irq.KERNEL:
        text = (
            f"Port {e.name} is lost: the file that had it was released without a record of it (H1, variant "
            "duplicate-drops-ports)."
        )
    else:
        text = (
            f"Port {e.name} has leaked: it was handed out to a file that had no memory for its record (H3, variant "
            "leak-on-enomem)."
        )
    return _Answer("lost", text, until)


def _no_handler(e: Evidence) -> _Answer | None:
    if e.file is not None or e.irq & Irq.KERNEL:
        return None
    pending = " An event is pending on it." if e.pending else ""
    if e.static:
        text = f"Port {e.name} is one end of a static channel, but no handler is bound to it.{pending}"
        return _Answer("no-handler", text, "a file binds it (bind_static)")
    made = "was made by a hypercall of its domain's kernel" if e.raw else "has a channel"
    text = f"Port {e.name} {made}, but no handler is bound to it.{pending}"
    return _Answer("no-handler", text, "a file binds it (bind_static), or its domain closes it")


def _file_has_gone(e: Evidence) -> _Answer | None:
    if e.file is None or (e.file.is_open and e.file.process.condition != processes.DEAD):
        return None
    text = f"Port {e.name} belongs to {e.file}, which is gone; its ports are being closed."
    return _Answer("file-gone", text, "the hypervisor finishes the release, and the port is free")


def _poisoned(e: Evidence) -> _Answer | None:
    if e.file is None or not e.file.poisoned:
        return None
    text = (
        f"The file of port {e.name}, {e.file}, is poisoned: its user wrote an impossible index, "
        "and every read answers EIO."
    )
    return _Answer("poisoned", text, "its user closes the file and opens a new one; no other file is touched")


# ---- has it arrived, and nobody took it?


def _in_service(e: Evidence) -> _Answer | None:
    if e.server is None:
        return None
    if not e.server.runs:
        text = f"Port {e.name} is in service on {e.server.name}, which {e.server.said}."
        return _Answer("cpu-not-running", text, e.server.remedy)
    text = f"Port {e.name} is in service on {e.server.name} at this moment, on its way into the event ring."
    return _Answer("in-service", text, "nothing is needed: look again")


def _overflowed(e: Evidence) -> _Answer | None:
    file = e.file
    if file is None or not file.overflowed:
        return None
    size = f" of {file.ring.size} entries" if file.ring is not None else ""
    text = (
        f"The event ring{size} of {file} has overflowed: every read answers EFBIG until RESET, "
        f"events dropped so far: {file.dropped}"
    )
    if file.ring is not None and file.ring.positions:
        text += f", and port {e.name} lies in it, unreachable"
    elif e.active:
        text += f", and port {e.name} is masked for {_for(e, e.served_at_ns)}"
    return _Answer(
        "overflowed", text + ".", "its user calls RESET, then writes its ports back, this one included"
    )


def _unread(e: Evidence) -> _Answer | None:
    file = e.file
    if file is None or file.ring is None or not file.ring.positions:
        return None
    ring = file.ring
    text = (
        f"Delivered {_for(e, e.served_at_ns)} ago, port {e.name} lies unread in the event ring of {file}, "
        f"at position {ring.positions[0]} of {ring.unread}"
    )
    behind = f" Another event is pending behind it, {_pending(e)}." if e.pending and e.masked else ""
    if not ring.door:
        why = (
            "the driver's lost wake-up"
            if e.driver_order
            else "a reader is at it just now, or its user wrote over the page"
        )
        text += f", but its doorbell is not raised: a reader that sleeps is not woken ({why}).{behind}"
        return _Answer(
            "not-woken",
            text,
            "the next event that finds the ring empty, or a read that does not wait for poll",
        )
    users = ", ".join(str(user) for user in file.users)
    stopped = [user for user in file.users if user.condition == processes.STOPPED]
    if stopped and len(stopped) == len(file.users):
        text += f"; the doorbell is raised, but {users} is stopped.{behind}"
        return _Answer("reader-stopped", text, f"continue it: kill -CONT {stopped[0].pid}")
    text += f"; the doorbell is raised, and {users} has not read it.{behind}"
    return _Answer("unread", text, "its user reads the file, then writes the port back")


# ---- does it wait for its write-back?


def _not_written_back(e: Evidence) -> _Answer | None:
    if e.file is None or not e.active:
        return None
    waiting = e.file.waiting.write_backs(e.port) if e.file.waiting is not None else 0
    if waiting and not e.hypervisor.runs:
        text = (
            f"Port {e.name} has been written back, but the hypervisor, which would unmask it, "
            f"{e.hypervisor.said}."
        )
        return _Answer("hypervisor-not-running", text, e.hypervisor.remedy)
    users = ", ".join(str(user) for user in e.file.users)
    taken = "taken by" if e.file.ring is not None else "delivered (whether it was read is not known) to"
    if not e.pending:
        text = (
            f"The last event of port {e.name} was {taken} {e.file} and not written back: the port "
            f"has been masked for {_for(e, e.served_at_ns)}, and no other event is pending."
        )
        return _Answer("not-written-back", text, f"{users} writes the port back")
    text = (
        f"Port {e.name} is {_pending(e)}: {e.file} was given the event before it "
        f"{_for(e, e.served_at_ns)} ago, and {users} has not written the port back since."
    )
    return _Answer(
        "pending-masked", text, f"{users} writes the port back; then the pending event is delivered"
    )


def _put_off(e: Evidence) -> _Answer | None:
    if not e.put_off_ns:
        return None
    event = f"it is {_pending(e)}" if e.pending else "no other event is pending"
    text = f"Port {e.name} has been written back, but its late EOI is put off until {duration(e.put_off_ns)} from now"
    why = "its upcall loop ran for more than two ticks, or it was spurious too often"
    if not e.hypervisor.runs:
        return _Answer("hypervisor-not-running", f"{text}, and the hypervisor {e.hypervisor.said}.", e.hypervisor.remedy)
    return _Answer("eoi-put-off", f"{text} ({why}); until then it stays masked, and {event}.", "that time, or machine.advance()")


def _masked(e: Evidence) -> _Answer | None:
    if not e.pending or not e.masked:
        return None
    reasons = [
        said
        for bit, said in (
            (Irq.EXPLICIT, "disabled"),
            (Irq.TEMPORARY, "masked for a moment"),
            (Irq.EOI_PENDING, "awaiting EOI"),
        )
        if e.irq & bit
    ]
    if e.irq & Irq.EXPLICIT:
        text = f"Port {e.name} is {_pending(e)}: its handler is disabled, as while it is being unbound."
        return _Answer("disabled", text, "the unbind ends, and the event goes with the port")
    why = ", ".join(reasons) or "its handler is being bound"
    return _Answer("masked", f"Port {e.name} is {_pending(e)}: {why}.", "it is unmasked; look again")


# ---- is it on its way to a CPU?


def _on_its_way(e: Evidence) -> _Answer | None:
    if not e.pending:
        return None
    if not e.cpus:
        return _Answer(
            "no-cpu", f"Port {e.name} is {_pending(e)}, and no CPU serves it.", "its file binds it anew"
        )
    cpu = e.cpus[0]
    if not cpu.runs:
        where = f", linked in the {e.queue_name}" if e.linked else ""
        text = f"Port {e.name} is {_pending(e)}{where}, but {cpu.name}, which would take it, {cpu.said}."
        return _Answer("cpu-not-running", text, cpu.remedy)
    if e.fifo and not e.linked:
        text = f"Port {e.name} is {_pending(e)}, but its event word is in no queue: {cpu.name} does not find it yet."
        return _Answer("on-its-way", text, "the hypervisor links it; look again")
    told = "has been told" if e.upcall_pending or not e.cpu_asleep else "sleeps and is about to be told"
    where = f", linked in the {e.queue_name}" if e.fifo else ""
    text = f"Port {e.name} is {_pending(e)}{where}: {cpu.name} {told} and is about to take it."
    return _Answer("on-its-way", text, "nothing is needed: look again")


def _submitted(e: Evidence) -> _Answer | None:
    count = 0
    if e.sender is not None:
        own = e.state == Port.IPI
        count = e.sender.notifies(e.port if own else e.remote_port)
    if e.hypervisor.runs and not count:
        return None
    if count:
        wait = "notify waits" if count == 1 else "notifies wait"
        waits = f"{count} {wait} in the submission ring of {e.sender_name}"
        if e.hypervisor.runs:
            return _Answer(
                "submitted", f"For port {e.name}, {waits}, just submitted.", "nothing is needed: look again"
            )
        text = f"For port {e.name}, {waits}, but the hypervisor, which would take them, {e.hypervisor.said}."
    elif e.irq & Irq.KERNEL:
        return None
    else:
        text = (
            f"Nothing is on its way to port {e.name}, and nothing can be raised: the hypervisor "
            f"{e.hypervisor.said}."
        )
    return _Answer("hypervisor-not-running", text, e.hypervisor.remedy)


# ---- nothing is on its way


def _kernel(e: Evidence) -> _Answer | None:
    if not e.irq & Irq.KERNEL:
        return None
    kind = f"VIRQ {e.remote_port}" if e.state == Port.VIRQ else _KINDS.get(e.state, "a port")
    text = (
        f"Port {e.name} is bound by the kernel of domain {e.domain} itself ({kind}), which handles "
        "its events in place."
    )
    return _Answer("kernel", text, "no user can have it: configuration keys kernel_virqs and kernel_ports")


def _without_peer(e: Evidence) -> _Answer | None:
    if e.state != Port.UNBOUND:
        return None
    bind = f"domain {e.remote_domain} binds it: bind_interdomain({e.domain}, {e.port})"
    if e.peer_closed:
        text = f"Port {e.name} is unbound: its peer in domain {e.remote_domain} has closed its end."
        return _Answer("peer-closed", text, bind)
    text = f"Port {e.name} is unbound: domain {e.remote_domain} may bind it, and has no end of it now."
    return _Answer("unbound", text, bind)


def _never_raised(e: Evidence) -> _Answer | None:
    if e.raised_for_file:
        return None
    if e.state == Port.VIRQ:
        text = (
            f"Port {e.name} is bound to VIRQ {e.remote_port}, which has not been raised since its "
            "file was opened."
        )
        return _Answer("virq-not-raised", text, f"raise it: pvbus virq {e.remote_port} --domain {e.domain}")
    peer = f" by its peer {e.remote_domain}:{e.remote_port}" if e.state == Port.INTERDOMAIN else ""
    text = (
        f"Port {e.name} is bound to {e.file} and ready, but has not been raised{peer} since its "
        "file was opened."
    )
    return _Answer(
        "never-raised",
        text,
        f"notify({e.remote_port}) in domain {e.remote_domain}" if peer else "it is notified",
    )


def _idle(e: Evidence) -> _Answer:
    text = (
        f"Nothing waits on port {e.name}: its last event was delivered {_for(e, e.served_at_ns)} "
        "ago, and written back."
    )
    return _Answer("idle", text, "the next event")


_QUESTIONS: tuple[Callable[[Evidence], _Answer | None], ...] = (
    _not_bound,
    _lost,
    _no_handler,
    _file_has_gone,
    _poisoned,
    _in_service,
    _overflowed,
    _unread,
    _put_off,
    _not_written_back,
    _masked,
    _on_its_way,
    _submitted,
    _kernel,
    _without_peer,
    _never_raised,
)


# ---- words


def _pending(e: Evidence) -> str:
    return f"pending for {_for(e, e.pending_since_ns)} and {'masked' if e.masked else 'not masked'}"


def _for(e: Evidence, at_ns: int) -> str:
    return duration(e.now_ns - at_ns) if at_ns else "an unknown time"
