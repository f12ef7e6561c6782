# SPDX-License-Identifier: Apache-2.0
"""A guest and its VMBus host, connected: what the scenarios of offers and of teardown are made of.

    toolstack --offer, rescind--> host --messages, flags--> cpu --work items--> guest <--calls, time-- user, timer
                                  host <------hypercalls------------------------ guest

The host is Server, the guest is Guest with its connection, channels, bus and tasks; each is the production code in one context.
What lies between them, SynIC and the work ring, has scenarios of its own and is a mailbox here: no message is lost, none
overtakes. The answer to a hypercall takes another way than messages do, and may come before them or behind. A ring is a Memory
of the shadow heap: its device writes into it while it is mapped, and who touches it after the guest has freed it is found out.
"""

from __future__ import annotations

from collections.abc import Iterable
from functools import partial
from typing import TYPE_CHECKING, Any

from pvbus.actors.hypervisor.vmbus.channel import GONE_FOR_GUEST
from pvbus.actors.hypervisor.vmbus.server import Server
from pvbus.actors.workqueue import attributes, waits
from pvbus.actors.workqueue.channels import Channels
from pvbus.shm import hyperv
from pvbus.shm._core_explored import Memory
from pvbus.shm.hyperv import PAGE
from pvbus.verify.explorer.scenario import Scenario, Start
from pvbus.verify.scenarios.vmbus_sides import INSTANCES, RING_PAGES, GuestSide, HostSide, Ring

if TYPE_CHECKING:
    import uuid

    from pvbus.actors.workqueue.bus import Device
    from pvbus.verify.explorer.model import Model


