"""A table of the API server's objects of one kind, kept by LIST and WATCH.

The table changes only by what the server says of its objects: a complete list, or an event. Broken
connections, errors and garbage leave it as it is; the list or the watch is tried again.
"""

import random
import threading
import time
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import Any, Generic, Protocol, TypeVar

from redirector.apiserver.client import JSON, ApiError, Client
from redirector.errors import ClusterError

#: Objects on a page of a list, unless told otherwise: bounds the memory that reading one takes.
PAGE = 50
#: A watch is asked to end after this many seconds and up to twice as many, as client-go asks.
WATCH_SECONDS = 300.0
GONE = 410
NOT_FOUND = 404
#: How often a kind that the server does not have is looked for, in seconds.
MISSING_SECONDS = 10.0
#: After so many failed watches in a row, what we know may be of another time (a restored etcd).
MOST_FAILURES = 3


class Named(Protocol):
    """An object of a table."""

    @property
    def full_name(self) -> str: ...


T = TypeVar("T", bound=Named)


@dataclass(frozen=True)
class Resource(Generic[T]):
    """What is listed and watched, and how it is read (ValueError: it is none)."""

    path: str
    read: Callable[[Mapping[str, Any]], T]
    query: Mapping[str, str]
    #: Metadata alone, where that is enough; a server that does not know it sends all.
    metadata_only: bool = False
    #: A server without this kind (404) has no objects of it; otherwise that is an error.
    optional: bool = False
    #: A list with none of the objects that were there is believed after so many seconds of it:
    #: a server that has lost its state, or is another one, answers so, too.
    hold: float = 0.0
    page: int = PAGE

    def accept(self, what: str) -> str:
        """The Accept header for a `PartialObjectMetadata` or its list."""
        return f"{JSON};as={what};g=meta.k8s.io;v=v1,{JSON}" if self.metadata_only else JSON


class Backoff:
    """Waiting times that grow from `first` to `most` seconds, with jitter of a half."""

    def __init__(self, first: float = 0.5, most: float = 30.0) -> None:
        self._first, self._most, self._next = first, most, first

    def next(self) -> float:
        """How long to wait now."""
        waiting, self._next = self._next, min(self._next * 2, self._most)
        return waiting * random.uniform(0.5, 1.0)

    def reset(self) -> None:
        """It went well: begin from the first again."""
        self._next = self._first


