# SPDX-License-Identifier: Apache-2.0
"""The hypervisor process: drains submission rings, executes calls one at a time, rings the doorbells.

Consumer of every submission ring, writer of all port state. Its own state besides the pages is what it was handed
(descriptors, connections); the supervisor hands them again to an heir.
"""

from __future__ import annotations

import contextlib
import errno
import functools
import os
import select
import socket
from typing import TYPE_CHECKING, Any, NamedTuple

from pvbus.actors.hypervisor import calls, kernel, records, recovery, together, toolstack
from pvbus.actors.hypervisor.cpus import Cpus, settle
from pvbus.actors.hypervisor.errors import HypercallError
from pvbus.actors.hypervisor.executor import Executor
from pvbus.actors.hypervisor.hosts import REQUESTS as HOST_REQUESTS
from pvbus.actors.hypervisor.hosts import Hosts
from pvbus.actors.hypervisor.irqs import IrqLayer
from pvbus.actors.hypervisor.ports import DomainState, EventChannels
from pvbus.actors.runtime import messages as m
from pvbus.actors.runtime import vmbus_messages as vm
from pvbus.actors.runtime.clock import SharedClock
from pvbus.actors.runtime.process import Peer, PeerGone, ProcessActor, Received
from pvbus.actors.runtime.wire import Done, Failure, Message
from pvbus.shm.layout import (
    MAGIC_DOMAIN,
    MAGIC_MACHINE,
    SUBMISSIONS_MAX,
    Domain,
    File,
    FilePage,
    Irq,
    Machine,
    PublicPage,
    Submission,
    SubmissionRing,
)
from pvbus.shm.memory import EventPath, Memory
from pvbus.shm.segment import check

if TYPE_CHECKING:
    from collections.abc import Callable, Generator

DRAIN_BUDGET = 256  # entries of one ring between two turns of a long call
BYTE = b"\x01"


class OpenFile(NamedTuple):
    """What the hypervisor keeps of an open file."""

    domain: int
    page: Memory
    door: socket.socket
    page_fd: int
    peer: Peer


