"""A ring buffer's memory, which a file stands for: what was written comes out whole, in order."""

import mmap
import os
import struct
from collections.abc import Iterator

import pytest

from redirector.datapath import libbpf
from redirector.datapath.ring import MOST, RingBuffer

PAGE = mmap.PAGESIZE
SIZE = 16 * PAGE
#: 13 bytes: header and padding make it 24.
FIELDS, LENGTH, ROW = "QI1s", 13, 24
BUSY = 1 << 31


class Kernel:
    """Writes as kernel/bpf/ringbuf.c does; a file has no data twice, so it writes it twice."""

    def __init__(self) -> None:
        self.fd = os.memfd_create("ring")
        os.ftruncate(self.fd, 2 * PAGE + 2 * SIZE)
        self._memory = mmap.mmap(self.fd, 0)
        self.produced = 0

    @property
    def consumed(self) -> int:
        return int.from_bytes(self._memory[:8], "little")

    def write(self, number: int, *, busy: bool = False) -> int:
        assert self.produced + ROW - self.consumed <= SIZE
        at, self.produced = self.produced, self.produced + ROW
        self.header(at, busy=busy)
        self._data(at + 8, struct.pack("=QI1s", number, number % 7, b"x"))
        self._memory[PAGE : PAGE + 8] = self.produced.to_bytes(8, "little")
        return at

    def header(self, at: int, *, busy: bool) -> None:
        self._data(at, struct.pack("=II", LENGTH | (BUSY if busy else 0), 3))

    def _data(self, at: int, content: bytes) -> None:
        for offset, byte in enumerate(content):
            place = (at + offset) % SIZE
            for copy in (0, SIZE):
                self._memory[2 * PAGE + copy + place] = byte


@pytest.fixture
def kernel(monkeypatch: pytest.MonkeyPatch) -> Kernel:
    made = Kernel()
    monkeypatch.setattr(libbpf, "ring_buffer_create", lambda _size: made.fd)
    return made


@pytest.fixture
def ring(kernel: Kernel) -> Iterator[RingBuffer]:
    made = RingBuffer(SIZE, FIELDS)
    assert made.fd == kernel.fd
    yield made
    made.close()


def numbers(ring: RingBuffer) -> list[int]:
    return [number for records in ring.read() for number, _, _ in records]


def test_records_come_whole_and_in_order_round_and_round(kernel: Kernel, ring: RingBuffer) -> None:
    assert numbers(ring) == []
    first = 0
    for count in (1, SIZE // ROW, 1, SIZE // ROW - 1, 700, 700, 2000):
        for number in range(first, first + count):
            kernel.write(number)
        records = [record for batch in ring.read() for record in batch]
        assert records == [(n, n % 7, b"x") for n in range(first, first + count)]
        assert kernel.consumed == kernel.produced
        first += count


def test_only_so_many_at_a_time(kernel: Kernel, ring: RingBuffer) -> None:
    for number in range(MOST + 1):
        kernel.write(number)
    assert [len(batch) for batch in ring.read()] == [MOST, 1]


def test_one_that_is_being_written_is_waited_for(kernel: Kernel, ring: RingBuffer) -> None:
    kernel.write(1)
    at = kernel.write(2, busy=True)
    kernel.write(3)
    assert numbers(ring) == [1]
    assert numbers(ring) == []
    kernel.header(at, busy=False)
    assert numbers(ring) == [2, 3]
    assert kernel.consumed == kernel.produced


def test_what_comes_meanwhile_is_left_for_the_next_call(kernel: Kernel, ring: RingBuffer) -> None:
    kernel.write(1)
    for _records in ring.read():
        kernel.write(2)
    assert numbers(ring) == [2]
