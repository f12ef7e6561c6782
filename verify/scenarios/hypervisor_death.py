# SPDX-License-Identifier: Apache-2.0
"""The hypervisor is killed at any step of a drain, and its heir goes on: each entry of a submission ring takes effect once.

Claim, do, release: the claim in the ring's record says which entry is being executed and how often its port had been served,
the doing is one exchange, and the index moves behind it. Contexts: the hypervisor, which may die anywhere; its heir; and the
CPU (a server), whose process ends when it notices the death, between two upcalls, and whose heir begins as soon as the
hypervisor's has repaired the pages: before the rings are back, or after.

On which ABI the domain is decides what the heir looks at: a pending bit (`2-level`), the event word (`fifo`), or, as long as the
event array has no page for the port, what the hypervisor has noted of it (`early`; nobody serves that port, an inspector looks).
"""

from __future__ import annotations

from collections.abc import Iterable
from functools import partial

from pvbus.actors.hypervisor import recovery
from pvbus.shm._core_explored import EventPath
from pvbus.shm.layout import Domain, Fifo, Irq, SubmissionRing
from pvbus.verify.explorer.model import Model
from pvbus.verify.explorer.scenario import Start, claimed
from pvbus.verify.scenarios import loops
from pvbus.verify.scenarios.fifo_queue import move_to_fifo, word_at
from pvbus.verify.scenarios.xen import XenScenario

NOTIFY, ENABLE = SubmissionRing.NOTIFY, SubmissionRing.ENABLE
CPUS = ("runs", "once", "later")
ABIS = {"2-level": None, "fifo": 1, "early": 0}  # pages of the event array


