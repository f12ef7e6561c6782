# SPDX-License-Identifier: Apache-2.0
"""The two processes between which everything is measured, and how the parent drives them.

The same two processes carry every transport, one row at a time, so rows can be interleaved without starting
anything in between. Each obeys commands from a control pipe: (row, ports) → ("ok", result) or ("error",
trace).
"""

from __future__ import annotations

import multiprocessing
import signal
import time
import traceback
from collections.abc import Callable
from contextlib import ExitStack
from dataclasses import dataclass
from multiprocessing.connection import Connection
from typing import Any

from pvbus.actors.client import attach
from pvbus.benchmarks import evtchn, peers, vmbus
from pvbus.benchmarks.page import RECEIVED, SIGNALS, STOP, STRIDE, Page

WARM_UP_S = 0.05
ANSWER_S_MAX = 30.0
BIND_S_MAX = 0.02  # a port, both ends, on a loaded computer


@dataclass(frozen=True)
class Setup:
    """What a process of the pair is born with."""

    machine: str
    page_path: str
    is_sender: bool
    ports_max: int
    zmq_to_peer: str | None
    zmq_from_peer: str | None


def _pvbus_rows(setup: Setup, page: Page, transport: str, file: Any, ports: list[int]) -> dict[str, Any]:
    rows: dict[str, Callable[[int], object]] = {}
    if setup.is_sender:
        rows["single"] = lambda count: evtchn.send_single(page, file, ports[:count])
        rows["batch"] = lambda count: evtchn.send_batch(page, file, ports[:count], peers.BATCH)
        rows["trip"] = lambda _: evtchn.trip(page, file, ports[0])
    else:
        rows["single"] = lambda count: evtchn.receive_single(page, file, ports[:count])
        rows["batch"] = lambda _: evtchn.receive_batch(page, file, peers.BATCH)
        rows["trip"] = lambda _: evtchn.echo(page, file, ports[0])
    return {f"{transport} {kind}": row for kind, row in rows.items()}


def _peer_rows(setup: Setup, page: Page, ends: dict[str, Any]) -> dict[str, Any]:
    rows: dict[str, Callable[[int], object]] = {}
    for name, end in ends.items():
        if setup.is_sender:
            rows[f"{name} single"] = lambda _, end=end: peers.send_single(page, end.send)  # type: ignore[misc]
            rows[f"{name} packets"] = lambda size, end=end: peers.send_single(page, end.send, [bytes(size)] * STRIDE)  # type: ignore[misc]
            rows[f"{name} batch"] = lambda _, end=end: peers.send_batch(page, end.send)  # type: ignore[misc]
            rows[f"{name} trip"] = lambda _, end=end: peers.trip(page, end.send, end.receive)  # type: ignore[misc]
        else:
            rows[f"{name} single"] = lambda _, end=end: peers.receive_single(page, end.receive)  # type: ignore[misc]
            rows[f"{name} packets"] = rows[f"{name} single"]
            rows[f"{name} batch"] = lambda _, end=end: peers.receive_batch(page, end.receive)  # type: ignore[misc]
            rows[f"{name} trip"] = lambda _, end=end: peers.echo(page, end.send, end.receive)  # type: ignore[misc]
    return rows


def _vmbus_rows(setup: Setup, page: Page, machine: Any, stack: ExitStack) -> dict[str, Any]:
    """The host is the other end, so one of the two has nothing to do."""
    if not setup.is_sender:
        return {f"{vmbus.TRANSPORT} {kind}": lambda _: None for kind in ("packets", "trip")}
    channel = vmbus.open_echo(machine, stack)
    return {
        f"{vmbus.TRANSPORT} packets": lambda size: vmbus.stream(page, channel, size),
        f"{vmbus.TRANSPORT} trip": lambda _: vmbus.trip(page, channel),
    }


