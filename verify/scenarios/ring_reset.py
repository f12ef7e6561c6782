# SPDX-License-Identifier: Apache-2.0
"""A small event ring overflows, is emptied by RESET, and has several readers: what is read is read once, and a loss is told.

Contexts: the CPU (its ports are pending at the start), the readers (servers, processes of one file: blocking reads of one
port, until EFBIG), the hypervisor (a server) and, with `resets`, the file process. EFBIG is an answer, and it is given if
and only if an event was dropped; a reader from before a RESET never takes an entry from behind it twice.
"""

from __future__ import annotations

import errno
from collections.abc import Iterable
from functools import partial

from pvbus.shm._core_explored import UserFile
from pvbus.shm.layout import FilePage
from pvbus.verify.explorer.model import Model
from pvbus.verify.explorer.scenario import Start, claimed, within
from pvbus.verify.scenarios import power_of_two
from pvbus.verify.scenarios.xen import XenScenario


class RingReset(XenScenario):
    """`events` come into a ring of `entries`, for `readers`; the ring is reset `resets` times."""

    ranges = within(events=(1, 63), entries=(2, 64), readers=(1, 8), resets=(0, 16))
    name = "ring-reset"
    claims = (
        claimed("sc tso arm", {"events": 3, "resets": 0}, {"events": 1, "readers": 2, "resets": 0})
        + claimed("sc tso", {"events": 1}, {"readers": 2, "resets": 0})
        + claimed("sc", {})
        + claimed("sc", {"events": 1, "readers": 2}, preemptions=2)
    )

    def __init__(self, *, events: int = 2, entries: int = 2, readers: int = 1, resets: int = 1) -> None:
        power_of_two("entries", entries)
        self.ports = list(range(1, 1 + events))
        self.entries, self.readers, self.resets = entries, readers, resets
        self.read: list[list[int]] = []
        self.told: list[bool] = []

    def prepare(self, model: Model, variants: int) -> None:
        """Make the pages; every port is pending."""
        self.make(model, ports=self.ports, entries=self.entries, users=self.readers, variants=variants)
        for port in self.ports:
            self.path.set_pending(0, port)

    def start(self, model: Model) -> Iterable[Start]:
        """Give the CPU, the file process, the readers and the hypervisor."""
        self.read, self.told = [[] for _ in range(self.readers)], [False] * self.readers
        yield "cpu0", partial(self._upcalls, model), False
        if self.resets:
            yield "file", self._file, False
        for index in range(self.readers):
            yield f"reader{index}", partial(self._reader, self.user(index), index), True
        yield "hypervisor", partial(self.hypervisor, model), True

    def _upcalls(self, model: Model) -> None:
        while (served := self.path.upcall(0, 0, 256)) is not None:
            for _ in served[1]:
                model.ring(self.door, "door.send")

    def _file(self) -> None:
        for _ in range(self.resets):
            self.path.reset(0)

    def _reader(self, file: UserFile, index: int) -> None:
        while not self.told[index]:
            try:
                self.read[index] += file.read_ports(1)
            except OSError as error:
                if error.errno != errno.EFBIG:
                    raise
                self.told[index] = True

    def broken(self, model: Model, stuck: list[str]) -> str | None:
        """Read once each, nothing left unread under a sleeper, nothing lost without a word."""
        read = [port for one in self.read for port in one]
        prod, cons = self.page.load64(FilePage.PROD), self.page.load64(FilePage.CONS)
        unread, lost = (prod - cons) & 0xFFFFFFFF, bool(prod & FilePage.OVERFLOW)
        if len(set(read)) != len(read) or not set(read) <= set(self.ports):
            return f"read {self.read}; {self.ports} were raised, each once"
        if lost and not all(self.told):
            return "an event was dropped, and a reader sleeps that nobody tells"
        if not lost and unread and not all(self.told):
            return f"a reader sleeps, and {unread} event(s) lie unread in the ring"
        if not self.resets:
            if any(self.told) != lost:
                return f"told of a loss: {self.told}, though {'one' if lost else 'none'} was dropped"
            if not lost and sorted(read) != self.ports:
                return f"read {self.read}, but {self.ports} were raised, and none was dropped"
        return None