class HypervisorDeath(XenScenario):
    """The ring holds a notify of port 1 or, with `enable`, port 1 written back while its next event waits behind the mask.

    `abi`: 2-level, fifo, early. `cpu`: it runs when the hypervisor dies. Or it has hung up before, and comes
    up once the heir is there, and only looks once what there is to serve; or later, when the heir has done its work.
    """

    name = "hypervisor-death"
    claims = (
        *claimed("sc tso", {}, {"enable": True}, {"abi": "fifo"}, deaths=1),
        *claimed("sc tso arm", {"abi": "early"}, {"abi": "fifo", "cpu": "later"}, deaths=1),
        *claimed("sc tso arm", {"cpu": "once"}, {"enable": True, "cpu": "once"}, deaths=1),
    )
    mortal = ("hypervisor",)

    def __init__(self, *, enable: bool = False, abi: str = "2-level", cpu: str = "runs") -> None:
        if abi not in ABIS:
            raise ValueError(f"no ABI {abi!r}: {', '.join(ABIS)}")
        if enable and abi == "early":
            raise ValueError("a port without an event word has no event that its user could write back")
        if cpu not in CPUS:
            raise ValueError(f"no CPU that {cpu!r}: {', '.join(CPUS)}")
        self.enable, self.abi = enable, abi
        self.runs, self.once, self.later = (cpu == one for one in CPUS)
        self.reborn = False

    def prepare(self, model: Model, variants: int) -> None:
        """Make the pages; the ring holds one entry."""
        self.make(model, ports=(1,), variants=variants)
        self.hangup, self.gone, self.go = (model.bell(name) for name in ("hangup", "gone", "go"))
        if (pages := ABIS[self.abi]) is not None:
            move_to_fifo(self.domain, pages=pages)
        if self.enable:
            self.domain.store64(Domain.table(Domain.IRQ_WORDS, 1), 1 | Irq.ACTIVE | Irq.EOI_PENDING | Irq.SERVED_ONE)
            self.path.mask(0, 1)
            self.path.set_pending(0, 1)
        self.rings[0].store32(SubmissionRing.DATA, (ENABLE if self.enable else NOTIFY) << 30 | 1)
        self.rings[0].store32(SubmissionRing.TAIL, 1)

    def start(self, model: Model) -> Iterable[Start]:
        """Give the hypervisor, the CPU, and the heir."""
        self.reborn = False
        yield "hypervisor", partial(self._hypervisor, model), False
        yield "cpu0", partial(self._cpu, model), True
        yield "heir", partial(self._heir, model), True
        if self.abi == "early":  # the CPU never comes by the port, and one process alone is not interrupted
            yield "inspector", partial(self.is_pending, 1), False

    def _hypervisor(self, model: Model) -> None:
        while (drained := self.path.drain(256)) is not None:
            for code in drained[1]:
                model.ring(self.doorbells[code & 0xFF], "cpu.kick")

    def _heir(self, model: Model) -> None:
        """Mirror on_ready of a reborn hypervisor, then what its files send it."""
        model.await_death("hypervisor")
        self.reborn = True
        model.ring(self.hangup, "hangup")
        model.ring(self.doorbells[0], "hangup")
        path = EventPath(self.machine, {0: self.domain})
        path.attach_file(0, self.page)
        irqs = self.irq_layer(model)
        recovery.repair(irqs.channels, irqs)
        if self.abi == "2-level" and not self.later:
            model.ring(self.go, "go")
        self.attach(path)
        if self.abi != "2-level":  # the queues are walked when the CPU comes up, before it runs
            model.wait(self.gone, "gone.wait")
            path.fifo_rebuild(0, 0)
            if not self.later:
                model.ring(self.go, "go")
        while (drained := path.drain(256)) is not None:
            for code in drained[1]:
                model.ring(self.doorbells[code & 0xFF], "cpu.kick")
        if self.later:
            model.ring(self.go, "go")

    def _cpu(self, model: Model) -> None:
        while self.runs and not model.take(self.hangup, "hung up?"):
            if self.path.upcall(0, 0, 256) is None and self.path.cpu_may_sleep(0, 0):
                loops.sleep(model, self.domain, 0, self.doorbells[0])
        model.ring(self.gone, "gone")
        model.wait(self.go, "go.wait")
        self.path.cpu_recover(0, 0)
        if self.once:
            self.path.upcall(0, 0, 256)
        else:
            self.cpu(model, 0)

    def attach(self, path: EventPath) -> None:
        """Take the ring over: an entry that was claimed is resolved."""
        path.attach_submission(0, self.rings[0], 0)

    def broken(self, model: Model, stuck: list[str]) -> str | None:
        """The one event has come, once; the port is masked until its user writes it back."""
        came = self.came()
        if not (self.runs or self.reborn):  # the CPU waits for that
            return None if self.is_pending(1) else "one event was to be pending, and none is"
        if self.abi == "early":
            noted = self.is_pending(1) and not came
            return None if noted else f"one event was to be noted, and no more: came {came}"
        if self.once and not came:
            return None if self.is_pending(1) else "one event was to be pending, and none is"
        if came != [1]:
            return f"one event was {'waiting' if self.enable else 'notified'}, and {len(came)} came"
        if self.is_pending(1):
            return "the event came, and is pending once more: it will come twice"
        if self.irq(1) & Irq.ENABLED:
            return f"port 1 has come and was not written back, and its irq word is {self.irq(1):#x}"
        return self.stranded((1,))

    def is_masked(self, port: int) -> bool:
        """Tell whether the port is masked, as the ABI has it."""
        if self.abi == "fifo":
            return bool(self.domain.load32(word_at(port)) & Fifo.MASKED)
        return super().is_masked(port)

    def is_pending(self, port: int) -> bool:
        """Tell whether an event is pending, as the ABI has it."""
        if self.abi == "fifo":
            return bool(self.domain.load32(word_at(port)) & Fifo.PENDING)
        if self.abi == "early":
            return bool(self.domain.load64(Domain.table(Domain.QUEUE_WORDS, port)) & Fifo.QUEUE_PENDING)
        return super().is_pending(port)
