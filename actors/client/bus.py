# SPDX-License-Identifier: Apache-2.0
"""A user process's connection to a domain's bus: calls go out and are answered, calls of drivers come in and are made here.

One thread reads the socket. A second one makes the driver's calls, so that a probe may itself call (open its channel) and wait.
"""

from __future__ import annotations

import contextlib
import errno
import itertools
import queue
import select
import threading
import traceback
from typing import TYPE_CHECKING

from pvbus.actors.runtime import vmbus_messages as vm
from pvbus.actors.runtime.wire import Done, Failure, Message, WireError, close_fds, decode, encode, recv_frame, send_frame

if TYPE_CHECKING:
    import socket
    from collections.abc import Callable

CALL_TIMEOUT_S = 40.0  # an open waits for two answers of the host, five seconds of the machine's clock each


class BusConnection:
    """The socket to the domain's workqueue. `call_driver` makes what comes in; its OSError is the driver's answer."""

    def __init__(
        self, sock: socket.socket, call_driver: Callable[[vm.CallDriver], None], gone: Callable[[], None] = lambda: None
    ) -> None:
        self._sock = sock
        self._call_driver = call_driver
        self._on_gone = gone
        self.on_uevent: Callable[[dict[str, str]], None] = lambda _variables: None  # in the reading thread: must not ask
        self._numbers = itertools.count(1)
        self._sending = threading.Lock()
        self._waiting: dict[int, queue.SimpleQueue[tuple[Message, list[int]] | None]] = {}
        self._calls: queue.SimpleQueue[tuple[int, vm.CallDriver] | None] = queue.SimpleQueue()
        self._closed = False
        self.gone = threading.Event()
        self._threads = [threading.Thread(target=target, name=name, daemon=True) for target, name in (
            (self._read, "pvbus-bus"), (self._work, "pvbus-driver"),
        )]  # fmt: skip
        for thread in self._threads:
            thread.start()

    @property
    def closed(self) -> bool:
        """Whether the bus has gone, or we have left it."""
        return self._closed

    def calls_here(self) -> bool:
        """Whether this is the thread that makes the driver's calls."""
        return threading.current_thread() is self._threads[1]

    def hung_up(self) -> bool:
        """Whether the bus has gone, heard of or not."""
        if self._closed:
            return True
        look = select.poll()  # of its own: another thread may look, too
        try:
            look.register(self._sock, select.POLLHUP)
        except ValueError:  # closed meanwhile
            return True
        return bool(look.poll(0))

    def end_calls(self) -> None:
        """Return when the driver's call that is under way, the last one, has ended."""
        self._threads[1].join()

    def ask(self, message: Message, timeout_s: float = CALL_TIMEOUT_S) -> tuple[Message, list[int]]:
        """Call the workqueue; give its answer and what came with it. OSError with its errno; EIO when it has gone, ETIMEDOUT."""
        number = next(self._numbers)
        answer: queue.SimpleQueue[tuple[Message, list[int]] | None] = queue.SimpleQueue()
        self._waiting[number] = answer
        try:
            with self._sending:
                if self._closed:
                    raise OSError(errno.EIO, "the bus has gone")
                send_frame(self._sock, encode(message, number))
            got = answer.get(timeout=timeout_s)
        except queue.Empty:
            raise OSError(errno.ETIMEDOUT, f"{type(message).__name__}: no answer in {timeout_s:.0f} s") from None
        except ConnectionError:  # reset: it died with frames of ours unread
            raise OSError(errno.EIO, "the bus has gone") from None
        finally:
            self._waiting.pop(number, None)
        if got is None:
            raise OSError(errno.EIO, "the bus has gone")
        reply, fds = got
        if isinstance(reply, Failure):
            close_fds(fds)
            raise reply.as_oserror()
        return reply, fds

    def _read(self) -> None:
        while True:
            fds: list[int] = []
            try:
                data, fds = recv_frame(self._sock)
                if not data:
                    break
                frame = decode(data)
            except OSError:
                break
            except WireError as error:  # among them: no descriptor is left here for those of an answer
                close_fds(fds)
                if error.reply:
                    self._deliver(error.request, Failure(errno=error.number, text=str(error)), [])
                continue
            if frame.reply:
                self._deliver(frame.request, frame.message, fds)
            elif isinstance(frame.message, vm.CallDriver):
                self._calls.put((frame.request, frame.message))
            elif isinstance(frame.message, vm.Uevent):
                self.on_uevent(frame.message.env)
        self._closed = True
        self._calls.put(None)
        for waiting in tuple(self._waiting.values()):
            waiting.put(None)
        self.gone.set()
        self._on_gone()

    def _deliver(self, number: int, message: Message, fds: list[int]) -> None:
        waiting = self._waiting.get(number)
        if waiting is not None:
            waiting.put((message, fds))
        else:
            close_fds(fds)

    def _work(self) -> None:
        while (item := self._calls.get()) is not None:
            number, call = item
            reply: Message
            try:
                self._call_driver(call)
                reply = Done()
            except OSError as error:
                reply = Failure(errno=error.errno or errno.EIO, text=error.strerror or "")
            except Exception as error:
                traceback.print_exc()
                reply = Failure(errno=errno.EIO, text=f"{type(error).__name__}: {error}")
            with contextlib.suppress(OSError), self._sending:
                send_frame(self._sock, encode(reply, number, reply=True))

    def forked(self) -> None:
        """In a forked child: let go of the parent's connection without a word on it; nobody reads or calls here."""
        self._closed = True
        self._sending = threading.Lock()  # who held it is not here
        self.gone = threading.Event()
        self.gone.set()
        self._sock.close()

    def close(self) -> None:
        """Hang up: the bus removes this process's drivers."""
        with contextlib.suppress(OSError):
            self._sock.shutdown(2)
        for thread in self._threads:
            if thread is not threading.current_thread():
                thread.join(5.0)
        self._sock.close()
