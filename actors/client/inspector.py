# SPDX-License-Identifier: Apache-2.0
"""Look into a running machine's segments, read-only and without a message: ports, files, CPUs, counters.

Values of different words may be of different moments: the machine does not stop for us.
"""

from __future__ import annotations

import os
from typing import TYPE_CHECKING, Any

from pvbus.shm import channel
from pvbus.shm.layout import (
    FILES_MAX,
    SUBMISSIONS_MAX,
    Domain,
    File,
    FilePage,
    Irq,
    Machine,
    Port,
    PublicPage,
    Submission,
    Vcpu,
)
from pvbus.shm.memory import Memory
from pvbus.shm.segment import read_text

if TYPE_CHECKING:
    from collections.abc import Iterator

STATES = ("free", "reserved", "unbound", "interdomain", "pirq", "virq", "ipi")


class Inspector:
    """The machine's pages, mapped read-only."""

    def __init__(self, fds: dict[str, int], facts: dict[str, Any]) -> None:
        self.facts = facts
        self.machine = Memory(fds["machine"], Machine.BYTES, False)
        self.public = Memory(fds["public"], PublicPage.BYTES, False)
        self.domain_pages = {
            int(name.removeprefix("domain")): Memory(fd, Domain.BYTES, False)
            for name, fd in fds.items()
            if name.startswith("domain")
        }
        for fd in fds.values():
            os.close(fd)

    def close(self) -> None:
        """Unmap everything."""
        for memory in (self.machine, self.public, *self.domain_pages.values()):
            memory.close()

    # ---- words

    def port_word(self, domid: int, port: int) -> int:
        """Read the hypervisor's word of a port."""
        return self.domain_pages[domid].load64(Domain.table(Domain.PORT_WORDS, port))

    def irq_word(self, domid: int, port: int) -> int:
        """Read the guest's word of a port."""
        return self.domain_pages[domid].load64(Domain.table(Domain.IRQ_WORDS, port))

    def is_pending(self, domid: int, port: int) -> bool:
        """Read the port's pending bit."""
        return channel.state(self.domain_pages[domid], port).pending

    def is_masked(self, domid: int, port: int) -> bool:
        """Read the port's mask bit."""
        return channel.state(self.domain_pages[domid], port).masked

    def file_field(self, slot: int, field: int, width: int = 4) -> int:
        """Read a field of an open file's record."""
        at = Machine.file(slot, field)
        return self.machine.load32(at) if width == 4 else self.machine.load64(at)

    def open_slots(self) -> Iterator[int]:
        """Give the slots of open files."""
        return (slot for slot in range(FILES_MAX) if self.file_field(slot, File.STATE) == File.OPEN)

    def submission_backlog(self, slot: int) -> list[tuple[int, int]]:
        """Give (index, entries taken so far) of a file's submission rings."""
        return [
            (index, self.machine.load64(Machine.submission(index, Submission.TAKEN)))
            for index in range(SUBMISSIONS_MAX)
            if self.machine.load32(Machine.submission(index, Submission.STATE)) != Submission.FREE
            and self.machine.load32(Machine.submission(index, Submission.SLOT)) == slot
        ]

    # ---- tables

    def ports(self, domain: int | None = None) -> list[dict[str, Any]]:
        """List the ports that are not free, in every domain or in one. LookupError for a domain that is none."""
        if domain is not None and domain not in self.domain_pages:
            raise LookupError(f"no domain {domain}")
        return [
            self.port(domid, port)
            for domid in self.domain_pages
            if domain is None or domid == domain
            for port in range(1, self.domain_pages[domid].load32(Domain.VALID_EVTCHNS))
            if self.port_word(domid, port) & 7 != Port.FREE or self.irq_word(domid, port) & Irq.SLOT
        ]

    def port(self, domid: int, port: int) -> dict[str, Any]:
        """Describe one port."""
        word = self.port_word(domid, port)
        state, remote_domain, remote_port, vcpu = Port.unpack(word)
        irq = self.irq_word(domid, port)
        slot = (irq & Irq.SLOT) - 1
        peer = state in (Port.UNBOUND, Port.INTERDOMAIN)
        kernels = irq & Irq.KERNEL or word & Port.RAW
        nobodys = "lost" if irq & Irq.LOST else "kernel" if kernels else None
        return {
            "domain": domid,
            "port": port,
            "state": STATES[state] if state < len(STATES) else "?",
            "remote_domain": remote_domain if peer else None,
            "remote_port": remote_port if state == Port.INTERDOMAIN else None,
            "static": bool(word & Port.STATIC),
            "virq": remote_port if state == Port.VIRQ else None,
            "vcpu": vcpu,
            "file": f"file/{domid}.{slot}" if slot >= 0 else nobodys,
            "pending": self.is_pending(domid, port),
            "masked": self.is_masked(domid, port),
            "enabled": bool(irq & Irq.ENABLED),
            "active": bool(irq & Irq.ACTIVE),
            "served": irq >> 32,
        }

    def files(self) -> list[dict[str, Any]]:
        """List the open files."""
        return [self._file(slot) for slot in self.open_slots()]

    def _file(self, slot: int) -> dict[str, Any]:
        prod = self.file_field(slot, File.PROD, 8)
        domain, restricted = self.file_field(slot, File.DOMAIN), self.file_field(slot, File.RESTRICTED)
        return {
            "file": f"file/{domain}.{slot}",
            "slot": slot,
            "domain": domain,
            "name": read_text(self.machine, Machine.file(slot, File.NAME), File.NAME_BYTES),
            "opener_pid": self.file_field(slot, File.OPENER_PID),
            "process_pid": self.file_field(slot, File.PROCESS_PID),
            "ports": self.file_field(slot, File.PORTS),
            "ring_size": self.file_field(slot, File.SIZE),
            "overflow": bool(prod & FilePage.OVERFLOW),
            "poisoned": bool(prod & FilePage.POISONED),
            "restricted": None if restricted == 0xFFFF else restricted,
            "delivered": self.file_field(slot, File.DELIVERED, 8),
            "dropped": self.file_field(slot, File.DROPPED, 8),
            "wakes": self.file_field(slot, File.WAKES, 8),
        }

    def counters(self) -> dict[str, int]:
        """Give the machine's counters."""
        names = {"notifies": Machine.NOTIFIES, "enables": Machine.ENABLES, "refused": Machine.REFUSED}
        names["poisoned"] = Machine.POISONED
        return {name: self.machine.load64(at) for name, at in names.items()}

    def domains(self, specs: list[dict[str, Any]]) -> list[dict[str, Any]]:
        """Describe the domains and their CPUs."""
        return [{**spec, "vcpus": [self.vcpu(spec["id"], vcpu) for vcpu in range(spec["cpus"])]} for spec in specs]

    def vcpu(self, domid: int, vcpu: int) -> dict[str, Any]:
        """Describe one virtual CPU."""
        memory = self.domain_pages[domid]
        fields = {"upcalls": Vcpu.UPCALLS, "events": Vcpu.EVENTS, "unhandled": Vcpu.UNHANDLED, "warnings": Vcpu.WARNINGS}
        fields["eois_put_off"] = Vcpu.EOIS_PUT_OFF
        return {
            "vcpu": vcpu,
            "generation": memory.load32(Domain.vcpu(vcpu, Vcpu.GENERATION)),
            "sleeping": bool(memory.load32(Domain.vcpu(vcpu, Vcpu.SLEEPING))),
            "upcall_pending": bool(memory.load8(Domain.vcpu_info(vcpu, Domain.UPCALL_PENDING))),
            **{name: memory.load64(Domain.vcpu(vcpu, at)) for name, at in fields.items()},
        }
