# SPDX-License-Identifier: Apache-2.0
"""Every sequence of what guest and host can do to a channel: nothing is freed twice, nobody waits for ever.

The guest's side is `Ledger`: it knows what a guest knows, from the messages alone.
"""
# Checklist: H12, X13 (host side); zoo 10, 14, 15, 25, 27

import itertools
import random
from collections.abc import Iterator

import pytest

from pvbus.actors.hypervisor.vmbus import snapshot
from pvbus.actors.hypervisor.vmbus.channel import State
from pvbus.actors.hypervisor.vmbus.connection import ConnectionState
from pvbus.actors.hypervisor.vmbus.gpadl import GpadlState
from pvbus.actors.runtime import vmbus_wire as wire
from pvbus.actors.runtime.vmbus_facts import STATUS_SUCCESS, V0_13, V5_3, Version
from pvbus.actors.runtime.vmbus_gpadl import gpadl_messages
from pvbus.tests.hypervisor.vmbus.rig import CHANNEL_FRAME, ECHO, INSTANCE, RING_GPADL, PacedDevice, Pages, Rig

OPERATIONS = ("open", "close", "rescind", "offer", "gpadl", "teardown", "release", "initiate", "unload")
LENGTH_MAX = 5
LONG_GPADL = 0xE1E20
(PAGES,) = gpadl_messages(1, RING_GPADL, 16 * 4096, range(CHANNEL_FRAME, CHANNEL_FRAME + 16))
HALF, REST = gpadl_messages(1, LONG_GPADL, 28 * 4096, range(CHANNEL_FRAME, CHANNEL_FRAME + 28))


@pytest.fixture(scope="module")
def pages() -> Iterator[Pages]:
    pages = Pages()
    yield pages
    pages.close()


class Broken(AssertionError):
    """An invariant of the protocol does not hold."""


class Ledger:
    """What the guest knows: relids that it holds, what it waits for, which pages the host has."""

    def __init__(self) -> None:
        self.held: set[int] = set()
        self.rescinded: set[int] = set()
        self.waiting: list[tuple[int, int]] = []        # opens: relid, open id
        self.pages_asked: list[tuple[int, int]] = []
        self.pages_given: dict[int, int] = {}           # gpadl: relid
        self.answered_opens = 0

    def forget(self) -> None:
        """The connection is over."""
        self.held.clear()
        self.rescinded.clear()
        self.waiting.clear()
        self.pages_asked.clear()
        self.pages_given.clear()

    def expect(self, holds: bool, what: str) -> None:
        """Raise if an invariant does not hold."""
        if not holds:
            raise Broken(what)

    def hear(self, message: wire.ChannelMessage) -> None:
        """Take a message of the host."""
        match message:
            case wire.OfferChannel(relid=relid):
                self.expect(relid not in self.held and relid != 0, f"relid {relid} offered while the guest holds it")
                self.held.add(relid)
            case wire.Rescind(relid=relid):
                self.expect(relid in self.held and relid not in self.rescinded, f"relid {relid} rescinded, not held or twice")
                self.rescinded.add(relid)
                self.waiting = [wait for wait in self.waiting if wait[0] != relid]
            case wire.OpenResult(relid=relid, open_id=open_id):
                self.expect((relid, open_id) in self.waiting, f"an answer to open {open_id} that nobody waits for")
                self.waiting.remove((relid, open_id))
                self.answered_opens += 1
            case wire.GpadlCreated(relid=relid, gpadl=gpadl, status=status):
                self.expect((relid, gpadl) in self.pages_asked, f"GPADL {gpadl:#x} created, nobody asked")
                self.pages_asked.remove((relid, gpadl))
                if status == STATUS_SUCCESS:
                    self.expect(gpadl not in self.pages_given, f"GPADL {gpadl:#x} created twice")
                    self.pages_given[gpadl] = relid
            case wire.GpadlTorndown(gpadl=gpadl):
                self.expect(gpadl in self.pages_given, f"GPADL {gpadl:#x} torn down, not given or twice")
                del self.pages_given[gpadl]


