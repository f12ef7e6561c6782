# SPDX-License-Identifier: Apache-2.0
# The machine's core with the baton gate (shm/native/gate.h); otherwise as _core.

from pvbus.shm._core import *  # noqa: F403

def enter_gate(path: str, name: str, /) -> None: ...
