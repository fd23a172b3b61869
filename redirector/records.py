"""What is enrolled, kept beside the kernel's own state: one JSON file a pod, changed by rename."""

import contextlib
import dataclasses
import fcntl
import hashlib
import json
import os
import shutil
from collections.abc import Iterable, Iterator, Mapping
from ipaddress import IPv4Network, ip_address, ip_network
from pathlib import Path
from typing import Any

from redirector.errors import DatapathError, MachineError
from redirector.model import Accelerate, Ids, IPAddress, Links, Mode, Pod, Steering

#: Members of a record beside the pod's own.
_CHANGING, _DEFAULTS, _STEERING_DEFAULTS = "changing", "defaults", "steering_defaults"


class Records:
    """The directory of records; made when first written to, mode 700.

    What writes may raise MachineError: no room, or no right to.
    """

    def __init__(self, directory: Path) -> None:
        self.directory = directory
        # Links to the records, named by what no two pods may share.
        self._entries = directory / "index"
        self._problems = directory / "problems"

    @contextlib.contextmanager
    def locked(self) -> Iterator[None]:
        """Keep other commands that change pods out until leaving."""
        path = self.directory / ".lock"
        while True:
            with self._writing():
                self.directory.mkdir(parents=True, exist_ok=True, mode=0o700)
                try:
                    lock = path.open("w")
                except FileNotFoundError:  # `clear` took the directory away again
                    continue
            with lock:
                fcntl.flock(lock, fcntl.LOCK_EX)
                # A program that we run holds it too: should we be killed, the next command waits
                # for what that one is about to change.
                os.set_inheritable(lock.fileno(), True)
                # Whom we waited for may have been `clear`: then this lock is nobody's any more.
                if not path.exists() or not os.path.samestat(path.stat(), os.fstat(lock.fileno())):
                    continue
                yield
                return

    @contextlib.contextmanager
    def _writing(self) -> Iterator[None]:
        """Translate what the file system refuses."""
        try:
            yield
        except OSError as error:
            raise MachineError(
                f"records in {self.directory}: {error.strerror}; give them a directory that can "
                "be written, with room"
            ) from error

    def all(self) -> list[Pod]:
        """Every record, by name. DatapathError names a file that is not a record."""
        return [self.read(path) for path in self.paths()]

    def readable(self) -> list[Pod]:
        """Those of `all` that can be read."""
        return self.sorted_out()[0]

    def sorted_out(self) -> tuple[list[Pod], dict[str, str]]:
        """What can be read, and by pod why another version's or a damaged record cannot."""
        readable: list[Pod] = []
        damaged: dict[str, str] = {}
        for path in self.paths():
            try:
                readable.append(self.read(path))
            except DatapathError as error:
                damaged[name_of(path)] = str(error)
        return readable, damaged

    def names(self) -> list[str]:
        """The pods that have a record, which may be damaged."""
        return [name_of(path) for path in self.paths()]

    def paths(self) -> list[Path]:
        """The files of all records, by name."""
        return sorted(self.directory.glob("*.json"))

    def version(self) -> int:
        """Another number whenever a record was written or deleted; 0 while there is none."""
        try:
            return self.directory.stat().st_mtime_ns
        except FileNotFoundError:
            return 0

    def get(self, name: str) -> Pod | None:
        """The record of one pod."""
        path = self._path(name)
        return self.read(path) if path.exists() else None

    @staticmethod
    def read(path: Path) -> Pod:
        """The record in a file. DatapathError when it is none."""
        try:
            data = json.loads(path.read_text())
            data.pop(_CHANGING, None)
            _forget_defaults(data)
            return from_json(data)
        except (OSError, AttributeError, KeyError, TypeError, ValueError) as error:
            raise DatapathError(
                f"{path}: is not a record of this version ({error}); take the pod off with "
                f"'redirector unenroll {name_of(path)}'"
            ) from error

    def guess(self, name: str) -> Pod | None:
        """What another version's record tells: enough to take the pod off, or None."""
        try:
            data = json.loads(self._path(name).read_text())
            return Pod(
                name=name,
                netns=Path(data["netns"]),
                cgroup=Path(data["cgroup"]),
                mode=Mode.IPTABLES,
                netns_cookie=int(data["netns_cookie"]),
            )
        except (OSError, AttributeError, KeyError, TypeError, ValueError):
            return None

    def had(self, name: str) -> tuple[Pod, ...]:
        """Every form that a pod may have in the kernel: recorded, or begun and interrupted."""
        path = self._path(name)
        pod = self.get(name)
        if pod is None:
            return ()
        begun = json.loads(path.read_text()).get(_CHANGING, ())
        for form in begun:
            _forget_defaults(form)
        return tuple(dict.fromkeys((pod, *map(from_json, begun))))

    def put(self, pod: Pod, changing: Iterable[Pod] = ()) -> None:
        """Write a record; a reader sees the old one or the new one, never half of it.

        `changing` are forms that the pod is about to get, or may have got before.
        """
        path = self._path(pod.name)
        known = None
        with contextlib.suppress(DatapathError):
            known = self.get(pod.name)
        forms = {_CHANGING: [_record(form) for form in changing]}
        with self._writing():
            # First, because an index entry without a record is harmless, and the opposite is not.
            self._complete_index()
            for key in _keys(pod):
                self._index(key, path)
            _write(path, _record(pod) | forms)
        stale = set(_keys(known)) - set(_keys(pod)) if known else ()
        self._unindex([self._entries / key for key in stale], path)

    def delete(self, name: str) -> None:
        """Forget a record; one that is not there is no error."""
        path = self._path(name)
        try:
            entries = [self._entries / key for key in _keys(self.read(path))]
        except DatapathError:
            entries = self._entries_of(path)
        with self._writing():
            self._unindex(entries, path)
            path.unlink(missing_ok=True)
        # What could not be done with it is nobody's any more; an agent looks again in any case.
        problems = self.problems()
        if problems.pop(name, None) is not None:
            with contextlib.suppress(OSError):
                _write(self._problems, problems)

    @staticmethod
    def _unindex(entries: Iterable[Path], path: Path) -> None:
        for entry in entries:
            # Another pod may have taken it over.
            if entry.is_symlink() and entry.readlink().name == path.name:
                entry.unlink()

    def cookies(self, name: str) -> list[int]:
        """The netns cookies that a pod was recorded with, told without its record."""
        found = (entry.name.partition("netns-")[2] for entry in self._entries_of(self._path(name)))
        return [int(cookie) for cookie in found if cookie.isdecimal()]

    def _entries_of(self, path: Path) -> list[Path]:
        entries = self._entries.iterdir() if self._entries.is_dir() else ()
        return [each for each in entries if each.is_symlink() and each.readlink().name == path.name]

    def near(self, pod: Pod) -> Iterator[Pod]:
        """The records with this name, this network namespace, or a cgroup above or below.

        Looks at no other, so that the price does not grow with the pods of the node.
        """
        self._complete_index()
        below = (Path(place) for place, _, _ in os.walk(pod.cgroup))
        cgroups = dict.fromkeys((pod.cgroup, *pod.cgroup.parents, *below))
        entries = [_netns_key(pod.netns_cookie), *map(_cgroup_key, cgroups)]
        for path in (self._path(pod.name), *(self._entries / entry for entry in entries)):
            if path.exists():
                yield self.read(path.resolve())

    def at_addresses(self, pod: Pod) -> list[Pod]:
        """The other pods in eBPF mode recorded with an address of this one, if they can be read."""
        self._complete_index()
        entries = (self._entries / _address_key(address) for address in pod.node_wide)
        found: dict[str, Pod] = {}
        for path in {entry.resolve() for entry in entries if entry.exists()}:
            with contextlib.suppress(DatapathError):
                other = self.read(path)
                found[other.name] = other
        found.pop(pod.name, None)
        return list(found.values())

    def _complete_index(self) -> None:
        """Index what an earlier version recorded, which had none."""
        if self._entries.is_dir():
            return
        staging = self._entries.with_suffix(".new")
        shutil.rmtree(staging, ignore_errors=True)
        staging.mkdir(mode=0o700, parents=True)
        for path in self.paths():
            with contextlib.suppress(DatapathError):
                for key in _keys(self.read(path)):
                    (staging / key).symlink_to(f"../{path.name}")
        staging.rename(self._entries)

    def _index(self, key: str, path: Path) -> None:
        entry, target = self._entries / key, f"../{path.name}"
        if entry.is_symlink() and str(entry.readlink()) == target:
            return
        staging = self._entries / f"{key}.new"
        staging.unlink(missing_ok=True)
        staging.symlink_to(target)
        staging.rename(entry)

    def keep_problems(self, problems: Mapping[str, str]) -> None:
        """Keep what the agent could not do, by pod, for `status` to tell."""
        with self._writing():
            self.directory.mkdir(parents=True, exist_ok=True, mode=0o700)
            _write(self._problems, dict(problems))

    def problems(self) -> dict[str, str]:
        """What `keep_problems` kept last; nothing when that cannot be read."""
        try:
            kept = json.loads(self._problems.read_text())
        except (OSError, ValueError):
            return {}
        return {str(pod): str(text) for pod, text in kept.items()} if type(kept) is dict else {}

    def clear(self) -> None:
        """Remove the directory with all that this class put into it."""
        with self._writing():
            for entries in self.directory.glob(f"{self._entries.name}*"):
                shutil.rmtree(entries)
            for pattern in ("*.json", "*.new", self._problems.name, ".lock"):
                for path in self.directory.glob(pattern):
                    path.unlink(missing_ok=True)
        with contextlib.suppress(OSError):
            self.directory.rmdir()

    def _path(self, name: str) -> Path:
        # A name may hold a slash ("namespace/pod"), a file's name may not.
        return self.directory / f"{name.replace('%', '%25').replace('/', '%2f')}.json"


