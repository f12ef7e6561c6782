# SPDX-License-Identifier: Apache-2.0
"""Memory: widths, alignment, range, and that two processes really share it atomically."""

import os
import threading
from collections.abc import Callable, Iterator
from typing import Any

import pytest

from pvbus.shm._core import Memory
from pvbus.tests.shm.rig import M32, M64, Rig

ROUNDS = 100_000


@pytest.fixture
def fd() -> Iterator[int]:
    made = os.memfd_create("pvbus-test", os.MFD_CLOEXEC)
    os.ftruncate(made, 4096)
    yield made
    os.close(made)


@pytest.mark.parametrize(("width", "top"), [(8, 0xFF), (32, M32), (64, M64)])
def test_a_store_writes_its_width_and_nothing_beside_it(rig: Rig, width: int, top: int) -> None:
    memory = rig.memory(64)
    for at in range(0, 64, 8):
        memory.store64(at, M64)

    getattr(memory, f"store{width}")(8, 0)

    assert getattr(memory, f"load{width}")(8) == 0
    assert memory.load64(8) == M64 & ~top
    assert memory.load64(0) == memory.load64(16) == M64


def test_loads_see_little_endian_parts_of_a_word(rig: Rig) -> None:
    memory = rig.memory(64)
    memory.store64_release(0, 0x1122334455667788)

    assert [memory.load8(0), memory.load8(7), memory.load32(0), memory.load32_acquire(4)] == [
        0x88, 0x11, 0x55667788, 0x11223344,
    ]
    assert memory.load64_acquire(0) == 0x1122334455667788


def test_read_modify_writes_give_the_old_value(rig: Rig) -> None:
    memory = rig.memory(64)
    memory.store64(0, 0b1100)

    assert memory.fetch_or64(0, 0b0011) == 0b1100
    assert memory.fetch_and64(0, 0b0110) == 0b1111
    assert memory.exchange64(0, M64) == 0b0110
    assert memory.exchange8(0, 0) == 0xFF
    assert memory.exchange32(4, 7) == M32
    assert memory.load64(0) == 7 << 32 | 0xFFFFFF00


@pytest.mark.parametrize("width", [32, 64])
def test_compare_exchange_takes_place_only_on_the_expected_value(rig: Rig, width: int) -> None:
    memory = rig.memory(64)
    swap = getattr(memory, f"compare_exchange{width}")

    assert (swap(8, 0, 5), swap(8, 0, 6), swap(8, 5, 7)) == (0, 5, 5)
    assert memory.load64(8) == 7


def test_bits_are_set_and_cleared_once(rig: Rig) -> None:
    memory = rig.memory(64)

    assert [memory.test_and_set_bit(8, 63), memory.test_and_set_bit(8, 63)] == [0, 1]
    assert memory.load64(8) == 1 << 63
    assert [memory.test_and_clear_bit(8, 63), memory.test_and_clear_bit(8, 63)] == [1, 0]


