# SPDX-License-Identifier: Apache-2.0
# The same sources as _core, each access a call-out: to a type checker they are one.

from pvbus.shm._core import *  # noqa: F403
