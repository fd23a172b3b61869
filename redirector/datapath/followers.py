"""Following the datapath's events: each follower has a ring buffer of its own in one of the slots.

    ROOT/followers/N    held locked (flock(2)) by the process whose slot it is

A lock goes with its process, however that ends, so a slot that nobody holds is free; whoever comes
next takes its ring buffer out, and the programs write to it no more.
"""

import contextlib
import fcntl
import os
from collections.abc import Iterator
from pathlib import Path

from redirector.datapath import libbpf
from redirector.datapath.layout import MAX_FOLLOWERS, Event, EventRecord, packed
from redirector.datapath.ring import RingBuffer
from redirector.errors import DatapathError, InputError

#: Bytes of a follower's ring buffer: some 30,000 events.
RING_SIZE = 1 << 22


class Followers:
    """The slots of the datapath whose maps are pinned in `maps`.

    Methods raise DatapathError, which names the map and what the kernel refused.
    """

    def __init__(self, maps: Path, identity: int) -> None:
        """`identity`: the inode number of `maps`, which tells one load from the next."""
        self._maps = maps
        self._identity = identity
        self._slots = maps.parent / "followers"

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Followers) and (self._maps, self._identity) == (
            other._maps,
            other._identity,
        )

    def __hash__(self) -> int:
        return hash((self._maps, self._identity))

    @contextlib.contextmanager
    def follow(self) -> Iterator["Follower"]:
        """Follow until leaving. InputError when all slots are taken."""
        with self._alone(), contextlib.ExitStack() as taken:
            number, lock = self._take()
            taken.callback(os.close, lock)
            follower = self._start(number)
            taken.callback(self._stop, number, follower)
            undo = taken.pop_all()
        with undo:
            yield follower

    def sweep(self) -> int:
        """Free the slots of followers that were killed; how many live ones there are."""
        if not self._slots.is_dir():
            return 0
        with self._alone():
            return MAX_FOLLOWERS - len(self._free())

    def lost(self) -> int:
        """How many events found no room, of all followers that ever were."""
        with self._map("lost_events") as fd:
            return sum(_lost(fd, number) for number in range(MAX_FOLLOWERS))

    @contextlib.contextmanager
    def _alone(self) -> Iterator[None]:
        """Keep others from changing slots until leaving."""
        try:
            self._slots.mkdir(mode=0o700, exist_ok=True)
            fd = os.open(self._slots, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
        except FileNotFoundError:
            raise DatapathError(f"{self._maps}: the programs were unloaded meanwhile") from None
        try:
            fcntl.flock(fd, fcntl.LOCK_EX)
            yield
        finally:
            os.close(fd)

    def _free(self) -> list[int]:
        """The slots that no process holds, cleared."""
        free = []
        for number in range(MAX_FOLLOWERS):
            lock = self._lock(number)
            if lock is not None:
                os.close(lock)
                self._clear(number)
                free.append(number)
        return free

    def _take(self) -> tuple[int, int]:
        for number in self._free():
            lock = self._lock(number)
            if lock is not None:
                return number, lock
        raise InputError(
            f"{MAX_FOLLOWERS} processes follow the flows already; end one of them first"
        )

    def _lock(self, number: int) -> int | None:
        path = self._slots / str(number)
        path.mkdir(mode=0o700, exist_ok=True)
        fd = os.open(path, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
        try:
            fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            os.close(fd)
            return None
        return fd

    def _start(self, number: int) -> "Follower":
        try:
            ring = RingBuffer(RING_SIZE, packed(Event))
        except OSError as error:
            raise DatapathError(f"following: {error.strerror}") from error
        try:
            with self._map("lost_events") as fd:
                follower = Follower(number, ring, os.dup(fd))
        except BaseException:
            ring.close()
            raise
        try:
            with self._map("followers") as fd:
                libbpf.map_update(fd, _key(number), ring.fd.to_bytes(4, "little"))
            self._mark(number, used=True)
        except BaseException:
            follower.close()
            raise
        return follower

    def _stop(self, number: int, follower: "Follower") -> None:
        # Not when the programs were unloaded meanwhile: their maps are gone.
        with contextlib.suppress(DatapathError), self._alone():
            self._clear(number)
        follower.close()

    def _clear(self, number: int) -> None:
        self._mark(number, used=False)
        with self._map("followers") as fd:
            libbpf.map_delete(fd, _key(number))

    def _mark(self, number: int, *, used: bool) -> None:
        with self._map("following") as fd:
            before = int.from_bytes(libbpf.map_lookup(fd, bytes(4), 4) or bytes(4), "little")
            after = before | 1 << number if used else before & ~(1 << number)
            if after != before:
                libbpf.map_update(fd, bytes(4), after.to_bytes(4, "little"))

    @contextlib.contextmanager
    def _map(self, name: str) -> Iterator[int]:
        try:
            with libbpf.opened(self._maps / name) as fd:
                yield fd
        except OSError as error:
            raise DatapathError(f"map {name}: {error.strerror or error}") from error


class Follower:
    """One reader of events. Made by `Followers.follow`."""

    def __init__(self, number: int, ring: RingBuffer, lost_events: int) -> None:
        """`lost_events`: a descriptor of the map, which may be unpinned meanwhile."""
        self._number = number
        self._ring = ring
        self._lost_events = lost_events
        self._lost = _lost(lost_events, number)

    def read(self) -> Iterator[list[EventRecord]]:
        """The events since the last call, oldest first, some at a time.

        The programs do not wake who waits for them.
        """
        for records in self._ring.read():
            yield [EventRecord._make(record) for record in records]

    def lost(self) -> int:
        """How many events found no room in this follower's buffer since the last call."""
        before, self._lost = self._lost, _lost(self._lost_events, self._number)
        return self._lost - before

    def close(self) -> None:
        """Give the buffer back."""
        self._ring.close()
        os.close(self._lost_events)


def _lost(fd: int, number: int) -> int:
    return int.from_bytes(libbpf.map_lookup(fd, _key(number), 8) or bytes(8), "little")


def _key(number: int) -> bytes:
    return number.to_bytes(4, "little")
