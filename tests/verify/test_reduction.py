# SPDX-License-Identifier: Apache-2.0
"""The reductions leave nothing out: on random programs each search finds exactly the ends that plain search finds."""

import contextlib
import random
from collections.abc import Iterable
from functools import partial
from typing import Any

from pvbus.shm._core_explored import Memory
from pvbus.verify.explorer import Model, Scenario, Start, explore

LOCATIONS = 3
OPERATIONS = (
    ("store", 6), ("load", 6), ("release", 2), ("acquire", 2), ("exchange", 2), ("cas", 2), ("or", 1), ("mb", 2), ("rmb", 1),
    ("wmb", 1), ("ring", 2), ("take", 1), ("wait", 1), ("lock", 1), ("unlock", 1), ("choose", 1), ("post", 1), ("receive", 1),
    ("clock", 1), ("if", 2), ("spin", 1), ("allocate", 1), ("heap", 1),
)


def program(draw: random.Random, length: int) -> list[tuple[str, int, int]]:
    names = draw.choices([name for name, _ in OPERATIONS], [weight for _, weight in OPERATIONS], k=length)
    return [(name, draw.randrange(LOCATIONS), draw.randint(1, 3)) for name in names]


class RandomProgram(Scenario):
    """Contexts of random operations; gathers what everybody saw and what is left, for each execution that ends."""

    name = "random program"

    def __init__(self, seed: int, contexts: int, length: int) -> None:
        draw = random.Random(seed)
        self.programs = [program(draw, length) for _ in range(contexts)]
        self.ends: set[tuple[Any, ...]] = set()

    def prepare(self, model: Model, variants: int) -> None:
        self.memory, self.heap = Memory(model, 64), Memory(model, 8)
        model.name(self.memory, "m")
        model.name(self.heap, "h")
        self.bell, self.lock, self.box = model.bell("bell"), model.lock("lock"), model.mailbox("box")
        model.ticks(5, at_most=1)

    def start(self, model: Model) -> Iterable[Start]:
        self.seen: list[list[int]] = [[] for _ in self.programs]
        for number, operations in enumerate(self.programs):
            yield f"t{number}", partial(self._run, model, operations, self.seen[number]), False

    def _run(self, model: Model, operations: list[tuple[str, int, int]], seen: list[int]) -> None:
        held, memory, live = False, self.memory, False
        skip = False
        for name, location, value in operations:
            at = 8 * location
            if skip:
                skip = False
                continue
            match name:
                case "store":
                    memory.store64(at, value, "s")
                case "release":
                    memory.store64_release(at, value, "s")
                case "load":
                    seen.append(memory.load64(at, "l"))
                case "acquire":
                    seen.append(memory.load64_acquire(at, "l"))
                case "exchange":
                    seen.append(memory.exchange64(at, value, "x"))
                case "cas":
                    seen.append(memory.compare_exchange64(at, 0, value, "c"))
                case "or":
                    seen.append(memory.fetch_or64(at, value, "o"))
                case "mb" | "rmb" | "wmb":
                    getattr(memory, "smp_" + name)("b")
                case "ring":
                    model.ring(self.bell)
                case "take":
                    seen.append(model.take(self.bell))
                case "wait":
                    model.wait(self.bell)
                case "lock" if not held:
                    model.acquire(self.lock)
                    held = True
                case "unlock" if held:
                    model.release(self.lock)
                    held = False
                case "choose":
                    seen.append(model.choose(2))
                case "post":
                    model.post(self.box, value)
                case "receive":
                    seen.append(model.receive(self.box))
                case "clock":
                    seen.append(model.clock())
                case "if":
                    skip = memory.load64(at, "l") % 2 == 1
                case "allocate" if not live and location == 0:
                    live = model.allocate(self.heap, may_fail=True)
                case "heap" if live:
                    seen.append(self.heap.load64(0, "h"))
                    model.free(self.heap)
                    live = False

    def broken(self, model: Model, stuck: list[str]) -> str | None:
        memory = tuple(self.memory.load64(8 * i) for i in range(LOCATIONS))
        rest = tuple(model.value(bell) for bell in (self.bell, self.lock, self.box))
        self.ends.add((tuple(tuple(seen) for seen in self.seen), memory, rest, tuple(stuck)))
        return None


def ends(seed: int, contexts: int, length: int, model: str, search: str, **bounds: Any) -> tuple[set[Any], Any]:
    scenario = RandomProgram(seed, contexts, length)
    result = explore(EndsInDeadlock(scenario), model=model, search=search, **bounds)
    assert result.failure is None, str(result.failure)
    return scenario.ends, result


class EndsInDeadlock(Scenario):
    """The same with everybody a server: a deadlock is an end like others."""

    name = "ends"

    def __init__(self, inner: RandomProgram) -> None:
        self.inner = inner

    def prepare(self, model: Model, variants: int) -> None:
        self.inner.prepare(model, variants)

    def start(self, model: Model) -> Iterable[Start]:
        for name, run, _ in self.inner.start(model):
            yield name, self._tolerant(run), True

    def _tolerant(self, run: Any) -> Any:
        def body() -> None:
            with contextlib.suppress(AssertionError):  # two allocate the same: an end like others
                run()

        return body

    def broken(self, model: Model, stuck: list[str]) -> str | None:
        return self.inner.broken(model, stuck)
