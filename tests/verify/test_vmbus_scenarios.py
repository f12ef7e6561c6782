# SPDX-License-Identifier: Apache-2.0
"""The scenarios of VMBus: a quick look at each under each model that it makes a claim about, and what their checks can see.

That they are clean to the end of the search is shown by `pvbus explore --all`.
"""

from typing import TYPE_CHECKING, Any, cast

import pytest

from pvbus.actors.hypervisor.synic import Synic
from pvbus.actors.hypervisor.vmbus.endpoint import Endpoint
from pvbus.actors.workqueue.channel import Channel
from pvbus.actors.workqueue.channels import Channels
from pvbus.actors.workqueue.waits import Steps
from pvbus.actors.workqueue.work import WorkRing
from pvbus.shm.hyperv import Vp
from pvbus.verify import scenarios
from pvbus.verify.explorer import MODELS, Scenario, explore
from pvbus.verify.explorer.scenario import Claim
from pvbus.verify.scenarios.actor_stop import ActorStop, ExploredInbox
from pvbus.verify.scenarios.channel_death import ChannelDeath
from pvbus.verify.scenarios.channel_echo import ChannelEcho
from pvbus.verify.scenarios.event_flags import EventFlags
from pvbus.verify.scenarios.hostile_ring import HostileRing
from pvbus.verify.scenarios.last_packet import LastPacket
from pvbus.verify.scenarios.offers import Offers
from pvbus.verify.scenarios.synic_death import SynicDeath
from pvbus.verify.scenarios.synic_messages import SynicMessages
from pvbus.verify.scenarios.teardown import Teardown
from pvbus.verify.scenarios.vmbus_pair import VmbusPair
from pvbus.verify.scenarios.work_death import WorkDeath
from pvbus.verify.scenarios.work_ring_full import WorkRingFull

if TYPE_CHECKING:
    from pvbus.verify.explorer.model import Model

NUMBERS: dict[type[Scenario], str] = {
    SynicMessages: "E6", EventFlags: "E8", ChannelEcho: "E9", Offers: "E10", Teardown: "E11", SynicDeath: "E12", ActorStop: "E13",
    ChannelDeath: "E12", WorkDeath: "E12", WorkRingFull: "H5", HostileRing: "", LastPacket: "",
}  # fmt: skip
"""Where the checklist has them; a reader who trusts nobody is no item of it."""


def numbers(kind: type[Scenario], claim: Claim) -> list[str]:
    """Give the checklist's numbers: the messages of two CPUs, or with a poller, are E7."""
    is_e7 = kind is SynicMessages and (claim.parameters.get("cpus") == 2 or claim.parameters.get("poller"))
    return ["E7"] if is_e7 else [NUMBERS[kind]] if NUMBERS[kind] else []


CLAIMS = [
    pytest.param(
        kind, claim, id=f"{kind.name}-{claim.model}-{dict(claim.parameters)}",
        marks=[pytest.mark.checklist(number) for number in numbers(kind, claim)],
    )
    for kind in NUMBERS for claim in scenarios.claims(kind)
]  # fmt: skip
A_LOOK = 100


@pytest.mark.parametrize(("kind", "claim"), CLAIMS)
def test_the_first_executions_of_what_is_claimed_are_clean(kind: type[Scenario], claim: Claim) -> None:
    result = explore(kind(**claim.parameters), model=claim.model, executions=A_LOOK, **claim.bounds)

    assert result.failure is None, str(result.failure)


@pytest.mark.parametrize("model", MODELS)
@pytest.mark.parametrize("scenario", [
    EventFlags(cpus=2, signals=2), HostileRing(), WorkRingFull(), SynicMessages(messages=2, posters=1, ahead=2),
    Offers("rescind a, again", opens=False), Offers("rescind a, offer b, rescind a", opens=False),
], ids=["flags on two CPUs", "a lying writer", "no room for work", "messages", "said twice", "revoked twice"])  # fmt: skip
def test_every_interleaving_of_a_small_one_is_clean(scenario: Scenario, model: str) -> None:
    result = explore(scenario, model=model)

    assert result.failure is None, str(result.failure)
    assert result.verdict == "complete"


# ---- the checks can fail; most are shown to by the zoo


class WritesEomAlways(SynicMessages):
    """As if each CPU had written one EOM more than it did."""

    def broken(self, model: "Model", stuck: list[str]) -> str | None:
        at = Vp.at(0, Vp.EOM)
        self.hv.store64(at, self.hv.load64(at) + 1)
        return super().broken(model, stuck)