class VmbusPair(Scenario):
    """`toolstack`, `user` and `seconds` say what is asked of the two, each in its order, at any moment.

    toolstack: `offer a`, `rescind a`, `tick` (every device writes), `again` (an heir of the host repeats its last message).
    users: of each, `open`, `close`, `read` (attributes), `register` (a driver of something else), `exit` (of the driver's
    module); a call begins when the one before has ended. seconds: the guest's clock moves on, once each. `opens`: the driver
    opens its channel when it is probed. `offered`: instances that are there from the beginning.
    """

    rings_max = 3

    def __init__(
        self, *, toolstack: tuple[str, ...] = (), users: tuple[tuple[str, ...], ...] = (), seconds: tuple[float, ...] = (),
        opens: bool = False, offered: str = "",
    ) -> None:  # fmt: skip
        self.toolstack, self.users, self.seconds, self.opens, self.offered = toolstack, users, seconds, opens, offered
        self.guest: GuestSide | None = None

    # ---- pages and contexts

    def prepare(self, model: Model, variants: int) -> None:
        """Make the guest's segment, the memory of its rings, and the ways of messages."""
        self.variants = variants
        self.hv: Any = Memory(model, hyperv.BYTES)
        model.name(self.hv, "hv")
        self.memories: list[Any] = []
        for number in range(self.rings_max):
            self.memories.append(Memory(model, RING_PAGES * PAGE))
            model.name(self.memories[number], f"ring{number}")
            model.allocate(self.memories[number])
        self.to_host, self.to_cpu, self.to_guest = (model.mailbox(f"to {name}") for name in ("host", "cpu", "guest"))
        self.to_users = [model.mailbox(f"to user{number}") for number in range(len(self.users))]

    def start(self, model: Model) -> Iterable[Start]:
        """Give all contexts; host and guest are connected, and the first offers have been made."""
        if self.guest is not None:
            self.guest.segment.is_over = True
        self.host = HostSide(self, model)
        self.guest = self.make_guest(model)
        for letter in self.offered:
            self.host.offer(letter)
        self.events: list[int] = []
        yield "host", self.host.run, True
        yield "cpu", partial(self._cpu, model), True
        yield "guest", partial(self.guest.run, self.host.early), True
        if self.toolstack:
            yield "toolstack", partial(self._ask_host, model), False
        for number in range(len(self.users)):
            yield f"user{number}", partial(self._ask_guest, model, number), False
        if self.seconds:
            yield "timer", partial(self._pass_time, model), False

    def _cpu(self, model: Model) -> None:
        """Take messages and flags to the guest; a flag is an event only where a doorbell is wired."""
        doors: set[int] = set()
        while True:
            what, value = model.receive(self.to_cpu, "cpu.take")
            if what == "wire":
                doors.add(value)
            elif what == "unwire":
                doors.discard(value)
            elif what == "flag":
                self.events += [value] if value in doors else []
            else:
                model.post(self.to_guest, (what, value), "work ring")

    def _ask_host(self, model: Model) -> None:
        for command in self.toolstack:
            model.post(self.to_host, (command.split()[0], *command.split()[1:]), "toolstack")

    def _ask_guest(self, model: Model, number: int) -> None:
        for command in self.users[number]:
            model.post(self.to_guest, ("call", number, command), "call")
            model.receive(self.to_users[number], "call.answer")

    def _pass_time(self, model: Model) -> None:
        for seconds in self.seconds:
            model.post(self.to_guest, ("time", seconds), "timer")

    # ---- what a bug may change

    def make_guest(self, model: Model) -> GuestSide:
        """Make the guest."""
        return GuestSide(self, model)

    def make_server(self, *arguments: Any) -> Server:
        """Make the host's protocol."""
        return Server(*arguments)

    def make_requests(self) -> waits.Requests:
        """Make the guest's list of questions."""
        return waits.Requests()

    def make_channels(self, *arguments: Any) -> Channels:
        """Make the guest's channels."""
        return Channels(*arguments)

    def read(self, guest: GuestSide, device: Device) -> None:
        """Read a device's attributes."""
        ring = device.channel.ring
        attributes.all_of(device, self.hv, ring.pages if ring is not None and isinstance(ring.pages, Ring) else None)

    # ---- what holds

    def broken(self, model: Model, stuck: list[str]) -> str | None:
        """The guest has what the host offers; nobody waits; no ring is lost, or freed and lent; the host has seen no offence."""
        host, guest = self.host, self.guest
        assert guest is not None
        offered = {c.relid: c.instance_id for c in host.server.offers if c.state not in GONE_FOR_GUEST}
        if wrong := self._last_words(offered):
            return wrong
        if not guest.vmbus.running:
            offered = {}
        listed = {channel.relid: channel.offer.instance_id for channel in guest.channels}
        if listed != offered:
            return f"the host offers {_letters(offered)}, the guest has {_letters(listed)}"
        devices = {device.channel.relid: device.channel.offer.instance_id for device in guest.bus.devices.values()}
        if devices != listed:
            return f"the guest has channels {_letters(listed)} and devices {_letters(devices)}"
        if guest.tasks.running or len(guest.requests):
            return f"{guest.tasks.running} functions of the guest wait, for {len(guest.requests)} answers that never come"
        lent = [entry.pages for channel in guest.channels for entry in channel.lent.values()]
        for number, ring in enumerate(guest.rings):
            if ring.freed == (ring in lent):
                return f"ring {number} is " + ("free, and lent to the host" if ring.freed else "lost: neither lent nor free")
        if host.server.last_violation:
            return f"the host has seen an offence: {host.server.last_violation}"
        return self.wrong(model)

    def _last_words(self, offered: dict[int, uuid.UUID]) -> str | None:
        wanted = set(self.offered)
        for what, *letter in (command.split() for command in self.toolstack):
            wanted = wanted | set(letter) if what == "offer" else wanted - set(letter)
        if {INSTANCES[letter] for letter in wanted} == set(offered.values()):
            return None
        return f"the toolstack has left {sorted(wanted)} offered, the host has {_letters(offered)}"

    def wrong(self, model: Model) -> str | None:
        """Say what else does not hold."""
        return None


def _letters(instances: dict[int, uuid.UUID]) -> str:
    names = {instance: letter for letter, instance in INSTANCES.items()}
    return "{" + ", ".join(f"{relid}: {names[instance]}" for relid, instance in sorted(instances.items())) + "}"
