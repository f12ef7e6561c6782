# SPDX-License-Identifier: Apache-2.0
"""A process's way to a domain's bus, across the deaths of the workqueue that runs it: one connection after the other.

When a connection ends, a thread lets go of what hung on it, connects to the heir, and hands the new connection over. It has ended
for good when the machine stops, when this process leaves or was cut off (the same workqueue still runs), or when nobody answers.
"""

from __future__ import annotations

import errno
import threading
from typing import TYPE_CHECKING

from pvbus.actors.client.bus import CALL_TIMEOUT_S, BusConnection

if TYPE_CHECKING:
    import socket
    from collections.abc import Callable

    from pvbus.actors.runtime import vmbus_messages as vm
    from pvbus.actors.runtime.wire import Message

DEATHS_MAX = 3  # under one call: it may be what they die of


class BusLink:
    """The way to one bus.

    `connect` gives a socket and which workqueue it leads to. `died` is called where the socket is read and must not wait,
    `let_go` and then `come_back` in a thread of their own.
    """

    def __init__(
        self, connect: Callable[[], tuple[socket.socket, int]], call_driver: Callable[[vm.CallDriver], None], *,
        died: Callable[[], None], let_go: Callable[[], None], come_back: Callable[[BusConnection], None],
    ) -> None:  # fmt: skip
        self._connect, self._call_driver = connect, call_driver
        self._died, self._let_go, self._come_back = died, let_go, come_back
        self._changed = threading.Condition()
        self._left = False
        self._reviver: threading.Thread | None = None
        self.gone = threading.Event()
        with self._changed:  # its end is heard behind our beginning
            sock, self.generation = connect()
            self.connection = BusConnection(sock, call_driver, self._ended)

    @property
    def closed(self) -> bool:
        """Whether it has ended for good."""
        return self._left or self.gone.is_set()

    def calls_here(self) -> bool:
        """Whether the caller is a driver's probe, remove or shutdown."""
        return self.connection.calls_here() or threading.current_thread() is self._reviver

    def ask(self, message: Message, *, again: bool = False) -> tuple[Message, list[int]]:
        """Call the workqueue, or its heir once that is up. EIO for a call that it dies under: it may have been made.

        `again`: make it again then; what it did with the dead one is gone, and twice is as good as once.
        """
        if self.calls_here():  # whom the heir's coming waits for
            return self.connection.ask(message)
        for _ in range(DEATHS_MAX):
            self._await(lambda: not self.connection.closed)
            connection = self.connection
            try:
                return connection.ask(message)
            except OSError as error:
                if not again or error.errno != errno.EIO or not connection.hung_up():
                    raise
            connection.gone.wait(CALL_TIMEOUT_S)
        raise OSError(errno.EIO, f"the bus has died {DEATHS_MAX} times under this call")

    def await_heir(self) -> None:
        """Return when nothing of a death is left to do here: connected, drivers registered again. ETIMEDOUT."""
        if self.connection.hung_up():
            self.connection.gone.wait(CALL_TIMEOUT_S)  # it is about to be read
        self._await(lambda: self._reviver is None and not self.connection.closed)

    def _await(self, condition: Callable[[], bool]) -> None:
        with self._changed:
            if not self._changed.wait_for(lambda: self.closed or condition(), CALL_TIMEOUT_S):
                raise OSError(errno.ETIMEDOUT, f"the bus has no heir within {CALL_TIMEOUT_S:.0f} s")

    # ---- deaths

    def _ended(self) -> None:
        self._died()
        with self._changed:
            if self._left:
                self.gone.set()
                return
            before = self._reviver
            self._reviver = threading.Thread(target=self._revive, args=(before,), name="pvbus-bus-heir", daemon=True)
            self._reviver.start()

    def _revive(self, before: threading.Thread | None) -> None:
        if before is not None:
            before.join()  # the heir died while its coming was under way: one after the other
        dead = self.connection
        dead.end_calls()
        try:
            self._let_go()
            if self._connect_again():
                self._come_back(self.connection)
        finally:
            dead.close()
            with self._changed:
                if self._reviver is threading.current_thread():
                    self._reviver = None
                self._changed.notify_all()

    def _connect_again(self) -> bool:
        try:
            if self._left:
                raise ConnectionAbortedError  # by us
            sock, generation = self._connect()
        except OSError:  # no machine any more, or none that lets us in: `gone` says so to whoever looks
            self._end()
            return False
        with self._changed:
            if self.closed or generation == self.generation:
                sock.close()
            else:
                self.generation = generation
                self.connection = BusConnection(sock, self._call_driver, self._ended)
                self._changed.notify_all()
                return True
        self._end()
        return False

    def _end(self) -> None:
        with self._changed:
            self.gone.set()
            self._changed.notify_all()

    # ---- leaving

    def forked(self) -> None:
        """In a forked child: it is the parent's, and whoever held our locks is not here."""
        self._changed = threading.Condition()
        self._left, self._reviver = True, None
        self.gone = threading.Event()
        self.gone.set()
        self.connection.forked()

    def close(self) -> None:
        """Leave: the bus removes this process's drivers."""
        with self._changed:
            self._left = True
            self._changed.notify_all()
            reviver = self._reviver
        self.connection.close()
        for thread in (reviver, self._reviver):
            if thread is not None and thread is not threading.current_thread():
                thread.join(CALL_TIMEOUT_S)
