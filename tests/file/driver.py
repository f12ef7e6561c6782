# SPDX-License-Identifier: Apache-2.0
"""Users of open files over a machine without processes: each ioctl's messages are answered from the plain state machine.

A fault can be put into the way of the next message of a kind: the hypervisor's answer to it, or its death.
"""

import contextlib
import errno
import os
import struct
from collections.abc import Generator
from typing import Any

from pvbus.actors.file import batch, evtchn
from pvbus.actors.file.evtchn import EvtchnFile
from pvbus.actors.hypervisor import calls, recovery
from pvbus.actors.runtime import messages as m
from pvbus.shm import channel
from pvbus.shm.layout import FilePage
from pvbus.tests.shm.rig import Rig

SELF = 0x7FF0
EPIPE_REPEATS_MAX = 3


class Machine:
    """A rig, its open files, and what was asked of the hypervisor."""

    def __init__(
        self, cpus: tuple[int, ...] = (2, 1), variants: int = 0, inject: dict[str, int] | None = None
    ) -> None:
        self.rig = Rig(cpus=cpus)
        self.variants = variants
        self.inject = inject or {}      # how many allocations of each file fail
        self.files: dict[int, EvtchnFile] = {}
        self.domain: dict[int, int] = {}
        self.asked: list[str] = []
        self.faults: dict[str, int] = {}        # kind of message -> errno of its next answer
        self.dies_after: set[str] = set()       # the hypervisor executes it, and dies before it answers
        self.dies_before: set[str] = set()

    def open(self, slot: int, domid: int = 0) -> EvtchnFile:
        page = self.rig.open(slot, domid, size=0)
        self.files[slot] = EvtchnFile(slot, page, self, self.variants, self.inject)
        self.domain[slot] = domid
        return self.files[slot]

    # ---- the file's ring

    def grow(self, slot: int, /) -> int:
        if "grow" in self.faults:
            raise _error(self.faults.pop("grow"))
        size: int = self.rig.path.grow(slot)
        return size

    def reset(self, slot: int, /) -> int:
        result: int = self.rig.path.reset(slot)
        return result

    # ---- ioctls

    def ioctl(self, file: EvtchnFile, request: int, argument: bytes | None = None) -> int:
        """Run an ioctl as the file's process does: repeated by the heir if the hypervisor dies under it."""
        for _ in range(EPIPE_REPEATS_MAX):
            try:
                value: int = self._drive(file, file.ioctl(request, argument))
            except OSError as error:
                if error.errno != errno.EPIPE:
                    raise
            else:
                return value
        raise AssertionError("the hypervisor dies again and again")

    def binds(self, file: EvtchnFile, request: int, arguments: list[bytes]) -> m.Values:
        """Make many bindings in one call, as the file's process does."""
        done: list[int] = []
        for _ in range(EPIPE_REPEATS_MAX):
            try:
                given: m.Values = self._drive(file, batch.binds(file, m.Binds(request=request, arguments=arguments), done))
            except OSError as error:
                if error.errno != errno.EPIPE:
                    raise
            else:
                return given
        raise AssertionError("the hypervisor dies again and again")

    def _drive(self, file: EvtchnFile, steps: Generator[Any, Any, Any]) -> Any:
        answer: Any = None
        failed: OSError | None = None
        while True:
            try:
                message = self._resume(steps, answer, failed)
            except StopIteration as stop:
                return stop.value
            answer = failed = None
            try:
                answer = self._answer(file.slot, message)
            except OSError as error:
                failed = error

    @staticmethod
    def _resume(steps: Generator[Any, Any, Any], answer: Any, failed: OSError | None) -> Any:
        if failed is not None:
            return steps.throw(failed)
        return next(steps) if answer is None else steps.send(answer)

    def _answer(self, slot: int, message: Any) -> Any:
        if isinstance(message, m.Hypercalls):
            return self._several(slot, message)
        kind = type(message).__name__
        self.asked.append(kind)
        if kind in self.faults:
            raise _error(self.faults.pop(kind))
        if kind in self.dies_before:
            self.dies_before.remove(kind)
            self._hypervisor_dies()
        value = self._execute(slot, message)
        if kind in self.dies_after:
            self.dies_after.remove(kind)
            self._hypervisor_dies()
        return value

    def _several(self, slot: int, message: m.Hypercalls) -> m.Values:
        values: list[int] = []
        for kind, fields in message.calls:
            try:
                values.append(self._answer(slot, getattr(m, kind)(**fields)))
            except OSError as error:
                if error.errno == errno.EPIPE:
                    raise
                return m.Values(values=values, errno=error.errno or 0, text=error.strerror or "")
        return m.Values(values=values)

    def _hypervisor_dies(self) -> None:
        self.rig.reborn()
        recovery.repair(self.rig.channels, self.rig.irqs)
        self.on_rebirth()
        raise _error(errno.EPIPE)

    def on_rebirth(self) -> None:
        """What others ask of the heir before the one whose call was in flight undoes it: a test replaces this."""

    def _execute(self, slot: int, message: Any) -> int:
        op, irqs, domid = self.rig.channels, self.rig.irqs, self.domain[slot]
        match message:
            case m.AllocUnbound():
                return op.alloc_unbound(domid, SELF, message.remote_domain)
            case m.BindInterdomain():
                return op.bind_interdomain(domid, message.remote_domain, message.remote_port)
            case m.BindVirq():
                return op.bind_virq(domid, message.virq, message.vcpu)
            case m.BindIrq():
                return calls.bind_irq(irqs, domid, slot, message.port, static=message.static)
            case m.UnbindIrq():
                return self._run(calls.unbind_irq(irqs, domid, slot, message.port))
            case m.ClosePort():
                return self._run(calls.close_port(irqs, domid, slot, message.port))
            case m.Barrier():
                return self._run(calls.barrier(domid))
            case m.NrChannels():
                return channel.nr_channels(op.domains[domid].memory)
            case m.ForgetPorts():
                return calls.forget_ports(irqs, domid, slot, message.leaked)
            case m.SendPort():
                with contextlib.suppress(OSError):      # A9.6: 0 whatever the hypervisor said
                    op.send(domid, message.port)
                return 0
        raise AssertionError(message)

    def _run(self, steps: Generator[calls.Wait, None, int]) -> int:
        while True:
            try:
                wait = next(steps)
            except StopIteration as stop:
                value: int = stop.value
                return value
            if isinstance(wait, calls.Flush):
                self.rig.deliver(wait.domid)

    def release(self, file: EvtchnFile) -> int:
        """Drop the last reference of a file, or let its process die: the hypervisor does the same."""
        return self._run(calls.release(self.rig.irqs, self.domain[file.slot], file.slot))

    # ---- short forms

    def alloc(self, file: EvtchnFile, remote: int = 0) -> int:
        return self.ioctl(file, evtchn.BIND_UNBOUND_PORT, u32(remote))

    def connect(self, file: EvtchnFile, domid: int, port: int) -> int:
        return self.ioctl(file, evtchn.BIND_INTERDOMAIN, u32(domid, port))

    def status(self, port: int, domid: int = 0) -> int:
        return self.rig.channels.status(domid, SELF, port).status

    def in_bitmap(self, file: EvtchnFile) -> set[int]:
        return {port for port in range(4096) if file.page.load64(FilePage.BITMAP + port // 64 * 8) >> port % 64 & 1}

    def sound(self, file: EvtchnFile) -> bool:
        """Whether the file, its bitmap and the irq layer agree on what is bound."""
        handled = set(self.rig.irqs.ports_of(self.domain[file.slot], file.slot))
        return file.ports == handled == self.in_bitmap(file) and file.nr_evtchns == len(file.ports)


def u32(*values: int) -> bytes:
    return struct.pack(f"={len(values)}I", *values)


def _error(number: int) -> OSError:
    return OSError(number, os.strerror(number))
