# SPDX-License-Identifier: Apache-2.0
"""Each memory model against a table of litmus tests with every kind of barrier: the outcome that names the shape is seen in
the models that allow it, and in no other. The tables are those of the literature: sequential consistency; x86-TSO (Owens,
Sarkar, Sewell 2009); ARMv8 (Pulte and others 2018), but for what `arm` leaves out (load buffering, and a store that passes a
locked operation in front of it) and for what it allows beyond: dependencies order no loads, and an acquire does not wait for a
release before it (as LDAPR).

Behind the table stand the axioms (axioms.py), which know every outcome of any program: random ones are held against them.
"""

from collections.abc import Iterable
from functools import partial

import pytest

from pvbus.shm._core_explored import Memory
from pvbus.tests.verify.axioms import Outcome, outcomes, programs
from pvbus.verify.explorer import MODELS, Model, Scenario, Start, explore

LOCATIONS = "xyz"

# What a thread does, one letter and a location each: w write 1, v write 2, W release 1, r read, R acquire, x exchange 1,
# c compare-exchange 0 for 1; m, s, l: full, store and load barrier.
# Then the outcome: the values read, thread by thread, and x, y, z at the end (None: whatever).
Ends = tuple[int | None, ...]

SB, SB_END = "wx {} ry | wy {} rx", ((0, 0), (None, None))
MP, MP_END = "wx {} wy | ry {} rx", ((1, 0), (None, None))
LB, LB_END = "rx {} wy | ry {} wx", ((1, 1), (None, None))
S, S_END = "vx {} wy | ry {} wx", ((1,), (2, None))
R, R_END = "wx {} wy | vy {} rx", ((0,), (None, 2))
TWO, TWO_END = "wx {} vy | wy {} vx", ((), (1, 1))
IRIW, IRIW_END = "wx | wy | rx {} ry | ry {} rx", ((1, 0, 1, 0), (None, None))

