# SPDX-License-Identifier: Apache-2.0
"""Memory, the one object through which shared pages are touched, and the native types built on it.

The machine uses `_core`; the explorer runs the same C source, compiled with call-outs, from `_core_explored`. Code that is to
run in both takes its Memory and EventPath as arguments and never imports this module's classes to make them.

With PVBUS_GATE=FILE in the environment it is `_core_gated`, whose processes follow the trace in that file
(pvbus.verify.bridge): a debug switch.
"""

from __future__ import annotations

import os
from typing import TYPE_CHECKING, Final

GATE: Final = "PVBUS_GATE"

if TYPE_CHECKING or GATE not in os.environ:
    from pvbus.shm._core import BufferTooSmall, ChannelRing, Context, EventPath, Memory, UserFile, now_ns
else:
    from pvbus.shm._core_gated import BufferTooSmall, ChannelRing, Context, EventPath, Memory, UserFile, now_ns

__all__ = ["GATE", "BufferTooSmall", "ChannelRing", "Context", "EventPath", "Memory", "UserFile", "enter_gate", "now_ns"]


def enter_gate(name: str) -> None:
    """Take part in the trace as the context of this name; nothing without PVBUS_GATE."""
    if GATE in os.environ:
        from pvbus.shm import _core_gated

        _core_gated.enter_gate(os.environ[GATE], name)
