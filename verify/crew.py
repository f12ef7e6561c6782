# SPDX-License-Identifier: Apache-2.0
"""The coordinator's side of its user processes: start, hear, tell, kill.

Each user is a subprocess that writes one JSON object a line; what they say is collected here, in order, and
a violation goes to the common list at once. Nothing here knows what the users do.
"""

from __future__ import annotations

import json
import os
import select
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from typing import Any

from pvbus.verify.launch import die_with_parent

LINE_BYTES_MAX = 1 << 16  # the longest line is a list of ports: 4095 of them are 24 KB
HEAR_S = 0.02  # one turn of waiting for anyone to speak


class CrewError(RuntimeError):
    """A user process ended, or did not answer in time."""


class User:
    """A user process, and what it has said and nobody has taken yet."""

    def __init__(self, job: dict[str, Any]) -> None:
        self.name: str = job["name"]
        self.said: list[dict[str, Any]] = []
        self.ended = False
        self._rest = b""
        self.process = subprocess.Popen(
            [sys.executable, "-m", "pvbus.verify.users", json.dumps(job)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            pass_fds=[job["fd"]],
            preexec_fn=die_with_parent(signal.SIGKILL),  # noqa: PLW1509 -- two system calls
        )
        if self.process.stdin is None or self.process.stdout is None:
            raise CrewError(f"{self.name} was started without pipes")
        self._in, self.out = self.process.stdin, self.process.stdout

    def tell(self, word: str) -> None:
        """Send one word; a user that is gone does not mind."""
        try:
            self._in.write(word.encode() + b"\n")
            self._in.flush()
        except BrokenPipeError:
            self.ended = True

    def hear(self) -> None:
        """Take what is there to read."""
        data = os.read(self.out.fileno(), LINE_BYTES_MAX)
        if not data:
            self.ended = True
            return
        *lines, self._rest = (self._rest + data).split(b"\n")
        if len(self._rest) > LINE_BYTES_MAX:
            raise CrewError(f"{self.name} said a line of more than {LINE_BYTES_MAX} bytes")
        self.said += [json.loads(line) for line in lines]

    def has_said(self, key: str) -> bool:
        """Whether a message with `key` waits to be taken."""
        return any(key in message for message in self.said)

    def kill(self) -> None:
        """End it as nobody can refuse, and reap it."""
        self.process.kill()
        self.process.wait()
        self.ended = True
        for stream in (self._in, self.out):
            try:
                stream.close()
            except BrokenPipeError:  # a word it never read
                continue


class Crew:
    """All of them."""

    def __init__(self, violations: list[str]) -> None:
        self.users: list[User] = []
        self.violations = violations

    def start(self, job: dict[str, Any]) -> User:
        """Start a user."""
        user = User(job)
        self.users.append(user)
        return user

    def pump(self, timeout_s: float = HEAR_S) -> None:
        """Wait for anyone to speak, at most so long, and collect."""
        open_users = [user for user in self.users if not user.ended]
        readable, _, _ = select.select([user.out for user in open_users], [], [], timeout_s)
        for user in open_users:
            if user.out in readable:
                user.hear()
                for message in user.said:
                    if "violation" in message:
                        self.violations.append(message["violation"])
                user.said = [message for message in user.said if "violation" not in message]
                if user.ended:
                    self.violations.append(f"{user.name} ended with code {user.process.wait()}")

    def until(self, condition: Callable[[], bool], timeout_s: float) -> bool:
        """Collect until the condition holds; say whether it did in time."""
        deadline = time.monotonic() + timeout_s
        while not condition():
            if time.monotonic() > deadline:
                return False
            self.pump()
        return True

    def answer(self, user: User, key: str, timeout_s: float) -> Any:
        """Wait for a message with `key` from a user, take it, and return its value."""
        self.until(lambda: user.ended or user.has_said(key), timeout_s)
        for message in user.said:
            if key in message:
                user.said.remove(message)
                return message[key]
        silent = f"was silent for {timeout_s:.0f} s"
        state = f"ended with code {user.process.poll()}" if user.ended else silent
        raise CrewError(f"{user.name} {state} when it should have said '{key}'")

    def dismiss(self, user: User) -> None:
        """Kill one and forget it."""
        user.kill()
        self.users.remove(user)

    def close(self) -> None:
        """Kill all that is left."""
        for user in list(self.users):
            self.dismiss(user)