def _serve(setup: Setup, page: Page, control: Connection, pipes: tuple[Connection, Connection]) -> None:
    with ExitStack() as stack:
        ends: dict[str, Any] = {"pipe": peers.PipeEnds(*pipes)}
        if setup.zmq_to_peer is not None and setup.zmq_from_peer is not None:
            ends["zmq"] = peers.ZmqEnds(setup.zmq_to_peer, setup.zmq_from_peer)
            stack.callback(ends["zmq"].close)
        machine = stack.enter_context(attach(name=setup.machine))
        rows = _peer_rows(setup, page, ends) | _vmbus_rows(setup, page, machine, stack)
        for abi in evtchn.ABIS:
            file = machine.open_evtchn(domain=abi.sender if setup.is_sender else abi.receiver, nonblock=False)
            stack.callback(file.close)
            ports = evtchn.accept(file, abi, control.recv()) if setup.is_sender else evtchn.offer(file, abi, setup.ports_max)
            control.send(("ok", ports))
            if not setup.is_sender:
                ports = ports[: control.recv()]
            rows |= _pvbus_rows(setup, page, abi.transport, file, ports)
            rows[f"{abi.transport} drain"] = lambda _, file=file: evtchn.drain(machine, file)
        while (command := control.recv()) is not None:
            row, count = command
            control.send(("ok", rows[row](count)))


def process(setup: Setup, control: Connection, pipes: tuple[Connection, Connection]) -> None:
    """Be one process of the pair."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # the parent ends us
    try:
        _serve(setup, Page.open(setup.page_path), control, pipes)
    except BaseException:
        control.send(("error", traceback.format_exc()))
        raise


class PairError(RuntimeError):
    """A process of the pair failed or did not answer."""


class Pair:
    """Both processes, from the parent's side."""

    def __init__(self, machine: str, ports_max: int, directory: str, with_zmq: bool) -> None:
        self.page = Page.make()
        there, back = (f"ipc://{directory}/{name}" if with_zmq else None for name in ("there", "back"))
        context = multiprocessing.get_context("spawn")
        a_in, b_out = context.Pipe(duplex=False)
        b_in, a_out = context.Pipe(duplex=False)
        path = self.page.path()
        setups = (
            Setup(machine, path, True, ports_max, there, back),
            Setup(machine, path, False, ports_max, back, there),
        )
        self._controls: list[Connection] = []
        self._processes = []
        for setup, pipes in zip(setups, ((a_out, a_in), (b_out, b_in)), strict=True):
            control, theirs = context.Pipe()
            child = context.Process(target=process, args=(setup, theirs, pipes), daemon=True)
            child.start()
            theirs.close()
            self._controls.append(control)
            self._processes.append(child)
        for end in (a_in, a_out, b_in, b_out):
            end.close()
        sender, receiver = self._controls
        bound_s_max = ANSWER_S_MAX + ports_max * BIND_S_MAX
        self.ports: dict[str, int] = {}
        for abi in evtchn.ABIS:
            sender.send(self._answer(receiver, bound_s_max))
            count = len(self._answer(sender, bound_s_max))
            receiver.send(count)
            self.ports[abi.transport] = count

    @staticmethod
    def _answer(control: Connection, s_max: float = ANSWER_S_MAX) -> Any:
        if not control.poll(s_max):
            raise PairError(f"a process of the pair did not answer within {s_max:.0f} s")
        kind, value = control.recv()
        if kind == "error":
            raise PairError(value)
        return value

    def _both(self, row: str, count: int) -> None:
        for control in self._controls:
            control.send((row, count))

    def rate(self, row: str, count: int, seconds: float) -> float:
        """Return events a second that the receiver got, after a short warm-up."""
        words = self.page.words
        self.page.reset()
        self._both(row, count)
        time.sleep(WARM_UP_S)
        first, begin = words[RECEIVED], time.perf_counter()
        time.sleep(seconds)
        last, end = words[RECEIVED], time.perf_counter()
        self._finish(row)
        return (last - first) / (end - begin)

    def signals(self) -> float:
        """Return how often a packet of the last row was signalled, for a transport that says so."""
        return self.page.words[SIGNALS] / (self.page.words[RECEIVED] or 1)

    def trips(self, row: str, seconds: float) -> list[int]:
        """Return round-trip times in nanoseconds, without the first tenth."""
        self.page.reset()
        self._both(row, 1)
        time.sleep(seconds + WARM_UP_S)
        times: list[int] = self._finish(row)
        return times[len(times) // 10 :]

    def _finish(self, row: str) -> Any:
        self.page.words[STOP] = 1
        results = [self._answer(control) for control in self._controls]
        transport = row.partition(" ")[0]
        if transport in self.ports:
            self._both(f"{transport} drain", 0)
            for control in self._controls:
                self._answer(control)
        return results[0]

    def close(self) -> None:
        """End both, by force if need be."""
        for control, child in zip(self._controls, self._processes, strict=True):
            try:
                control.send(None)
            except OSError:  # it has ended already
                continue
            child.join(2.0)
        for child in self._processes:
            if child.is_alive():
                child.kill()
                child.join()
