# SPDX-License-Identifier: Apache-2.0
"""All pages of one machine: made, formatted and unlinked here, by the supervisor only; everybody else maps descriptors."""

from __future__ import annotations

import os
from typing import TYPE_CHECKING

from pvbus.shm import hyperv, store
from pvbus.shm.layout import (
    MAGIC_DOMAIN,
    MAGIC_MACHINE,
    MAGIC_PUBLIC,
    PORTS_2L,
    Domain,
    Machine,
    Port,
    PublicPage,
)
from pvbus.shm.memory import Memory
from pvbus.shm.segment import Segment, read_only, sealed_memfd, stamp

if TYPE_CHECKING:
    from collections.abc import Collection, Mapping


class MachinePages:
    """The machine's segment, one segment a domain, a second one for those on the Hyper-V platform, and the public page."""

    def __init__(self, run_id: str, domains: Mapping[int, int], variants: int, hyperv_domains: Collection[int] = ()) -> None:
        """Create everything for `domains` {domain id: number of vCPUs}. Raises OSError when /dev/shm is full or missing."""
        self.segments: dict[str, Segment] = {}
        self.public_fd = -1
        try:
            self._create(run_id, domains, variants)
            for domid in hyperv_domains:
                self.segments[f"kept{domid}"] = Segment(f"pvbus-{run_id}-s{domid}", store.BYTES)
                segment = self.segments[f"hyperv{domid}"] = Segment(f"pvbus-{run_id}-h{domid}", hyperv.BYTES)
                format_hyperv(segment.memory, domid, domains[domid])
        except BaseException:
            self.close()
            raise

    def _create(self, run_id: str, domains: Mapping[int, int], variants: int) -> None:
        machine = self.segments["machine"] = Segment(f"pvbus-{run_id}-m", Machine.BYTES)
        stamp(machine.memory, MAGIC_MACHINE)
        machine.memory.store32(Machine.VARIANTS, variants)
        for domid, vcpus in domains.items():
            segment = self.segments[f"domain{domid}"] = Segment(f"pvbus-{run_id}-d{domid}", Domain.BYTES)
            stamp(segment.memory, MAGIC_DOMAIN)
            segment.memory.store32(Domain.PORTS_MAX, PORTS_2L)
            segment.memory.store32(Domain.VCPUS, vcpus)
            segment.memory.store32(Domain.DOMID, domid)
            segment.memory.store32(Domain.VALID_EVTCHNS, 64)
            for word in range(64):  # a guest boots with every port masked
                segment.memory.store64(Domain.EVTCHN_MASK + 8 * word, 2**64 - 1)
            segment.memory.store64(Domain.table(Domain.PORT_WORDS, 0), Port.pack(Port.RESERVED))
        self.public_fd = sealed_memfd(f"pvbus-{run_id}-public", PublicPage.BYTES)
        self.public = Memory(self.public_fd, PublicPage.BYTES)
        stamp(self.public, MAGIC_PUBLIC)
        self.public_for_users = read_only(self.public_fd)

    @property
    def machine(self) -> Memory:
        """The machine's segment."""
        return self.segments["machine"].memory

    def domain(self, domid: int) -> Memory:
        """A domain's segment."""
        return self.segments[f"domain{domid}"].memory

    def hyperv(self, domid: int) -> Memory:
        """The Hyper-V segment of a domain on that platform. Raises KeyError for others."""
        return self.segments[f"hyperv{domid}"].memory

    def fds(self) -> dict[str, int]:
        """Name every descriptor that the machine's own processes may map."""
        return {**{name: segment.fd for name, segment in self.segments.items()}, "public": self.public_fd}

    def close(self) -> None:
        """Unmap and unlink everything."""
        for segment in self.segments.values():
            segment.close()
        self.segments.clear()
        if self.public_fd >= 0:
            self.public.close()
            os.close(self.public_for_users)
            os.close(self.public_fd)
            self.public_fd = -1


def format_hyperv(memory: Memory, domid: int, vcpus: int) -> None:
    """Write the state in which a fresh, zeroed Hyper-V segment boots: every SINT masked, everything else off."""
    stamp(memory, hyperv.MAGIC)
    memory.store32(hyperv.Header.VCPUS, vcpus)
    memory.store32(hyperv.Header.DOMID, domid)
    for vp in range(vcpus):
        for sint in range(hyperv.SINTS):
            memory.store64(hyperv.Vp.sint(vp, sint), hyperv.Sint.MASKED)
