# SPDX-License-Identifier: Apache-2.0
"""Memory, the one object through which shared pages are touched, and the native types built on it.

The machine uses `_core`; the explorer runs the same C source, compiled with call-outs, from `_core_explored`. Code that is to
run in both takes its Memory and EventPath as arguments and never imports this module's classes to make them.
"""

from pvbus.shm._core import BufferTooSmall, ChannelRing, Context, EventPath, Memory, UserFile, now_ns

__all__ = ["BufferTooSmall", "ChannelRing", "Context", "EventPath", "Memory", "UserFile", "now_ns"]
