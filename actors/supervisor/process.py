# SPDX-License-Identifier: Apache-2.0
"""The supervisor's process: boots a machine and keeps it.

It creates and unlinks every segment, keeps descriptors and doorbells for heirs, starts children left to right (hypervisor,
CPUs, then open files as they come), restarts what dies, stops right to left. It answers attached users on the machine's
socket; on the path of an event it is not.
"""

from __future__ import annotations

import contextlib
import errno
import os
import secrets
import signal
import socket
import sys
from typing import TYPE_CHECKING, Any

from pvbus.actors.runtime import messages as m
from pvbus.actors.runtime import rundir
from pvbus.actors.runtime import vmbus_messages as vm
from pvbus.actors.runtime.clock import SharedClock
from pvbus.actors.runtime.forkserver import ChildExited, ForkServer, Spawned
from pvbus.actors.runtime.process import Peer, PeerGone, ProcessActor, Received, Start, Started, failure_of
from pvbus.actors.runtime.supervision import Child, ChildSpec, ChildTable, State, Verdict
from pvbus.actors.runtime.wire import Done, Failure, Message
from pvbus.actors.supervisor import limits
from pvbus.actors.supervisor.heirs import Heirs
from pvbus.actors.supervisor.opening import Crowd, OpenFile, Opening, forget, hand_on, ignore, reopen
from pvbus.actors.supervisor.pool import FILE_ENTRY, Pool
from pvbus.actors.supervisor.settling import Settling
from pvbus.actors.supervisor.status import inspect, inspect_file, status_of
from pvbus.actors.supervisor.stopping import stop_next
from pvbus.actors.supervisor.workqueues import Workqueues, on_hyperv
from pvbus.shm.layout import FILES_MAX, Machine, PublicPage
from pvbus.shm.pages import MachinePages

if TYPE_CHECKING:
    from collections.abc import Callable

    from pvbus.actors.runtime.config import MachineConfig

    GiveToKernels = Callable[[MachineConfig, MachinePages], None]

PRELOAD = (
    "pvbus.actors.hypervisor.process",
    "pvbus.actors.cpu.process",
    "pvbus.actors.file.process",
    "pvbus.actors.workqueue.process",
    "setproctitle",
)
CALL_DEADLINE_S = 20.0
EXIT_BROKEN = 1
CLOCK_OFFSET_NS_MAX = 1 << 62  # 146 years: times are 64 bits, and have others added to them
FORWARDED = (  # to the hypervisor, or its heir
    m.RaiseVirq, m.EventChannelOp, m.SetVirqHandler, m.SetAffinity, m.SoftReset,
    vm.Offer, vm.RescindOffer, vm.ListChannels, vm.HostShutdown,
)  # fmt: skip


