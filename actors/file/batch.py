# SPDX-License-Identifier: Apache-2.0
"""Many bindings in one call of the user: the ioctls one after the other, and two messages to the hypervisor for 64 of them.

The contract of each is evtchn.py's, and so is its order (A7): the hypercall, then record and room in the ring, then the handler,
whose first event may fire at once. What is not plain (an injected failure, a number that is this file's already) is bound by
evtchn.py itself. Pure, as that.
"""

from __future__ import annotations

import errno
import os
from typing import TYPE_CHECKING, Any

import msgspec

from pvbus.actors.file.evtchn import BIND_INTERDOMAIN, BIND_UNBOUND_PORT
from pvbus.actors.runtime import messages as m

if TYPE_CHECKING:
    from collections.abc import Generator

    from pvbus.actors.file.evtchn import EvtchnFile
    from pvbus.actors.runtime.wire import Message

TOGETHER_MAX = 64  # a turn of the hypervisor of about a millisecond: the events of all others wait for it


def binds(file: EvtchnFile, message: m.Binds, done: list[int]) -> Generator[Message, Any, m.Values]:
    """Bind with each argument behind those that are `done`, and give all ports. The first failure ends it, and is told with them.

    EPIPE, the hypervisor's death, is thrown on: begun again with the same `done`, it goes on where it was.
    """
    if message.request not in (BIND_UNBOUND_PORT, BIND_INTERDOMAIN):
        raise OSError(errno.EINVAL, f"request {message.request:#x} does not bind a port of another number each time")
    while len(done) < len(message.arguments):
        arguments = message.arguments[len(done) : len(done) + TOGETHER_MAX]
        try:
            yield from _bind_some(file, message.request, arguments, done)
        except OSError as error:
            if error.errno == errno.EPIPE:
                raise
            return m.Values(values=done, errno=error.errno or errno.EIO, text=error.strerror or "")
    return m.Values(values=done)


def _bind_some(file: EvtchnFile, request: int, arguments: list[bytes], done: list[int]) -> Generator[Message, Any, None]:
    failure: OSError | None = None
    calls: list[Message] = []
    for argument in arguments:
        try:
            calls.append(file.hypercall_of(request, argument))
        except OSError as error:
            failure = error
            break
    if calls:
        made = yield _together(calls)
        failure = _failure_of(made) or failure
        plain = not any(file.inject.values()) and file.ports.isdisjoint(made.values)
        yield from (_handlers(file, made.values, done) if plain else _one_by_one(file, made.values, done))
    if failure is not None:
        raise failure


def _one_by_one(file: EvtchnFile, ports: list[int], done: list[int]) -> Generator[Message, Any, None]:
    for at, port in enumerate(ports):
        try:
            done.append((yield from file.bind_to_user(port)))
        except OSError as error:
            if error.errno != errno.EPIPE:  # what the dead one had handed out, its heir has closed
                yield from _close(file, ports[at + 1 :])
            raise


def _handlers(file: EvtchnFile, ports: list[int], done: list[int]) -> Generator[Message, Any, None]:
    """Record all, then bind their handlers; those without one are undone."""
    bound = recorded = 0
    failure: OSError | None = None
    try:
        for port in ports:
            file.record(port)
            recorded += 1
    except OSError as error:
        failure = error
    try:
        if recorded:
            made = yield _together([m.BindIrq(port=port) for port in ports[:recorded]])
            failure = _failure_of(made) or failure
            bound = len(made.values)
    except OSError as error:
        file.forget(ports[:recorded])
        if error.errno == errno.EPIPE:  # a handler of ours goes, if the forerunner had bound it before it died
            yield _together([m.UnbindIrq(port=port) for port in ports[:recorded]])
        raise
    file.ports.update(ports[:bound])
    done += ports[:bound]
    file.forget(ports[bound:recorded])
    yield from _close(file, ports[bound:])
    if failure is not None:
        raise failure


def _close(file: EvtchnFile, ports: list[int]) -> Generator[Message, Any, None]:
    for port in ports:
        yield from file.close_quietly(port)


def _together(calls: list[Message]) -> m.Hypercalls:
    return m.Hypercalls(calls=[(type(call).__name__, msgspec.structs.asdict(call)) for call in calls])


def _failure_of(made: m.Values) -> OSError | None:
    return OSError(made.errno, made.text or os.strerror(made.errno)) if made.errno else None