class HypervisorProcess(ProcessActor):
    """The hypervisor as an actor in a process of its own."""

    def __init__(self, name: str, control: socket.socket, arguments: dict[str, Any], fds: dict[str, int]) -> None:
        super().__init__(name, control)
        self.machine = Memory(fds["machine"], Machine.BYTES)
        self.inbox.clock = SharedClock(self.machine, Machine.CLOCK_OFFSET_NS)
        self.public = Memory(fds["public"], PublicPage.BYTES)
        domains = {
            spec["id"]: DomainState(spec["id"], spec["cpus"], Memory(fds[f"domain{spec['id']}"], Domain.BYTES))
            for spec in arguments["domains"]
        }
        check(self.machine, MAGIC_MACHINE, "the machine's segment")
        for domid, state in domains.items():
            check(state.memory, MAGIC_DOMAIN, f"the segment of domain {domid}")
        self.path = EventPath(self.machine, {domid: domain.memory for domid, domain in domains.items()})
        limits = {spec["id"]: spec["ports_max"] for spec in arguments["domains"] if spec["ports_max"]}
        self.kernels = {spec["id"]: spec for spec in arguments["domains"]}  # what each domain's kernel takes when it boots
        self.channels = EventChannels(domains, self.path, self._kick, machine=self.machine, limits=limits)
        spread = {spec["id"]: spec["affinity"] == "spread" for spec in arguments["domains"]}
        self.irqs = IrqLayer(self.channels, spread=spread)
        self.files: dict[int, OpenFile] = {}
        self.slots: dict[Peer, int] = {}
        self.rings: dict[int, int] = {}  # submission index -> slot
        self.ring_kicks: dict[int, int] = {}
        self.cpus = Cpus(self.inbox, self.channels, self._flushed)
        self.hosts = Hosts(self.inbox, self.path, self.cpus, self._kick, self.machine)
        self.hosts.add_all({spec["id"]: spec["cpus"] for spec in arguments["domains"]}, fds)
        self.calls = Executor(self._take_turns, self._before_a_call, self.cpus.flush)
        self.doors = select.epoll()
        self.releasing: set[int] = set()
        self.unclaimed: dict[int, set[int]] = {}  # ports handed out to a file and not bound by it yet
        self.kick_bitmap = bytearray(8)  # which descriptors of the epoll set are doorbells

    def on_ready(self) -> None:
        """Count the birth; the next sleep is announced only behind a look at every ring."""
        born = self.machine.load32(Machine.HYPERVISOR_GENERATION)
        if born == 0:  # before it is counted: who dies in between has an heir that begins anew
            self.hosts.offer_defaults(self.kernels)
        self.machine.store32(Machine.HYPERVISOR_GENERATION, born + 1)
        # Even: awake. A new number, or users who rang the forerunner would not ring us.
        self.public.store32(PublicPage.HYPERVISOR_SLEEPING, (self.public.load32(PublicPage.HYPERVISOR_SLEEPING) | 1) + 1)
        if born > 0:
            recovery.repair(self.channels, self.irqs)
        else:
            self.hosts.first_boot()
        self.inbox.sleep_in(self._serve)
        self.inbox.add_fd(self.doors.fileno(), select.EPOLLIN, self._look_for_hangups)

    # ---- the event path

    def _serve(self, epoll: int, timeout_ms: int) -> None:
        """Drain, ring, spin, announce, sleep: natively, until a message comes."""
        self.path.serve_hypervisor(self.public, epoll, timeout_ms, self.kick_bitmap)

    def _effects(self, drained: tuple[int, list[int], list[int], list[int]]) -> None:
        _, kicks, rearm, poisoned = drained
        for code in kicks:
            self.cpus.kick(code >> 8, code & 0xFF)
        for slot in rearm:
            self._send_byte(slot)
        for slot in poisoned:
            if slot in self.files and self.path.poison(slot):
                self._send_byte(slot)

    def _kick(self, domid: int, vcpu: int) -> None:
        self.cpus.kick(domid, vcpu)

    def _flushed(self, error: OSError | None) -> None:
        self.calls.resume(error)

    def _send_byte(self, slot: int) -> None:
        file = self.files.get(slot)
        if file is not None:
            with contextlib.suppress(BlockingIOError, BrokenPipeError):  # full of bytes, or the user has gone: both end well
                file.door.send(BYTE, socket.MSG_DONTWAIT | socket.MSG_NOSIGNAL)

    # ---- messages

    def on_message(self, received: Received) -> Message | None:
        """Answer supervisor, files and CPUs."""
        message = received.message
        if received.peer is self.supervisor:
            return self._from_supervisor(received)
        if self.hosts.is_workqueue(received.peer):
            return self.hosts.on_message(received)
        slot = self.slots.get(received.peer)
        if slot is None:
            raise OSError(errno.EPERM, f"{received.peer.name} may not call the hypervisor")
        if isinstance(message, m.AttachSubmission):
            return self._attach_submission(slot, message, received.fds)
        if isinstance(message, m.Rejoined):
            self.doors.register(self.files[slot].door.fileno(), 0)
            return None
        if isinstance(message, m.Hypercalls):
            self._several(slot, message, received)
        else:
            self.calls.start(self._call_of(slot, received.peer, message), lambda reply: _reply(received, reply))
        return None

    def _several(self, slot: int, message: m.Hypercalls, received: Received) -> None:
        """Make calls of a file one after the other, up to the first that fails."""
        values: list[int] = []
        wanted = together.decode(message)

        def steps() -> Generator[calls.Wait, None, int]:
            for one in wanted:
                value = yield from self._call_of(slot, received.peer, one)
                values.append(value)
            return 0

        def answer(reply: Message) -> None:
            failed = reply if isinstance(reply, Failure) else Failure(errno=0)
            _reply(received, m.Values(values=values, errno=failed.errno, text=failed.text))

        self.calls.start(steps(), answer)

    def _from_supervisor(self, received: Received) -> Message | None:
        message = received.message
        if isinstance(message, m.CpuUp):
            self._cpu_up(message, received)
        elif isinstance(message, m.FileUp):
            self._file_up(message, received)
        elif isinstance(message, vm.WorkqueueUp):
            return self.hosts.workqueue_up(message, received)
        elif isinstance(message, HOST_REQUESTS):
            return self.hosts.execute(message, received)
        elif isinstance(message, m.FilesKnown):
            self.calls.start(self._files_known(), lambda reply: _reply(received, reply))
        elif isinstance(message, m.Settle):
            self.calls.start(settle(self._look, self.cpus), lambda reply: _reply(received, reply))
        elif isinstance(message, toolstack.REQUESTS):
            self._from_toolstack(message, received)
        elif isinstance(message, m.SoftReset):
            self.calls.start(self._soft_reset(message.domain), lambda reply: _reply(received, reply))
        elif isinstance(message, m.Advance):
            return Done()  # that we are awake is all: late EOIs whose time has come are looked for before the next sleep
        else:
            return super().on_message(received)
        return None

    def _from_toolstack(self, message: Message, received: Received) -> None:
        answers: list[Message] = []

        def steps() -> Generator[calls.Wait, None, int]:
            yield from ()
            answers.append(toolstack.execute(self.channels, self.irqs, message))
            return 0

        self.calls.start(steps(), lambda reply: _reply(received, answers[0] if answers else reply))

    def _soft_reset(self, domid: int) -> Generator[calls.Wait, None, int]:
        """The old kernel's files go with it; Xen closes what is left; the new kernel boots as the first one did."""
        if domid not in self.channels.domains:
            raise HypercallError(errno.ESRCH, f"no domain {domid}")
        for slot, file in tuple(self.files.items()):
            if file.domain == domid:
                yield from self._release(slot, file)
        yield calls.Flush(domid)
        self.channels.reset(domid, domid)
        self.irqs.forget(domid)
        spec = self.kernels[domid]
        kernel.boot(self.channels, domid, **{key: spec[key] for key in ("abi", "kernel_ports", "kernel_virqs")})
        return 0

    def _call_of(self, slot: int, caller: Peer, message: Message) -> Generator[calls.Wait, None, int]:
        """Find the steps of a file's call; they run once its turn comes, if the file still is there then."""
        domid = self.files[slot].domain
        irqs = self.irqs
        if isinstance(message, m.UnbindIrq):
            return calls.unbind_irq(irqs, domid, slot, message.port)
        if isinstance(message, m.ClosePort):
            return calls.close_port(irqs, domid, slot, message.port)
        if isinstance(message, m.Barrier):
            return calls.barrier(domid)
        if isinstance(message, m.ReleaseFile):
            return self._release(slot, self.files[slot])

        def run() -> Generator[calls.Wait, None, int]:
            yield from ()
            if self.slots.get(caller) != slot:
                raise HypercallError(errno.EPERM, "the file was released meanwhile")
            if isinstance(message, m.DetachSubmission):
                return self._detach_submission(slot, message.index)
            return calls.at_once(irqs, domid, slot, message, self.unclaimed.setdefault(slot, set()))

        return run()

    # ---- calls, one at a time

    def _before_a_call(self) -> None:
        """A call sees every notify that had returned, and every last reference that had gone, when it was made."""
        self._drain_all()
        self._look_for_hangups()

    def _drain_all(self) -> bool:
        drained = self.path.drain(2**31)
        if drained is not None:
            self._effects(drained)
        return drained is not None

    def _look(self) -> bool:
        """Do what there is to do; whether there was any."""
        done = self._drain_all()
        self.hosts.look()
        return done

    def _take_turns(self, resume: Callable[[], None]) -> None:
        """A call goes on after a look at the messages; the events of all others do not wait for its end."""
        drained = self.path.drain(DRAIN_BUDGET)
        if drained is not None:
            self._effects(drained)
        self.inbox.call_soon(resume)

    # ---- CPUs

    def _cpu_up(self, message: m.CpuUp, received: Received) -> None:
        peer = self.cpus.up(message, received)
        for slot, file in self.files.items():
            if file.domain == message.domain:
                self._attach_to(peer, slot, file, lambda _reply, _fds: None)
        if message.domain in self.hosts:
            self.hosts.cpu_up(message.domain, message.vcpu, peer, received.fds[2])
        self.cpus.go((message.domain, message.vcpu), peer, received)

    def _attach_to(self, peer: Peer, slot: int, file: OpenFile, then: Callable[[Message, list[int]], None]) -> None:
        peer.ask(m.AttachFile(slot=slot), then, fds=(file.page_fd, file.door.fileno()))

    # ---- open files

    def _file_up(self, message: m.FileUp, received: Received) -> None:
        def steps() -> Generator[calls.Wait, None, int]:
            if message.slot in self.files:  # its last file, whose end was not noticed yet
                yield from self._release(message.slot, self.files[message.slot])
            self._connect_file(message, received)
            return 0

        self.calls.start(steps(), lambda reply: _reply(received, reply) if isinstance(reply, Failure) else None)

    def _connect_file(self, message: m.FileUp, received: Received) -> None:
        sock, page_fd, door_fd = received.fds
        slot = message.slot
        page = Memory(page_fd, FilePage.BYTES)
        peer = self.inbox.add_peer(socket.socket(fileno=sock), f"file/{message.domain}.{slot}")
        file = OpenFile(message.domain, page, socket.socket(fileno=door_fd), page_fd, peer)
        if not message.reborn:
            records.format_file(self.machine, slot, message.domain)
        self.files[slot] = file
        self.slots[peer] = slot
        self.path.attach_file(slot, page)
        self.path.set_door(slot, door_fd)
        if not message.reborn:  # a reborn file's users are looked for once its submission rings are back (Rejoined)
            self.doors.register(door_fd, 0)
        waiting = dict(self.cpus.of(message.domain))

        failed: list[Failure] = []

        def attached(vcpu: int, reply: Message, _fds: list[int]) -> None:
            waiting.pop(vcpu, None)
            if isinstance(reply, Failure) and reply.errno != errno.EPIPE:  # EPIPE: it died; its heir learns of the file
                failed.append(reply)
            if not waiting:
                received.peer.reply(received.request, failed[0] if failed else Done())

        for vcpu, cpu in tuple(waiting.items()):
            self._attach_to(cpu, slot, file, functools.partial(attached, vcpu))
        if not waiting:
            received.peer.reply(received.request, Done())

    def _attach_submission(self, slot: int, message: m.AttachSubmission, fds: list[int]) -> Message:
        ring_fd, kick = fds
        index = message.index
        if index < 0:
            index = next((i for i in range(SUBMISSIONS_MAX) if self._ring_is_free(i)), -1)
            if index < 0:
                raise OSError(errno.EMFILE, f"all {SUBMISSIONS_MAX} submission rings are taken")
            records.format_submission(self.machine, index, slot, message.pid)
        self.path.attach_submission(index, Memory(ring_fd, SubmissionRing.BYTES), slot)
        os.close(ring_fd)
        self.rings[index] = slot
        self.ring_kicks[index] = kick
        # Edge-triggered: every write of the user wakes us, and nobody has to read the counter back.
        self.inbox.add_fd(kick, select.EPOLLIN | select.EPOLLET, lambda _events: None)
        self._mark_doorbell(kick, present=True)
        return Done(value=index)

    def _mark_doorbell(self, fd: int, *, present: bool) -> None:
        while fd // 8 >= len(self.kick_bitmap):
            self.kick_bitmap.extend(bytes(8))
        bit = 1 << fd % 8
        self.kick_bitmap[fd // 8] = self.kick_bitmap[fd // 8] & ~bit | (bit if present else 0)

    def _ring_is_free(self, index: int) -> bool:
        # The record, too: after a rebirth its file may not have come back with it yet.
        return index not in self.rings and self.machine.load32(Machine.submission(index, Submission.STATE)) == Submission.FREE

    def _detach_submission(self, slot: int, index: int) -> int:
        if self.rings.get(index) != slot:
            raise HypercallError(errno.EINVAL, f"submission ring {index} is not this file's")
        self.path.attach_submission(index, None)
        self.machine.store32(Machine.submission(index, Submission.STATE), Submission.FREE)
        del self.rings[index]
        kick = self.ring_kicks.pop(index)
        self.inbox.remove_fd(kick)
        self._mark_doorbell(kick, present=False)
        os.close(kick)
        return 0

    # ---- the end of a file

    def _look_for_hangups(self, _events: int = 0) -> None:
        """Find files whose last reference has gone; their release comes before any other call that waits."""
        for fd, _ in self.doors.poll(0):
            slot = next((slot for slot, file in self.files.items() if file.door.fileno() == fd), None)
            if slot is None or slot in self.releasing:
                continue  # a release that this loop has started has found it, too
            self.doors.unregister(fd)
            self._begin_release(slot)
            self.calls.start_first(self._release(slot, self.files[slot]))

    def on_hangup(self, peer: Peer) -> None:
        """A dead CPU is waited for; a dead file process is released on its behalf."""
        self.cpus.forget(peer)
        self.hosts.forget(peer)
        slot = self.slots.get(peer)
        if slot is not None and slot not in self.releasing:
            self._begin_release(slot)
            self.calls.start(self._release(slot, self.files[slot]))

    def _begin_release(self, slot: int) -> None:
        self.releasing.add(slot)
        # At once, not when its turn comes: a producer that waits for the lock of the file's dead process gives up at this
        # word, and the call that runs may be waiting for that producer.
        self.machine.store32_release(Machine.file(slot, File.STATE), File.CLOSING)
        self.files[slot].page.store32(FilePage.RELEASED, 1)  # whoever still holds a dead file hears it from notify and write

    def _files_known(self) -> Generator[calls.Wait, None, int]:
        """An heir: files that died together with the forerunner left their ports behind. Behind every FileUp in the queue."""
        yield from ()
        for slot, domid in records.abandoned_files(self.machine, self.files):
            self.calls.start(self._release_abandoned(slot, domid))
        records.free_abandoned_rings(self.machine, self.rings, self.files)
        return 0

    def _release_abandoned(self, slot: int, domid: int) -> Generator[calls.Wait, None, int]:
        closed = yield from calls.release(self.irqs, domid, slot)
        # Only now: an heir of ours that finds it closing goes on with it.
        self.machine.store32_release(Machine.file(slot, File.STATE), File.DEAD)
        return closed

    def _release(self, slot: int, file: OpenFile) -> Generator[calls.Wait, None, int]:
        """Mirror evtchn_release of this very file: its slot may have gone to another one meanwhile."""
        if self.files.get(slot) is not file:
            return 0
        self._begin_release(slot)
        closed = yield from calls.release(self.irqs, file.domain, slot)
        for port in self.unclaimed.pop(slot, ()):
            if not self.irqs.word(file.domain, port) & (Irq.SLOT | Irq.LOST):
                with contextlib.suppress(HypercallError):  # closed already
                    self.channels.close(file.domain, port)
        self.machine.store32_release(Machine.file(slot, File.STATE), File.DEAD)
        for index in [index for index, owner in self.rings.items() if owner == slot]:
            self._detach_submission(slot, index)
        records.free_rings_of(self.machine, slot)
        self.path.attach_file(slot, None)
        self.path.set_door(slot, -1)
        for _, cpu in self.cpus.of(file.domain):
            with contextlib.suppress(PeerGone):
                cpu.tell(m.DetachFile(slot=slot))
        with contextlib.suppress(FileNotFoundError):
            self.doors.unregister(file.door.fileno())
        del self.files[slot]
        file.door.close()
        os.close(file.page_fd)
        file.page.close()
        self.slots.pop(file.peer, None)
        self.releasing.discard(slot)
        with contextlib.suppress(PeerGone):
            file.peer.tell(m.Released())
        return closed


def _reply(received: Received, reply: Message) -> None:
    with contextlib.suppress(PeerGone):  # the caller died meanwhile: its release is on the way
        received.peer.reply(received.request, reply)
