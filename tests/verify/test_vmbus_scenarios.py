# SPDX-License-Identifier: Apache-2.0
"""The scenarios of VMBus: a quick look at each under each model that it makes a claim about, and what their checks can see.

That they are clean to the end of the search is shown by `pvbus explore --all`.
"""

from typing import TYPE_CHECKING, Any

import pytest

from pvbus.actors.workqueue.channel import Channel
from pvbus.actors.workqueue.channels import Channels
from pvbus.actors.workqueue.waits import Steps
from pvbus.shm.hyperv import Vp
from pvbus.verify import scenarios
from pvbus.verify.explorer import MODELS, Scenario, explore
from pvbus.verify.scenarios.actor_stop import ActorStop, ExploredInbox
from pvbus.verify.scenarios.channel_echo import ChannelEcho
from pvbus.verify.scenarios.event_flags import EventFlags
from pvbus.verify.scenarios.hostile_ring import HostileRing
from pvbus.verify.scenarios.offers import Offers
from pvbus.verify.scenarios.synic_messages import SynicMessages
from pvbus.verify.scenarios.teardown import Teardown
from pvbus.verify.scenarios.vmbus_pair import VmbusPair
from pvbus.verify.scenarios.work_ring_full import WorkRingFull

if TYPE_CHECKING:
    from pvbus.verify.explorer.model import Model

KINDS: list[type[Scenario]] = [ActorStop, ChannelEcho, EventFlags, HostileRing, Offers, SynicMessages, Teardown, WorkRingFull]
CLAIMS = [(kind, claim) for kind in KINDS for claim in scenarios.claims(kind)]
A_LOOK = 100


@pytest.mark.parametrize(
    ("kind", "claim"), CLAIMS, ids=[f"{kind.name}-{claim.model}-{dict(claim.parameters)}" for kind, claim in CLAIMS]
)
def test_the_first_executions_of_what_is_claimed_are_clean(kind: type[Scenario], claim: Any) -> None:
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


class Swallows(ExploredInbox):
    """An inbox that stops without a word about what it has not handled."""

    def _refuse(self, item: Any, *, answer: bool) -> None:
        """Drop it."""


class SwallowingActor(ActorStop):
    """An actor with such an inbox, as pykka's own is."""

    inbox_type = Swallows


@pytest.mark.parametrize("asks", [0, 1])
def test_a_message_behind_the_stop_that_nobody_hears_of_is_noticed(asks: int) -> None:
    failure = explore(SwallowingActor(asks=asks)).failure

    assert failure is not None
    assert "message 0 was handled, refused, counted [0, 0, 0] times" in failure.message


def test_a_script_is_taken_apart_at_its_commas() -> None:
    pair: VmbusPair = Offers("rescind a,offer b , again", timeouts=2)

    assert (pair.toolstack, pair.seconds) == (("rescind a", "offer b", "again"), (5.0, 5.0))
