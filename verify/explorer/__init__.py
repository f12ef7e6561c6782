# SPDX-License-Identifier: Apache-2.0
"""The explorer: the production code under every interleaving that a memory model allows.

    from pvbus.verify.explorer import explore
    from pvbus.verify.scenarios.event_ring import EventRing

    explore(EventRing(events=2), model="tso").verdict               # 'complete'
    print(explore(EventRing(), variant="driver-wakeup-order").failure)      # the lost wake-up, with its trace

Contexts are greenlets that run room logic over pvbus.shm._core_explored, the same C source as the machine's
core with each access turned into a call-out to a memory model (model.py), which stops the context there;
the search (search.py) chooses who goes on. A scenario (scenario.py, pvbus.verify.scenarios) is pages,
contexts and what must hold.
"""

from pvbus.actors.runtime.config import VARIANTS
from pvbus.verify.explorer._engine import ContextDied, LockError, UseAfterFree, WidthError
from pvbus.verify.explorer.execution import ReplayError
from pvbus.verify.explorer.model import MODELS, FilePort, Model
from pvbus.verify.explorer.scenario import Scenario, Start
from pvbus.verify.explorer.search import SEARCHES, Failure, Result, Run, explore, follow, replay

__all__ = [
    "MODELS", "SEARCHES", "VARIANTS", "ContextDied", "Failure", "FilePort", "LockError", "Model", "ReplayError", "Result", "Run",
    "Scenario", "Start", "UseAfterFree", "WidthError", "explore", "follow", "replay",
]