def _write(path: Path, data: Mapping[str, Any]) -> None:
    """Make a file JSON; a reader sees the old one or the new one."""
    staging = path.with_suffix(".new")
    try:
        staging.write_text(json.dumps(data, indent=2) + "\n")
        staging.rename(path)
    except OSError:
        staging.unlink(missing_ok=True)
        raise


def name_of(path: Path) -> str:
    """The pod whose record a file is."""
    return path.stem.replace("%2f", "/").replace("%25", "%")


def _keys(pod: Pod) -> tuple[str, ...]:
    # Several pods may have one; an entry has room for one.
    addresses = map(_address_key, pod.unique if pod.mode is Mode.EBPF else ())
    return (_netns_key(pod.netns_cookie), _cgroup_key(pod.cgroup), *addresses)


def _address_key(address: IPAddress) -> str:
    return f"address-{address}"


def _netns_key(cookie: int) -> str:
    return f"netns-{cookie}"


def _cgroup_key(path: Path) -> str:
    # A path may be longer than a file's name.
    return f"cgroup-{hashlib.sha256(os.fsencode(path)).hexdigest()}"


def _record(pod: Pod) -> dict[str, Any]:
    """With the names of what is as by default: a version that does not know it may ignore it."""
    return to_json(pod) | {
        _DEFAULTS: _at_default(pod),
        _STEERING_DEFAULTS: _at_default(pod.steering),
    }


