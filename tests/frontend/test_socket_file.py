# SPDX-License-Identifier: Apache-2.0
"""The injected socket: what is put into it, when, and how much."""

from __future__ import annotations

import errno
import os
from collections.abc import Iterator
from typing import Any, cast

import pytest

from pvbus.actors.client.frontend import FrontendFile
from pvbus.view.seccomp import files
from pvbus.view.seccomp.files import SocketFile, whole


class Ring:
    """Stands for the machine's file: what has come lies in `entries`, what is written back in `written`."""

    def __init__(self) -> None:
        self.entries = b""
        self.written = b""
        self.error = 0

    def ready(self) -> bool:
        return bool(self.entries or self.error)

    def read(self, count: int) -> bytes:
        if self.error:
            raise OSError(self.error, os.strerror(self.error))
        data, self.entries = self.entries[:count], self.entries[count:]
        return data

    def write(self, data: bytes) -> int:
        self.written += data
        return len(data)


class Rig:
    def __init__(self, mode: int = os.O_RDWR) -> None:
        self.ring = Ring()
        self.file = SocketFile(cast("FrontendFile", self.ring), mode, nonblock=True)
        self.user = self.file.theirs.dup()
        self.user.setblocking(False)
        self.file.handed_over()

    def comes(self, data: bytes) -> None:
        self.ring.entries += data
        self.file.pump()

    def reads(self, count: int = 4096) -> bytes:
        """Read as the user does; then the loop hears of it."""
        try:
            data = self.user.recv(count)
        except BlockingIOError:
            data = b"EAGAIN"
        self.file.fill()
        return data


@pytest.fixture
def rig() -> Iterator[Rig]:
    made = Rig()
    yield made
    made.user.close()
    made.file.ours.close()


def ports(*numbers: int) -> bytes:
    return b"".join(number.to_bytes(4, "little") for number in numbers)


def test_a_read_gives_all_that_has_come(rig: Rig) -> None:
    rig.comes(ports(1, 2))
    rig.comes(ports(3))

    assert rig.reads() == ports(1, 2, 3)
    assert rig.reads() == b"EAGAIN"


def test_who_listens_for_edges_has_the_socket_filled_only_when_it_is_empty(rig: Rig) -> None:
    rig.file.edges = True
    rig.comes(ports(1))
    rig.comes(ports(2, 3))

    assert [rig.reads(), rig.reads(), rig.reads()] == [ports(1), ports(2, 3), b"EAGAIN"]


def test_who_waits_for_an_odd_length_finds_one_port_at_a_time(rig: Rig) -> None:
    rig.file.one_by_one = True
    rig.comes(ports(1, 2))

    assert [rig.reads(6), rig.reads(6), rig.reads(6)] == [ports(1), ports(2), b"EAGAIN"]


def test_no_more_than_a_page_lies_there(rig: Rig) -> None:
    rig.comes(ports(*range(1500)))

    assert [len(rig.reads(1 << 20)), len(rig.reads(1 << 20))] == [4096, 1500 * 4 - 4096]


def test_a_user_that_lets_too_much_lie_is_hung_up_on(rig: Rig, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(files, "BACKLOG_BYTES_MAX", 6000)
    rig.comes(ports(*range(1024)))
    before = rig.file.hung_up

    rig.comes(ports(*range(2048)))

    assert (before, rig.file.hung_up) == (False, True)
    assert len(rig.reads()) == 4096
    assert rig.reads() == b""


@pytest.mark.parametrize("error", [errno.EIO, errno.EFBIG])
def test_when_the_machine_s_file_fails_the_user_reads_what_lies_there_and_the_end(rig: Rig, error: int) -> None:
    rig.comes(ports(1))
    rig.ring.error = error
    rig.file.pump()

    assert [rig.reads(), rig.reads()] == [ports(1), b""]
    rig.user.send(ports(1))
    assert rig.file.take_writes()


def test_what_the_user_writes_is_written_back_and_its_close_is_heard(rig: Rig) -> None:
    rig.user.send(ports(1, 2))
    rig.user.send(ports(3))
    assert rig.file.take_writes()
    rig.user.send(ports(4))
    rig.user.close()

    assert not rig.file.take_writes()
    assert rig.ring.written == ports(1, 2, 3, 4)


def test_writes_to_a_file_that_is_read_only_go_nowhere() -> None:
    rig = Rig(os.O_RDONLY)
    rig.user.send(ports(1))

    assert rig.file.take_writes()
    assert rig.ring.written == b""
    rig.user.close()
    rig.file.ours.close()


def test_during_a_reset_nothing_is_handed_out(rig: Rig) -> None:
    rig.file.paused = True
    rig.comes(ports(1))

    assert rig.reads() == b"EAGAIN"
    assert rig.ring.entries == ports(1)


@pytest.mark.parametrize(("count", "rounded"), [(0, 0), (3, 0), (4, 4), (7, 4), (4096, 4096), (4097, 4096), (1 << 20, 4096)])
def test_lengths_are_rounded_as_the_driver_does(count: int, rounded: int) -> None:
    assert whole(count) == rounded


def test_a_vector_that_is_too_long_is_refused() -> None:
    with pytest.raises(OSError, match="1025 segments"):
        files.segments_of(os.getpid(), 0, 1025)
    with pytest.raises(OSError, match="Bad address"):
        files.segments_of(os.getpid(), 8, 1)
    empty: Any = files.segments_of(os.getpid(), 8, 0)
    assert empty == []