class Run:
    """One sequence."""

    def __init__(self, pages: Pages, version: Version, *, slow: bool) -> None:
        self.rig, self.ledger, self.slow = Rig(pages, version), Ledger(), slow
        self.open_ids = itertools.count(1)
        self.devices: list[PacedDevice] = []
        self.channel_states: set[State] = set()
        self.connection_states: set[ConnectionState] = set()
        self.do("offer")
        self.do("initiate")
        self.do("gpadl")

    def do(self, name: str) -> None:
        """Do one thing, hear what comes of it, look at the invariants."""
        rig = self.rig
        if name in ("initiate", "unload"):
            self.ledger.forget()
        if name == "offer":
            self._offer()
        elif name == "rescind":
            rig.server.rescind(1)
        elif name == "device":
            for device in self.devices:
                device.go_on()
        elif name == "initiate":
            self._say(rig.contact())
            if rig.server.link.state is ConnectionState.CONNECTED:
                self._say(wire.RequestOffers())
        else:
            self._say(self._message(name))
        self._hear()
        self.look()

    def _offer(self) -> None:
        device = PacedDevice(slow=self.slow)
        try:
            self.rig.server.offer(ECHO, INSTANCE, device)
        except OSError:
            return
        self.devices.append(device)

    def _message(self, name: str) -> wire.ChannelMessage:
        if name == "open":
            open_id = next(self.open_ids)
            if 1 in self.ledger.held and 1 not in self.ledger.rescinded:
                self.ledger.waiting.append((1, open_id))
            return self.rig.opening(1, open_id)
        if name == "gpadl":
            if self.connected:
                self.ledger.pages_asked.append((1, RING_GPADL))
            return PAGES
        if name == "half" and self.connected:
            self.ledger.pages_asked.append((1, LONG_GPADL))
        return {
            "half": HALF, "rest": REST, "ask": wire.RequestOffers(),
            "close": wire.CloseChannel(1), "teardown": wire.GpadlTeardown(1, RING_GPADL), "release": wire.RelidReleased(1),
            "unload": wire.Unload(),
        }[name]  # fmt: skip

    @property
    def connected(self) -> bool:
        """Whether the server hears more than INITIATE_CONTACT."""
        return self.rig.server.link.state is ConnectionState.CONNECTED

    def _say(self, message: wire.ChannelMessage) -> None:
        if isinstance(message, wire.RelidReleased) and 1 in self.ledger.rescinded and self.connected:
            self.ledger.held.discard(1)
            self.ledger.rescinded.discard(1)
            self.ledger.pages_asked.clear()     # who releases a relid has given up what it asked for
            self.ledger.pages_given = {gpadl: relid for gpadl, relid in self.ledger.pages_given.items() if relid != 1}
        assert self.rig.server.on_message(message.encode(self.rig.version))

    def _hear(self) -> None:
        for message in self.rig.heard():
            self.ledger.hear(message)

    def look(self) -> None:
        """Compare what the server knows with what the guest knows."""
        server, ledger = self.rig.server, self.ledger
        self.channel_states |= {channel.state for channel in server.offers}
        self.connection_states.add(server.link.state)
        known = {channel.relid for channel in server.offers if channel.state not in (
            State.CLIENT_RELEASED, State.OPENING_CLIENT_RELEASE, State.CLOSING_CLIENT_RELEASE,
        )}  # fmt: skip
        ledger.expect(known == ledger.held, f"server thinks the guest holds {known}, it holds {ledger.held}")
        ledger.expect(
            set(server.devices) == {channel.relid for channel in server.offers if channel.state is not State.REVOKED},
            "devices and channels do not fit",
        )
        accepted = {gpadl.gpadl for gpadl in server.gpadls.all() if gpadl.state is not GpadlState.IN_PROGRESS}
        ledger.expect(accepted == set(ledger.pages_given), f"host has {accepted}, guest gave {ledger.pages_given}")
        ledger.expect(not server.outgoing, "something waits although there is room")
        open_devices = [device for device in self.devices if device.mapped is not None and not device.pending]
        ledger.expect(len(open_devices) <= 1, "two devices have the rings")
        if open_devices and self.connected:
            ledger.expect(RING_GPADL in ledger.pages_given, "a device has rings that the guest has back")

    def fingerprint(self) -> object:
        """Give all that decides what can come. Generations only count up, and devices of the past are deaf: not how many."""
        server, ledger = self.rig.server, self.ledger
        current = [server.devices.get(channel.relid) for channel in server.offers]
        busy = [(device.mapped is not None, device.pending) for device in self.devices if device in current]
        past = sum(device.pending != "" for device in self.devices if device not in current)
        return (
            server.link.state, server.link.offers_requested, server.link.version, tuple(busy), min(past, 2), len(ledger.waiting),
            tuple((channel.state, channel.opened is not None, channel.reopen is not None) for channel in server.offers),
            tuple((gpadl.gpadl, gpadl.state) for gpadl in server.gpadls.all()), frozenset(ledger.held),
            frozenset(ledger.rescinded), frozenset(ledger.pages_given), frozenset(ledger.pages_asked),
        )  # fmt: skip

    def end(self) -> None:
        """Let devices finish: every open that the guest waits for has been answered, or its channel revoked."""
        for _ in range(4):
            self.do("device")
        self.ledger.expect(not self.ledger.waiting, f"opens {self.ledger.waiting} wait for ever")
        if self.connected:
            self.do("rest")
        for asked in self.ledger.pages_asked:
            self.ledger.expect(asked[0] not in self.ledger.held, f"GPADL {asked[1]:#x} waits for ever")
        self.ledger.expect(
            self.rig.server.link.state in (ConnectionState.CONNECTED, ConnectionState.DISCONNECTED), "a reset never ends"
        )


