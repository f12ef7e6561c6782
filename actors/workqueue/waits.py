# SPDX-License-Identifier: Apache-2.0
"""What the guest's VMBus code waits for: it is generators that yield one of these and are resumed with the answer.

    Post        status of HvPostMessage           Listen, Quiesce       None, once every CPU knows
    Reply       the message, or None              Probe, Remove, Shutdown   errno of the user's driver, 0 for good
    Sleep       None                              ReadMsr, WriteMsr     value, 0; OSError for a fault
    Until       None, once it holds             Synchronize             None, once every CPU has left its handler

No I/O and no clock here: a process, a test and the explorer answer them, each in its way (tasks.py runs them).
"""

from __future__ import annotations

from collections.abc import Callable, Generator
from typing import TYPE_CHECKING, Any, NamedTuple, TypeVar

if TYPE_CHECKING:
    from pvbus.actors.runtime.vmbus_wire import ChannelMessage
    from pvbus.actors.workqueue.bus import Device, Driver


class Post(NamedTuple):
    """Post a message of type 1 on a connection; Hyper-V status."""

    connection: int
    payload: bytes


class Reply(NamedTuple):
    """Wait until a request that was registered before it was posted has its answer; None: time is up, or nothing will come."""

    request: Request
    deadline_s: float


class Sleep(NamedTuple):
    """Let time pass."""

    seconds: float


class Until(NamedTuple):
    """Wait until something of this process's own state holds. Whatever is waited for must end by itself."""

    holds: Callable[[], bool]


class Listen(NamedTuple):
    """Have every CPU know a channel's doorbell."""

    relid: int


class Quiesce(NamedTuple):
    """Have every CPU forget it: after the answer nothing rings for the channel."""

    relid: int


class Synchronize(NamedTuple):
    """Wait until no CPU is in an interrupt handler or tasklet that had begun before."""


class Probe(NamedTuple):
    """Call the driver's probe with the device and the entry of the table that matched (None: by name)."""

    driver: Driver
    device: Device
    matched: bytes | None


class Remove(NamedTuple):
    """Call the driver's remove."""

    driver: Driver
    device: Device


class Shutdown(NamedTuple):
    """Call the driver's shutdown."""

    driver: Driver
    device: Device


class ReadMsr(NamedTuple):
    """Read a register on a virtual CPU."""

    vp: int
    number: int


class WriteMsr(NamedTuple):
    """Write one."""

    vp: int
    number: int
    value: int


Wait = Post | Reply | Sleep | Until | Listen | Quiesce | Synchronize | Probe | Remove | Shutdown | ReadMsr | WriteMsr
T = TypeVar("T")
Steps = Generator[Wait, Any, T]
"""A function that waits."""


class Request:
    """A question that has been, or is about to be, posted."""

    __slots__ = ("answer", "ended", "gone", "gpadl", "matches", "relid")

    def __init__(self, matches: Callable[[ChannelMessage], bool], relid: int, gpadl: int) -> None:
        self.matches = matches
        self.relid, self.gpadl = relid, gpadl
        self.answer: ChannelMessage | None = None
        self.ended = False
        self.gone = False   # the channel was taken away: there will be no answer


class Requests:
    """The questions that are open. Whoever enters one takes it out again, whatever comes (zoo 27)."""

    def __init__(self) -> None:
        self._open: list[Request] = []

    def __len__(self) -> int:
        return len(self._open)

    def enter(self, matches: Callable[[ChannelMessage], bool], relid: int = 0, gpadl: int = 0) -> Request:
        """Register a question, before it is posted: the answer may come first."""
        request = Request(matches, relid, gpadl)
        self._open.append(request)
        return request

    def unlink(self, request: Request) -> None:
        """Take a question out: an answer that comes now is nobody's."""
        self._open.remove(request)

    def deliver(self, message: ChannelMessage, *, every: bool = False) -> bool:
        """Complete the first question that the message answers, or every one. False: it answers none."""
        found = False
        for request in self._open:
            if not request.ended and request.matches(message):
                request.answer, request.ended, found = message, True, True
                if not every:
                    break
        return found

    def end_channel(self, relid: int) -> None:
        """Nothing that was asked about the channel will be answered (H12)."""
        for request in self._open:
            if request.relid == relid and not request.ended:
                request.ended = request.gone = True

    def end_all(self) -> None:
        """The connection is gone, and with it every answer."""
        for request in self._open:
            if not request.ended:
                request.ended = request.gone = True