# text, values, ends, models that allow it
TABLE: list[tuple[str, tuple[int, ...], Ends, set[str]]] = [
    # store buffering: only two full barriers forbid it; locked operations do on x86, not on ARMv8.0
    (SB.format("", ""), *SB_END, {"tso", "arm"}),
    (SB.format("m", "m"), *SB_END, set()),
    (SB.format("m", ""), *SB_END, {"tso", "arm"}),
    (SB.format("s", "l"), *SB_END, {"tso", "arm"}),
    (SB.format("s l", "s l"), *SB_END, {"tso", "arm"}),
    ("Wx Ry | Wy Rx", *SB_END, {"tso", "arm"}),
    ("xx ry | xy rx", (0, 0, 0, 0), (None, None), {"arm"}),
    ("xx m ry | xy m rx", (0, 0, 0, 0), (None, None), set()),
    ("cx ry | cy rx", (0, 0, 0, 0), (None, None), {"arm"}),
    # message passing: any barrier that orders stores, and any that orders loads
    (MP.format("", ""), *MP_END, {"arm"}),
    (MP.format("s", ""), *MP_END, {"arm"}),
    (MP.format("", "l"), *MP_END, {"arm"}),
    (MP.format("s", "l"), *MP_END, set()),
    (MP.format("m", "m"), *MP_END, set()),
    (MP.format("s", "m"), *MP_END, set()),
    (MP.format("l", "s"), *MP_END, {"arm"}),
    ("wx Wy | Ry rx", *MP_END, set()),
    ("Wx wy | ry Rx", *MP_END, {"arm"}),
    ("wx Wy | ry l rx", *MP_END, set()),
    ("wx s wy | Ry rx", *MP_END, set()),
    ("wx xy | ry l rx", (0, 1, 0), (None, None), set()),
    ("wx s wy | cy rx", (1, 0), (None, None), set()),
    # load buffering: out of scope, never seen
    (LB.format("", ""), *LB_END, set()),
    (LB.format("m", "m"), *LB_END, set()),
    # a store behind a read one
    (S.format("", ""), *S_END, {"arm"}),
    (S.format("s", ""), *S_END, set()),
    (S.format("m", "m"), *S_END, set()),
    ("vx Wy | ry wx", *S_END, set()),
    ("vx l wy | Ry wx", *S_END, {"arm"}),
    # a store before one that is overwritten, and a read
    (R.format("", ""), *R_END, {"tso", "arm"}),
    (R.format("s", ""), *R_END, {"tso", "arm"}),
    (R.format("", "m"), *R_END, {"arm"}),
    (R.format("s", "l"), *R_END, {"tso", "arm"}),
    (R.format("s", "m"), *R_END, set()),
    (R.format("m", "m"), *R_END, set()),
    # two stores each, both overtaken
    (TWO.format("", ""), *TWO_END, {"arm"}),
    (TWO.format("s", ""), *TWO_END, {"arm"}),
    (TWO.format("l", "l"), *TWO_END, {"arm"}),
    (TWO.format("s", "s"), *TWO_END, set()),
    (TWO.format("m", "m"), *TWO_END, set()),
    ("wx Vy | wy Vx", *TWO_END, set()),
    # two readers that see two writers in different orders: multi-copy atomic, so ordered loads forbid it
    (IRIW.format("", ""), *IRIW_END, {"arm"}),
    (IRIW.format("l", ""), *IRIW_END, {"arm"}),
    (IRIW.format("l", "l"), *IRIW_END, set()),
    (IRIW.format("m", "m"), *IRIW_END, set()),
    ("wx | wy | Rx ry | Ry rx", *IRIW_END, set()),
    # coherence of one location
    ("wx vx | rx rx", (2, 1), (None, None), set()),
    ("wx vx | rx rx", (1, 0), (None, None), set()),
    ("wx | vx | rx rx | rx rx", (1, 2, 2, 1), (None, None), set()),
    ("wx rx", (0,), (None, None), set()),
    ("wx rx | vx", (2,), (2, None), {"sc", "tso", "arm"}),
    ("rx wx | vx", (2,), (2, None), set()),
    ("wx vx", (), (1, None), set()),
    # forwarding from the own buffer
    ("wx rx ry | wy ry rx", (1, 0, 1, 0), (None, None), {"tso", "arm"}),
    ("wx rx m ry | wy ry m rx", (1, 0, 1, 0), (None, None), set()),
    # a chain through three threads: a store that was read is visible to all
    ("wx | rx l wy | ry l rx", (1, 1, 0), (None, None), set()),
    ("wx | rx wy | ry rx", (1, 1, 0), (None, None), {"arm"}),
    ("wx | rx Wy | Ry rx", (1, 1, 0), (None, None), set()),
    ("wx | rx Wy | ry l rx", (1, 1, 0), (None, None), set()),
    ("wx | rx Wy | ry rx", (1, 1, 0), (None, None), {"arm"}),
    # message passing through three threads (ISA2)
    ("wx wy | ry wz | rz rx", (1, 1, 0), (None, None), {"arm"}),
    ("wx s wy | ry wz | rz l rx", (1, 1, 0), (None, None), set()),    # no load buffering: ry is before wz by itself
    ("wx s wy | ry wz | rz rx", (1, 1, 0), (None, None), {"arm"}),
    ("wx Wy | Ry Wz | Rz rx", (1, 1, 0), (None, None), set()),
    ("wx Wy | ry Wz | Rz rx", (1, 1, 0), (None, None), set()),
    ("wx Wy | xy wz | Rz rx", (1, 1, 0), (None, None), set()),
    # a read of a store, and a store buffer further on (RWC, W+RWC)
    ("wx | rx ry | wy rx", (1, 0, 0), (None, None), {"tso", "arm"}),
    ("wx | rx ry | wy m rx", (1, 0, 0), (None, None), {"arm"}),
    ("wx | rx l ry | wy m rx", (1, 0, 0), (None, None), set()),
    ("wx | Rx ry | Wy Rx", (1, 0, 0), (None, None), {"tso", "arm"}),
    ("wx s wy | ry l rz | wz rx", (1, 0, 0), (None, None), {"tso", "arm"}),
    ("wx s wy | ry l rz | wz m rx", (1, 0, 0), (None, None), set()),
    # an overwritten store, passed on, and a store buffer (Z6)
    ("wx s wy | vy s wz | rz l rx", (1, 0), (None, 2), set()),
    ("wx wy | vy wz | rz rx", (1, 0), (None, 2), {"arm"}),
    ("wx m wy | vy m wz | rz l rx", (1, 0), (None, 2), set()),
    ("wx s wy | vy wz | rz l rx", (1, 0), (None, 2), {"arm"}),
    # three stores in a circle (3.2W)
    ("wx vy | wy vz | wz vx", (), (1, 1, 1), {"arm"}),
    ("wx s vy | wy s vz | wz s vx", (), (1, 1, 1), set()),
    # a store and a load of one location keep their order with others' (CoRW, CoWR)
    ("rx vx | wx", (1,), (1, None), set()),
    ("vx rx | wx", (1,), (2, None), set()),
    ("wx | vx rx", (1,), (1, None), {"sc", "tso", "arm"}),
    # what is acquired from a locked operation, and what one releases
    ("wx xy | Ry rx", (0, 1, 0), (None, None), set()),
    ("wx xy | cy rx", (0, 1, 0), (None, None), set()),
    ("wx cy | ry l rx", (0, 1, 0), (None, None), set()),
    ("xy rx | vx m ry", (0, 0, 0), (None, None), {"arm"}),
    # a store that passes a locked one in front of it: ARMv8 allows it, `arm` leaves it out, as it does load buffering
    ("xx wy | ry l rx", (0, 1, 0), (None, None), set()),
    # atomicity of locked operations
    ("xx | xx", (0, 0), (None, None), set()),
    ("cx | cx", (0, 0), (None, None), set()),
]


