# SPDX-License-Identifier: Apache-2.0
"""How many descriptors a machine needs, and how the supervisor keeps some for what must always work.

A descriptor is taken in five processes for one open file. Each says EMFILE when it has none left; only the supervisor
holds some back, because the heirs of everyone else are started with them. Nothing that knows of messages belongs here.
"""

from __future__ import annotations

import errno
import os

from pvbus.actors.runtime.wire import close_fds

DESCRIPTORS_PER_FILE = 6
"""What the hypervisor (four) and the supervisor (three) keep of an open file and its first user, and some air."""
DESCRIPTORS_OF_A_MACHINE = 256
"""What they keep besides: segments, doorbells and sockets of CPUs, attached users."""
RESERVE_FOR_OPENS = 32
"""Left free by every open: a hypervisor and its CPUs can be started again, and whoever attaches finds room."""
RESERVE_FOR_SPARES = 64
"""Left free by every spare process: near the limit a close makes room for an open, and for nothing else."""
RESERVE_FOR_USERS = 16
"""Left free by every connection of a user: the first half of that is theirs, so a full machine still tells its status."""


def check_reserve(count: int, some_fd: int) -> None:
    """Raise OSError(EMFILE) unless `count` descriptors are free; `some_fd` is any that is open."""
    taken: list[int] = []
    try:
        while len(taken) < count:
            taken.append(os.dup(some_fd))
    except OSError as error:
        if error.errno not in (errno.EMFILE, errno.ENFILE):
            raise
        raise OSError(errno.EMFILE, "the supervisor has no descriptor left for this (ulimit -n)") from None
    finally:
        close_fds(taken)