def play(pages: Pages, version: Version, sequence: tuple[str, ...], *, slow: bool) -> tuple[Run, object]:
    """Run one sequence; give the state before its end. A broken invariant names the sequence."""
    run = Run(pages, version, slow=slow)
    try:
        for name in sequence:
            run.do(name)
        state = run.fingerprint()
        run.end()
    except AssertionError as error:
        raise Broken(f"{version.name}, {'slow' if slow else 'prompt'} device, {' '.join(sequence)}: {error}") from error
    return run, state


@pytest.mark.parametrize("slow", [False, True], ids=["prompt device", "slow device"])
@pytest.mark.parametrize("version", [V5_3, V0_13])
def test_every_sequence_however_long_keeps_the_invariants(pages: Pages, version: Version, slow: bool) -> None:
    seen: set[object] = set()
    channel_states, connection_states = set(), set()
    frontier: list[tuple[str, ...]] = [()]
    longest = 0
    while frontier:     # by length: the first sequence that leads to a state is a shortest one
        longer: list[tuple[str, ...]] = []
        for sequence in ((*prefix, name) for prefix in frontier for name in (*OPERATIONS, "ask", "half", "rest", "device")):
            run, state = play(pages, version, sequence, slow=slow)
            if state not in seen:
                seen.add(state)
                longer.append(sequence)
                longest = len(sequence)
            channel_states |= run.channel_states
            connection_states |= run.connection_states
        frontier = longer

    # It ends by itself: every state has been left by every operation.
    assert longest >= (LENGTH_MAX if slow else LENGTH_MAX - 1)
    if slow:
        assert channel_states == set(State)
        assert connection_states == set(ConnectionState)


def test_every_sequence_of_four_keeps_the_invariants_without_taking_states_for_equal(pages: Pages) -> None:
    for sequence in itertools.product(OPERATIONS, repeat=LENGTH_MAX - 1):
        play(pages, V5_3, sequence, slow=False)


@pytest.mark.parametrize("seed", range(20))
def test_long_random_sequences_keep_the_invariants(pages: Pages, seed: int) -> None:
    chance = random.Random(seed)
    weights = (6, 3, 3, 4, 4, 2, 4, 1, 1, 4)
    for _ in range(20):
        sequence = tuple(chance.choices((*OPERATIONS, "device"), weights, k=60))
        play(pages, chance.choice((V5_3, V0_13)), sequence, slow=chance.random() < 0.5)


@pytest.mark.parametrize("seed", range(10))
def test_an_heir_that_takes_over_between_any_two_messages_keeps_the_invariants(pages: Pages, seed: int) -> None:
    chance = random.Random(1000 + seed)
    for _ in range(20):
        run = Run(pages, V5_3, slow=False)
        for name in chance.choices(OPERATIONS, k=30):
            run.do(name)
            take_over(run)
            run._hear()
            run.look()
        run.end()


def take_over(run: Run) -> None:
    """Kill the server and its devices, and start an heir."""
    data = snapshot.take(run.rig.server)
    heir = Rig(run.rig.pages, run.rig.version)
    run.devices = []

    def device_of(channel: object) -> PacedDevice:
        run.devices.append(PacedDevice())
        return run.devices[-1]

    snapshot.restore(heir.server, data, device_of)
    run.rig = heir


def test_a_planted_double_free_is_seen(pages: Pages) -> None:
    run = Run(pages, V5_3, slow=False)
    run.do("rescind")

    run.rig.server._send(wire.Rescind(1))

    with pytest.raises(Broken, match="twice"):
        run._hear()


def test_a_planted_lost_answer_is_seen(pages: Pages) -> None:
    run = Run(pages, V5_3, slow=True)
    run.do("open")
    run.devices[0].pending = ""

    with pytest.raises(Broken, match="wait for ever"):
        run.end()