class Reflector(Generic[T]):
    """Runs in a thread of its own; the table is read from others."""

    def __init__(
        self,
        client: Client,
        resource: Resource[T],
        changed: Callable[[], None],
        complain: Callable[[str], None],
        backoff: Backoff | None = None,
        clock: Callable[[], float] = time.monotonic,
        verify: Callable[[], None] = lambda: None,
    ) -> None:
        """`verify` is called before and after each list, and raises ApiError if the server is not
        to be believed."""
        self._client = client
        self._resource = resource
        self._changed = changed
        self._complain = complain
        self._backoff = backoff or Backoff()
        self._clock = clock
        self._verify = verify
        self._table: dict[str, T] | None = None
        self._version: str | None = None
        self._failures = 0
        self._emptied: float | None = None
        self._missing = False
        self._stopped = threading.Event()
        self.problem: str | None = "has not answered yet"

    def objects(self) -> Mapping[str, T] | None:
        """The table by name; None before the first complete list. Never changed afterwards."""
        return self._table

    def start(self) -> None:
        """Begin; the thread ends with the process, or after `stop`."""
        name = f"watch {self._resource.path}"
        threading.Thread(target=self._run, name=name, daemon=True).start()

    def stop(self) -> None:
        """End at the next occasion."""
        self._stopped.set()

    def _run(self) -> None:
        while not self._stopped.is_set():
            wait = self.step()
            if wait:
                self._stopped.wait(wait)

    def step(self) -> float:
        """List if need be, then watch until that ends; return how long to wait before the next."""
        began = self._clock()
        try:
            if self._version is None:
                self._list()
                self._well()
            if self._version is None:
                return MISSING_SECONDS * random.uniform(0.5, 1)
            eventful = self._watch()
        except ClusterError as error:
            return self._failed(error)
        # A server that ends each watch at once is not to be asked all the time.
        if eventful or self._clock() - began > 1:
            self._backoff.reset()
            return 0.0
        return self._backoff.next()

    def _failed(self, error: ClusterError) -> float:
        status, retry_after = 0, 0.0
        if isinstance(error, ApiError):
            status, retry_after = error.status, error.retry_after
        if status == GONE and self._version is not None:
            # Normal after a while without news: what happened meanwhile is in a new list.
            self._version = None
            return self._backoff.next() / 10
        self._failures += 1
        if self._failures >= MOST_FAILURES:
            self._version = None
        if str(error) != self.problem:
            self._complain(str(error))
        self.problem = str(error)
        return max(retry_after, self._backoff.next())

    def _well(self) -> None:
        self.problem = None
        self._failures = 0

    def _list(self) -> None:
        self._verify()
        try:
            found, version = self._pages()
        except ApiError as error:
            if error.status != NOT_FOUND or not self._resource.optional:
                raise
            found, version = {}, None
        self._verify()
        self._doubt(found)
        if version is None and not self._missing:
            self._complain(f"{self._resource.path}: the server does not have this kind (yet)")
        self._missing = version is None
        if found != self._table:
            self._table = found
            self._changed()
        self._version = version

    def _doubt(self, found: Mapping[str, T]) -> None:
        if found or not self._table:
            self._emptied = None
            return
        now = self._clock()
        self._emptied = self._emptied or now
        if now - self._emptied < self._resource.hold:
            raise ApiError(
                f"GET {self._resource.path}: none of the {len(self._table)} objects that were "
                f"there is left; believed after {self._resource.hold:g} s"
            )

    def _pages(self) -> tuple[dict[str, T], str | None]:
        found: dict[str, T] = {}
        known = self._table or {}
        query = {**self._resource.query, "limit": str(self._resource.page)}
        accept = self._resource.accept("PartialObjectMetadataList")
        while True:
            page = self._client.get(self._resource.path, query, accept)
            metadata, items = page.get("metadata"), page.get("items")
            if not str(page.get("kind", "")).endswith("List") or not isinstance(metadata, dict):
                raise ApiError(f"GET {self._resource.path}: the answer is not a list")
            version = metadata.get("resourceVersion")
            # Go writes an empty list as null.
            items = [] if items is None else items
            if not isinstance(items, list) or not isinstance(version, str) or not version:
                raise ApiError(f"GET {self._resource.path}: the answer is not a whole list")
            for item in self._read(items):
                before = known.get(item.full_name)
                # Who keeps something for an object finds it again.
                found[item.full_name] = before if before == item else item
            following = metadata.get("continue")
            if not following:
                return found, version
            query["continue"] = str(following)

    def _watch(self) -> bool:
        """Return whether any event came."""
        eventful = False
        assert self._version is not None
        query = {
            **self._resource.query,
            "resourceVersion": self._version,
            "allowWatchBookmarks": "true",
        }
        seconds = WATCH_SECONDS * random.uniform(1, 2)
        accept = self._resource.accept("PartialObjectMetadata")
        for event in self._client.watch(self._resource.path, query, seconds, accept):
            self._apply(event)
            self._well()
            eventful = True
            if self._stopped.is_set():
                break
        return eventful

    def _apply(self, event: Mapping[str, Any]) -> None:
        kind, value = event.get("type"), event.get("object")
        if kind == "ERROR" and isinstance(value, dict):
            code = value.get("code")
            raise ApiError(
                f"watch {self._resource.path}: {value.get('message', '')!s:.300}",
                code if isinstance(code, int) else 0,
            )
        metadata = value.get("metadata") if isinstance(value, dict) else None
        version = metadata.get("resourceVersion") if isinstance(metadata, dict) else None
        if kind not in ("ADDED", "MODIFIED", "DELETED", "BOOKMARK") or not isinstance(version, str):
            # What it was meant to say is lost: only a list can tell.
            self._version = None
            raise ApiError(f"watch {self._resource.path}: {kind!r:.60} is no event")
        if kind != "BOOKMARK":
            self._change(kind, value)
        self._version = version

    def _change(self, kind: str, value: Any) -> None:
        (item,) = self._read([value])
        table = dict(self._table or {})
        if kind == "DELETED":
            table.pop(item.full_name, None)
        else:
            table[item.full_name] = item
        if table != self._table:
            self._table = table
            self._changed()

    def _read(self, values: Iterable[Any]) -> list[T]:
        try:
            return [self._resource.read(value) for value in values]
        except (ValueError, AttributeError, TypeError, KeyError) as error:
            self._version = None
            raise ApiError(f"{self._resource.path}: an object that is none: {error}") from error
