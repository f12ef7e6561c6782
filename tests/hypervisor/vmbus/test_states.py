# SPDX-License-Identifier: Apache-2.0
"""Every message in every state of a channel, and every message in every state of the connection."""
# Checklist: H12, X13 (host side)

from collections.abc import Callable, Iterator

import pytest

from pvbus.actors.hypervisor.vmbus.channel import State
from pvbus.actors.hypervisor.vmbus.connection import ConnectionState
from pvbus.actors.runtime import vmbus_wire as wire
from pvbus.actors.runtime.vmbus_facts import HOST_TO_GUEST, STATUS_SUCCESS, V0_13, V5_3, Kind
from pvbus.actors.runtime.vmbus_gpadl import gpadl_messages
from pvbus.tests.hypervisor.vmbus.rig import CHANNEL_FRAME, ECHO, INSTANCE, RING_GPADL, PacedDevice, Pages, Rig


@pytest.fixture
def pages() -> Iterator[Pages]:
    pages = Pages()
    yield pages
    pages.close()


def client_released(rig: Rig, device: PacedDevice) -> None:
    rig.say(rig.contact())
    rig.server.offer(ECHO, INSTANCE, device)


def closed(rig: Rig, device: PacedDevice) -> None:
    client_released(rig, device)
    rig.say(wire.RequestOffers())
    rig.give_pages(1)


def opening(rig: Rig, device: PacedDevice) -> None:
    closed(rig, device)
    rig.say(rig.opening(1))


def opened(rig: Rig, device: PacedDevice) -> None:
    opening(rig, device)
    device.go_on()


def closing(rig: Rig, device: PacedDevice) -> None:
    opened(rig, device)
    rig.say(wire.CloseChannel(1))


def closing_reopen(rig: Rig, device: PacedDevice) -> None:
    closing(rig, device)
    rig.say(rig.opening(1))


def revoked(rig: Rig, device: PacedDevice) -> None:
    closed(rig, device)
    rig.server.rescind(1)


def reoffered(rig: Rig, device: PacedDevice) -> None:
    revoked(rig, device)
    rig.server.offer(ECHO, INSTANCE, PacedDevice(slow=True))


REACH: dict[State, Callable[[Rig, PacedDevice], None]] = {
    State.CLIENT_RELEASED: client_released, State.CLOSED: closed, State.OPENING: opening, State.OPEN: opened,
    State.CLOSING: closing, State.CLOSING_REOPEN: closing_reopen, State.REVOKED: revoked, State.REOFFERED: reoffered,
}  # fmt: skip

PAGE = gpadl_messages(1, 0xE1E11, 4096, [CHANNEL_FRAME])[0]
MESSAGES: dict[str, wire.ChannelMessage] = {
    "open": wire.OpenChannel(relid=1, open_id=8, ring_gpadl=RING_GPADL, downstream_page=8),
    "close": wire.CloseChannel(1), "release": wire.RelidReleased(1), "modify": wire.ModifyChannel(1, 1), "pages": PAGE,
    "teardown": wire.GpadlTeardown(1, RING_GPADL), "offers?": wire.RequestOffers(),
    "initiate": wire.InitiateContact(version=V5_3, sint=2), "unload": wire.Unload(),
}  # fmt: skip

# By state: what each message leads to, and what the guest hears. "!": counted as a violation. "-": a failure.
TABLE = {
    State.CLIENT_RELEASED: {
        "open": "client released !", "close": "client released !", "release": "client released !", "modify": "client released !",
        "pages": "client released ! GpadlCreated-", "teardown": "client released !",
        "offers?": "closed OfferChannel AllOffersDelivered",
        "initiate": "client released VersionResponse", "unload": "client released UnloadResponse",
    },
    State.CLOSED: {
        "open": "opening", "close": "closed !", "release": "closed !", "modify": "closed ! ModifyChannelResponse-",
        "pages": "closed GpadlCreated", "teardown": "closed GpadlTorndown", "offers?": "closed AllOffersDelivered",
        "initiate": "client released VersionResponse", "unload": "client released UnloadResponse",
    },
    State.OPENING: {
        "open": "opening ! OpenResult-", "close": "opening !", "release": "opening !",
        "modify": "opening ! ModifyChannelResponse-", "pages": "opening GpadlCreated", "teardown": "opening !",
        "offers?": "opening AllOffersDelivered",
        "initiate": "opening, client released", "unload": "opening, client released",
    },
    State.OPEN: {
        "open": "open ! OpenResult-", "close": "closing", "release": "open !", "modify": "open ModifyChannelResponse",
        "pages": "open GpadlCreated", "teardown": "open !", "offers?": "open AllOffersDelivered",
        "initiate": "closing, client released", "unload": "closing, client released",
    },
    State.CLOSING: {
        "open": "closing, to be opened again", "close": "closing !", "release": "closing !",
        "modify": "closing ! ModifyChannelResponse-", "pages": "closing GpadlCreated", "teardown": "closing",
        "offers?": "closing AllOffersDelivered",
        "initiate": "closing, client released", "unload": "closing, client released",
    },
    State.CLOSING_REOPEN: {
        "open": "closing, to be opened again ! OpenResult-", "close": "closing, to be opened again !",
        "release": "closing, to be opened again !", "modify": "closing, to be opened again ! ModifyChannelResponse-",
        "pages": "closing, to be opened again GpadlCreated", "teardown": "closing, to be opened again !",
        "offers?": "closing, to be opened again AllOffersDelivered",
        "initiate": "closing, client released", "unload": "closing, client released",
    },
    State.REVOKED: {
        "open": "revoked", "close": "revoked", "release": "gone", "modify": "revoked ModifyChannelResponse-",
        "pages": "revoked GpadlCreated-", "teardown": "revoked GpadlTorndown", "offers?": "revoked AllOffersDelivered",
        "initiate": "gone VersionResponse", "unload": "gone UnloadResponse",
    },
    State.REOFFERED: {
        "open": "reoffered", "close": "reoffered", "release": "closed OfferChannel", "modify": "reoffered ModifyChannelResponse-",
        "pages": "reoffered GpadlCreated-", "teardown": "reoffered GpadlTorndown", "offers?": "reoffered AllOffersDelivered",
        "initiate": "client released VersionResponse", "unload": "client released UnloadResponse",
    },
}  # fmt: skip


