# SPDX-License-Identifier: Apache-2.0
"""The loops of the machine's processes, as serve.c and their process.py run them, over modelled doorbells.

They call the explored core for everything that touches a page; what stands here is only who is called when. A
change of the real loops has to be made here too.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Final

from pvbus.shm._core_explored import EventPath, Memory
from pvbus.shm.layout import Domain, PublicPage, Vcpu
from pvbus.verify.explorer.model import Model

DRAIN_BUDGET: Final = 256


def awake(public: Memory) -> None:
    """Mirror pv_hypervisor_awake: an even number, so that the next announcement is another odd one."""
    word = public.load32(PublicPage.HYPERVISOR_SLEEPING, "sub.word")
    public.store32(PublicPage.HYPERVISOR_SLEEPING, (word | 1) + 1, "sub.awake")


def hypervisor(
    model: Model, path: EventPath, public: Memory, kick: int, door: int, wake: Callable[[Memory], None] = awake,
    doorbells: Sequence[int] = (),
) -> None:
    """Sleep, drain when kicked, ring the CPUs that sleep, send the bytes that readers ask for; begins asleep and announced."""
    while True:
        model.wait(kick, "hypervisor.wait")
        model.take(kick, "hypervisor.take")
        wake(public)
        while True:
            drained = path.drain(DRAIN_BUDGET)
            if drained is not None:
                for code in drained[1]:
                    model.ring(doorbells[code & 0xFF], "cpu.kick")
                for _ in drained[2]:
                    model.ring(door, "door.send")
            elif path.hypervisor_may_sleep(public):
                break


def cpu(model: Model, path: EventPath, domain: Memory, vcpu: int, doorbell: int, door: int, budget: int = 256) -> None:
    """Take upcalls until there is none, send the bytes that they ask for, sleep; begins awake."""
    while True:
        while (served := path.upcall(0, vcpu, budget)) is not None:
            for _ in served[1]:
                model.ring(door, "door.send")
        if path.cpu_may_sleep(0, vcpu):
            sleep(model, domain, vcpu, doorbell)


def sleep(model: Model, domain: Memory, vcpu: int, doorbell: int) -> None:
    """Sleep until kicked; the sleep was announced."""
    model.wait(doorbell, "cpu.wait")
    model.take(doorbell, "cpu.take")
    domain.store32(Domain.vcpu(vcpu, Vcpu.SLEEPING), 0, "cpu.awake")


def ring_eventfd(model: Model, memory: Memory, bell: int, site: str) -> None:
    """Write to an eventfd: whoever reads it sees what was stored before, because both take the kernel's lock on it."""
    memory.smp_mb("eventfd.write")
    model.ring(bell, site)


def await_eventfd(model: Model, memory: Memory, bell: int, site: str) -> None:
    """Sleep until an eventfd has been written to, and read it."""
    model.wait(bell, f"{site}.wait")
    model.take(bell, f"{site}.take")
    memory.smp_mb("eventfd.read")


def hyperv_cpu(
    model: Model, path: EventPath, hv: Memory, vp: int, irq: int, *, exits: int, work: int | None = None,
    ring: Callable[[int], None] | None = None,
) -> None:  # fmt: skip
    """Run a virtual CPU's process on the Hyper-V platform: interrupts and tasklets until nothing is left, then sleep; at birth,
    too.

    `irq` is its doorbell, `exits` the one that tells the host of EOMs, `work` the workqueue's; `ring` is called with each
    channel.
    """
    while True:
        done = 1
        while done:
            done, channels, has_work, eom = path.hv_run(0, vp)
            for relid in channels:
                if ring is not None:
                    ring(relid)
            if has_work and work is not None:
                ring_eventfd(model, hv, work, "work")
            if eom:
                ring_eventfd(model, hv, exits, "EOM")
        await_eventfd(model, hv, irq, "cpu")
