# SPDX-License-Identifier: Apache-2.0
"""The memory models and the search against litmus tests, and against enumerations that share no code with
them.
"""

from collections.abc import Iterable
from functools import cache, partial
from typing import Any

import pytest

from pvbus.shm._core_explored import Memory
from pvbus.verify.explorer import Model, Scenario, Start, explore

# ("W", location, value) | ("R", location) | ("MB",) | ("X", location, value): a locked exchange
Op = tuple[Any, ...]
Thread = tuple[Op, ...]
X, Y = 0, 1


def w(location: int, value: int) -> Op:
    return ("W", location, value)


def r(location: int) -> Op:
    return ("R", location)


MB: Op = ("MB",)

SHAPES: dict[str, tuple[Thread, ...]] = {
    "SB": ((w(X, 1), r(Y)), (w(Y, 1), r(X))),
    "SB+mb": ((w(X, 1), MB, r(Y)), (w(Y, 1), MB, r(X))),
    "SB+one-mb": ((w(X, 1), MB, r(Y)), (w(Y, 1), r(X))),
    "SB+locked": ((("X", X, 1), r(Y)), (("X", Y, 1), r(X))),
    "SB+forward": ((w(X, 1), r(X), r(Y)), (w(Y, 1), r(Y), r(X))),
    "MP": ((w(X, 1), w(Y, 1)), (r(Y), r(X))),
    "LB": ((r(X), w(Y, 1)), (r(Y), w(X, 1))),
    "S": ((w(X, 2), w(Y, 1)), (r(Y), w(X, 1))),
    "R": ((w(X, 1), w(Y, 1)), (w(Y, 2), r(X))),
    "R+mb": ((w(X, 1), MB, w(Y, 1)), (w(Y, 2), MB, r(X))),
    "2+2W": ((w(X, 1), w(Y, 2)), (w(Y, 1), w(X, 2))),
    "CoRR": ((w(X, 1), w(X, 2)), (r(X), r(X))),
    "IRIW": ((w(X, 1),), (w(Y, 1),), (r(X), r(Y)), (r(Y), r(X))),
}

Outcome = tuple[tuple[int, ...], int, int]  # every value read, thread by thread; x and y at the end

# The outcome that names the shape, and the models that allow it (x86-TSO as in the literature).
RELAXED: dict[str, tuple[Outcome, frozenset[str]]] = {
    "SB": (((0, 0), 1, 1), frozenset({"tso"})),
    "SB+mb": (((0, 0), 1, 1), frozenset()),
    "SB+one-mb": (((0, 0), 1, 1), frozenset({"tso"})),
    "SB+locked": (((0, 0), 1, 1), frozenset()),
    "SB+forward": (((1, 0, 1, 0), 1, 1), frozenset({"tso"})),
    "MP": (((1, 0), 1, 1), frozenset()),
    "LB": (((1, 1), 1, 1), frozenset()),
    "S": (((1,), 2, 1), frozenset()),
    "R": (((0,), 1, 2), frozenset({"tso"})),
    "R+mb": (((0,), 1, 2), frozenset()),
    "2+2W": (((), 1, 1), frozenset()),
    "CoRR": (((2, 1), 2, 0), frozenset()),
    "IRIW": (((1, 0, 1, 0), 1, 1), frozenset()),
}


class Litmus(Scenario):
    """Threads of single accesses through the explored core; gathers every outcome."""

    name = "litmus"

    def __init__(self, threads: tuple[Thread, ...]) -> None:
        self.threads = threads
        self.outcomes: set[Outcome] = set()

    def prepare(self, model: Model, variants: int) -> None:
        self.memory = Memory(model, 64)
        model.name(self.memory, "m")

    def start(self, model: Model) -> Iterable[Start]:
        self.values: list[list[int]] = [[] for _ in self.threads]
        for number, thread in enumerate(self.threads):
            yield f"t{number}", partial(self._run, thread, self.values[number]), False

    def _run(self, thread: Thread, values: list[int]) -> None:
        for op in thread:
            if op[0] == "W":
                self.memory.store64(op[1] * 8, op[2])
            elif op[0] == "R":
                values.append(self.memory.load64(op[1] * 8))
            elif op[0] == "X":
                self.memory.exchange64(op[1] * 8, op[2])
            else:
                self.memory.smp_mb("mb")

    def broken(self, model: Model, stuck: list[str]) -> str | None:
        values = tuple(value for thread in self.values for value in thread)
        self.outcomes.add((values, self.memory.load64(0), self.memory.load64(8)))
        return None


