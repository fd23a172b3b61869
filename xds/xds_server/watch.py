"""Notices that manifests changed: which files, and when."""

import asyncio
import time
from collections.abc import AsyncGenerator
from contextlib import aclosing, suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import NamedTuple

from watchfiles import awatch

from xds_server.sources.files import SUFFIXES
from xds_server.sources.source import Change

#: A change is taken in once the directory was quiet for _STEP_MS, after _DEBOUNCE_MS at the latest.
_DEBOUNCE_MS = 50
_STEP_MS = 20
#: How often the directory is compared without any notice (started too late, remote file system).
_COMPARE_EVERY_MS = 1000
#: A shorter or missing file may be one that is about to be written: wait until all has been quiet
#: for so long before believing it, or for _SETTLE_MOST_S.
_SETTLE_S = 0.25
_SETTLE_MOST_S = 3.0
_RETRY_S = 0.25


class FileState(NamedTuple):
    """Tells one state of a file from another."""

    device: int
    inode: int
    size: int
    modified_ns: int
    changed_ns: int


@dataclass(frozen=True)
class Listing:
    """The manifests in a directory; `directory` is None when it cannot be read. `at` is when it was
    looked at."""

    directory: FileState | None
    files: dict[str, FileState]
    at: float = field(default=0.0, compare=False)


def listing(directory: Path) -> Listing:
    """What the directory holds now."""
    files, at = {}, time.time()
    try:
        own = _state(directory)
        for path in directory.iterdir():
            if path.suffix in SUFFIXES and not path.name.startswith("."):
                with suppress(FileNotFoundError):  # renamed away since it was listed
                    files[path.name] = _file_state(path)
    except OSError:
        return Listing(None, {}, at)
    return Listing(own, files, at)


def _file_state(path: Path) -> FileState:
    """A link that leads to nothing that can be looked at is told by itself."""
    try:
        return _state(path)
    except OSError:
        return _state(path, follow_links=False)


def _state(path: Path, *, follow_links: bool = True) -> FileState:
    found = path.stat(follow_symlinks=follow_links)
    return FileState(
        found.st_dev, found.st_ino, found.st_size, found.st_mtime_ns, found.st_ctime_ns
    )


def compare(old: Listing, new: Listing, now: float) -> Change | None:
    """What changed between two listings; None when nothing did."""
    if old.files == new.files and (old.directory is None) == (new.directory is None):
        return None
    if new.directory is None:
        return Change("directory vanished", now)
    added = sorted(new.files.keys() - old.files.keys())
    removed = sorted(old.files.keys() - new.files.keys())
    changed = sorted(n for n in new.files.keys() & old.files.keys() if new.files[n] != old.files[n])
    words = [("changed", changed), ("added", added), ("removed", removed)]
    reason = ", ".join(f"{word} {' '.join(names)}" for word, names in words if names)
    # A rename keeps the file's mtime but moves its ctime; a removal shows on the directory only.
    moments = [new.files[name].changed_ns for name in (*changed, *added)]
    if removed:
        moments.append(new.directory.modified_ns)
    at = max(moments, default=int(now * 1e9)) / 1e9
    # What a link leads to now may have been written long ago.
    return Change(reason or "directory is back", max(min(at, now), old.at))


def unsettled(old: Listing, new: Listing) -> bool:
    """A file is gone or became shorter, as happens in the middle of a save: the beginning of a
    policy may well be a policy that refuses less."""
    return any(
        name not in new.files or new.files[name].size < state.size
        for name, state in old.files.items()
    )


async def changes(directory: Path, seen: Listing) -> AsyncGenerator[Change, None]:
    """Every change from `seen` on, as long as the caller asks for more.

    Survives that the directory is removed and made again. What is missing of it by then is awaited
    as any other missing file.
    """
    look = _Look(directory, seen)
    while True:
        try:
            watcher = awatch(
                directory,
                watch_filter=None,
                debounce=_DEBOUNCE_MS,
                step=_STEP_MS,
                rust_timeout=_COMPARE_EVERY_MS,
                yield_on_timeout=True,
                recursive=False,
            )
            watched = listing(directory).directory
            async with aclosing(watcher):
                async for _ in watcher:
                    if change := await look.again():
                        yield change
                    if not _same(watched, look.seen.directory):
                        break  # the watch is on a directory that is no longer there
        except (OSError, RuntimeError):
            # No directory, or no watch to be had (the user's inotify limit): look by ourselves.
            if change := await look.again():
                yield change
        await asyncio.sleep(_RETRY_S)


class _Look:
    """What was seen of a directory last, and when it could last be read."""

    def __init__(self, directory: Path, seen: Listing) -> None:
        self._directory = directory
        self.seen = self._whole = seen

    async def again(self) -> Change | None:
        """What has changed since."""
        found = await _settled(self._directory, self._whole)
        change = compare(self.seen, found, time.time())
        self.seen = found
        if found.directory:
            self._whole = found
        return change


async def _settled(directory: Path, seen: Listing) -> Listing:
    before, found = None, listing(directory)
    latest = time.monotonic() + _SETTLE_MOST_S
    while found != before and unsettled(seen, found) and time.monotonic() < latest:
        await asyncio.sleep(_SETTLE_S)
        before, found = found, listing(directory)
    return found


def _same(one: FileState | None, other: FileState | None) -> bool:
    return (
        one is not None
        and other is not None
        and (one.device, one.inode) == (other.device, other.inode)
    )