class Litmus(Scenario):
    """Threads of single accesses; gathers every outcome."""

    name = "litmus"

    def __init__(self, text: str) -> None:
        self.threads = [thread.split() for thread in text.split("|")]
        self.outcomes: set[Outcome] = set()

    def prepare(self, model: Model, variants: int) -> None:
        self.memory = Memory(model, 8 * len(LOCATIONS))
        model.name(self.memory, "m")

    def start(self, model: Model) -> Iterable[Start]:
        self.values: list[list[int]] = [[] for _ in self.threads]
        for number, thread in enumerate(self.threads):
            yield f"t{number}", partial(self._run, thread, self.values[number]), False

    def _run(self, thread: list[str], values: list[int]) -> None:
        memory = self.memory
        for op in thread:
            at = 8 * LOCATIONS.index(op[1:])
            match op[0]:
                case "w" | "v":
                    memory.store64(at, 1 + (op[0] == "v"), "store")
                case "W" | "V":
                    memory.store64_release(at, 1 + (op[0] == "V"), "release")
                case "r":
                    values.append(memory.load64(at, "load"))
                case "R":
                    values.append(memory.load64_acquire(at, "acquire"))
                case "x":
                    values.append(memory.exchange64(at, 1, "exchange"))
                case "c":
                    values.append(memory.compare_exchange64(at, 0, 1, "compare-exchange"))
                case "m":
                    memory.smp_mb("mb")
                case "s":
                    memory.smp_wmb("wmb")
                case "l":
                    memory.smp_rmb("rmb")

    def broken(self, model: Model, stuck: list[str]) -> str | None:
        values = tuple(value for thread in self.values for value in thread)
        self.outcomes.add((values, tuple(self.memory.load64(8 * i) for i in range(len(LOCATIONS)))))
        return None

    def saw(self, values: tuple[int, ...], ends: Ends) -> bool:
        return any(
            seen == values and all(end in (None, left) for end, left in zip(ends, lefts, strict=False))
            for seen, lefts in self.outcomes
        )


@pytest.mark.parametrize(("text", "values", "ends", "allowed"), TABLE, ids=[f"{row[0]} {row[1]}" for row in TABLE])
def test_the_outcome_is_seen_where_it_is_allowed_and_nowhere_else(
    text: str, values: tuple[int, ...], ends: Ends, allowed: set[str]
) -> None:
    seen_in = set()
    for model in MODELS:
        litmus = Litmus(text)
        assert explore(litmus, model=model).verdict == "complete"
        if litmus.saw(values, ends):
            seen_in.add(model)

    assert seen_in == allowed


@pytest.mark.parametrize("text", [
    "wx s wy | ry l rx", "wx Wy | Ry rx", "wx m ry | wy m rx", "xx m ry | xy m rx", "wx | wy | rx l ry | ry l rx",
])  # fmt: skip
def test_sc_is_in_tso_is_in_arm(text: str) -> None:
    outcomes = []
    for model in MODELS:
        litmus = Litmus(text)
        explore(litmus, model=model)
        outcomes.append(litmus.outcomes)

    assert outcomes[0] <= outcomes[1] <= outcomes[2]


@pytest.mark.parametrize(("text", "site", "values"), [
    ("wx Wy | Ry rx", "release", (1, 0)), ("wx Wy | Ry rx", "acquire@t1", (1, 0)), ("wx s wy | ry l rx", "wmb", (1, 0)),
    ("wx s wy | ry l rx", "rmb@t1", (1, 0)), ("wx m ry | wy m rx", "mb@t0", (0, 0)),
])  # fmt: skip
def test_what_is_dropped_orders_nothing(text: str, site: str, values: tuple[int, ...]) -> None:
    litmus = Litmus(text)

    result = explore(litmus, model="arm", drop=[site])

    assert result.sites_dropped == {site}
    assert litmus.saw(values, (None, None))


# ---- every outcome, not only the one that names a shape


def found(text: str, model: str) -> set[Outcome]:
    """Return what the search sees."""
    litmus = Litmus(text)
    assert explore(litmus, model=model).verdict == "complete"
    return litmus.outcomes


DRAWN = [
    *programs(seed=1, threads=2, length=3, locations="xy", number=60),
    *programs(seed=2, threads=2, length=4, locations="xy", number=30),
    *programs(seed=3, threads=3, length=2, locations="xy", number=30),
    *programs(seed=4, threads=3, length=3, locations="xyz", number=10),
]


@pytest.mark.parametrize("model", MODELS)
def test_random_programs_have_the_outcomes_that_the_axioms_allow_and_no_others(model: str) -> None:
    for text in DRAWN:
        assert found(text, model) == outcomes(text, model, LOCATIONS), text


@pytest.mark.parametrize("model", MODELS)
def test_the_programs_of_the_table_have_the_outcomes_that_the_axioms_allow_and_no_others(model: str) -> None:
    for text in {row[0] for row in TABLE}:
        assert found(text, model) == outcomes(text, model, LOCATIONS), text