def _at_default(value: Pod | Steering) -> list[str]:
    return [
        field.name
        for field in dataclasses.fields(value)
        if field.default is not dataclasses.MISSING and getattr(value, field.name) == field.default
    ]


def _forget_defaults(data: dict[str, Any]) -> None:
    """Drop what this version does not know, as far as it does not matter."""
    for fields, names, part in (
        (dataclasses.fields(Pod), data.pop(_DEFAULTS, ()), data),
        (dataclasses.fields(Steering), data.pop(_STEERING_DEFAULTS, ()), data["steering"]),
    ):
        for name in set(names) - {field.name for field in fields}:
            part.pop(name, None)


def to_json(pod: Pod) -> dict[str, Any]:
    """A pod as JSON values; `from_json` is the inverse."""
    return {
        field.name: _plain(getattr(pod, field.name))
        for field in dataclasses.fields(pod)
        if field.name not in ("steering", "links", "ids")
    } | {
        "ids": {
            field.name: _plain(getattr(pod.ids, field.name))
            for field in dataclasses.fields(pod.ids)
        },
        "links": {
            field.name: _plain(getattr(pod.links, field.name))
            for field in dataclasses.fields(pod.links)
        },
        "steering": {
            field.name: _plain(getattr(pod.steering, field.name))
            for field in dataclasses.fields(pod.steering)
        },
    }


def from_json(data: dict[str, Any]) -> Pod:
    """The pod that `to_json` wrote. KeyError, TypeError or ValueError when it is none."""
    steering = dict(data["steering"])
    for name, value in steering.items():
        if name == "host_loopback_range":
            steering[name] = IPv4Network(value)
        elif name == "dns_servers":
            steering[name] = None if value is None else tuple(ip_address(text) for text in value)
        elif name.endswith("_cidrs"):
            steering[name] = tuple(ip_network(text) for text in value)
        elif name.endswith(("_ports", "_groups", "_interfaces")):
            steering[name] = None if value is None else frozenset(value)
        elif name.endswith(("_uids", "_gids")):
            steering[name] = tuple(value)
    return Pod(
        **{
            **data,
            "netns": Path(data["netns"]),
            "cgroup": Path(data["cgroup"]),
            "mode": Mode(data["mode"]),
            "accelerate": Accelerate(data["accelerate"]),
            "steering": Steering(**steering),
            "addresses": tuple(ip_address(text) for text in data["addresses"]),
            "repeated": tuple(ip_address(text) for text in data.get("repeated", ())),
            "links": _links(data.get("links", {})),
            "ids": _ids(data.get("ids", {})),
        }
    )


def _links(data: dict[str, Any]) -> Links:
    return Links(
        tuple(data.get("excluded", ())),
        tuple(ip_network(text) for text in data.get("through", ())),
        tuple(ip_network(text) for text in data.get("beside", ())),
    )


def _ids(data: dict[str, Any]) -> Ids:
    return Ids(*(tuple(map(tuple, data.get(name, ()))) for name in ("users", "groups")))


def _plain(value: object) -> object:
    if isinstance(value, frozenset):
        return sorted(value)
    if isinstance(value, tuple):
        return [_plain(item) for item in value]
    return value if value is None or isinstance(value, int | str) else str(value)