class Supervisor(ProcessActor):
    """Boots, keeps and stops one machine."""

    def __init__(self, config: MachineConfig, give_to_kernels: GiveToKernels, ready: Callable[[], None]) -> None:
        self.give_to_kernels = give_to_kernels
        self.run_id = secrets.token_hex(6)
        self.directory = rundir.create(config.name, self.run_id)
        domains = {domain.id: domain.cpus for domain in config.domain}
        hyperv = [domain.id for domain in on_hyperv(config.domain)]
        self.pages = MachinePages(self.run_id, domains, config.variant_bits(), hyperv)
        clock = SharedClock(self.pages.machine, Machine.CLOCK_OFFSET_NS)
        ours, self._own_end = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        super().__init__("supervisor", ours, clock)
        self.config = config
        self.announce_ready = ready
        self.listener: socket.socket | None = None
        self.doorbells = {
            (domain.id, vcpu): os.eventfd(0, os.EFD_NONBLOCK | os.EFD_CLOEXEC)
            for domain in config.domain
            for vcpu in range(domain.cpus)
        }
        self.table = ChildTable([ChildSpec("hypervisor", "pvbus.actors.hypervisor.process:HypervisorProcess")])
        for domid, vcpu in self.doorbells:
            self.table.add(ChildSpec(f"cpu/{domid}.{vcpu}", "pvbus.actors.cpu.process:CpuProcess"))
        self.workqueues = Workqueues(self)
        for spec in self.workqueues.specs():
            self.table.add(spec)
        self.controls: dict[str, Peer] = {}
        self.files: dict[str, OpenFile] = {}
        self.free_slots = list(range(FILES_MAX - 1, -1, -1))
        self.openings: dict[str, Opening] = {}
        self.pool = Pool(self)
        self.crowd = Crowd(self)
        self.heirs = Heirs(self)
        self.stopping = False
        self.booted = False
        self.output: int | None = None  # where children write what they have to say; None: where we do

    # ---- boot

    def on_ready(self) -> None:
        """Give each domain's kernel its ports, then start the fork server and with it everything else."""
        self.give_to_kernels(self.config, self.pages)
        os.environ["PVBUS_RUN_ID"] = self.run_id
        self.forkserver = ForkServer(self.inbox, self.output)
        self.forkserver.preload(
            PRELOAD, self._preloaded, directories=[str(self.directory)], shm_prefix=f"pvbus-{self.run_id}"
        )

    def _preloaded(self, reply: Message, _fds: list[int]) -> None:
        if isinstance(reply, Failure):
            self._give_up(f"the fork server cannot start: {_reason(reply)}")
        else:
            self._start_next()

    def _start_next(self) -> None:
        if self.stopping:
            return
        child = self.table.next_to_start()
        if child is not None:
            self._spawn(child)
        elif not self.booted and all(child.state is State.UP for child in self.table):
            self._open_for_users()

    def _open_for_users(self) -> None:
        """Register the devices, then say that we are ready; a domain without Xen has none, and says nothing (A10.7)."""
        self.booted = True
        try:
            self.listener = rundir.bind_machine(self.directory)
        except OSError as error:
            self._log(f"cannot register the event-channel device: {error.strerror}")
            self._give_up(f"{self.directory} takes no socket: {error.strerror}")
            return
        for domain in self.config.domain:
            if "xen" in domain.platforms:
                self._log(f"event-channel device installed in domain {domain.id}")
        self.inbox.add_listener(self.listener, self._accept)
        self.pages.public.store32(PublicPage.MACHINE_STATE, PublicPage.READY)
        try:
            self.announce_ready()
        except OSError as error:
            self._give_up(f"cannot say that it is ready: {error.strerror}")
        self.pool.refill_later()

    def _log(self, text: str) -> None:
        """Say what the driver would, where children say theirs: a line with the driver's prefix (A10.9)."""
        with contextlib.suppress(OSError):  # nobody listens there: no reason for a machine not to run
            os.write(2 if self.output is None else self.output, f"xen:evtchn: {text}\n".encode())

    # ---- children

    def _spawn(self, child: Child) -> None:
        name = child.spec.name
        ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        self.table.starting(name)
        self.controls[name] = self.inbox.add_peer(ours, name)

        def spawned(reply: Message, _fds: list[int]) -> None:
            if isinstance(reply, Spawned):
                self.table.forked(name, reply.pid)
                if not self.stopping:
                    self._send_start(child)
                return
            self.not_forked(name)
            if name in self.files:  # only this open fails, if it has not yet
                if name in self.openings:
                    self.openings[name].fail(reply)
                self._forget_file(name)
            else:
                self._give_up(f"{name} cannot be forked: {_reason(reply)}")

        self.forkserver.spawn(name, theirs, spawned)
        theirs.close()

    def not_forked(self, name: str) -> None:
        """Forget a child that there is not, or not in time: it finds its connection closed, and its exit means nothing here."""
        self.controls.pop(name).close()
        self.table.not_forked(name)
        if self.stopping:
            stop_next(self)

    def _send_start(self, child: Child) -> None:
        name = child.spec.name
        role, _, place = name.partition("/")
        if role == "hypervisor":
            domains = [domain.as_arguments() for domain in self.config.domain]
            self.ask_start(child, {"domains": domains}, self.pages.fds(), self._hypervisor_started)
        elif role == "workqueue":
            self.workqueues.start(child, int(place))
        elif role == "cpu":
            domid, vcpu = (int(part) for part in place.split("."))
            theirs, hypervisors = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
            fds = {
                "machine": self.pages.fds()["machine"],
                "domain": self.pages.fds()[f"domain{domid}"],
                "hypervisor": theirs.fileno(),
                "doorbell": self.doorbells[domid, vcpu],
                **self.workqueues.cpu_fds(domid, vcpu),
            }
            then = lambda: self._cpu_started(name, domid, vcpu, hypervisors)  # noqa: E731
            self.ask_start(child, {"domain": domid, "vcpu": vcpu}, fds, then)
            theirs.close()
        else:
            opening = self.openings.get(name)
            if opening is None:  # the open has failed meanwhile
                self.forkserver.kill(child.pid, signal.SIGKILL)
            else:
                opening.start(self.pages.fds()["machine"])

    def ask_start(
        self, child: Child, arguments: dict[str, Any], fds: dict[str, int], then: Callable[[], None],
        refused: Callable[[Message], None] | None = None,
    ) -> None:  # fmt: skip
        """Tell a forked child what it is; `then` runs when it is up, and `refused` if it says that it cannot.

        Neither does anything for a machine that stops meanwhile.
        """
        name = child.spec.name

        def started(reply: Message, _fds: list[int]) -> None:
            if self.stopping:
                return
            if isinstance(reply, Started):
                then()
            elif refused is not None:
                refused(reply)
            elif getattr(reply, "errno", 0) != errno.EPIPE:  # EPIPE: its exit is reported, too
                self._give_up(f"{name} does not start: {_reason(reply)}")

        start = Start(name=name, entry=child.spec.entry, arguments=arguments, fds=list(fds))
        self.controls[name].ask(start, started, child.spec.start_deadline_s, fds=tuple(fds.values()))

    def started(self, name: str) -> None:
        """Go on with the next child: this one is up."""
        self.table.started(name)
        self._start_next()

    def _hypervisor_started(self) -> None:
        self.table.started("hypervisor")
        hypervisor = self.controls["hypervisor"]
        for file in self.files.values():  # an heir: hand it what lives
            if file.name in self.controls:
                hand_on(self, file, hypervisor)
        hypervisor.ask(m.FilesKnown(), ignore, CALL_DEADLINE_S)
        self.workqueues.rewire(hypervisor)
        self.heirs.is_up()
        self._start_next()

    def _cpu_started(self, name: str, domid: int, vcpu: int, hypervisors: socket.socket) -> None:
        def connected(reply: Message, _fds: list[int]) -> None:
            if isinstance(reply, Done):
                self.started(name)

        hypervisor = self.hypervisor()
        if hypervisor is None:  # it died meanwhile: this CPU is started again behind its heir
            hypervisors.close()
            self.forkserver.kill(self.table[name].pid, signal.SIGKILL)
            return
        doorbell = self.doorbells[domid, vcpu]
        up = m.CpuUp(domain=domid, vcpu=vcpu)
        fds = (hypervisors.fileno(), doorbell, *self.workqueues.exit_fds(domid, vcpu))
        hypervisor.ask(up, connected, CALL_DEADLINE_S, fds=fds)
        hypervisors.close()

    def _child_exited(self, exited: ChildExited) -> None:
        child = self.table.by_pid(exited.pid)  # not by the name that it was forked under: it may be another one by now
        if child is None:
            return
        name, was_spare = child.spec.name, child.state is State.SPARE
        control = self.controls.pop(name)
        verdict = self.table.exited(name, self.inbox.clock.now_ns())
        control.fail_all(errno.EPIPE)  # now, not when its end is read: an answer that comes late would be taken for its heir's
        control.close()
        if name in self.files:
            self._forget_file(name)
            if name in self.openings:
                self.openings[name].lost()
        self.crowd.look()
        if was_spare:
            self.pool.died(name)
        else:
            self.pool.refill_later()  # if it had no room for that before
        if self.stopping:
            stop_next(self)
        elif verdict is Verdict.GIVE_UP:
            self._give_up(f"{name} died too often (last status {exited.status})")
        elif verdict is Verdict.RESTART:
            self._start_next()

    # ---- users

    def _accept(self, sock: socket.socket) -> None:
        try:
            rundir.check_peer_uid(sock)
            limits.check_reserve(limits.RESERVE_FOR_USERS, sock.fileno())
        except PermissionError:
            sock.close()
            return
        except OSError as error:  # the connection's first caller reads this, whatever it asked for
            user = self.inbox.add_peer(sock, "user")
            with contextlib.suppress(PeerGone):
                user.tell(Failure(errno=errno.EMFILE, text=error.strerror or ""))
            user.close()
            return
        self.inbox.add_peer(sock, "user")

    def on_message(self, received: Received) -> Message | None:
        """Answer the fork server and attached users."""
        message = received.message
        if received.peer is self.forkserver.peer:
            if isinstance(message, ChildExited):
                self._child_exited(message)
            return None
        answers: dict[type[Message], Callable[[Any, Received], Message | None]] = {
            m.Hello: lambda _m, _r: m.Welcome(name=self.config.name, run_id=self.run_id),
            m.OpenEvtchn: self._open_evtchn,
            m.Reopen: lambda _m, received: reopen(self, received),
            m.Status: lambda _m, _r: m.Report(data=status_of(self)),
            m.Inspect: lambda _m, received: inspect(self, received),
            m.InspectFile: lambda message, received: inspect_file(self, message, received),
            m.Settle: lambda message, received: Settling(self, message, received).begin(),
            **dict.fromkeys(FORWARDED, self.heirs.forward),
            vm.ConnectBus: self.workqueues.connect,
            m.Advance: self._advance,
            m.Shutdown: self._shut_down,
        }
        answer = answers.get(type(message))
        if answer is None or received.peer in self.controls.values():
            return super().on_message(received)
        return answer(message, received)

    def hypervisor(self) -> Peer | None:
        """The hypervisor, while it is up."""
        return self.controls.get("hypervisor") if self.table["hypervisor"].state is State.UP else None

    def _advance(self, message: m.Advance, received: Received) -> None:
        if message.ns < 0:
            raise OSError(errno.EINVAL, f"the clock cannot go back ({message.ns} ns)")
        offset_ns = self.pages.machine.load64(Machine.CLOCK_OFFSET_NS) + message.ns
        if offset_ns > CLOCK_OFFSET_NS_MAX:
            raise OSError(errno.EINVAL, f"the clock ends before that ({message.ns} ns)")
        self.pages.machine.store64(Machine.CLOCK_OFFSET_NS, offset_ns)
        self.workqueues.clock_moved()
        self.heirs.forward(message, received)  # it may sleep until the time that has come by this

    def _shut_down(self, _message: Message, _received: Received) -> Message:
        self.inbox.call_soon(self.begin_stop)
        return Done()

    # ---- open files

    def _open_evtchn(self, message: m.OpenEvtchn, received: Received) -> None:
        try:
            self.open_evtchn(message, received)
        except OSError as error:
            if not self.crowd.takes(message, received, error):
                raise

    def open_evtchn(self, message: m.OpenEvtchn, received: Received, *, warm: bool = True) -> None:
        """Open a file: with a process of the pool if there is one and `warm`, or with a fork. Replies later."""
        domain = next((domain for domain in self.config.domain if domain.id == message.domain), None)
        if domain is None or "xen" not in domain.platforms:
            raise OSError(errno.ENODEV, f"domain {message.domain} is no Xen domain")
        if self.stopping:
            raise OSError(errno.ESHUTDOWN, "the machine is stopping")
        if not self.free_slots:
            raise OSError(errno.EMFILE, f"{FILES_MAX} files are open")
        hypervisor = self.hypervisor()
        if hypervisor is None:
            self.heirs.wait(lambda: self.open_again(message, received))
            return
        opening = Opening(self, self.free_slots[-1], message, received)
        self.free_slots.pop()  # not before: an EMFILE up to here must not cost a slot
        name = opening.file.name
        self.files[name], self.openings[name] = opening.file, opening
        spec = ChildSpec(name, FILE_ENTRY, "temporary")
        spare = self.pool.take(spec) if warm else None
        opening.child = spare or self.table.add(spec)
        opening.tell_hypervisor(hypervisor)
        if spare is None:
            self._spawn(opening.child)
        else:
            opening.warm = True
            opening.start(self.pages.fds()["machine"])

    def open_again(self, message: m.OpenEvtchn, received: Received) -> None:
        """Open with a fork, and answer what goes wrong: nobody above us does."""
        try:
            self.open_evtchn(message, received, warm=False)
        except OSError as error:
            if not self.crowd.takes(message, received, error):
                received.peer.reply(received.request, failure_of(error))

    def _forget_file(self, name: str) -> None:
        file = self.files.pop(name)
        forget(file)
        self.free_slots.append(file.slot)

    # ---- the end

    def on_hangup(self, peer: Peer) -> None:
        """Without its fork server a machine cannot keep what it promises."""
        if peer is not self.forkserver.peer:
            return
        for child in self.table:  # the kernel has killed them with it, and nobody reports that any more
            child.state, child.pid = State.DOWN, 0
        if self.stopping:
            self.stop()
        else:
            self._give_up("the fork server died")

    def _give_up(self, why: str) -> None:
        if not self.stopping:
            print(f"pvbus: {why}", file=sys.stderr, flush=True)
            self.exit_code = EXIT_BROKEN
            self.begin_stop()

    def begin_stop(self) -> None:
        """Stop the children right to left, then ourselves."""
        if self.stopping:
            return
        self.stopping = True
        self.pages.public.store32(PublicPage.MACHINE_STATE, PublicPage.STOPPING)
        if self.listener is not None:
            self.inbox.remove_fd(self.listener.fileno())
            self.listener.close()
        stop_next(self)

    def clean_up(self) -> None:
        """Leave nothing behind: processes, segments, run directory."""
        self.pages.close()
        if hasattr(self, "forkserver"):
            self.forkserver.close()
        rundir.remove(self.config.name)

    def run(self) -> int:
        """Run until stopped; SIGINT and SIGTERM stop in order."""
        for number in (signal.SIGINT, signal.SIGTERM):
            signal.signal(number, lambda *_: self.inbox.call_soon(self.begin_stop))
        self.inbox.wake_on_signals()
        try:
            self._start_actor_loop()
        finally:
            self.clean_up()
        return self.exit_code


def _reason(reply: Message) -> str:
    return reply.text or os.strerror(reply.errno) if isinstance(reply, Failure) else str(reply)