@pytest.mark.parametrize(("name", "width"), [
    ("load8", 1), ("load32", 4), ("load64", 8), ("load32_acquire", 4), ("load64_acquire", 8),
])
def test_offsets_outside_or_unaligned_are_refused(rig: Rig, name: str, width: int) -> None:
    load = getattr(rig.memory(64), name)

    assert load(64 - width) == 0
    for offset in (-1, -width, 64, 64 - width + 1, 2**62):
        with pytest.raises(IndexError):
            load(offset)
    with pytest.raises(OverflowError):
        load(2**64)
    if width > 1:
        with pytest.raises(IndexError):
            load(width // 2)


STORES: list[Callable[[Any], object]] = [
    lambda m: m.store8(0, 1), lambda m: m.store32(0, 1), lambda m: m.store64(0, 1), lambda m: m.store32_release(0, 1),
    lambda m: m.store64_release(0, 1), lambda m: m.exchange8(0, 1), lambda m: m.exchange32(0, 1),
    lambda m: m.exchange64(0, 1), lambda m: m.fetch_or64(0, 1), lambda m: m.fetch_and64(0, 1),
    lambda m: m.compare_exchange32(0, 0, 1), lambda m: m.compare_exchange64(0, 0, 1),
    lambda m: m.test_and_set_bit(0, 0), lambda m: m.test_and_clear_bit(0, 0),
]


@pytest.mark.parametrize("store", STORES)
def test_a_read_only_memory_refuses_every_write(fd: int, store: Callable[[Any], object]) -> None:
    memory = Memory(fd, 4096, writable=False)

    with pytest.raises(TypeError):
        store(memory)

    assert memory.load64(0) == 0


@pytest.mark.parametrize("access", [*STORES, lambda m: m.load8(0), lambda m: m.load64_acquire(0)])
def test_a_closed_memory_refuses_every_access(rig: Rig, access: Callable[[Any], object]) -> None:
    memory = rig.memory(4096)
    memory.close()
    memory.close()

    assert memory.closed
    with pytest.raises(ValueError, match="closed"):
        access(memory)


@pytest.mark.parametrize("arguments", [(), (0,), (0, 1, 2, 3), ("0", 1), (0, "1"), (None, 1), (0, 1.5)])
def test_wrong_arguments_are_type_errors(rig: Rig, arguments: tuple[Any, ...]) -> None:
    with pytest.raises(TypeError):
        rig.memory(64).store32(*arguments)


def test_a_descriptor_that_is_too_short_or_no_descriptor_is_refused(fd: int) -> None:
    with pytest.raises(ValueError, match="4097"):
        Memory(fd, 4097)
    for size in (0, -1):
        with pytest.raises(ValueError, match="bytes"):
            Memory(fd, size)
    with pytest.raises((ValueError, OSError)):
        Memory(-1, 4096)


def in_a_child(act: Callable[[], None]) -> int:
    """Fork a process that acts and ends; give its pid."""
    pid = os.fork()
    if pid == 0:
        try:
            act()
            os._exit(0)
        finally:
            os._exit(1)
    return pid


def succeeded(pid: int) -> bool:
    return os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) == 0


def start_line(memory: Memory, at: int) -> None:
    """Wait for the other process, so that both really run at once; bounded."""
    memory.fetch_or64(at, 1 << (1 if os.getpid() == memory.load32(2048) else 0))
    for _ in range(50_000_000):
        if memory.load64(at) == 3:
            return
    raise TimeoutError


def test_two_processes_lose_no_compare_exchange(fd: int) -> None:
    memory = Memory(fd, 4096)
    memory.store32(2048, os.getpid())

    def count() -> None:
        mapped = Memory(fd, 4096)
        start_line(mapped, 1024)
        for _ in range(ROUNDS):
            seen = mapped.load64(0)
            while (found := mapped.compare_exchange64(0, seen, seen + 1)) != seen:
                seen = found

    child = in_a_child(count)
    count()

    assert succeeded(child)
    assert memory.load64(0) == 2 * ROUNDS


def test_two_processes_lose_no_bit_of_a_word(fd: int) -> None:
    memory = Memory(fd, 4096)
    memory.store32(2048, os.getpid())

    def flip(mine: int) -> None:
        mapped = Memory(fd, 4096)
        start_line(mapped, 1024)
        for i in range(ROUNDS):
            bit = 1 << (mine + 2 * (i % 32))
            assert mapped.fetch_or64(0, bit) & bit == 0
            assert mapped.fetch_and64(0, ~bit) & bit == bit

    child = in_a_child(lambda: flip(0))
    flip(1)

    assert succeeded(child)
    assert memory.load64(0) == 0


def test_another_process_never_sees_a_torn_store(fd: int) -> None:
    memory = Memory(fd, 4096)
    values = (0x00000000, 0xFFFFFFFF, 0x55555555, 0xAAAAAAAA)

    def write() -> None:
        mapped = Memory(fd, 4096)
        for i in range(ROUNDS):
            mapped.store32(0, values[i % 4])
        mapped.store32(8, 1)

    child = in_a_child(write)
    seen = set()
    while not memory.load32_acquire(8):
        seen.add(memory.load32(0))

    assert succeeded(child)
    assert seen <= set(values)


def test_threads_lose_no_compare_exchange(fd: int) -> None:
    memory = Memory(fd, 4096)

    def count() -> None:
        for _ in range(10_000):
            seen = memory.load32(0)
            while (found := memory.compare_exchange32(0, seen, seen + 1)) != seen:
                seen = found

    threads = [threading.Thread(target=count) for _ in range(3)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(30)

    assert memory.load32(0) == 30_000
