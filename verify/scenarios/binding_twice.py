# SPDX-License-Identifier: Apache-2.0
"""A hypervisor hands out a port number that the file has already: the bind fails, and the file's other ports go on working.

Contexts: the file process (binds; the hypervisor's part of the call is executed in its place) and the user, which writes
back and notifies another port of the file meanwhile, over its submission ring. The hypervisor drains afterwards.
"""

from __future__ import annotations

import errno
from collections.abc import Iterable
from functools import partial

from pvbus.actors.file.evtchn import EvtchnFile
from pvbus.actors.hypervisor import calls
from pvbus.actors.hypervisor.irqs import IrqLayer
from pvbus.actors.runtime import messages as m
from pvbus.shm.layout import Domain, Irq
from pvbus.verify.explorer.model import Model
from pvbus.verify.explorer.scenario import Start, claimed
from pvbus.verify.scenarios.xen import XenScenario

TAKEN, OTHER = 1, 2


class BindingTwice(XenScenario):
    """Port 1 was bound as a static number, and is handed out again; port 2 is an innocent one of the same file."""

    name = "binding-twice"
    claims = claimed("sc tso arm", {})
    variants = 0

    def __init__(self) -> None:
        self.failed = 0

    def prepare(self, model: Model, variants: int) -> None:
        """Make the pages."""
        self.make(model, ports=(TAKEN, OTHER), variants=variants | self.variants)
        self.domain.fetch_or64(Domain.table(Domain.IRQ_WORDS, TAKEN), Irq.STATIC)

    def start(self, model: Model) -> Iterable[Start]:
        """Give the file process, the user and the hypervisor."""
        self.failed = 0
        yield "user", self._user, False
        yield "file", partial(self._file, model, self.irq_layer(model)), False
        yield "hypervisor", partial(self.hypervisor, model), True

    def _user(self) -> None:
        self.user().notify(OTHER)

    def _file(self, model: Model, irqs: IrqLayer) -> None:
        file = EvtchnFile(0, self.page, self.path, self.variants)
        file.ports, file.nr_evtchns, file.ring_size = {TAKEN, OTHER}, 2, 64
        steps = file.bind_to_user(TAKEN)
        try:
            call = next(steps)
            while True:
                if isinstance(call, m.ClosePort):
                    value = self.run_call(model, calls.close_port(irqs, 0, 0, call.port))
                else:
                    value = calls.at_once(irqs, 0, 0, call, set())
                call = steps.send(value)
        except OSError as error:
            self.failed = error.errno or 0

    def broken(self, model: Model, stuck: list[str]) -> str | None:
        """The bind has failed with EEXIST; the other port is the file's as before, and its notify has arrived."""
        if self.failed != errno.EEXIST:
            return f"the bind ended with {self.failed}, not with EEXIST"
        if self.irq(OTHER) & (Irq.LOST | Irq.SLOT) != 1:
            return f"port {OTHER} is the file's no more: irq word {self.irq(OTHER):#x}"
        return None if self.is_pending(OTHER) else f"port {OTHER} was notified, and is not pending"
