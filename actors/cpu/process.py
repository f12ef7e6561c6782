# SPDX-License-Identifier: Apache-2.0
"""A virtual CPU's process: takes upcalls, runs the driver's interrupt handler, rings the doors of open files.

Producer of the event rings of its domain's files. It has no state that matters: where each port stands lies in its irq
word, so an heir goes on from there.
"""

from __future__ import annotations

import contextlib
import os
import select
import socket
from typing import TYPE_CHECKING, Any

from pvbus.actors.runtime import messages as m
from pvbus.actors.runtime import vmbus_messages as vm
from pvbus.actors.runtime.process import ProcessActor, Received
from pvbus.actors.runtime.wire import Done, Message
from pvbus.shm import hyperv
from pvbus.shm.layout import MAGIC_DOMAIN, MAGIC_MACHINE, Domain, FilePage, Machine, Vcpu
from pvbus.shm.memory import EventPath, Memory
from pvbus.shm.segment import check

if TYPE_CHECKING:
    from pvbus.actors.runtime.process import Peer

UPCALL_BUDGET = 256  # events a turn: then the messages get a look
FLUSH_ROUNDS_MAX = 64  # 64 x 256 events: every port of the domain four times over
BYTE = b"\x01"


class CpuProcess(ProcessActor):
    """One virtual CPU of one domain."""

    def __init__(self, name: str, control: socket.socket, arguments: dict[str, Any], fds: dict[str, int]) -> None:
        super().__init__(name, control)
        self.domid: int = arguments["domain"]
        self.vcpu: int = arguments["vcpu"]
        self.memory = Memory(fds["domain"], Domain.BYTES)
        machine = Memory(fds["machine"], Machine.BYTES)
        check(self.memory, MAGIC_DOMAIN, f"the segment of domain {self.domid}")
        check(machine, MAGIC_MACHINE, "the machine's segment")
        self.path = EventPath(machine, {self.domid: self.memory})
        self.hypervisor: Peer = self.inbox.add_peer(socket.socket(fileno=fds["hypervisor"]), "hypervisor")
        self.doorbell = fds["doorbell"]
        self.hyperv = Memory(fds["hyperv"], hyperv.BYTES) if "hyperv" in fds else None
        if self.hyperv is not None:
            check(self.hyperv, hyperv.MAGIC, f"the Hyper-V segment of domain {self.domid}")
            self.path.set_hyperv(self.domid, self.hyperv, fds["work"])
            self.path.set_exit(self.domid, self.vcpu, fds["exit"])
        self.channels: dict[int, int] = {}
        self.doors: dict[int, socket.socket] = {}
        self.pages: dict[int, Memory] = {}
        self.doorbell_bitmap = bytearray(self.doorbell // 64 * 8 + 8)
        self.doorbell_bitmap[self.doorbell // 8] = 1 << self.doorbell % 8

    def on_ready(self) -> None:
        """Count the birth; upcalls begin with the hypervisor's Go, when every file is attached."""
        at = Domain.vcpu(self.vcpu, Vcpu.GENERATION)
        self.memory.store32(at, self.memory.load32(at) + 1)
        self.memory.store32(Domain.vcpu(self.vcpu, Vcpu.SLEEPING), 0)
        # Edge-triggered: every ring wakes us, and nobody has to read the counter back.
        self.inbox.add_fd(self.doorbell, select.EPOLLIN | select.EPOLLET, lambda _events: None)

    # ---- the event path

    def _serve(self, epoll: int, timeout_ms: int) -> None:
        """Take upcalls, ring the doors, spin, announce, sleep: natively, until a message comes."""
        self.path.serve_cpu(self.domid, self.vcpu, epoll, timeout_ms, self.doorbell_bitmap)

    def _take_upcall(self) -> bool:
        served = self.path.upcall(self.domid, self.vcpu, UPCALL_BUDGET)
        for slot in served[1] if served is not None else ():
            self._send_byte(slot)
        return served is not None

    def _send_byte(self, slot: int) -> None:
        door = self.doors.get(slot)
        if door is not None:
            with contextlib.suppress(BlockingIOError, BrokenPipeError):  # full of bytes, or the user has gone: both end well
                door.send(BYTE, socket.MSG_DONTWAIT | socket.MSG_NOSIGNAL)

    # ---- messages

    def on_message(self, received: Received) -> Message | None:
        """Answer the hypervisor."""
        message = received.message
        if received.peer is not self.hypervisor:
            return super().on_message(received)
        if isinstance(message, m.AttachFile):
            page_fd, door_fd = received.fds
            self._detach(message.slot)
            self.pages[message.slot] = Memory(page_fd, FilePage.BYTES)
            os.close(page_fd)
            self.path.attach_file(message.slot, self.pages[message.slot])
            self.doors[message.slot] = socket.socket(fileno=door_fd)
            self.path.set_door(message.slot, door_fd)
        elif isinstance(message, m.DetachFile):
            self._detach(message.slot)
        elif isinstance(message, vm.AttachDoor):
            self._detach_door(message.relid)
            self.channels[message.relid] = received.fds[0]
            self.path.set_channel_door(self.domid, message.relid, received.fds[0])
            os.eventfd_write(received.fds[0], 1)  # a forerunner may have taken its flag and not rung: a look too many is cheap
        elif isinstance(message, vm.DetachDoor):
            self._detach_door(message.relid)
        elif isinstance(message, m.Go):
            self._go()
        elif isinstance(message, m.FlushUpcalls):
            self._flush()
        else:
            return super().on_message(received)
        return Done()

    def _detach_door(self, relid: int) -> None:
        door = self.channels.pop(relid, None)
        if door is not None:
            self.path.set_channel_door(self.domid, relid, -1)
            os.close(door)

    def _detach(self, slot: int) -> None:
        page = self.pages.pop(slot, None)
        if page is not None:
            self.path.attach_file(slot, None)
            self.path.set_door(slot, -1)
            page.close()
            self.doors.pop(slot).close()

    def _go(self) -> None:
        """Finish what a dead forerunner held, look at every port, and wake whoever has something unread."""
        self.path.cpu_recover(self.domid, self.vcpu)
        if self.hyperv is not None:
            self.path.hv_recover(self.domid, self.vcpu)
        self.inbox.sleep_in(self._serve)
        self._flush()
        for slot, page in self.pages.items():
            prod, cons = page.load64(FilePage.PROD), page.load64(FilePage.CONS)
            if prod != cons or page.load32(FilePage.DOOR):
                page.store32(FilePage.DOOR, 1)
                self._send_byte(slot)

    def _flush(self) -> None:
        for _ in range(FLUSH_ROUNDS_MAX):
            if not self._take_upcall():
                return

    def on_hangup(self, peer: Peer) -> None:
        """End when the hypervisor has: the supervisor starts an heir of both, in order."""
        if peer is self.hypervisor:
            self.stop()
