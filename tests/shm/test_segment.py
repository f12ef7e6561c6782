# SPDX-License-Identifier: Apache-2.0
"""Segments and memfds: what a user who means ill can do to them, and what is left of them."""

import errno
import fcntl
import mmap
import os
import secrets
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from pvbus.shm import segment
from pvbus.shm.layout import LAYOUT_VERSION, MAGIC_DOMAIN, MAGIC_FILE
from pvbus.shm.memory import Memory
from pvbus.shm.segment import LayoutError, Segment


@pytest.fixture
def memfd() -> Iterator[int]:
    fd = segment.sealed_memfd("pvbus-test", 8192)
    yield fd
    os.close(fd)


@pytest.fixture
def name() -> str:
    return f"pvbus-{secrets.token_hex(6)}-m"


@pytest.mark.parametrize("attack", [
    lambda fd: os.ftruncate(fd, 0),
    lambda fd: os.ftruncate(fd, 4096),
    lambda fd: os.ftruncate(fd, 16384),
    lambda fd: os.posix_fallocate(fd, 8192, 4096),
    lambda fd: os.pwrite(fd, b"x", 8192),
    lambda fd: fcntl.fcntl(fd, fcntl.F_ADD_SEALS, fcntl.F_SEAL_WRITE),
])
def test_what_a_user_gets_cannot_be_cut_grown_or_sealed_further(memfd: int, attack: Callable[[int], object]) -> None:
    with pytest.raises(OSError) as caught:
        attack(memfd)

    assert caught.value.errno == errno.EPERM
    assert os.fstat(memfd).st_size == 8192


def test_a_sealed_page_can_be_written_through_its_mapping(memfd: int) -> None:
    Memory(memfd, 8192).store64(8184, 5)

    assert Memory(memfd, 8192).load64(8184) == 5


def test_a_read_only_descriptor_cannot_be_mapped_writable_or_written(memfd: int) -> None:
    readable = segment.read_only(memfd)
    try:
        with pytest.raises(PermissionError):
            Memory(readable, 4096)
        with pytest.raises(PermissionError):
            mmap.mmap(readable, 4096, mmap.MAP_SHARED, mmap.PROT_READ | mmap.PROT_WRITE)
        with pytest.raises(OSError) as caught:
            os.pwrite(readable, b"x", 0)

        assert caught.value.errno == errno.EBADF
        assert Memory(readable, 4096, writable=False).load32(0) == 0
    finally:
        os.close(readable)


def test_the_owner_still_writes_what_others_only_read(memfd: int) -> None:
    readable = segment.read_only(memfd)
    theirs = Memory(readable, 4096, writable=False)
    os.close(readable)

    Memory(memfd, 4096).store32(0, 7)

    assert theirs.load32(0) == 7


def test_a_segment_is_unlinked_when_it_is_closed(name: str) -> None:
    made = Segment(name, 4096)
    path = Path("/dev/shm", name)

    assert path.exists()
    made.close()
    assert not path.exists()
    assert made.memory.closed


def test_a_segment_whose_name_has_gone_already_closes_quietly(name: str) -> None:
    made = Segment(name, 4096)
    Path("/dev/shm", name).unlink()

    made.close()

    assert made.memory.closed


def test_a_second_segment_of_the_same_name_is_refused_and_the_first_lives(name: str) -> None:
    made = Segment(name, 4096)
    try:
        with pytest.raises(FileExistsError):
            Segment(name, 4096)

        made.memory.store32(0, 1)
        assert Path("/dev/shm", name).exists()
    finally:
        made.close()


def test_who_maps_a_segment_and_ends_does_not_take_it_away(name: str) -> None:
    made = Segment(name, 4096)
    program = (
        "import sys\n"
        "from pvbus.shm.memory import Memory\n"
        "m = Memory(int(sys.argv[1]), 4096); m.store32(0, 5)\n"
        "assert 'multiprocessing.resource_tracker' not in sys.modules\n"
    )
    try:
        ended = subprocess.run(
            [sys.executable, "-c", program, str(made.fd)], pass_fds=(made.fd,), check=False, capture_output=True,
            text=True, timeout=30,
        )

        assert (ended.returncode, ended.stderr) == (0, "")
        assert made.memory.load32(0) == 5
        assert Path("/dev/shm", name).exists()
    finally:
        made.close()


def test_the_owner_ends_without_a_word_of_the_resource_tracker(name: str) -> None:
    program = f"from pvbus.shm.segment import Segment\nSegment({name!r}, 4096).close()\n"

    ended = subprocess.run(
        [sys.executable, "-W", "error", "-c", program], check=False, capture_output=True, text=True, timeout=30,
    )

    assert (ended.returncode, ended.stderr) == (0, "")


@pytest.mark.parametrize(("version", "magic"), [
    (LAYOUT_VERSION + 1, MAGIC_FILE), (0, MAGIC_FILE), (LAYOUT_VERSION, MAGIC_DOMAIN), (0, 0),
])
def test_a_page_of_another_kind_or_version_is_refused_with_both_numbers(
    memfd: int, version: int, magic: int
) -> None:
    memory = Memory(memfd, 4096)
    memory.store32(0, version)
    memory.store32(4, magic)

    with pytest.raises(LayoutError) as caught:
        segment.check(memory, MAGIC_FILE, "a file's page")

    for number in (version, hex(magic), LAYOUT_VERSION, hex(MAGIC_FILE)):
        assert str(number) in str(caught.value)


def test_a_stamped_page_is_accepted(memfd: int) -> None:
    memory = Memory(memfd, 4096)

    segment.stamp(memory, MAGIC_FILE)

    segment.check(memory, MAGIC_FILE, "a file's page")


@pytest.mark.parametrize(("text", "read"), [
    ("evtchn:python3", "evtchn:python3"), ("", ""), ("x" * 40, "x" * 31), ("é" * 10, "é" * 10), ("a\0b", "a"),
])
def test_a_name_is_padded_cut_and_read_back(memfd: int, text: str, read: str) -> None:
    memory = Memory(memfd, 4096)
    memory.store64(64 + 32, 2**64 - 1)
    segment.write_text(memory, 64, 32, "z" * 31)

    segment.write_text(memory, 64, 32, text)

    assert segment.read_text(memory, 64, 32) == read
    assert memory.load64(64 + 32) == 2**64 - 1
