"""A BPF ring buffer of this process's own, read where it lies (kernel/bpf/ringbuf.c).

libbpf's reader calls back for each record, which costs Python more than unpacking it.
"""

import mmap
import os
import struct
from collections.abc import Iterator
from threading import Lock
from typing import Any

from redirector.datapath import libbpf

#: struct bpf_ringbuf_hdr, bytes; the first four are the record's length, and more than that as long
#: as it is being written (BPF_RINGBUF_BUSY_BIT).
_HEADER = 8
#: Records that `read` takes at once: they stay in a CPU's cache until they have been dealt with.
MOST = 1024


class RingBuffer:
    """Programs write records of one kind, `read` takes them. For one thread.

    `fd` is the map's descriptor. OSError when the kernel refuses.
    """

    def __init__(self, size: int, record: str) -> None:
        """`size` in bytes, a power of two and a multiple of the page size.

        `record`: a record's fields as the `struct` module has them, without a byte order.
        """
        self._length = struct.calcsize(f"={record}")
        # Records begin at multiples of eight.
        self._row = struct.Struct(f"={_HEADER}x{record}{-self._length % 8}x")
        self._mask, self._most = size - 1, MOST * self._row.size
        self._lock = Lock()
        page = mmap.PAGESIZE
        self.fd = libbpf.ring_buffer_create(size)
        try:
            written = mmap.mmap(self.fd, page)
            # The data is there twice, one behind the other, so that no record has a gap.
            read = mmap.mmap(self.fd, page + 2 * size, prot=mmap.PROT_READ, offset=page)
        except BaseException:
            os.close(self.fd)
            raise
        self._consumed = memoryview(written).cast("Q")
        self._produced = memoryview(read).cast("Q")
        self._data = memoryview(read)[page:]

    def read(self) -> Iterator[list[tuple[Any, ...]]]:
        """The records that have come by now, each as its fields, MOST or fewer at a time."""
        consumed, produced = self._consumed[0], self._produced[0]
        while consumed < produced:
            self._order()
            start, size = consumed & self._mask, min(produced - consumed, self._most)
            rows = self._data[start : start + size]
            lengths = rows.cast("I")[:: self._row.size // 4].tolist()
            whole = lengths.count(self._length)
            if whole < len(lengths):
                # Another CPU has not come to its end yet, though later ones may have.
                whole = next(n for n, length in enumerate(lengths) if length != self._length)
                produced = consumed + whole * self._row.size
            self._order()
            records = list(self._row.iter_unpack(rows[: whole * self._row.size]))
            self._order()
            consumed += whole * self._row.size
            self._consumed[0] = consumed
            if records:
                yield records

    def _order(self) -> None:
        """What comes before, other CPUs see before what comes after (as smp_mb() does it)."""
        with self._lock:
            pass

    def close(self) -> None:
        """Give the buffer back; the kernel frees it when no map holds it either."""
        for view in (self._consumed, self._produced, self._data):
            view.release()
        os.close(self.fd)