def enumerated(threads: tuple[Thread, ...], *, tso: bool) -> set[Outcome]:
    """Every outcome by plain recursion over (positions, buffers, memory, values): no greenlets, no replay,
    no core.
    """

    @cache
    def ends(
        at: tuple[int, ...], buffers: tuple[Any, ...], memory: tuple[int, int], read: tuple[Any, ...]
    ) -> frozenset[Outcome]:
        found: set[Outcome] = set()
        for t, thread in enumerate(threads):
            rest = buffers[:t], buffers[t + 1 :]
            if buffers[t]:
                (location, value), *left = buffers[t]
                flushed = (value, memory[1]) if location == X else (memory[0], value)
                found |= ends(at, (*rest[0], tuple(left), *rest[1]), flushed, read)
            if at[t] == len(thread):
                continue
            op, on = thread[at[t]], (*at[:t], at[t] + 1, *at[t + 1 :])
            if op[0] in ("MB", "X") and buffers[t]:
                continue
            if op[0] == "R":
                own = [value for location, value in buffers[t] if location == op[1]]
                seen = (*read[:t], (*read[t], own[-1] if own else memory[op[1]]), *read[t + 1 :])
                found |= ends(on, buffers, memory, seen)
            elif op[0] == "MB":
                found |= ends(on, buffers, memory, read)
            elif op[0] == "W" and tso:
                found |= ends(on, (*rest[0], (*buffers[t], op[1:]), *rest[1]), memory, read)
            else:
                found |= ends(on, buffers, (op[2], memory[1]) if op[1] == X else (memory[0], op[2]), read)
        if not found:
            return frozenset({(tuple(value for values in read for value in values), *memory)})
        return frozenset(found)

    nothing = tuple(() for _ in threads)
    return set(ends(tuple(0 for _ in threads), nothing, (0, 0), nothing))


@pytest.mark.parametrize("model", ["sc", "tso"])
@pytest.mark.parametrize("shape", SHAPES)
def test_the_search_sees_exactly_the_outcomes_that_the_model_allows(shape: str, model: str) -> None:
    litmus = Litmus(SHAPES[shape])
    relaxed, allowed_in = RELAXED[shape]

    result = explore(litmus, model=model)

    assert result.verdict == "complete"
    assert (relaxed in litmus.outcomes) == (model in allowed_in)
    assert litmus.outcomes == enumerated(SHAPES[shape], tso=model == "tso")


def test_a_dropped_barrier_is_no_barrier() -> None:
    everywhere, in_one = Litmus(SHAPES["SB+mb"]), Litmus(SHAPES["SB+mb"])

    dropped = explore(everywhere, model="tso", drop=["mb"])
    explore(in_one, model="tso", drop=["mb@t0"])

    assert dropped.sites_dropped == {"mb"}
    assert everywhere.outcomes == enumerated(SHAPES["SB"], tso=True)
    assert in_one.outcomes == enumerated(SHAPES["SB+one-mb"], tso=True)


def test_a_barrier_that_nobody_passes_is_not_reported_as_dropped() -> None:
    assert explore(Litmus(SHAPES["SB"]), model="tso", drop=["mb"]).sites_dropped == frozenset()


class MixedWidths(Litmus):
    """One context stores a word and loads half of it."""

    def _run(self, thread: Thread, values: list[int]) -> None:
        self.memory.store64(0, 1)
        values.append(self.memory.load32(4))


def test_accesses_of_two_widths_to_one_word_are_refused() -> None:
    failure = explore(MixedWidths(SHAPES["SB"])).failure

    assert failure is not None
    assert failure.kind == "exception"
    assert "WidthError" in failure.message


def test_an_unknown_model_or_variant_is_refused() -> None:
    with pytest.raises(ValueError, match="no memory model 'alpha'"):
        explore(Litmus(SHAPES["SB"]), model="alpha")
    with pytest.raises(ValueError, match="no variant 'none'"):
        explore(Litmus(SHAPES["SB"]), variant="none")
