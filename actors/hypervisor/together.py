# SPDX-License-Identifier: Apache-2.0
"""Several calls of a file in one message: which may be, and how they are read. What makes them is the process."""

from __future__ import annotations

import errno

import msgspec

from pvbus.actors.hypervisor.errors import HypercallError
from pvbus.actors.runtime import messages as m
from pvbus.actors.runtime.wire import Message

_KINDS: dict[str, type[Message]] = {
    kind.__name__: kind for kind in (m.AllocUnbound, m.BindInterdomain, m.BindIrq, m.UnbindIrq)
}


def decode(message: m.Hypercalls) -> list[Message]:
    """Read all of them before the first is made. EBADMSG when one is no call that may come with others."""
    try:
        return [msgspec.convert(fields, _KINDS[kind]) for kind, fields in message.calls]
    except (KeyError, msgspec.ValidationError) as error:
        raise HypercallError(errno.EBADMSG, f"not a call that is made together with others: {error}") from None
