# SPDX-License-Identifier: Apache-2.0
"""The hypervisor's view of the CPU processes: who is up, their doorbells, and waiting until one has delivered everything."""

from __future__ import annotations

import contextlib
import errno
import os
import socket
from typing import TYPE_CHECKING

from pvbus.actors.hypervisor import calls
from pvbus.actors.hypervisor.errors import HypercallError
from pvbus.actors.runtime import messages as m
from pvbus.actors.runtime.process import Peer, PeerGone
from pvbus.actors.runtime.wire import Failure, Message
from pvbus.shm.channel import cpu_is_idle
from pvbus.shm.hyperv import Vp
from pvbus.shm.memory import Memory, now_ns

if TYPE_CHECKING:
    from collections.abc import Callable, Generator, Iterator

    from pvbus.actors.hypervisor.ports import DomainState, EventChannels
    from pvbus.actors.runtime.inbox import Inbox
    from pvbus.actors.runtime.process import Received

SETTLE_ROUNDS_MAX = 10_000
FLUSH_DEADLINE_S = 10.0  # a CPU that is restarted meanwhile included


class Cpus:
    """Every virtual CPU of every domain. `flushed` is called when a flush has ended, with its error if it failed."""

    def __init__(self, inbox: Inbox, channels: EventChannels, flushed: Callable[[OSError | None], None]) -> None:
        self._inbox = inbox
        self._channels = channels
        self._flushed = flushed
        self._peers: dict[tuple[int, int], Peer] = {}
        self._doorbells: dict[tuple[int, int], int] = {}
        self._hyperv: dict[int, Memory] = {}  # segments of the domains on the Hyper-V platform
        self._flushing: set[tuple[int, int]] = set()
        self._deadline_ns = 0

    def of(self, domid: int) -> Iterator[tuple[int, Peer]]:
        """Give (vCPU, its process) of every CPU of a domain that is up."""
        return ((vcpu, peer) for (owner, vcpu), peer in tuple(self._peers.items()) if owner == domid)

    def watch(self, domid: int, segment: Memory) -> None:
        """A CPU of this domain is idle only if Hyper-V has no interrupt for it either."""
        self._hyperv[domid] = segment

    def up(self, message: m.CpuUp, received: Received) -> Peer:
        """Connect a CPU's process, first or reborn; nothing that its forerunner, or ours, left half done stays so."""
        key = (message.domain, message.vcpu)
        sock, doorbell = received.fds[:2]
        old = self._doorbells.pop(key, None)
        if old is not None:
            os.close(old)
        self._doorbells[key] = doorbell
        self._channels.path.set_doorbell(*key, doorbell)
        for vcpu in self._channels.path.fifo_rebuild(*key):  # it does not run yet, and we raise nothing meanwhile
            self.kick(message.domain, vcpu)
        return self._inbox.add_peer(socket.socket(fileno=sock), f"cpu/{message.domain}.{message.vcpu}")

    def go(self, key: tuple[int, int], peer: Peer, received: Received) -> None:
        """Let it take upcalls; it hears of files and flushes behind that: its socket keeps their order."""
        peer.ask(m.Go(), lambda reply, _fds: received.peer.reply(received.request, reply))
        self._peers[key] = peer
        if key in self._flushing:
            self._ask(key)

    def forget(self, peer: Peer) -> None:
        """It has died: whoever waits for it waits for its heir."""
        for key in [key for key, cpu in self._peers.items() if cpu is peer]:
            del self._peers[key]

    def kick(self, domid: int, vcpu: int) -> None:
        """Ring a doorbell."""
        doorbell = self._doorbells.get((domid, vcpu))
        if doorbell is not None:
            os.eventfd_write(doorbell, 1)

    def busy(self) -> list[int]:
        """Give the domains of which a CPU has something to deliver."""
        domains = self._channels.domains
        return [
            domid for domid, domain in domains.items()
            if not all(self.is_idle(domain, vcpu) for vcpu in range(domain.vcpus))
        ]  # fmt: skip

    # ---- flush

    def flush(self, domid: int) -> None:
        """Have every CPU of the domain deliver what is pending now."""
        self._deadline_ns = now_ns() + int(FLUSH_DEADLINE_S * 1e9)
        domain = self._channels.domains[domid]
        self._flushing = {(domid, vcpu) for vcpu in range(domain.vcpus) if not self.is_idle(domain, vcpu)}
        for key in tuple(self._flushing):
            self._ask(key)
        if not self._flushing:
            self._inbox.call_soon(lambda: self._flushed(None))

    def is_idle(self, domain: DomainState, vcpu: int) -> bool:
        """Nothing to deliver: no upcall or interrupt is pending, and it sleeps (it looks at those after announcing sleep)."""
        segment = self._hyperv.get(domain.domid)
        # Before the look at its sleep: a CPU that has taken a vector and not scheduled its tasklet yet is awake.
        if segment is not None and (
            any(segment.load64(Vp.at(vcpu, Vp.IRR) + 8 * word) for word in range(4)) or segment.load32(Vp.at(vcpu, Vp.TASKLETS))
        ):
            return False
        return cpu_is_idle(domain.memory, vcpu)

    def _ask(self, key: tuple[int, int]) -> None:
        peer = self._peers.get(key)
        if peer is not None:  # otherwise its heir is asked when it comes up
            with contextlib.suppress(PeerGone):
                peer.ask(m.FlushUpcalls(), lambda reply, _fds: self._answered(key, reply), FLUSH_DEADLINE_S)

    def _answered(self, key: tuple[int, int], reply: Message) -> None:
        if isinstance(reply, Failure):
            if now_ns() > self._deadline_ns and key in self._flushing:
                self._flushing.clear()
                self._flushed(HypercallError(errno.EIO, f"cpu/{key[0]}.{key[1]} does not answer"))
            return
        if key in self._flushing:
            self._flushing.discard(key)
            if not self._flushing:
                self._flushed(None)


def settle(look: Callable[[], bool], cpus: Cpus) -> Generator[calls.Wait, None, int]:
    """Wait until a round finds nothing to do: rings drained, every CPU asleep without an upcall; give the rounds before it."""
    for rounds in range(SETTLE_ROUNDS_MAX):
        done = look()
        busy = cpus.busy()
        for domid in busy:
            yield calls.Flush(domid)
        if not done and not busy:
            return rounds
    raise HypercallError(errno.ETIMEDOUT, "events keep coming")