def test_an_eom_that_nobody_waits_for_is_noticed() -> None:
    failure = explore(WritesEomAlways(messages=2, posters=1)).failure

    assert failure is not None
    assert "wrote EOM 2 times" in failure.message


class LosesRings(Channels):
    """Forgets to free what it takes back."""

    def release(self, channel: Channel) -> Steps[None]:
        channel.lent.clear()
        yield from super().release(channel)


class Forgetful(Teardown):
    """A guest that does so."""

    def make_channels(self, *arguments: Any) -> Channels:
        return LosesRings(*arguments)


def test_a_ring_that_nobody_frees_is_noticed() -> None:
    failure = explore(Forgetful(rescind=True, ticks=0)).failure

    assert failure is not None
    assert "ring 0 is lost" in failure.message


class SignalsTwice(ChannelEcho):
    """A reader that has signalled room more often than it was asked for."""

    def broken(self, model: "Model", stuck: list[str]) -> str | None:
        ring = self.host_ring
        self.host_ring = _Boastful(ring)  # type: ignore[assignment]
        try:
            return super().broken(model, stuck)
        finally:
            self.host_ring = ring


class _Boastful:
    def __init__(self, ring: Any) -> None:
        self._ring = ring

    def state(self) -> dict[str, int]:
        state: dict[str, int] = self._ring.state()
        return state | {"in_signals": state["in_signals"] + 3}


def test_signals_that_nobody_asked_for_are_noticed() -> None:
    failure = explore(SignalsTwice(packets=1)).failure

    assert failure is not None
    assert "was told 3 times" in failure.message


class LooksForEomsOnly(SynicDeath):
    """A host to which the birth of a CPU is nothing new."""

    def welcome(self, host: Synic) -> None:
        host.attend_eoms()


class GivesNothingUp(SynicDeath):
    """A CPU whose heir does not know that its forerunner had claimed something."""

    def recover_cpu(self) -> None:
        """Begin as if nobody had been here."""


@pytest.mark.checklist("E12")
@pytest.mark.parametrize(("kind", "what"), [
    (LooksForEomsOnly, "messages [1, 2] were posted, and [1] handled"), (GivesNothingUp, "was claimed and is not filled"),
])
def test_what_an_heir_of_a_cpu_has_to_do_is_noticed_when_it_is_left_out(kind: type[SynicDeath], what: str) -> None:
    failure = explore(kind(), deaths=1, search="random", executions=1000).failure

    assert failure is not None
    assert what in failure.message


class Hasty(WorkRing):
    """Gives an entry back before its message has been handled."""

    def take(self) -> bytes | None:
        payload = super().take()
        if payload is not None:
            super().done()
        return payload

    def done(self) -> None:
        """Nothing is left to do."""


class HastyWork(WorkDeath):
    """A workqueue that does so."""

    def ring(self) -> WorkRing:
        return Hasty(cast("Any", self.hv))


class Unaware(ChannelDeath):
    """An heir that knows of no claim."""

    def restore(self, endpoint: Endpoint) -> None:
        assert self.claim_words is not None
        words, at = self.claim_words
        words.store64(at + 8, 0)  # of relid 1
        super().restore(endpoint)


@pytest.mark.checklist("E12")
@pytest.mark.parametrize(("scenario", "what"), [
    (HastyWork(), "messages handled [0] times"), (Unaware(), "the driver has [1, 1] back"),
])  # fmt: skip
def test_an_heir_that_cannot_know_what_its_forerunner_did_is_noticed(scenario: Scenario, what: str) -> None:
    failure = explore(scenario, deaths=1, search="random", executions=3000).failure

    assert failure is not None
    assert what in failure.message


class Swallows(ExploredInbox):
    """An inbox that stops without a word about what it has not handled."""

    def _refuse(self, item: Any, *, answer: bool) -> None:
        """Drop it."""


class SwallowingActor(ActorStop):
    """An actor with such an inbox, as pykka's own is."""

    inbox_type = Swallows


@pytest.mark.checklist("E13")
def test_a_message_behind_the_stop_that_nobody_hears_of_is_noticed() -> None:
    failure = explore(SwallowingActor(asks=0)).failure

    assert failure is not None
    assert "message 0 was handled, refused, counted [0, 0, 0] times" in failure.message


def test_a_script_is_taken_apart_at_its_commas() -> None:
    pair: VmbusPair = Offers("rescind a,offer b , again", timeouts=2)

    assert (pair.toolstack, pair.seconds) == (("rescind a", "offer b", "again"), (5.0, 5.0))
