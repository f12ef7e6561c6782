# SPDX-License-Identifier: Apache-2.0
"""Writer and reader of a channel's ring: neither sleeps for ever, and the barriers are what makes it so."""

import pytest

from pvbus.shm._core_explored import Memory
from pvbus.shm.channel_ring import ChannelControl
from pvbus.verify.explorer import explore
from pvbus.verify.scenarios.channel_ring import DATA_BYTES, PACKET_BYTES, ChannelRings
from pvbus.verify.zoo.bug07_full_ring_throttles import NEARLY_FULL, KeepsTheWriteIndex

FULL = (DATA_BYTES - PACKET_BYTES,)     # as much is left as a packet has, which is not enough
FULL_TWICE = (PACKET_BYTES, DATA_BYTES - PACKET_BYTES - 8)
SLEEPS_OVER_PACKETS = "the reader sleeps, and"
BOTH_SLEEP = "the writer waits for room, the reader sleeps"


@pytest.mark.parametrize("model", ["sc", "tso"])
@pytest.mark.parametrize("scenario", [
    ChannelRings(), ChannelRings(packets=3, batch=True), ChannelRings(packets=3, masked=False),
], ids=["mask", "mask, batch", "no mask"])
def test_a_reader_never_sleeps_over_a_packet_that_nobody_signals(scenario: ChannelRings, model: str) -> None:
    result = explore(scenario, model=model)

    assert result.failure is None, str(result.failure)
    assert result.verdict == "complete"


@pytest.mark.parametrize(("model", "scenario"), [
    ("sc", ChannelRings(packets=1, filled=FULL)), ("tso", ChannelRings(packets=1, filled=FULL)),
    ("sc", ChannelRings(filled=FULL, masked=False)), ("tso", ChannelRings(filled=FULL, masked=False)),
    ("sc", ChannelRings(packets=1, filled=FULL_TWICE)), ("tso", ChannelRings(packets=1, filled=FULL_TWICE)),
    ("tso", ChannelRings(filled=FULL_TWICE, masked=False)),     # contains every interleaving of sc
])
def test_a_writer_without_room_and_its_reader_never_both_sleep(model: str, scenario: ChannelRings) -> None:
    result = explore(scenario, model=model)

    assert result.failure is None, str(result.failure)
    assert result.verdict == "complete"


@pytest.mark.parametrize("site", ["vmr_signal", "vmr_signal@writer", "vmr_signal@reader"])
def test_without_the_barrier_before_the_mask_a_signal_is_lost_under_tso(site: str) -> None:
    assert explore(ChannelRings(), drop=[site]).verdict == "complete"   # invisible without store buffers

    failure = explore(ChannelRings(), model="tso", drop=[site]).failure

    assert failure is not None
    assert SLEEPS_OVER_PACKETS in failure.message


@pytest.mark.parametrize("site", ["vmr_signal@writer", "vmr_room@reader"])
def test_a_reader_without_a_mask_needs_the_barrier_behind_its_index(site: str) -> None:
    failure = explore(ChannelRings(masked=False), model="tso", drop=[site]).failure

    assert failure is not None
    assert SLEEPS_OVER_PACKETS in failure.message


@pytest.mark.parametrize("site", ["vmr_room", "vmr_room@writer", "vmr_room@reader"])
def test_without_the_barrier_around_the_demand_for_room_both_sleep_under_tso(site: str) -> None:
    assert explore(ChannelRings(packets=1, filled=FULL), drop=[site]).verdict == "complete"

    failure = explore(ChannelRings(packets=1, filled=FULL), model="tso", drop=[site]).failure

    assert failure is not None
    assert BOTH_SLEEP in failure.message


class AsksForWhatItNeeds(ChannelRings):
    """Asks for as much room as the packet has, as if a ring could be full."""

    def no_room(self, memory: Memory) -> None:
        memory.store32(ChannelControl.PENDING_SEND_SZ, PACKET_BYTES, "vmr.pending")


def test_a_demand_for_just_as_much_as_the_packet_has_is_caught() -> None:
    failure = explore(AsksForWhatItNeeds(packets=1, filled=FULL)).failure

    assert failure is not None
    assert BOTH_SLEEP in failure.message


@pytest.mark.parametrize("reader", [ChannelRings, KeepsTheWriteIndex])
def test_an_old_write_index_in_the_comparison_is_caught(reader: type[ChannelRings]) -> None:
    failure = explore(reader(filled=NEARLY_FULL, masked=False)).failure

    if reader is ChannelRings:
        assert failure is None, str(failure)
    else:
        assert failure is not None
        assert BOTH_SLEEP in failure.message