def described(rig: Rig, told: list[wire.ChannelMessage], violations: int) -> str:
    """Say what a message has led to, in the words of the table."""
    words = [str(rig.state(1) or "gone")]
    words += ["!"] * (rig.server.counters.violations - violations)
    words += [type(message).__name__ + ("-" if getattr(message, "status", STATUS_SUCCESS) else "") for message in told]
    return " ".join(words)


@pytest.mark.parametrize("state", list(TABLE))
@pytest.mark.parametrize("name", list(MESSAGES))
def test_every_message_in_every_state_of_a_channel(pages: Pages, state: State, name: str) -> None:
    rig, device = Rig(pages), PacedDevice(slow=True)
    REACH[state](rig, device)
    rig.heard()
    assert rig.state(1) is state
    violations = rig.server.counters.violations

    told = rig.say(MESSAGES[name])

    assert described(rig, told, violations) == TABLE[state][name]


def test_the_table_is_complete() -> None:
    from_guest = {type(message).KIND for message in MESSAGES.values()} | {Kind.GPADL_BODY}

    assert from_guest == set(Kind) - HOST_TO_GUEST
    assert all(set(row) == set(MESSAGES) for row in TABLE.values())
    assert set(State) - set(TABLE) == {State.CLOSING_CLIENT_RELEASE, State.OPENING_CLIENT_RELEASE}


# By state: what the host's own calls lead to.
HOST = {
    State.CLIENT_RELEASED: "gone", State.CLOSED: "revoked Rescind", State.OPENING: "revoked Rescind",
    State.OPEN: "revoked Rescind", State.CLOSING: "revoked Rescind", State.CLOSING_REOPEN: "revoked Rescind",
    State.REVOKED: "revoked", State.REOFFERED: "revoked",
}  # fmt: skip


@pytest.mark.parametrize("state", list(TABLE))
def test_a_rescind_in_every_state(pages: Pages, state: State) -> None:
    rig, device = Rig(pages), PacedDevice(slow=True)
    REACH[state](rig, device)
    rig.heard()
    violations = rig.server.counters.violations

    taken = rig.server.rescind(1)

    assert taken is (state is not State.REVOKED)
    assert described(rig, rig.heard(), violations) == HOST[state]


@pytest.mark.parametrize("state", list(TABLE))
def test_an_instance_is_offered_once_unless_it_was_revoked(pages: Pages, state: State) -> None:
    rig = Rig(pages)
    REACH[state](rig, PacedDevice(slow=True))
    rig.heard()

    if state is State.REVOKED:
        assert rig.server.offer(ECHO, INSTANCE, PacedDevice()) == 1
        assert rig.state(1) is State.REOFFERED
    else:
        with pytest.raises(OSError, match="is offered"):
            rig.server.offer(ECHO, INSTANCE, PacedDevice())
        assert rig.state(1) is state
    assert rig.heard() == []


@pytest.mark.parametrize("name", list(MESSAGES))
@pytest.mark.parametrize("version", [V0_13, V5_3])
def test_a_guest_that_has_not_connected_is_heard_only_when_it_initiates(pages: Pages, version: int, name: str) -> None:
    rig = Rig(pages)
    rig.server.offer(ECHO, INSTANCE, PacedDevice())

    told = rig.say(MESSAGES[name])

    assert [type(message) for message in told] == ([wire.VersionResponse] if name == "initiate" else [])
    assert rig.server.counters.violations == (name != "initiate")


@pytest.mark.parametrize("leave", ["initiate", "unload"])
@pytest.mark.parametrize("name", list(MESSAGES))
@pytest.mark.parametrize("state", [State.OPENING, State.OPEN])
def test_while_devices_close_a_guest_is_heard_only_when_it_initiates(pages: Pages, state: State, leave: str, name: str) -> None:
    rig, device = Rig(pages), PacedDevice(slow=True)
    REACH[state](rig, device)
    rig.heard()
    assert rig.say(MESSAGES[leave]) == []
    before = rig.server.link.state
    assert before is (ConnectionState.CONNECTING if leave == "initiate" else ConnectionState.DISCONNECTING)

    assert rig.say(MESSAGES[name]) == []
    assert rig.server.link.state is (ConnectionState.CONNECTING if name == "initiate" else before)

    device.go_on()
    device.go_on()
    initiated = "initiate" in (leave, name)
    assert [type(message) for message in rig.heard()] == [wire.VersionResponse if initiated else wire.UnloadResponse]
    assert rig.state(1) is State.CLIENT_RELEASED
    assert device.mapped is None


@pytest.mark.parametrize("kind", sorted(HOST_TO_GUEST))
def test_what_only_a_host_says_is_ignored_from_a_guest(pages: Pages, kind: Kind) -> None:
    rig = Rig(pages)
    closed(rig, PacedDevice())
    rig.heard()

    assert rig.server.on_message(kind.to_bytes(4, "little") + bytes(200))

    assert rig.heard() == []
    assert kind.name in rig.server.last_violation
