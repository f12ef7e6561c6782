# SPDX-License-Identifier: Apache-2.0
"""The workqueue's process: channel memory that finds no room, and calls that a hypervisor's death ends."""

from __future__ import annotations

import errno
import socket
import sys
from pathlib import Path
from typing import Any

import pytest

from pvbus.actors.runtime import vmbus_messages as vm
from pvbus.actors.runtime.wire import Message, decode, recv_frame
from pvbus.actors.workqueue.process import WorkqueueProcess
from pvbus.actors.workqueue.rings import RingMemories
from pvbus.shm.hyperv import PAGE

sys.path.insert(0, str(Path(__file__).parents[1] / "runtime"))
from rig import Rig, descriptors_left  # type: ignore[import-not-found]


def open_fds() -> int:
    return len(list(Path("/proc/self/fd").iterdir()))


@pytest.mark.parametrize("room", [0, 1, 2])
def test_channel_memory_that_finds_no_room_leaves_nothing_open(room: int) -> None:
    memories = RingMemories(lambda _memory: None)
    before = open_fds()
    for _ in range(3):
        with descriptors_left(room), pytest.raises(OSError) as refused:
            memories.make(2 * PAGE)
        assert refused.value.errno == errno.EMFILE
    assert (open_fds(), memories.all) == (before, {})
    memories.make(2 * PAGE).free()
    assert open_fds() == before


class _Hypervisors:
    """A workqueue's half that asks, a hypervisor that dies, and its heir."""

    def __init__(self, rig: Any) -> None:
        self.rig = rig
        self.process: Any = WorkqueueProcess.__new__(WorkqueueProcess)
        self.process.orphans = []
        self.process.hypervisor, self.dead = rig.connect("hypervisor")
        self.heirs, self.heir = rig.connect("heir")
        self.answers: list[Message] = []

    def ask(self, message: Message) -> None:
        self.process._ask_hypervisor(message, (), self.answers.append)

    def at_heir(self) -> list[Message]:
        found = []
        while True:
            try:
                found.append(decode(recv_frame(self.heir, socket.MSG_DONTWAIT)[0]).message)
            except BlockingIOError:
                return found


def test_what_was_asked_of_the_dead_and_fails_behind_the_heir_s_coming_is_asked_of_the_heir() -> None:
    rig = Rig()
    both = _Hypervisors(rig)
    post = vm.PostMessage(connection=1, type=1, payload=b"x")
    both.dead.close()
    both.ask(post)
    both.process.hypervisor = both.heirs  # as Rewire does, before the loop says that the call has failed
    both.ask(vm.DropMemory(frame=7))
    both.at_heir()
    rig.pump()
    assert (both.at_heir(), both.process.orphans, both.answers) == ([post], [], [])
    rig.inbox.close()
    for sock in rig.sockets:
        sock.close()


def test_memory_is_not_taken_back_from_an_heir_that_may_have_been_given_it_anew() -> None:
    rig = Rig()
    both = _Hypervisors(rig)
    post = vm.PostMessage(connection=1, type=1, payload=b"x")
    for message in (vm.DropMemory(frame=7), post, vm.GuestMemory(frame=7, pages=2)):
        both.ask(message)
    both.dead.close()
    rig.pump()
    assert [message for message, _fds, _then in both.process.orphans] == [post]
    rig.inbox.close()
    for sock in rig.sockets:
        sock.close()
